"""`jchain search` for one seed: make the bank, search, re-rank, score controls, report."""

import contextlib
import dataclasses
import math
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

import jax

import jchain
from jchain import chain as chain_lib
from jchain._typing import Array, Key
from jchain.bank import Bank
from jchain.cli.config import SearchConfig, check_sweep, resolved
from jchain.cli.context import Context, strip
from jchain.cli.controls import ControlScores, score_controls
from jchain.cli.progress import print_progress, show_phase
from jchain.cli.records import ResultRecord, ScoredChain, SearchOutput, SweepRow
from jchain.cli.scores import ExampleScores
from jchain.cli.setup import Setup
from jchain.data import EVALUATION_SPLITS
from jchain.hub import recipes
from jchain.problem import Problem
from jchain.search.base import Result, Search, run
from jchain.search.local_search import LocalSearch
from jchain.updates import UpdatePolicy


class Found(NamedTuple):
    """What the search found."""

    bank: Bank  # after updates
    result: Result
    update_calls: int  # layer calls of gradient steps


class Picked(NamedTuple):
    """The chain that `select` picks."""

    tokens: list[int]
    chosen: str  # "search", or the name of a recipe
    scores: ExampleScores


def run_pipeline(
    config: SearchConfig, setup: Setup, search: Search, policy: UpdatePolicy
) -> SearchOutput:
    """Make the bank, search on `search`, re-rank the finalists, open `test` once.

    Finalists are re-ranked on `select`, or on all splits that decide (`Setup.deciding_splits`).

    For checkpoints, the recipes that people use by hand, and the model unchanged, are re-ranked
    among the finalists.

    Args:
      config: resolved options of `jchain search`.
      setup: bank, data, and loss.
      search: the search.
      policy: when weights of the bank are updated. The bank that is kept has the final weights;
        controls are of the bank as it was made.

    Raises:
      ValueError: sizes do not fit each other, the budget is smaller than one step, or no chain
        has a finite loss.
    """
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(config.seed), 4)
    bank_key, control_key, search_key = keys[:3]
    context = make(bank_key, config, setup)
    if config.is_frozen and config.checkpoint:
        search = start_at_models(search, context.problem)
    found = search_chains(search_key, context, search, policy)
    by_recipe = _score_recipes(context, context.problem) if config.checkpoint else {}
    picked = rerank(context, context.problem, found, by_recipe)
    finalists = found.bank, [strip(row) for row in found.result.finalists]
    scored = score_controls(control_key, context, picked.scores, finalists, search)
    scored.controls["recipes"] = by_recipe
    record = _make_record(context, found, picked, scored)
    if config.sweep is not None:
        record["sweep"] = [
            *(_search_at(num, search_key, context, search) for num in _sweep_sizes(context)),
            _make_sweep_row(context.max_layers, picked, by_recipe),
        ]
    record["seconds"] = round(time.perf_counter() - start, 1)
    levels = {
        name: level.loss + level.penalty
        for name, level in scored.levels.items()
        if level.loss is not None
    }
    return SearchOutput(record, found.bank, found.result, levels, scored.is_interrupted)


def make(key: Key[Array, ""], config: SearchConfig, setup: Setup) -> Context:
    """Make the bank and the problem.

    Args:
      key: of the bank.
      config: resolved.
      setup: data, loss, and how the bank is made.

    Raises:
      ValueError: sizes do not fit each other.
    """
    with show_phase(setup.making):
        made = jax.block_until_ready(setup.make_bank(key))
    longest = max((len(parent) - 1 for parent in made.parents), default=0)
    max_layers = longest if config.max_layers is None else config.max_layers
    check_sweep(config.sweep, max_layers)
    problem = setup.make_problem(made, "search", max_layers, min_layers=config.min_layers)
    width = max(max_layers, longest, setup.plain_depth, len(setup.reference) - 1)
    return Context(config, setup, made, problem, max_layers, width)


def search_chains(
    key: Key[Array, ""], context: Context, search: Search, policy: UpdatePolicy
) -> Found:
    """Search, and update weights by the policy, until the budget is used.

    Args:
      key: of the search and the updates.
      context: what all steps share.
      search: the search.
      policy: when weights are updated.

    Raises:
      ValueError: the budget is smaller than one step, or no chain has a finite loss.
    """
    print_progress(f"Searching {context.problem.space.num_chains:,} chains ...")
    outcome = policy.run(
        key,
        search,
        context.problem,
        context.setup.data.train,
        budget=resolved(context.config.budget),
        progress=True,
    )
    found = Found(outcome.bank, outcome.result, outcome.update_calls)
    if len(found.result.finalists) == 0:
        raise ValueError(f"no chain has a finite loss: {found.result.num_chains} were scored")
    return found


def rerank(
    context: Context, problem: Problem, found: Found, by_recipe: Mapping[str, ScoredChain]
) -> Picked:
    """Pick the chain with the lowest loss on the splits that decide, `select` as a rule.

    It is one of the finalists and the recipes.

    If weights were updated, recipes do not take part: they are scored with the original weights.

    Args:
      context: what all steps share.
      problem: the problem that was searched; recipes with fewer than `min_layers` layers do not
        take part.
      found: what the search found.
      by_recipe: recipes by name.
    """
    chains = {}
    if context.config.is_frozen:
        chains = {name: tuple(row["chain"]) for name, row in by_recipe.items()}
    named = {tokens: name for name, tokens in chains.items() if len(tokens) > problem.min_layers}
    named |= {tuple(strip(row)): "search" for row in found.result.finalists}
    tokens = context.pick(found.bank, chain_lib.pad([*named]))
    return Picked(tokens, named[tuple(tokens)], context.score(found.bank, tokens))


def _make_record(
    context: Context, found: Found, picked: Picked, scored: ControlScores
) -> ResultRecord:
    data = context.setup.data
    return {
        "about": context.setup.about,
        "best_chain": picked.tokens,
        "chosen": picked.chosen,
        "layers": [found.bank.names[token] for token in picked.tokens],
        **picked.scores.summarize(),
        "num_examples": {name: len(getattr(data, name).y) for name in EVALUATION_SPLITS},
        "layer_calls": found.result.layer_calls,
        "update_calls": found.update_calls,
        "num_chains": context.problem.space.num_chains,
        "seconds": 0.0,
        "optimum": scored.optimum.loss,
        "controls": scored.controls,
        "nonfinite_chains": found.result.num_nonfinite,
        "config": context.config.dump(),
        "versions": find_versions(),
    }


def _sweep_sizes(context: Context) -> range:
    first = context.config.sweep
    return range(0) if first is None else range(first, context.max_layers)


def _search_at(max_layers: int, key: Key[Array, ""], context: Context, search: Search) -> SweepRow:
    """Search with at most `max_layers` layers, and score recipes for that many."""
    print_progress(f"Searching chains of at most {max_layers} layers ...")
    min_layers = min(context.config.min_layers, max_layers)
    problem = context.setup.make_problem(context.made, "search", max_layers, min_layers=min_layers)
    budget = resolved(context.config.budget)
    result = run(key, start_at_models(search, problem), problem, budget=budget, progress=True)
    by_recipe = _score_recipes(context, problem)
    picked = rerank(context, problem, Found(context.made, result, 0), by_recipe)
    return _make_sweep_row(max_layers, picked, by_recipe)


def _make_sweep_row(max_layers: int, picked: Picked, by_recipe: dict[str, ScoredChain]) -> SweepRow:
    return {
        "max_layers": max_layers,
        "chain": picked.tokens,
        "chosen": picked.chosen,
        **picked.scores.summarize(),
        "recipes": by_recipe,
    }


def start_at_models(search: Search, problem: Problem) -> Search:
    """Start a local search at the models, or at what recipes make of them.

    Other searches are returned unchanged.

    Args:
      search: the search.
      problem: what it minimizes over; its bank has the models as parents.
    """
    if not isinstance(search, LocalSearch):
        return search
    bank, max_layers = problem.bank, problem.max_layers
    starts = recipes.find_starts(bank, max_layers, min_layers=problem.min_layers)
    return dataclasses.replace(search, starts=starts if len(starts) else None)


def _score_recipes(context: Context, problem: Problem) -> dict[str, ScoredChain]:
    """Score recipes that bring a model to the most layers of the problem, or leave it unchanged.

    If there are several models, each recipe takes the one with the lowest loss on `select`.
    """
    scored: dict[str, list[ScoredChain]] = {}
    for parent in problem.bank.parents:
        for name, tokens in recipes.find_chains(problem, parent, problem.max_layers).items():
            scores = context.score(problem.bank, tokens).summarize()
            scored.setdefault(name, []).append({"chain": tokens, **scores})
    return {name: min(rows, key=_get_select_loss) for name, rows in scored.items()}


def _get_select_loss(row: ScoredChain) -> float:
    loss = row["loss"]["select"]
    return math.inf if loss is None else loss


def find_versions() -> dict[str, str]:
    """Versions of Python, jchain, and the libraries that change results."""
    versions = {"python": platform.python_version(), "jchain": jchain.__version__}
    for name in ("jax", "flax", "optax", "rlax", "numpy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
