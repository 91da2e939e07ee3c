"""The recipe of an exported chain for mergekit, a passthrough merge."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    runs = _list_runs(model)
    lines = _list_differences(model, runs[0].source, runs[-1].source, changed)
    if options:
        lines.append(
            f"{_DIFFERS} mergekit copies {', '.join(options)} of the first model's config.json; "
            "use the config.json of this folder."
        )
    if any(origins[run.source].hub_name is None for run in runs):
        lines.append(_LOCAL)
    if any(origins[run.source].path.lower().endswith(GGUF) for run in runs):
        lines.append(
            "# mergekit does not read GGUF files: use the folder that they were made from."
        )
    lines.append("slices:")
    for run in runs:
        lines += [
            "  - sources:",
            *_refer_to(origins[run.source]),
            f"        layer_range: [{run.start}, {run.stop}]",
        ]
        if run.zeros:
            lines += ["        parameters:", "          scale:"]
            for child in run.zeros:
                lines += [f"            - filter: {child}.", "              value: 0.0"]
            lines.append("            - value: 1.0")
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {model.dtype}"]) + "\n"


class _Run(NamedTuple):
    """Consecutive blocks of one model."""

    source: str
    start: int  # index of the first block
    stop: int  # index after the last block
    zeros: tuple[str, ...]  # children of the blocks whose weights are zero


def _list_runs(model: ChainModel) -> list[_Run]:
    runs: list[_Run] = []
    for block in model.blocks:
        key = block.source, block.position, block.zeros
        if runs and (runs[-1].source, runs[-1].stop, runs[-1].zeros) == key:
            runs[-1] = runs[-1]._replace(stop=block.position + 1)
        else:
            runs.append(_Run(block.source, block.position, block.position + 1, block.zeros))
    return runs


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
    mixed = [block.label for block in model.blocks if block.mlp_origin is not None]
    if mixed:
        lines.append(
            f"{_DIFFERS} mergekit does not join attention and MLP of different blocks, as in "
            f"{', '.join(mixed)}."
        )
    if changed:
        lines.append(f"{_DIFFERS} {', '.join(changed)} were trained after loading.")
    return ["".join(map(_escape, line)) for line in lines]
