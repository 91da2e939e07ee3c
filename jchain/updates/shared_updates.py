"""The policy that trains sampled chains during the search."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Array, Float, Int, Key, PyTree
from jchain.arguments import check_at_least_one, check_instances, check_numbers, checked
from jchain.bank import Bank
from jchain.chain import PADDING, count_layers
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.runs.driver import advance_runs, check_arguments
from jchain.runs.progress import ProgressLine
from jchain.runs.result import (
    MAX_FREE_STEPS,
    RunState,
    StopRule,
    Trace,
    empty_trace,
    make_results,
)
from jchain.runs.run_folder import Snapshot
from jchain.runs.stepping import infer_runs, init_runs
from jchain.search.protocol import Refreshable, Search
from jchain.train import OPTIMIZER
from jchain.updates import tune
from jchain.updates.policies import (
    Outcome,
    RunArguments,
    UpdatePolicy,
    init_search,
    make_training_problem,
    open_checkpoints,
    resume_run,
    tuning_cost,
)
from jchain.updates.saving import Checkpoints


class RefreshableSearch(Search, Refreshable, Protocol):
    """A search that can continue under changed weights."""


class _Begun(NamedTuple):
    """What the first round needs."""

    key: Key[Array, ""]
    run_key: Key[Array, ""]  # of the last part
    search: RefreshableSearch
    bank: Bank  # the bank before any update, in float32
    problem: Problem
    training: Problem
    carry: tuple[PyTree, tune.State]  # the states of the search and of the training
    start_calls: int  # the cost of the starts


class _Training(NamedTuple):
    """How far the training is, and what it cost."""

    key: Key[Array, ""]
    carry: tuple[PyTree, tune.State]  # the states of the search and of the training
    best: Float[np.ndarray, ""]  # the lowest loss so far
    counts: Int[np.ndarray, "2"]  # the chains scored, and how many of them have no finite loss
    layer_calls: int
    update_calls: int = 0  # the part of layer_calls that gradient steps cost
    num_free: int = 0  # consecutive rounds that cost nothing
    step_calls: int = 0  # the most that a step of the search cost


_NUMBERS = ("layer_calls", "update_calls", "num_free", "step_calls")


class _Final(NamedTuple):
    """How far the last part is, in which weights are fixed."""

    runs: RunState
    trace: Trace


@pytree_dataclass
class SharedUpdates(UpdatePolicy):
    """A policy that trains, in place, some of the chains that each step of the search scored.

    Weights change during the search, so the search must be `Refreshable`: after each step, its
    stored losses are recomputed, and the layer calls that this takes are charged. For the last part
    of the budget, the weights are fixed, and only chains that are scored in that part can be found.

    Attributes:
      num_updates: number of chains to train after each step of the search, with one gradient step
        each. They are drawn from the chains that the step scored.
      final_share: fraction of the budget for the last part, in which weights are fixed.
      optimizer: the optax optimizer; AdamW by default.
    """

    num_updates: int = static(default=8)
    final_share: float = static(default=0.25)
    optimizer: optax.GradientTransformation = static(default=OPTIMIZER)

    def __post_init__(self) -> None:
        check_instances(optax.GradientTransformation, "optax.adam(1e-3)", optimizer=self.optimizer)
        check_at_least_one(num_updates=self.num_updates)
        check_numbers(above=0, at_most=1, final_share=self.final_share)
        if self.final_share == 1:
            raise ValueError(f"expected a final_share above 0 and below 1, got {self.final_share}")

    @checked
    def check(self, args: RunArguments) -> None:
        begun = self._begin(args)
        _, _, calls, length, _ = _train_round(
            self,
            jax.random.split(begun.key)[1],
            begun.carry,
            begun.search,
            begun.problem,
            begun.training,
        )
        cost = tuning_cost(args.problem, args.train, np.asarray(length))
        total, step_calls = int(sum(calls)) + cost, int(calls[0])
        if total > 0 and begun.start_calls + total > self._limit(args.budget, step_calls):
            raise self._make_error(args.budget, total, step_calls)

    @checked
    def apply(self, args: RunArguments) -> Outcome:
        begun = self._begin(args)
        with (
            open_checkpoints(self, args) as checkpoints,
            ProgressLine(args.budget, is_shown=args.progress) as line,
        ):
            training, final = _restore(begun, args, checkpoints)
            stopped_by = None
            if final is None:
                training, stopped_by = self._train(training, begun, args, checkpoints, line)
            problem = begun.problem.with_bank(training.carry[1].bank)
            if final is None:
                final = _Final(_start_last_part(training, begun, problem, args), empty_trace(1))
            if stopped_by is None:
                final, stopped_by = _run_last_part(
                    training, final, begun.search, problem, args, checkpoints, line
                )
                checkpoints.finish(lambda: _make_snapshot(training, final))
            else:
                checkpoints.finish(lambda: _make_snapshot(training, None))
            is_over, stopped_by = stopped_by is None, stopped_by or checkpoints.signal_name
        stop = StopRule(np.int32(args.budget), np.float32(-np.inf))
        (result,) = make_results(final.runs, final.trace, stop, problem)
        result = result._replace(
            is_complete=is_over, ended_by="budget" if is_over else None, stopped_by=stopped_by
        )
        bank = _update_bank(begun.bank, args.problem.bank, problem.bank)
        return Outcome(bank, result, training.update_calls)

    def _begin(self, args: RunArguments) -> _Begun:
        """Check the arguments, and return what the first round needs."""
        search = args.search
        if not isinstance(search, Refreshable):
            raise ValueError(
                "expected a search with a method refresh, such as ActorCritic, "
                f"got {type(search).__name__}"
            )
        check_arguments(search, args.problem, args.budget, args.num_finalists)
        bank = tune.upcast_bank(args.problem.bank)
        problem = args.problem.with_bank(bank).without_names()
        training = make_training_problem(args.problem, args.train).without_names()
        key, init_key, run_key = jax.random.split(args.key, 3)
        start = dataclasses.replace(problem.bank, versions=problem.bank.get_versions())
        state, start_calls = init_search(search, init_key, problem), 0
        if len(args.starts) > 0:
            state, calls = _refresh(search, state, problem, jnp.asarray(args.starts))
            start_calls = int(calls)
        carry = (state, tune.init(start, self.optimizer))
        return _Begun(key, run_key, search, bank, problem, training, carry, start_calls)

    def _train(
        self,
        training: _Training,
        begun: _Begun,
        args: RunArguments,
        checkpoints: Checkpoints,
        line: ProgressLine,
    ) -> tuple[_Training, str | None]:
        """Alternate steps of the search and gradient steps until the last part of the budget.

        Returns:
          How far the training is, and why it was stopped; None at its end.
        """
        total, step_calls = 0, training.step_calls
        # Stop after too many consecutive steps that cost nothing, as jc.run does.
        while training.num_free < MAX_FREE_STEPS:
            key, round_key = jax.random.split(training.key)
            carry, lowest, calls, length, scored = _train_round(
                self, round_key, training.carry, begun.search, begun.problem, begun.training
            )
            cost = tuning_cost(args.problem, args.train, np.asarray(length))
            total, step_calls = int(sum(calls)) + cost, max(step_calls, int(calls[0]))
            if training.layer_calls + total > self._limit(args.budget, step_calls):
                break
            training = _Training(
                key,
                carry,
                np.asarray(np.minimum(training.best, np.float32(lowest))),
                training.counts + np.asarray(scored),
                training.layer_calls + total,
                training.update_calls + cost,
                0 if total else training.num_free + 1,
                step_calls,
            )
            line.update(training.layer_calls, float(training.best))
            if reason := checkpoints.after_part(lambda now=training: _make_snapshot(now, None)):
                return training, reason
        if training.layer_calls == begun.start_calls and training.num_free == 0:
            raise self._make_error(args.budget, total, step_calls)
        return training, None

    def _limit(self, budget: int, step_calls: int) -> float:
        """Return the layer calls before the last part, which must pay for one step."""
        return float(min((1 - self.final_share) * budget, budget - step_calls))

    def _make_error(self, budget: int, total: int, step_calls: int) -> ValueError:
        return ValueError(
            f"expected a budget whose first {1 - self.final_share:.0%} pay for a step of the "
            f"search and its gradient steps ({total} layer calls) and whose rest pays for "
            f"another step ({step_calls} layer calls), got {budget}"
        )


def _restore(
    begun: _Begun, args: RunArguments, checkpoints: Checkpoints
) -> tuple[_Training, _Final | None]:
    """Return how far an earlier call came, or the beginning."""
    first = _Training(
        begun.key,
        begun.carry,
        np.array(np.inf, np.float32),
        np.zeros(2, np.int32),
        begun.start_calls,
    )

    def make_template(info: dict[str, Any]) -> PyTree:
        arrays = {"key": first.key, "carry": first.carry, "best": first.best}
        arrays["counts"] = first.counts
        if info["is_trained"]:
            keys = begun.run_key[None]
            runs = infer_runs(keys, begun.search, begun.problem, args.num_finalists)
            trace = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((-1, 1), leaf.dtype), empty_trace(1)
            )
            arrays |= {"runs": runs, "trace": trace}
        return arrays

    snapshot = checkpoints.restore(make_template)
    if snapshot is None:
        return first, None
    arrays, info = snapshot
    numbers = [info[name] for name in _NUMBERS]
    carry = jax.device_put(arrays["carry"])
    training = _Training(arrays["key"], carry, arrays["best"], arrays["counts"], *numbers)
    if not info["is_trained"]:
        return training, None
    return training, _Final(jax.device_put(arrays["runs"]), arrays["trace"])


def _make_snapshot(training: _Training, final: _Final | None) -> Snapshot:
    arrays, numbers = training._asdict(), {}
    for name in _NUMBERS:
        numbers[name] = arrays.pop(name)
    return Snapshot(
        arrays | ({} if final is None else final._asdict()),
        numbers | {"is_trained": final is not None},
    )


def _start_last_part(
    training: _Training, begun: _Begun, problem: Problem, args: RunArguments
) -> RunState:
    runs = init_runs(begun.run_key[None], begun.search, problem, args.num_finalists)
    pool = jax.tree.map(lambda leaf: leaf[0], runs.stats.pool)
    state = training.carry[0]
    return resume_run(runs, state, pool, training.layer_calls, *training.counts.tolist())


def _run_last_part(
    training: _Training,
    final: _Final,
    search: RefreshableSearch,
    problem: Problem,
    args: RunArguments,
    checkpoints: Checkpoints,
    line: ProgressLine,
) -> tuple[_Final, str | None]:
    """Search with fixed weights until the budget is spent, or until the run is stopped."""

    def extend(runs: RunState, trace: Trace) -> _Final:
        both = jax.tree.map(lambda *leaves: np.concatenate(leaves), final.trace, trace)
        return _Final(runs, both)

    runs, trace, stopped_by = advance_runs(
        final.runs,
        search,
        problem,
        StopRule(np.int32(args.budget), np.float32(-np.inf)),
        line,
        after_part=lambda history: checkpoints.after_part(
            lambda: _make_snapshot(training, extend(history.runs, history.trace))
        ),
    )
    return extend(runs, trace), stopped_by


def _update_bank(bank: Bank, old: Bank, trained: Bank) -> Bank:
    """Return the bank with the trained weights, their versions, and origins that say so."""
    versions = trained.get_versions()
    is_trained = np.asarray(versions > old.get_versions()).tolist()
    origins = tuple(
        f"trained while searching, from {origin}" if is_new else origin
        for origin, is_new in zip(old.origins, is_trained, strict=bool(old.origins))
    )
    return dataclasses.replace(
        bank, layers=trained.layers, heads=trained.heads, versions=versions, origins=origins
    )


@jax.jit
def _refresh(
    search: RefreshableSearch, state: PyTree, problem: Problem, chains: Int[Array, "C L"]
) -> tuple[PyTree, Int[Array, ""]]:
    return search.refresh(state, problem, chains)


@jax.jit
def _train_round(
    policy: SharedUpdates,
    key: Array,
    carry: tuple[PyTree, tune.State],
    search: RefreshableSearch,
    problem: Problem,
    training: Problem,
) -> tuple[tuple[PyTree, tune.State], Array, tuple[Array, Array], Array, Array]:
    """Take a step of the search, then gradient steps on some of its chains.

    Returns:
      The carry, the lowest loss, the layer calls of the step and of the refresh, the number of
      layers of each trained chain `[U]`, and two counts: the chains that were scored, and how many
      of them have no finite loss.
    """
    step_key, draw_key, train_key = jax.random.split(key, 3)
    state, tuning = carry
    state, info = search.step(step_key, state, problem.with_bank(tuning.bank))
    # A loss that is not finite has no gradient to follow.
    is_scored = info.chains[:, 0] != PADDING
    is_usable = is_scored & jnp.isfinite(info.loss)
    draws = jax.random.uniform(draw_key, is_usable.shape, jnp.float32)
    order = jnp.argsort(jnp.where(is_usable, draws, 2.0))
    chains = jnp.where(is_usable[:, None], info.chains, PADDING)[order[: policy.num_updates]]
    tuning = tune.train_on(train_key, tuning, training, chains, policy.optimizer)
    none = jnp.full_like(info.chains[:1], PADDING)
    state, calls = search.refresh(state, problem.with_bank(tuning.bank), none)
    length = count_layers(chains, problem.bank.num_layers)
    counts = jnp.stack([is_scored.sum(), (is_scored & ~is_usable).sum()])
    return (state, tuning), info.loss.min(), (info.layer_calls, calls), length, counts
