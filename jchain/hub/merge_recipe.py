"""The recipe of an exported chain for mergekit, a passthrough merge."""

from collections.abc import Mapping, Sequence

from jchain.hub.chain_model import ChainModel
from jchain.hub.locating import GGUF
from jchain.hub.origins import Origin

_DIFFERS = "# This merge differs from the checkpoint in this folder:"
_LOCAL = "# Paths are those of the machine that wrote this file."


def make_mergekit_recipe(
    model: ChainModel,
    origins: Mapping[str, Origin],
    changed: Sequence[str],
    options: Sequence[str],
) -> str:
    """Write the chain as a passthrough merge of mergekit.

    Comments list the differences from the exported checkpoint that mergekit cannot reproduce.

    Args:
      model: the model that the chain computes.
      origins: map from the name of each model to where it comes from.
      changed: names of the layers and heads whose weights were trained after loading.
      options: names of the config options with an entry per block that the chain changes.
    """
    runs: list[tuple[str, int, int]] = []  # model, index of the first block, index after the last
    for block in model.blocks:
        if runs and (runs[-1][0], runs[-1][2]) == (block.source, block.position):
            runs[-1] = (block.source, runs[-1][1], block.position + 1)
        else:
            runs.append((block.source, block.position, block.position + 1))
    lines = _list_differences(model, runs[0][0], runs[-1][0], changed)
    if options:
        lines.append(
            f"{_DIFFERS} mergekit copies {', '.join(options)} of the first model's config.json; "
            "use the config.json of this folder."
        )
    if any(origins[name].hub_name is None for name, _, _ in runs):
        lines.append(_LOCAL)
    if any(origins[name].path.lower().endswith(GGUF) for name, _, _ in runs):
        lines.append(
            "# mergekit does not read GGUF files: use the folder that they were made from."
        )
    lines.append("slices:")
    for name, start, stop in runs:
        lines += [
            "  - sources:",
            *_refer_to(origins[name]),
            f"        layer_range: [{start}, {stop}]",
        ]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {model.dtype}"]) + "\n"


def _refer_to(origin: Origin) -> list[str]:
    """Write the reference to a model.

    mergekit reads a text `a+b` as the model `a` with the adapter `b`, and `a@b` as the revision `b`
    of `a` (`ModelReference` and `ModelPath` in its `common.py`), so these need the longer form.
    """
    if origin.hub_name is not None:
        revision = "" if origin.revision is None else f"@{origin.revision}"
        return [f"      - model: {quote(origin.hub_name + revision)}"]
    if not {"+", "@"} & set(origin.path):
        return [f"      - model: {quote(origin.path)}"]
    return ["      - model:", "          model:", f"            path: {quote(origin.path)}"]


def quote(text: str) -> str:
    """Write text as a double-quoted scalar of YAML.

    Args:
      text: any text, also with characters that a YAML file cannot hold.
    """
    return f'"{"".join(map(_escape, text))}"'


def _escape(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    code = ord(character)
    return (
        f"\\x{code:02x}"
        if code < 1 << 8
        else f"\\u{code:04x}"
        if code < 1 << 16
        else (f"\\U{code:08x}")
    )


def _list_differences(
    model: ChainModel, first: str, last: str, changed: Sequence[str]
) -> list[str]:
    """Write comments on how the checkpoint differs from the merge.

    The merge has the stem of the model `first` and the head of the model `last`.
    """
    lines = []
    if model.head_source != last:
        lines.append(
            f"{_DIFFERS} the checkpoint's output layer comes from {model.head_source}, "
            f"but mergekit uses {last}'s."
        )
    if model.stem_source != first:
        lines.append(
            f"{_DIFFERS} the checkpoint's embeddings come from {model.stem_source}, "
            f"but mergekit uses {first}'s."
        )
    if changed:
        lines.append(f"{_DIFFERS} {', '.join(changed)} were trained after loading.")
    return ["".join(map(_escape, line)) for line in lines]
