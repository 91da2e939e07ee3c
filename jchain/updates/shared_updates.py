"""The policy that trains sampled chains during the search."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Array, Int, Key, PyTree
from jchain.bank import Bank
from jchain.chain import PADDING, count_layers
from jchain.problem import Problem
from jchain.pytree import check_at_least_one, pytree_dataclass, static
from jchain.runs.driver import advance_runs, check_arguments
from jchain.runs.progress import ProgressLine
from jchain.runs.result import StopRule, make_results
from jchain.runs.stepping import MAX_FREE_STEPS, init_runs
from jchain.search.protocol import Refreshable, Search
from jchain.train import OPTIMIZER
from jchain.updates import tune
from jchain.updates.policies import (
    Outcome,
    RunArguments,
    UpdatePolicy,
    init_search,
    make_training_problem,
    resume_run,
    tuning_cost,
)


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
    """The search and the bank after training, and the cost of the training."""

    state: PyTree  # the state of the search
    tuning: tune.State
    layer_calls: int
    update_calls: int  # the part of layer_calls that gradient steps cost
    counts: Int[np.ndarray, "2"]  # the chains scored, and how many of them have no finite loss


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
        check_at_least_one(num_updates=self.num_updates)
        if not 0 < self.final_share < 1:
            raise ValueError(f"expected a final_share above 0 and below 1, got {self.final_share}")

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

    def apply(self, args: RunArguments) -> Outcome:
        begun = self._begin(args)
        search, problem = begun.search, begun.problem
        with ProgressLine(args.budget, is_shown=args.progress) as line:
            trained = self._train(begun, args, line)
            final = problem.with_bank(trained.tuning.bank)
            runs = init_runs(begun.run_key[None], search, final, args.num_finalists)
            pool = jax.tree.map(lambda leaf: leaf[0], runs.stats.pool)
            runs = resume_run(
                runs, trained.state, pool, trained.layer_calls, *trained.counts.tolist()
            )
            stop = StopRule(np.int32(args.budget), np.float32(-np.inf))
            runs, trace = advance_runs(runs, search, final, stop, line)
        result = make_results(runs, trace, args.budget, final)[0]
        bank = _update_bank(begun.bank, args.problem.bank, trained.tuning.bank)
        return Outcome(bank, result, trained.update_calls)

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

    def _train(self, begun: _Begun, args: RunArguments, line: ProgressLine) -> _Training:
        """Alternate steps of the search and gradient steps until the last part of the budget."""
        key, carry, start_calls = begun.key, begun.carry, begun.start_calls
        layer_calls = start_calls
        update_calls = num_free = total = step_calls = 0
        best, counts = np.inf, np.zeros(2, np.int32)
        # Stop after too many consecutive steps that cost nothing, as jc.run does.
        while num_free < MAX_FREE_STEPS:
            key, round_key = jax.random.split(key)
            new, lowest, calls, length, scored = _train_round(
                self, round_key, carry, begun.search, begun.problem, begun.training
            )
            cost = tuning_cost(args.problem, args.train, np.asarray(length))
            total, step_calls = int(sum(calls)) + cost, max(step_calls, int(calls[0]))
            if layer_calls + total > self._limit(args.budget, step_calls):
                break
            carry, best, counts = new, min(best, float(lowest)), counts + np.asarray(scored)
            layer_calls, update_calls = layer_calls + total, update_calls + cost
            num_free = 0 if total else num_free + 1
            line.update(layer_calls, best)
        if layer_calls == start_calls and num_free == 0:
            raise self._make_error(args.budget, total, step_calls)
        state, tuning = carry
        return _Training(state, tuning, layer_calls, update_calls, counts)

    def _limit(self, budget: int, step_calls: int) -> float:
        """Return the layer calls before the last part, which must pay for one step."""
        return float(min((1 - self.final_share) * budget, budget - step_calls))

    def _make_error(self, budget: int, total: int, step_calls: int) -> ValueError:
        return ValueError(
            f"expected a budget whose first {1 - self.final_share:.0%} pay for a step of the "
            f"search and its gradient steps ({total} layer calls) and whose rest pays for "
            f"another step ({step_calls} layer calls), got {budget}"
        )


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
