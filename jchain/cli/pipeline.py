"""The steps of `jchain search` for one seed: make the bank, search, re-rank, score, and report."""

import contextlib
import platform
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jchain
from jchain import chain as chain_lib
from jchain._typing import Array, Key
from jchain.bank import Bank
from jchain.cli.config import SearchConfig, check_sweep, require
from jchain.cli.context import Context, strip
from jchain.cli.controls import ControlScores, ReferenceLoss, score_controls
from jchain.cli.finalists import Found, Picked, choose, describe_finalists
from jchain.cli.interruption import get_name, raise_if_stopped
from jchain.cli.progress import print_progress, show_phase
from jchain.cli.records import (
    ResultRecord,
    SearchOutput,
    SweepRow,
)
from jchain.cli.result_folder import BANK_FILE
from jchain.cli.scores import Scorer
from jchain.cli.setup import Setup
from jchain.cli.trust import sign
from jchain.data import EVALUATION_SPLITS
from jchain.engine.timing import measure_calls
from jchain.hub import recipes
from jchain.problem import Problem
from jchain.runs.driver import run
from jchain.runs.starts import list_starts
from jchain.search.protocol import Search
from jchain.updates import UpdatePolicy


def run_pipeline(
    config: SearchConfig,
    setup: Setup,
    search: Search,
    policy: UpdatePolicy,
    folder: Path | None = None,
    deadline: float | None = None,
) -> SearchOutput:
    """Make the bank, search it, re-rank the finalists, and score the chain that was picked.

    The search sees only `search`, and the finalists are re-ranked on `Setup.deciding_splits`, by
    default on `select`. For checkpoints, the recipes that people use by hand and the unchanged
    models are re-ranked together with the finalists. `test` is used once, at the end.

    Args:
      config: the resolved options of `jchain search`.
      setup: the data, the loss, and the function that makes the bank.
      search: the search and its hyperparameters.
      policy: the policy that decides when weights of the bank are updated. The output holds the
        bank with its final weights, whereas controls use the bank before any update.
      folder: the folder in which the bank and the run are saved, and from which they continue; None
        to save nothing.
      deadline: the `time.monotonic()` at which searches stop; None for no limit.

    Raises:
      ValueError: if sizes do not match, the budget is smaller than one step, or no chain has a
        finite loss.
    """
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(config.seed), 4)
    bank_key, control_key, search_key = keys[:3]
    context = make(bank_key, config, setup, folder)
    found = search_chains(search_key, context, search, policy, deadline)
    picked = choose(context, context.problem, found)
    finalists = found.bank, [strip(row) for row in found.result.finalists]
    stopped_by = found.result.stopped_by
    if stopped_by is None:
        scored = score_controls(control_key, context, picked.scores, finalists, search)
    else:
        why = "Out of time" if stopped_by == "max_seconds" else "Interrupted"
        print_progress(f"{why}: the best chain so far is kept, and controls are not scored")
        scored = ControlScores({"recipes": {}}, ReferenceLoss(None, 0.0), {}, stopped_by)
    scored.controls["recipes"] = picked.recipes
    record = _make_record(context, found, picked, scored)
    if config.text:
        splits = {name: getattr(setup.data, name) for name in EVALUATION_SPLITS}
        record["num_tokens"] = {name: int(batch.y.size) for name, batch in splits.items()}
    if config.sweep is not None and scored.stopped_by is None:
        try:
            record["sweep"] = [
                *(
                    _search_at(num, search_key, context, search, deadline)
                    for num in _sweep_sizes(context)
                ),
                _make_sweep_row(context.max_layers, picked),
            ]
        except KeyboardInterrupt as error:
            print_progress("Interrupted: the sweep is not finished, and left out")
            scored = scored._replace(stopped_by=get_name(error))
    if scored.stopped_by is not None:
        record["stopped_by"] = scored.stopped_by
    record["seconds"] = round(time.perf_counter() - start, 1)
    levels = {
        name: reference.loss + reference.penalty
        for name, reference in scored.reference_losses.items()
        if reference.loss is not None
    }
    return SearchOutput(record, found.bank, found.result, levels, scored.stopped_by)


def make(
    key: Key[Array, ""], config: SearchConfig, setup: Setup, folder: Path | None = None
) -> Context:
    """Make the bank and the problem on `search`.

    A bank that is trained is saved as soon as it is made, and read if it was saved before.

    Args:
      key: the PRNG key for making the bank.
      config: the resolved options of `jchain search`.
      setup: the data, the loss, and the function that makes the bank.
      folder: the folder of the bank; None to save nothing.

    Raises:
      ValueError: if sizes do not match.
    """
    is_trained = setup.make_plain_net is not None
    path = folder / BANK_FILE if folder is not None and is_trained else None
    if path is not None and path.exists():
        print_progress(f"The bank is read from {path}")
        return _make_context(config, setup, Bank.load(path), folder)
    with show_phase(setup.progress_label):
        original_bank = jax.block_until_ready(setup.make_bank(key))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        original_bank.save(path)
    return _make_context(config, setup, original_bank, folder)


def _make_context(
    config: SearchConfig, setup: Setup, original_bank: Bank, folder: Path | None = None
) -> Context:
    longest = max((len(parent) - 1 for parent in original_bank.parents), default=0)
    max_layers = longest if config.max_layers is None else config.max_layers
    check_sweep(config.sweep, max_layers)
    problem = _make_search_problem(config, setup, original_bank, max_layers, config.min_layers)
    padded_layers = max(max_layers, longest, setup.plain_depth, len(setup.reference) - 1)
    if config.checkpoint:
        starts = recipes.find_starts(original_bank, max_layers, min_layers=problem.min_layers)
    else:
        starts = list_starts(problem, "parents")
    scorer = Scorer(setup, shows_progress=bool(config.checkpoint))
    return Context(
        config, setup, original_bank, problem, max_layers, padded_layers, starts, scorer, folder
    )


def _make_search_problem(
    config: SearchConfig, setup: Setup, bank: Bank, max_layers: int, min_layers: int
) -> Problem:
    """Make the problem to search, in the space of its chains."""
    space = config.space
    if space is None:
        longest = max((len(parent) - 1 for parent in bank.parents), default=0)
        is_subset = config.checkpoint and bank.stages is None and max_layers < longest
        space = "subset" if is_subset else "chains"
    return setup.make_problem(bank, "search", max_layers, min_layers=min_layers, space=space)


def check_budget(
    config: SearchConfig, setup: Setup, search: Search, policy: UpdatePolicy, budget: int
) -> None:
    """Check that a budget pays for the first step of the search, before the bank is trained.

    The step is taken on a bank of the same shapes with random weights, and its programs are those
    of the search. A bank of checkpoints is not checked, because it is searched right after it has
    been read, and a step may be expensive.

    Args:
      config: the resolved options of `jchain search`.
      setup: the data, the loss, and the function that makes the bank.
      search: the search and its hyperparameters.
      policy: the policy that decides when weights are updated.
      budget: the layer calls that the search and the updates may cost.

    Raises:
      ValueError: if the budget is smaller than one step, or another argument is invalid.
    """
    if config.checkpoint:
        return
    bank_key, _, search_key = jax.random.split(jax.random.key(config.seed), 4)[:3]

    def check(bank: Bank) -> None:
        context = _make_context(config, setup, bank)
        train, starts = setup.data.train, context.starts
        policy.check_budget(
            search_key, search, context.problem, train, budget=budget, starts=starts
        )

    if setup.make_plain_net is None:  # the bank is read, not trained
        return check(setup.make_bank(bank_key))
    shapes = jax.eval_shape(setup.make_bank, bank_key)
    try:
        check(_draw_weights(0, shapes))
    except ValueError:
        # Some searches choose what to score by losses, so other weights may cost less.
        check(_draw_weights(1, shapes))


def _draw_weights(seed: int, shapes: Bank) -> Bank:
    """Draw small random weights for a bank of which only the shapes are known."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> Array:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = rng.normal(0.0, 0.1, leaf.shape) if is_float else np.zeros(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, shapes)


def search_chains(
    key: Key[Array, ""],
    context: Context,
    search: Search,
    policy: UpdatePolicy,
    deadline: float | None = None,
) -> Found:
    """Search, and update weights as the policy decides, until the budget is used.

    The run is saved in the folder of the context.

    Args:
      key: the PRNG key for the search and the updates.
      context: the state that all steps share.
      search: the search and its hyperparameters.
      policy: the policy that decides when weights are updated.
      deadline: the `time.monotonic()` at which searches stop; None for no limit.

    Raises:
      ValueError: if the budget is smaller than one step or no chain has a finite loss.
    """
    budget, problem, starts = require(context.config.budget), context.problem, context.starts
    line = f"Searching {problem.space.num_chains:,} chains"
    if context.config.checkpoint:
        line += f", {_estimate(problem, budget)}"
    print_progress(f"{line} ...")
    if context.config.is_frozen:
        folder = None if context.folder is None else context.folder / "search"
        result = run(
            key,
            search,
            problem,
            budget=budget,
            progress=True,
            starts=starts,
            # Recipes need not be scored again.
            record="chains" if context.config.checkpoint else None,
            checkpoint_dir=folder,
            max_seconds=_count_seconds(deadline),
        )
        found = Found(context.original_bank, result, 0)
    else:
        train = context.setup.data.train
        # A policy divides its budget, so a run with another budget is another run.
        folder = None if context.folder is None else context.folder / f"search-{budget}"
        outcome = policy.run(
            key,
            search,
            problem,
            train,
            budget=budget,
            progress=True,
            starts=starts,
            checkpoint_dir=folder,
            max_seconds=_count_seconds(deadline),
        )
        found = Found(outcome.bank, outcome.result, outcome.update_calls)
    if len(found.result.finalists) == 0:
        raise_if_stopped(found.result)
        raise ValueError(f"no chain has a finite loss: {found.result.num_scored} were scored")
    return found


def _estimate(problem: Problem, budget: int) -> str:
    """Describe how long a search of pretrained blocks takes, by a short measurement."""
    parent = problem.bank.parents[0]
    wide = problem.relax(max(problem.max_layers, len(parent) - 1))
    of_layer, of_head = measure_calls(wide, chain_lib.pad([parent], wide.max_layers)[0])
    # Chains that are scored together share about half of their layers.
    seconds = budget * (of_layer + of_head * 2 / max(1, problem.max_layers))
    minutes = "" if seconds < 90 else f" ({seconds / 60:,.0f} min)"
    return f"which takes about {seconds:,.0f} s{minutes}"


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
        "finalists": describe_finalists(found.bank, found.result, picked),
        "num_scored": found.result.num_scored,
        "nonfinite_chains": found.result.num_nonfinite,
        "config": context.config.dump(),
        "signature": sign(context.config.dump()),
        "versions": find_versions(),
    }


def _count_seconds(deadline: float | None) -> float | None:
    """Return the seconds that are left, at least a moment."""
    return None if deadline is None else max(1e-3, deadline - time.monotonic())


def _sweep_sizes(context: Context) -> range:
    first = context.config.sweep
    return range(0) if first is None else range(first, context.max_layers)


def _search_at(
    max_layers: int, key: Key[Array, ""], context: Context, search: Search, deadline: float | None
) -> SweepRow:
    """Search for a chain of at most `max_layers` layers, and score the recipes for that number."""
    print_progress(f"Searching chains of at most {max_layers} layers ...")
    min_layers = min(context.config.min_layers, max_layers)
    config, bank = context.config, context.original_bank
    problem = _make_search_problem(config, context.setup, bank, max_layers, min_layers)
    budget = require(context.config.budget)
    starts = recipes.find_starts(problem.bank, max_layers, min_layers=min_layers)
    folder = None if context.folder is None else context.folder / f"sweep-{max_layers}"
    result = run(
        key,
        search,
        problem,
        budget=budget,
        progress=True,
        starts=starts,
        record="chains",
        checkpoint_dir=folder,
        max_seconds=_count_seconds(deadline),
    )
    raise_if_stopped(result)
    picked = choose(context, problem, Found(context.original_bank, result, 0))
    return _make_sweep_row(max_layers, picked)


def _make_sweep_row(max_layers: int, picked: Picked) -> SweepRow:
    return {
        "max_layers": max_layers,
        "chain": picked.tokens,
        "chosen": picked.chosen,
        **picked.scores.summarize(),
        "recipes": picked.recipes,
    }


def find_versions() -> dict[str, str]:
    """Find the versions of Python, jchain, and the libraries that affect results."""
    versions = {"python": platform.python_version(), "jchain": jchain.__version__}
    for name in ("jax", "flax", "optax", "rlax", "numpy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
