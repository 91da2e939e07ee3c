"""The text files of an exported chain: a model card and a recipe for mergekit."""

import json
from collections.abc import Mapping, Sequence

from jchain.hub.chain_model import ChainModel


def make_mergekit_recipe(
    model: ChainModel, paths: Mapping[str, str], changed: Sequence[str]
) -> str:
    """Write the chain as a passthrough merge of mergekit.

    Comments list the differences from the exported checkpoint that mergekit cannot reproduce.

    Args:
      model: the model that the chain computes.
      paths: map from the name of each model to its folder.
      changed: names of the layers and heads whose weights were trained after loading.
    """
    runs: list[tuple[str, int, int]] = []  # model, index of the first block, index after the last
    for block in model.blocks:
        if runs and (runs[-1][0], runs[-1][2]) == (block.source, block.position):
            runs[-1] = (block.source, runs[-1][1], block.position + 1)
        else:
            runs.append((block.source, block.position, block.position + 1))
    lines = _list_differences(model, runs[0][0], runs[-1][0], changed)
    lines.append("slices:")
    for name, start, stop in runs:
        lines += [
            "  - sources:",
            f"      - model: {json.dumps(paths[name])}",
            f"        layer_range: [{start}, {stop}]",
        ]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {model.dtype}"]) + "\n"


def _list_differences(
    model: ChainModel, first: str, last: str, changed: Sequence[str]
) -> list[str]:
    """Write comments on how the checkpoint differs from the merge.

    The merge has the stem of the model `first` and the head of the model `last`.
    """
    start = "# This merge differs from the checkpoint in this folder:"
    lines = []
    if model.head_source != last:
        lines.append(
            f"{start} the checkpoint's output layer comes from {model.head_source}, "
            f"but mergekit uses {last}'s."
        )
    if model.stem_source != first:
        lines.append(
            f"{start} the checkpoint's embeddings come from {model.stem_source}, "
            f"but mergekit uses {first}'s."
        )
    if changed:
        lines.append(f"{start} {', '.join(changed)} were trained after loading.")
    return lines


def make_card(model: ChainModel, facts: Mapping[str, object], changed: Sequence[str]) -> str:
    """Write a model card that lists the blocks of the chain and facts about it.

    Args:
      model: the model that the chain computes.
      facts: rows of a table, as a map from label to value.
      changed: names of the layers and heads whose weights were trained after loading.
    """
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    table = ["", "| | |", "|---|---|", *rows] if rows else []
    chain = " -> ".join(f"{block.source}/{block.position}" for block in model.blocks)
    summary = (
        f"Blocks in order: `{chain}`. Embeddings of {model.stem_source}, "
        f"output layer of {model.head_source}."
    )
    if changed:
        summary += f" Trained after loading: {', '.join(changed)}."
    lines = ["---", "library_name: transformers", "tags: [jchain]", "---", "", summary, *table]
    return "\n".join(lines) + "\n"
