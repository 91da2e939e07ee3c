"""What the model card of an exported chain says about the search that found it."""

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from jchain.cli.config import SearchConfig
from jchain.cli.records import ResultRecord, Scores, format_calls, format_loss, read
from jchain.cli.result_folder import RESULT_FILE
from jchain.cli.seeds import TITLES, list_rows
from jchain.data import EVALUATION_SPLITS

# Absolute paths, and paths from the home folder, the working directory, or the one above it.
_PATH = re.compile(r"(/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]).*")


def describe(path: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Collect facts about the chain of a result folder, and the scores of it and of its controls.

    Args:
      path: the result folder.

    Returns:
      Rows of the card's table of facts, and rows of its table of scores, as `jc.hub.export` takes
      them.
    """
    needed = ("loss", "accuracy", "controls", "chosen", "layer_calls", "config")
    record = read(path / RESULT_FILE, ResultRecord, needed)
    config = SearchConfig.load(record["config"])
    return _list_facts(record, config), _list_scores(record, config)


def _list_facts(record: ResultRecord, config: SearchConfig) -> dict[str, str]:
    facts = {"data": _name_data(config)}
    for key, title in (("num_examples", "examples"), ("num_tokens", "tokens")):
        if numbers := record.get(key):
            counts = (f"{numbers[name]:,} in {name}" for name in EVALUATION_SPLITS)
            facts[title] = ", ".join(counts)
    if record["chosen"] != "search":
        facts["recipe"] = f"{record['chosen']}: no chain that the search found was better on select"
    calls = f"{format_calls(record['layer_calls'])} layer calls"
    facts["search"] = f"{config.search}, seed {config.seed}, {calls}"
    return facts | {"command": f"`{hide_folders(config.command)}`"}


def _name_data(config: SearchConfig) -> str:
    scored_on = config.text or config.choices or config.data or ""
    files = [scored_on] if isinstance(scored_on, str) else scored_on
    return ", ".join(Path(file).name for file in files)


def _list_scores(record: ResultRecord, config: SearchConfig) -> dict[str, dict[str, str]]:
    """List the scores of the chain, of the original model, and of the other controls."""
    original = "original model" if len(config.checkpoint or ()) == 1 else "best original model"
    rows: Mapping[str, Scores] = {"this chain": record} | {
        original if title == TITLES["best_parent"] else title: scores
        for title, scores in list_rows(record).items()
    }
    return {title: _format(scores, is_text=bool(config.text)) for title, scores in rows.items()}


def _format(scores: Scores, *, is_text: bool) -> dict[str, str]:
    """Format the scores of one chain by column: perplexity for text, and accuracy otherwise."""
    cells = {}
    for split, loss in scores["loss"].items():
        error = scores.get("standard_error", {}).get(split)
        shown = "" if loss is None or error is None else f" ± {error:.4f}"
        cells[f"loss on {split}"] = f"{format_loss(loss, 4)}{shown}"
        if is_text:
            cells[f"perplexity on {split}"] = _format_perplexity(loss)
        elif split in scores["accuracy"]:
            cells[f"accuracy on {split}"] = f"{scores['accuracy'][split]:.1%}"
    return cells


def _format_perplexity(loss: float | None) -> str:
    if loss is None or loss > math.log(1e9):
        return format_loss(None) if loss is None else f"above {1e9:.0e}"
    return f"{math.exp(loss):.2f}"


def hide_folders(command: str) -> str:
    """Replace paths in a command by the names of their files and folders.

    Args:
      command: the command, as a shell reads it.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    return shlex.join(map(_hide_folder, words))


def _hide_folder(word: str) -> str:
    option, is_pair, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if _PATH.fullmatch(value):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1] or value
    return f"{option}{is_pair}{value}"
