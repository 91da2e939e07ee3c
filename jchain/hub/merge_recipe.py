"""The recipe of an exported chain for mergekit, a passthrough merge."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jchain.hub.chain_model import ChainModel, ModelBlock
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
    """Write the chain as a passthrough merge of mergekit, or a linear one if layers are mixed.

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
    method = "linear" if any(run.other is not None for run in runs) else "passthrough"
    for run in runs:
        lines += [
            "  - sources:",
            *_refer_to(origins[run.source]),
            f"        layer_range: [{run.start}, {run.stop}]",
        ]
        if run.other is not None:
            name, position, weight = run.other
            lines += [
                *_weigh(1 - weight),
                *_refer_to(origins[name]),
                f"        layer_range: [{position}, {position + 1}]",
                *_weigh(weight),
            ]
        elif method == "linear":
            lines += _weigh(1.0)
        elif run.zeros:
            lines += ["        parameters:", "          scale:"]
            for child in run.zeros:
                lines += [f"            - filter: {child}.", "              value: 0.0"]
            lines.append("            - value: 1.0")
    return "\n".join([*lines, f"merge_method: {method}", f"dtype: {model.dtype}"]) + "\n"


class _Run(NamedTuple):
    """Consecutive blocks of one model."""

    source: str
    start: int  # index of the first block
    stop: int  # index after the last block
    zeros: tuple[str, ...]  # children of the blocks whose weights are zero
    other: tuple[str, int, float] | None  # source, position, and weight in a linear mix


def _weigh(weight: float) -> list[str]:
    return ["        parameters:", f"          weight: {weight:g}"]


def _list_runs(model: ChainModel) -> list[_Run]:
    runs: list[_Run] = []
    for block in model.blocks:
        start, stop, other = block.position, block.position + 1, _find_other(block)
        run = _Run(block.source, start, stop, block.zeros, other)
        if other is None and runs and runs[-1] == run._replace(start=runs[-1].start, stop=start):
            run = run._replace(start=runs.pop().start)
        runs.append(run)
    return runs


def _find_other(block: ModelBlock) -> tuple[str, int, float] | None:
    """Find the other block of a linear mix of two whole blocks; None for any other block."""
    mixes = {(change.other, change.weight) for change in block.changes}
    is_whole = block.missing is None and block.mlp_origin is None
    if not is_whole or len(mixes) != 1 or len(block.changes) != block.num_layers:
        return None
    other, weight = mixes.pop()
    return None if other is None or weight is None else (*other, weight)


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
    others = [b for b in model.blocks if b.changes and _find_other(b) is None]
    if others:
        lines.append(
            f"{_DIFFERS} this recipe does not make the weights of "
            f"{', '.join(block.label for block in others)}."
        )
    if any(_find_other(block) for block in model.blocks) and any(b.zeros for b in model.blocks):
        lines.append(
            f"{_DIFFERS} a linear merge of mergekit keeps attention and MLP that the chain drops."
        )
    if changed:
        lines.append(f"{_DIFFERS} {', '.join(changed)} were trained after loading.")
    return ["".join(map(_escape, line)) for line in lines]
