"""Files of banks."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from jchain._typing import PyTree
from jchain.files.arrays import read_arrays, write_arrays
from jchain.files.modules import decode_groups, decode_module, encode_groups, encode_module
from jchain.modules.encoding import decode_tree, encode_tree
from jchain.pytree import get_first_line


def write_bank(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write a bank atomically; see `jchain.Bank.save`.

    Args:
      path: the file to write.
      fields: the fields of the bank by name.

    Raises:
      ValueError: if a module's fields or params cannot be written.
    """
    layers, layer_params = encode_groups(fields["layers"])
    heads, head_params = encode_groups(fields["heads"])
    structure, stem_params = encode_tree(fields["stem_params"] or {}, "the stem")
    header = {
        "stem": None if fields["stem"] is None else encode_module(fields["stem"]),
        **({} if structure is None else {"stem_structure": structure}),
        **{name: fields[name] for name in ("names", "origins", "parents", "num_steps")},
        "layers": layers,
        "heads": heads,
    }
    trees = {"layers": layer_params, "heads": head_params, "stem": stem_params}
    arrays: PyTree = traverse_util.flatten_dict(trees, sep="/")
    if fields["versions"] is not None:
        arrays["versions"] = fields["versions"]
    write_arrays(path, header, arrays)


def read_bank(path: str | os.PathLike[str], modules: Sequence[object]) -> dict[str, Any]:
    """Read the fields of a bank; see `jchain.Bank.load`.

    Args:
      path: the file to read.
      modules: the caller's own module classes, functions, and nnx modules.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged, its header is not that of a bank, or it names an unknown
        module.
    """
    from jchain.files.headers import BankHeader, check_header

    header, arrays = read_arrays(path)
    if isinstance(kind := header.get("kind"), str):
        raise ValueError(f"{path}: expected a bank, got a {kind}")
    check_header(BankHeader, header, path)
    try:
        trees: PyTree = traverse_util.unflatten_dict(arrays, sep="/")
        unknown = set(trees) - {"layers", "heads", "stem", "versions"}
        if unknown:
            raise ValueError(f"expected arrays of layers, heads, and a stem, got {min(unknown)}")
        stem = header.get("stem")
        return {
            "layers": decode_groups(header["layers"], trees.get("layers", {}), modules),
            "heads": decode_groups(header["heads"], trees.get("heads", {}), modules),
            "stem_params": decode_tree(header.get("stem_structure"), trees.get("stem")),
            "stem": None if stem is None else decode_module(stem, modules),
            "names": tuple(header["names"]),
            "origins": tuple(header["origins"]),
            "parents": tuple(map(tuple, header["parents"])),
            "num_steps": header["num_steps"],
            "versions": trees.get("versions"),
        }
    except RecursionError:
        raise ValueError(f"{path}: its header is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {get_first_line(error)}") from None
