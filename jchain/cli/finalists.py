"""The choice among the finalists of a search and the recipes that people use by hand."""

from typing import NamedTuple

import numpy as np

from jchain._typing import Float, Int
from jchain.bank import Bank
from jchain.cli.context import Context, strip
from jchain.cli.progress import evaluate_in_parts
from jchain.cli.records import FinalistRow, ScoredChain, finite_or_none
from jchain.cli.scores import ExampleScores
from jchain.hub import recipes
from jchain.problem import Problem
from jchain.runs.result import Result

# The number of chains of a recipe that are evaluated between two updates of the progress.
_PART_SIZE = 8


class Found(NamedTuple):
    """The outcome of the search."""

    bank: Bank  # the bank after updates
    result: Result
    update_calls: int  # number of layer calls that gradient steps cost


class Picked(NamedTuple):
    """The chain that was picked among the finalists and the recipes."""

    tokens: list[int]
    chosen: str  # "search", or the name of a recipe
    scores: ExampleScores
    finalist_losses: Float[np.ndarray, "Q"]  # on `Setup.deciding_splits`, with layer penalties
    recipes: dict[str, ScoredChain]


def choose(context: Context, problem: Problem, found: Found) -> Picked:
    """Pick the chain with the lowest loss among the finalists and the recipes.

    The loss is on `Setup.deciding_splits`, by default on `select`. All of them are scored together
    with the parents, so that they share the layers that they begin with. Then the chain that was
    picked, the recipes, and the best parent are scored on the other splits. If weights may have
    been updated, recipes do not take part, because they are scored with the original weights.

    Args:
      context: the state that all steps share.
      problem: the problem that was searched; recipes with fewer than its `min_layers` layers do
        not take part.
      found: the outcome of the search.
    """
    by_recipe = find_recipes(context, problem, found.result) if context.config.checkpoint else {}
    original, parents = context.original_bank, [*context.original_bank.parents]
    of_recipes = [tokens for chains in by_recipe.values() for tokens in chains]
    finalists = [tuple(strip(row)) for row in found.result.finalists]
    # Scored together, so that what follows finds these losses.
    context.rank(found.bank, [*finalists, *(of_recipes + parents) * (found.bank is original)])
    best = {name: tuple(context.pick(original, chains)) for name, chains in by_recipe.items()}
    named: dict[tuple[int, ...], str] = {}
    if context.config.is_frozen:
        named = {row: name for name, row in best.items() if len(row) > problem.min_layers}
    named |= dict.fromkeys(finalists, "search")
    losses = dict(zip(named, context.rank(found.bank, [*named]), strict=True))
    tokens = min(named, key=lambda tokens: losses[tokens])
    shown = [*best.values(), *([context.pick(original, parents)] if parents else [])]
    if found.bank is original:
        shown.insert(0, tokens)
    if shown:
        context.scorer.score(original, shown)
    scored: dict[str, ScoredChain] = {
        name: {"chain": [*row], **context.score(original, row).summarize()}
        for name, row in best.items()
    }
    of_finalists = np.array([losses[row] for row in finalists])
    scores = context.score(found.bank, tokens)
    return Picked([*tokens], named[tokens], scores, of_finalists, scored)


def find_recipes(
    context: Context, problem: Problem, result: Result
) -> dict[str, list[tuple[int, ...]]]:
    """Find the chains of `problem.max_layers` layers that each recipe makes from the models.

    A model that has no more layers than that is also there unchanged. If there are several models,
    each recipe is applied to all of them.

    Args:
      context: the state that all steps share.
      problem: the problem that was searched.
      result: the result of the search; chains that it scored are not scored again.
    """
    known = _read_losses(result)

    def score(sized: Problem, chains: Int[np.ndarray, "P L"]) -> Float[np.ndarray, "P"]:
        rows = [tuple(strip(row)) for row in chains]
        new = [row for row in dict.fromkeys(rows) if row not in known]
        if new:
            unknown = chains[[rows.index(row) for row in new]]
            title = f"Scoring {len(new)} chains of a recipe"
            losses = evaluate_in_parts(sized, unknown, title, _PART_SIZE).loss
            known.update(zip(new, losses.tolist(), strict=True))
        return np.array([known[row] for row in rows], np.float32)

    found: dict[str, list[tuple[int, ...]]] = {}
    for parent in problem.bank.parents:
        chains = recipes.find_chains(problem, parent, problem.max_layers, evaluate_fn=score)
        for name, tokens in chains.items():
            found.setdefault(name, []).append(tuple(tokens))
    return found


def _read_losses(result: Result) -> dict[tuple[int, ...], float]:
    """Read the losses on the whole of `search` that a search found; stopped chains have none."""
    if result.scored is None:
        return {}
    chains, losses = result.scored.chains, result.scored.loss.tolist()
    pairs = zip(chains, losses, strict=True)
    return {tuple(strip(row)): loss for row, loss in pairs if np.isfinite(loss)}


def describe_finalists(bank: Bank, result: Result, picked: Picked) -> list[FinalistRow]:
    """Describe the finalists for `result.json`.

    Args:
      bank: the bank, which names the layers.
      result: the result of the search.
      picked: the chain that was picked, and the losses of the finalists.
    """
    costs, rows = result.finalist_costs, []
    for i, tokens in enumerate(map(strip, result.finalists)):
        row: FinalistRow = {
            "chain": tokens,
            "layers": [bank.names[token] for token in tokens],
            "search_loss": float(result.finalist_losses[i]),
            "deciding_loss": finite_or_none(picked.finalist_losses[i]),
            "cost": len(tokens) - 1.0 if costs is None else float(costs[i]),
        }
        rows.append(row)
    return rows
