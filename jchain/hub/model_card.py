"""The model card of an exported chain. It holds no paths of the machine that wrote it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from jchain.hub.chain_model import ChainModel
from jchain.hub.merge_recipe import quote
from jchain.hub.origins import License, Origin
from jchain.hub.sublayers import KINDS

Scores = Mapping[str, Mapping[str, object]]


def make_card(
    model: ChainModel,
    origins: Mapping[str, Origin],
    depth: int,
    *,
    name: str,
    facts: Mapping[str, object],
    scores: Scores,
    changed: Sequence[str],
    usage: Sequence[str],
) -> str:
    """Write a model card: metadata, the chain in words, scores, facts, and how to load it.

    Args:
      model: the model that the chain computes.
      origins: map from the name of each model that is used to where it comes from.
      depth: number of blocks of each of these models.
      name: name of the exported folder.
      facts: rows of a table, as a map from label to value.
      scores: rows of another table: map from label to a map from column to value.
      changed: names of the layers and heads whose weights were trained after loading.
      usage: names of the classes of transformers that load the folder.
    """
    lines = [
        *_make_metadata(origins),
        "",
        f"# {_escape(name)}",
        "",
        "A chain of the blocks of "
        f"{_join(_link(model_name, origin) for model_name, origin in origins.items())}, "
        "made with jchain.",
        "",
        *(f"- {_describe_blocks(model, source, depth)}" for source in origins),
        *_describe_ends(model, changed),
        "",
        f"Blocks in order: {_code(' -> '.join(b.label for b in model.blocks))}.",
        *_describe_licenses(origins),
        *_tabulate_scores(scores),
        *_tabulate_facts(facts),
        "",
        "## How to load it",
        "",
        "```python",
        f"from transformers import {', '.join(usage)}",
        "",
        *(f"{_name_variable(cls)} = {cls}.from_pretrained({quote(name)})" for cls in usage),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _make_metadata(origins: Mapping[str, Origin]) -> list[str]:
    """Write the metadata that the Hugging Face Hub reads."""
    names = [origin.hub_name for origin in origins.values() if origin.hub_name is not None]
    lines = ["---", "library_name: transformers"]
    if names:
        lines += ["base_model:", *(f"- {quote(name)}" for name in sorted(set(names)))]
    lines += ["tags:", "- jchain", *(["- merge"] if len(origins) > 1 else [])]
    licenses = {origin.license for origin in origins.values()}
    if len(licenses) == 1 and (found := licenses.pop()) is not None:
        lines.append(f"license: {quote(found.id)}")
        for key, value in (("license_name", found.name), ("license_link", found.link)):
            if value is not None:
                lines.append(f"{key}: {quote(value)}")
    return [*lines, "---"]


def _describe_blocks(model: ChainModel, source: str, depth: int) -> str:
    """Say which blocks of a model stay, are dropped, and are repeated."""
    positions = [block.position for block in model.blocks if block.source == source]
    counts = Counter(positions)
    kept = sorted(counts)
    if not kept:
        return f"{_code(source)}: none of its {depth} blocks."
    dropped = sorted(set(range(depth)) - set(kept))
    repeated = [f"{i} ({counts[i]} times)" for i in kept if counts[i] > 1]
    text = f"{_code(source)}: all {depth} blocks stay"
    if dropped:
        text = f"{_code(source)}: {len(kept)} of {depth} blocks stay ({_join_runs(kept)})"
        text += f", {len(dropped)} dropped ({_join_runs(dropped)})"
    text += f"; repeated: {', '.join(repeated)}" if repeated else ""
    for kind in KINDS:
        own = [b for b in model.blocks if b.source == source and b.missing == kind]
        if own:
            text += f"; without {kind}: {_join_runs(sorted({b.position for b in own}))}"
    if any(later < earlier for earlier, later in pairwise(positions)):
        text += "; not in the order of the model"
    return f"{text}."


def _describe_ends(model: ChainModel, changed: Sequence[str]) -> list[str]:
    lines = [
        f"- Embeddings of {_code(model.stem_source)}, output layer of {_code(model.head_source)}."
    ]
    if changed:
        lines.append(f"- Trained after loading: {', '.join(map(_code, changed))}.")
    return lines


def _describe_licenses(origins: Mapping[str, Origin]) -> list[str]:
    """Name the license of each model, if there are several."""
    found = {name: origin.license for name, origin in origins.items()}
    if len(set(found.values())) == 1:
        return []
    rows = (f"{_code(name)}: {_describe_license(own)}" for name, own in found.items())
    return ["", f"Licenses: {'; '.join(rows)}."]


def _describe_license(found: License | None) -> str:
    if found is None:
        return "not known"
    return _escape(found.id if found.name is None else f"{found.id}, {found.name}")


def _tabulate_scores(scores: Scores) -> list[str]:
    """Write the table of scores; a cell is empty if a row has no value for its column."""
    if not scores:
        return []
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    rows = [[label, *(_format(row.get(c, "")) for c in columns)] for label, row in scores.items()]
    return ["", "## Scores", "", *_tabulate(["", *columns], rows)]


def _tabulate_facts(facts: Mapping[str, object]) -> list[str]:
    if not facts:
        return []
    rows = [[label, str(value)] for label, value in facts.items()]
    return ["", "## How it was made", "", *_tabulate(["", ""], rows)]


def _tabulate(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(map(_escape_cell, line))} |" for line in lines]


def _format(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _join_runs(numbers: Sequence[int]) -> str:
    """Join increasing numbers, and runs of them as in `2-5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _join(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def _link(name: str, origin: Origin) -> str:
    if origin.hub_name is None:
        return _code(name)
    return f"{_code(name)} ([{origin.hub_name}](https://huggingface.co/{origin.hub_name}))"


def _code(text: str) -> str:
    return f"`{_escape(text).replace('`', ' ')}`"


def _escape(text: str) -> str:
    """Put text on one line."""
    return " ".join(text.split())


def _escape_cell(text: str) -> str:
    return _escape(text).replace("|", "\\|")


def _name_variable(cls: str) -> str:
    if "Tokenizer" in cls:
        return "tokenizer"
    return "processor" if "Processor" in cls else "model"
