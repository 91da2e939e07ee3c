"""Statistics over several seeds of one search: the best chain found against each control."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jchain._typing import Float
from jchain.cli.config import SearchConfig
from jchain.cli.pipeline import find_versions
from jchain.cli.records import (
    FOUND,
    ResultRecord,
    ScoredChain,
    Scores,
    SeedRow,
    Summary,
    finite_or_none,
    format_loss,
)
from jchain.cli.scores import find_standard_error
from jchain.cli.trust import sign

# Controls and the titles of their rows, in the order of the tables.
TITLES = {
    "finalist_ensemble": "ensemble of the finalists",
    "reference": "known faults, undone in reverse order",
    "local_search": "local search, same budget",
    "actor_critic": "actor-critic, same budget",
    "best_parent": "best parent",
    "best_edit": "best parent, best single edit",
    "parent_ensemble": "ensemble of the parents",
    "plain_net": "plain net, same steps",
    "tuned_plain_net": "plain net, fine-tuned on search",
    "random_chains": "random chains, median",
}
# Controls that the sentence names.
_NAMED = {"best_parent": "best parent", "plain_net": "plain net"}
# Two-sided 95%.
_QUANTILE = 0.975


class Interval(NamedTuple):
    """The mean of paired differences and its 95% interval (Student's t).

    `bounds` is None if there is only one pair.
    """

    mean: float
    bounds: list[float] | None


def list_rows(record: ResultRecord) -> dict[str, Scores]:
    """List the scores of the controls by row title, in the order of the tables.

    Args:
      record: the result of one seed.
    """
    found: dict[str, Scores | ScoredChain] = {}
    for name, title in TITLES.items():
        scores = record["controls"].get(name)
        if scores is not None:
            found[title] = scores
    return found | record["controls"]["recipes"]


def compare_pairs(differences: Sequence[float] | Float[np.ndarray, "S"]) -> Interval:
    """Compute the mean of paired differences and its 95% interval (Student's t).

    Args:
      differences: `[S]`, one difference per seed.
    """
    from scipy.stats import sem, t

    rows = np.asarray(differences, np.float64)
    mean = float(rows.mean())
    if len(rows) < 2 or not np.isfinite(rows).all():
        return Interval(mean, None)
    width = float(sem(rows) * t.ppf(_QUANTILE, len(rows) - 1))
    return Interval(mean, [mean - width, mean + width])


def summarize(config: SearchConfig, records: Sequence[ResultRecord], seconds: float) -> Summary:
    """Compare the chains found with every control over all seeds.

    Args:
      config: the configuration that all seeds share.
      records: the results, one per seed.
      seconds: the run time of all seeds together.
    """
    listed = [list_rows(record) for record in records]
    titles = [title for title in listed[0] if all(title in rows for rows in listed)]
    found = _make_row(records, records)
    rows = {FOUND: found}
    rows |= {
        title: _make_row([listed[i][title] for i in range(len(listed))], records)
        for title in titles
    }
    return {
        "seeds": [int(str(record["config"]["seed"])) for record in records],
        "about": [record["about"] for record in records],
        "layers": [record["layers"] for record in records],
        "num_examples": records[0]["num_examples"],
        "rows": rows,
        "sentence": _make_sentence(rows, len(records)),
        "seconds": round(seconds, 1),
        "config": config.dump(),
        "signature": sign(config.dump()),
        "versions": find_versions(),
    }


def _make_row(scores: Sequence[Scores], records: Sequence[ResultRecord]) -> SeedRow:
    loss = [row["loss"]["test"] for row in scores]
    accuracy = [row["accuracy"]["test"] for row in scores]
    values = np.array([np.inf if value is None else value for value in loss])
    found = [record["loss"]["test"] for record in records]
    own = np.array([np.inf if value is None else value for value in found])
    row: SeedRow = {
        "loss": loss,
        "accuracy": accuracy,
        "mean": finite_or_none(values.mean()),
        "standard_error": finite_or_none(find_standard_error(values)),
        "mean_accuracy": float(np.mean(accuracy)),
        "difference": None,
        "interval": None,
        "num_lower": int((own < values).sum()),
    }
    if np.isfinite(values).all() and np.isfinite(own).all():
        row["difference"], row["interval"] = compare_pairs(own - values)
    return row


def _make_sentence(rows: dict[str, SeedRow], num_seeds: int) -> str:
    """Summarize the result and its uncertainty in one or two sentences."""
    found, parts = rows[FOUND], []
    for name, short in _NAMED.items():
        row = rows.get(TITLES[name])
        if row is not None and row["difference"] is not None:
            parts.append(f"the {short} in {row['num_lower']} of {num_seeds} seeds ({_say(row)})")
    said = f"On test, the best chain found has a mean loss of {format_loss(found['mean'])}"
    if np.isfinite(found["mean_accuracy"]):
        said += f" and an accuracy of {found['mean_accuracy']:.1%}"
    if not parts:
        return f"{said}."
    return f"{said}. It beats {' and '.join(parts)}."


def _say(row: SeedRow) -> str:
    """Describe a difference, as in "8.85 lower on average, 95% interval 5.38 to 12.32"."""
    difference, bounds = row["difference"], row["interval"]
    assert difference is not None
    word = "lower" if difference < 0 else "higher"
    if bounds is None:
        return f"{abs(difference):.3f} {word}"
    if bounds[0] <= 0 <= bounds[1]:
        return "on average no difference beyond noise"
    low, high = sorted(abs(bound) for bound in bounds)
    return f"{abs(difference):.3f} {word} on average, 95% interval {low:.3f} to {high:.3f}"
