"""The main job: make the bank, search, re-rank, score controls, report."""

import contextlib
import dataclasses
import math
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jchain
from jchain import chain as chain_lib
from jchain._typing import Array, Key
from jchain.bank import Bank
from jchain.cli.config import SearchConfig, check_sweep
from jchain.cli.progress import print_progress
from jchain.cli.records import Job, ResultRecord, ScoredChain, Scores, SweepRow
from jchain.cli.setup import Setup
from jchain.data import EVALUATION_SPLITS
from jchain.engine.evaluate import evaluate, evaluate_all
from jchain.hub import recipes
from jchain.problem import Problem
from jchain.search.base import Result, Search, run
from jchain.updates import Policy


class _Bench(NamedTuple):
    """What all five steps of a job share."""

    config: SearchConfig
    setup: Setup
    made: Bank  # before any update
    problem: Problem  # on `search`, penalties included
    max_layers: int
    width: int  # chains of one width share compiled programs


class _Found(NamedTuple):
    """What the search found."""

    bank: Bank  # after updates
    result: Result
    update_calls: int  # layer calls of gradient steps


class _Picked(NamedTuple):
    """The chain that `select` picks."""

    tokens: list[int]
    chosen: str  # "search", or the name of a recipe
    scores: Scores


class _Level(NamedTuple):
    """A loss on `search` and the layer penalty that is not in it."""

    loss: float | None
    penalty: float


class _Controls(NamedTuple):
    """What the chain found is compared with."""

    parent: Scores
    parent_penalty: float
    random_chain: Scores
    optimum: _Level


def run_job(config: SearchConfig, setup: Setup, search: Search, policy: Policy) -> Job:
    """Make the bank, search on `search`, re-rank the finalists on `select`, open `test` once.

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
    bank_key, control_key, search_key, chain_key = keys
    bench = make(bank_key, config, setup)
    if config.is_frozen and config.checkpoint:
        search = start_at_models(search, bench.problem)
    found = search_chains(search_key, bench, search, policy)
    print_progress("Re-ranking the finalists, scoring the controls ...")
    parent_chain = _pick_parent(control_key, bench)
    by_recipe = _score_recipes(bench, bench.problem) if config.checkpoint else {}
    picked = rerank(bench, bench.problem, found, by_recipe)
    controls = score_controls(chain_key, bench, parent_chain, len(picked.tokens) - 1)
    record = _make_record(bench, found, picked, controls, by_recipe)
    if config.sweep is not None:
        record["sweep"] = [
            *(_search_at(num, search_key, bench, search) for num in _sweep_sizes(bench)),
            _make_sweep_row(bench.max_layers, picked, by_recipe),
        ]
    record["seconds"] = round(time.perf_counter() - start, 1)
    known = {
        "best parent": _Level(controls.parent["loss"]["search"], controls.parent_penalty),
        "optimum": controls.optimum,
    }
    levels = {
        name: level.loss + level.penalty for name, level in known.items() if level.loss is not None
    }
    return Job(record, found.bank, found.result, levels)


def make(key: Key[Array, ""], config: SearchConfig, setup: Setup) -> _Bench:
    """Make the bank and the problem."""
    made = setup.make_bank(key)
    longest = max((len(parent) - 1 for parent in made.parents), default=0)
    max_layers = longest if config.max_layers is None else config.max_layers
    check_sweep(config.sweep, max_layers)
    problem = setup.make_problem(made, "search", max_layers, min_layers=config.min_layers)
    width = max(max_layers, longest, config.depth)
    return _Bench(config, setup, made, problem, max_layers, width)


def search_chains(key: Key[Array, ""], bench: _Bench, search: Search, policy: Policy) -> _Found:
    """Search, and update weights as the policy says, until the budget is used."""
    outcome = policy.run(
        key,
        search,
        bench.problem,
        bench.setup.data.train,
        budget=_get_budget(bench),
        progress=True,
    )
    found = _Found(outcome.bank, outcome.result, outcome.update_calls)
    if len(found.result.finalists) == 0:
        raise ValueError(f"no chain has a finite loss: {found.result.num_chains} were scored")
    return found


def rerank(
    bench: _Bench, problem: Problem, found: _Found, by_recipe: Mapping[str, ScoredChain]
) -> _Picked:
    """Pick the best on `select` of what was found and of the recipes that are long enough.

    Weights that were updated are compared with the models as they were, so then no recipe of the
    updated weights takes part.
    """
    chains = {}
    if bench.config.is_frozen:
        chains = {name: tuple(row["chain"]) for name, row in by_recipe.items()}
    named = {tokens: name for name, tokens in chains.items() if len(tokens) > problem.min_layers}
    named |= {tuple(_strip(row)): "search" for row in found.result.finalists}
    tokens = _pick_on_select(bench.setup, found.bank, chain_lib.pad([*named]))
    scores = _score(bench, found.bank, tokens)
    return _Picked(tokens, named[tuple(tokens)], scores)


def score_controls(
    key: Key[Array, ""], bench: _Bench, parent: tuple[Bank, list[int]], num_layers: int
) -> _Controls:
    """Score the best parent, a random chain of as many layers, and the optimum if it can be had."""
    parent_bank, parent_tokens = parent
    problem = bench.setup.make_problem(parent_bank, "search", bench.width)
    padded = jnp.asarray(chain_lib.pad([parent_tokens], bench.width))
    return _Controls(
        _score(bench, parent_bank, parent_tokens),
        float(problem.layer_penalty(padded)[0]),
        _score(bench, bench.made, _sample_chain(key, bench.made, num_layers)),
        _find_optimum(bench),
    )


def _make_record(
    bench: _Bench,
    found: _Found,
    picked: _Picked,
    controls: _Controls,
    by_recipe: dict[str, ScoredChain],
) -> ResultRecord:
    return {
        "best_chain": picked.tokens,
        "chosen": picked.chosen,
        "layers": [found.bank.names[token] for token in picked.tokens],
        **picked.scores,
        "layer_calls": found.result.layer_calls,
        "update_calls": found.update_calls,
        "seconds": 0.0,
        "optimum": controls.optimum.loss,
        "controls": {
            "best_parent": controls.parent,
            "random_chain": controls.random_chain,
            "recipes": by_recipe,
        },
        "nonfinite_chains": found.result.num_nonfinite,
        "config": bench.config.dump(),
        "versions": _find_versions(),
    }


def _get_budget(bench: _Bench) -> int:
    assert bench.config.budget is not None  # resolved
    return bench.config.budget


def _sweep_sizes(bench: _Bench) -> range:
    first = bench.config.sweep
    return range(0) if first is None else range(first, bench.max_layers)


def _search_at(max_layers: int, key: Key[Array, ""], bench: _Bench, search: Search) -> SweepRow:
    """What is found if chains have at most that many layers, beside recipes for as many."""
    print_progress(f"Searching chains of at most {max_layers} layers ...")
    min_layers = min(bench.config.min_layers, max_layers)
    problem = bench.setup.make_problem(bench.made, "search", max_layers, min_layers=min_layers)
    budget = _get_budget(bench)
    result = run(key, start_at_models(search, problem), problem, budget=budget, progress=True)
    by_recipe = _score_recipes(bench, problem)
    picked = rerank(bench, problem, _Found(bench.made, result, 0), by_recipe)
    return _make_sweep_row(max_layers, picked, by_recipe)


def _make_sweep_row(
    max_layers: int, picked: _Picked, by_recipe: dict[str, ScoredChain]
) -> SweepRow:
    return {
        "max_layers": max_layers,
        "chain": picked.tokens,
        "chosen": picked.chosen,
        **picked.scores,
        "recipes": by_recipe,
    }


def start_at_models(search: Search, problem: Problem) -> Search:
    """The search, started at the models, or at what recipes make of them, if it has `starts`."""
    names = {field.name for field in dataclasses.fields(search)}  # pyright: ignore[reportArgumentType]
    if "starts" not in names:
        return search
    bank, max_layers = problem.bank, problem.max_layers
    starts = recipes.find_starts(bank, max_layers, min_layers=problem.min_layers)
    return dataclasses.replace(search, starts=starts if len(starts) else None)  # pyright: ignore[reportArgumentType,reportCallIssue]


def _score_recipes(bench: _Bench, problem: Problem) -> dict[str, ScoredChain]:
    """Recipes that bring a model to the most layers of the problem, or leave it unchanged.

    Of several models, each recipe is that of the model with the lowest loss on `select`.
    """
    scored: dict[str, list[ScoredChain]] = {}
    for parent in problem.bank.parents:
        for name, tokens in recipes.find_chains(problem, parent, problem.max_layers).items():
            row: ScoredChain = {"chain": tokens, **_score(bench, problem.bank, tokens)}
            scored.setdefault(name, []).append(row)
    return {name: min(rows, key=_get_select_loss) for name, rows in scored.items()}


def _get_select_loss(row: ScoredChain) -> float:
    loss = row["loss"]["select"]
    return math.inf if loss is None else loss


def _score(bench: _Bench, bank: Bank, tokens: list[int]) -> Scores:
    """Loss, without layer penalty, and accuracy of one chain by split."""
    chains = chain_lib.pad([tokens], bench.width)
    outs = {}
    for name in EVALUATION_SPLITS:
        problem = bench.setup.make_problem(bank, name, bench.width, is_penalized=False)
        outs[name] = evaluate(problem, chains)
    return {
        "loss": {name: finite_or_none(out.loss[0]) for name, out in outs.items()},
        "accuracy": {name: float(out.accuracy[0]) for name, out in outs.items()},
    }


def _pick_on_select(setup: Setup, bank: Bank, chains: np.ndarray) -> list[int]:
    """The tokens of the chain with the lowest loss on `select`, penalties included."""
    out = evaluate(setup.make_problem(bank, "select", chains.shape[1] - 1), chains)
    return _strip(chains[int(np.argmin(out.loss))])


def _strip(row: np.ndarray) -> list[int]:
    return [int(token) for token in row if token != chain_lib.PADDING]


def _pick_parent(key: Key[Array, ""], bench: _Bench) -> tuple[Bank, list[int]]:
    """The best net that the bank was cut from, or a plain net of as many layers and steps."""
    bank = bench.made
    if not bank.parents and bench.setup.make_plain_net is not None:
        bank = bench.setup.make_plain_net(key, bank.num_steps)
    return bank, _pick_on_select(bench.setup, bank, chain_lib.pad(bank.parents))


def _sample_chain(key: Key[Array, ""], bank: Bank, num_layers: int) -> list[int]:
    layer_key, head_key = jax.random.split(key)
    layers = jax.random.randint(layer_key, (num_layers,), 0, bank.num_layers)
    head = bank.num_layers + jax.random.randint(head_key, (), 0, bank.num_heads)
    return [*map(int, layers), int(head)]


def _find_optimum(bench: _Bench) -> _Level:
    """The lowest loss of all chains on `search`, None if they are too many to evaluate."""
    num_chains = bench.problem.space.num_chains
    if num_chains > bench.setup.max_optimum_chains:
        return _Level(None, 0.0)
    print_progress(f"Evaluating all {num_chains:,} chains for the optimum ...")
    chains, out = evaluate_all(bench.problem)
    best = int(out.loss.argmin())
    penalty = float(bench.problem.layer_penalty(jnp.asarray(chains[best])))
    return _Level(finite_or_none(out.loss[best] - penalty), penalty)


def finite_or_none(loss: float | Array | np.ndarray) -> float | None:
    """A loss for JSON, which has no infinity."""
    return float(loss) if np.isfinite(loss) else None


def _find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "jchain": jchain.__version__}
    for name in ("jax", "flax", "optax", "rlax", "numpy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
