"""The policy that tunes copies of layers between rounds of the search."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Array, Int, PyTree
from jchain.arguments import check_at_least_one, check_instances, checked
from jchain.engine.evaluation import evaluate
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.runs.driver import advance_runs, check_arguments, check_first_step
from jchain.runs.front import merge_front
from jchain.runs.progress import ProgressLine
from jchain.runs.result import (
    MAX_FREE_STEPS,
    RunState,
    Start,
    StopRule,
    Trace,
    empty_trace,
    make_results,
)
from jchain.runs.run_folder import Snapshot
from jchain.runs.starts import begin_at
from jchain.runs.stepping import init_runs
from jchain.search.pool import empty_pool, merge
from jchain.search.protocol import Refreshable, Search, charges_fractions
from jchain.train import OPTIMIZER
from jchain.updates.clones import CloneBank
from jchain.updates.policies import (
    Outcome,
    RunArguments,
    UpdatePolicy,
    check_budget,
    count_chain_layers,
    init_search,
    make_training_problem,
    mention_reserved_calls,
    open_checkpoints,
    reserve_for_tuning,
    resume_run,
    tuning_cost,
)
from jchain.updates.saving import Checkpoints


class _Rounds(NamedTuple):
    """The search and its bank between two rounds, with the records of earlier rounds."""

    runs: RunState  # the state of a single run
    clones: CloneBank
    start: Start | None  # the chains that were scored before the first round
    trace: Trace = empty_trace(1)
    update_calls: int = 0  # layer calls of gradient steps
    round_index: int = 0
    # Layer calls at the beginning of the present round; None between two rounds.
    spent: int | None = None


@pytree_dataclass
class CloneThenTune(UpdatePolicy):
    """A policy that alternates between searching and tuning copies of the best chain's layers.

    The tuned copies join the bank. The weights of the original layers and of all heads stay exactly
    the same. The copies get tokens that the bank has reserved (`Bank.reserve`), so all rounds share
    one program. A reserved token that is still free holds a copy of another layer, and chains may
    contain it. Copies may be copied again; their origin names the source. If a module has no free
    token left, its layers are not copied. After each round, a `Refreshable` search continues. Any
    other search restarts, but its best chains so far are kept.

    Attributes:
      num_rounds: number of rounds of searching and tuning, which divide the budget equally.
      num_steps: number of gradient steps in each round.
      capacity: number of tokens to reserve per module for copies; enough for all rounds if None.
      optimizer: the optax optimizer; AdamW by default.
    """

    num_rounds: int = static(default=4)
    num_steps: int = static(default=100)
    capacity: int | None = static(default=None)
    optimizer: optax.GradientTransformation = static(default=OPTIMIZER)

    def __post_init__(self) -> None:
        check_instances(optax.GradientTransformation, "optax.adam(1e-3)", optimizer=self.optimizer)
        check_at_least_one(num_rounds=self.num_rounds, num_steps=self.num_steps)
        if self.capacity is not None:
            check_at_least_one(capacity=self.capacity)

    @checked
    def check(self, args: RunArguments) -> None:
        check_arguments(args.search, args.problem, args.budget, args.num_finalists)
        _check_search(args.search)
        reserved = self._reserve(args)
        rounds = self._start(jax.random.split(args.key, self.num_rounds + 1)[0], args)
        problem = args.problem.with_bank(rounds.clones.bank)
        stop = StopRule(np.int32(args.budget - reserved), np.float32(-np.inf))
        with mention_reserved_calls(reserved, args.budget):
            check_first_step(rounds.runs, args.search, problem, stop, rounds.start)

    def _reserve(self, args: RunArguments) -> int:
        """Return the layer calls that each round keeps for gradient steps."""
        reserved = reserve_for_tuning(args.problem, args.train, self.num_steps)
        check_budget(args.budget, self.num_rounds * reserved)
        return reserved

    @checked
    def apply(self, args: RunArguments) -> Outcome:
        check_arguments(args.search, args.problem, args.budget, args.num_finalists)
        _check_search(args.search)
        training = make_training_problem(args.problem, args.train)
        _check_problem(args.problem)
        reserved = self._reserve(args)
        start_key, *round_keys = jax.random.split(args.key, self.num_rounds + 1)
        rounds = self._start(start_key, args)
        with (
            open_checkpoints(self, args) as checkpoints,
            ProgressLine(args.budget, is_shown=args.progress) as line,
        ):
            rounds = _restore(rounds, checkpoints)
            stopped_by = None
            for i in range(rounds.round_index, self.num_rounds):
                budget = args.budget * (i + 1) // self.num_rounds - reserved
                rounds, stopped_by = _search_round(rounds, args, budget, checkpoints, line)
                if stopped_by is not None:
                    break
                if int(rounds.runs.stats.layer_calls[0]) + reserved > args.budget:
                    break
                is_last = i == self.num_rounds - 1
                rounds, is_affordable = self._tune_round(
                    round_keys[i], rounds, args, training, is_last=is_last
                )
                if not is_affordable:
                    break
            is_over = stopped_by is None
            if is_over:
                rounds = rounds._replace(round_index=self.num_rounds)
            checkpoints.finish(lambda: _make_snapshot(rounds))
            stopped_by = stopped_by or checkpoints.signal_name
        with mention_reserved_calls(reserved, args.budget):
            problem = args.problem.with_bank(rounds.clones.bank)
            stop = StopRule(np.int32(args.budget), np.float32(-np.inf))
            (result,) = make_results(rounds.runs, rounds.trace, stop, problem, rounds.start)
        result = result._replace(
            is_complete=is_over, ended_by="budget" if is_over else None, stopped_by=stopped_by
        )
        return Outcome(rounds.clones.bank, result, rounds.update_calls)

    def _start(self, key: Array, args: RunArguments) -> _Rounds:
        """Return the state before the first round, with tokens reserved for copies."""
        capacity = self.capacity
        if capacity is None:
            capacity = self.num_rounds * args.problem.max_layers
        clones = CloneBank.reserve(args.problem.bank, capacity)
        problem = args.problem.with_bank(clones.bank)
        runs = init_runs(key[None], args.search, problem, args.num_finalists)
        if len(args.starts) == 0:
            return _Rounds(runs, clones, None)
        # The heads follow the reserved tokens.
        num_new = clones.bank.num_layers - args.problem.bank.num_layers
        is_head = args.starts >= args.problem.bank.num_layers
        starts = np.where(is_head, args.starts + num_new, args.starts).astype(np.int32)
        stop = StopRule(np.int32(args.budget), np.float32(-np.inf))
        runs, start = begin_at(runs, args.search, problem, starts, stop)
        return _Rounds(runs, clones, start)

    def _tune_round(
        self,
        key: Array,
        rounds: _Rounds,
        args: RunArguments,
        training: Problem,
        *,
        is_last: bool,
    ) -> tuple[_Rounds, bool]:
        """Tune copies of the best chain's layers.

        Returns:
          The state after the round, and False if the budget does not suffice for another round.
        """
        tune_key, restart_key = jax.random.split(key)
        runs = rounds.runs
        best = rounds.clones.replace_free_tokens(runs.stats.pool.chains[0])
        on_front = rounds.clones.replace_free_tokens(runs.stats.front.chains[0])
        clones, chain = self._tune_best(tune_key, rounds.clones, training, runs, best)
        if chain is None:
            return rounds._replace(
                runs=_resume_unchanged(runs), round_index=rounds.round_index + 1
            ), True
        problem = args.problem.with_bank(clones.bank)
        cost = tuning_cost(problem, args.train, count_chain_layers(chain), self.num_steps)
        next_key = None if is_last else restart_key
        runs, is_affordable = _continue_with(
            chain, next_key, args, problem, runs, best, on_front, training_calls=cost
        )
        rounds = rounds._replace(
            runs=runs,
            clones=clones,
            trace=_concat(rounds.trace, _record_totals(runs)),
            update_calls=rounds.update_calls + cost,
            round_index=rounds.round_index + 1,
        )
        return rounds, is_affordable

    def _tune_best(
        self,
        key: Array,
        clones: CloneBank,
        training: Problem,
        runs: RunState,
        chains: Int[np.ndarray, "Q L"],
    ) -> tuple[CloneBank, Int[np.ndarray, "L"] | None]:
        """Tune copies of the layers of the best chain.

        Returns:
          The new bank and the chain of copies, which is None if nothing was copied.
        """
        if not np.isfinite(runs.stats.pool.loss[0, 0]):
            return clones, None
        clones, chain = clones.tune_clones(
            key, training, chains[0], num_steps=self.num_steps, optimizer=self.optimizer
        )
        return clones, None if (chain == chains[0]).all() else chain


def _search_round(
    rounds: _Rounds, args: RunArguments, budget: int, checkpoints: Checkpoints, line: ProgressLine
) -> tuple[_Rounds, str | None]:
    """Continue the search until `budget` layer calls are spent in total.

    Returns:
      The state after the search, and why it was stopped; None at its end.
    """
    problem = args.problem.with_bank(rounds.clones.bank)
    stop = StopRule(np.int32(budget), np.float32(-np.inf))
    before = int(rounds.runs.stats.layer_calls[0]) if rounds.spent is None else rounds.spent

    def extend(runs: RunState, trace: Trace) -> _Rounds:
        return rounds._replace(runs=runs, trace=_concat(rounds.trace, trace), spent=before)

    runs, trace, stopped_by = advance_runs(
        rounds.runs,
        args.search,
        problem,
        stop,
        line,
        keep_state=True,
        after_part=lambda history: checkpoints.after_part(
            lambda: _make_snapshot(extend(history.runs, history.trace))
        ),
    )
    rounds = extend(runs, trace)
    if stopped_by is not None:
        return rounds, stopped_by
    # The next round repeats a step that the budget did not pay for, but with another key.
    after = runs.stats.layer_calls[0]
    is_paid = before < budget and (after >= budget or runs.stats.num_free[0] >= MAX_FREE_STEPS)
    key = runs.key if is_paid else jax.random.split(runs.key[0])[:1]
    return rounds._replace(runs=runs._replace(key=key), spent=None), None


def _concat(first: Trace, second: Trace) -> Trace:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), first, second)


def _restore(first: _Rounds, checkpoints: Checkpoints) -> _Rounds:
    """Return how far an earlier call came, or the beginning."""
    clones, bank = first.clones, first.clones.bank
    template = {
        "runs": first.runs,
        "bank": bank.without_names(),
        "sources": clones.source_tokens,
        "trace": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((-1, 1), leaf.dtype), empty_trace(1)
        ),
    }
    snapshot = checkpoints.restore(lambda info: template)
    if snapshot is None:
        return first
    arrays, info = snapshot
    bank = dataclasses.replace(
        jax.device_put(arrays["bank"]),
        names=tuple(info["names"]),
        origins=tuple(info["origins"]),
        parents=bank.parents,
        num_steps=bank.num_steps,
    )
    free_tokens = tuple(map(tuple, info["free_tokens"]))
    return first._replace(
        runs=jax.device_put(arrays["runs"]),
        clones=CloneBank(bank, free_tokens, arrays["sources"]),
        trace=arrays["trace"],
        update_calls=info["update_calls"],
        round_index=info["round_index"],
        spent=info["spent"],
    )


def _make_snapshot(rounds: _Rounds) -> Snapshot:
    clones, bank = rounds.clones, rounds.clones.bank
    arrays = {
        "runs": rounds.runs,
        "bank": bank.without_names(),
        "sources": clones.source_tokens,
        "trace": rounds.trace,
    }
    info = {
        "names": list(bank.names),
        "origins": list(bank.origins),
        "free_tokens": [list(tokens) for tokens in clones.free_tokens],
        "update_calls": rounds.update_calls,
        "round_index": rounds.round_index,
        "spent": rounds.spent,
    }
    return Snapshot(arrays, info)


def _check_search(search: Search) -> None:
    if charges_fractions(search):
        raise ValueError(
            "expected a search that charges whole layer calls with CloneThenTune, got "
            f"{type(search).__name__}"
        )


def _check_problem(problem: Problem) -> None:
    """Check that the problem allows adding tokens to the bank."""
    if problem.layer_cost.ndim > 0:
        raise ValueError(
            f"expected one layer_cost for all layers, got {problem.layer_cost.shape[0]}"
        )
    if problem.token_costs is not None:
        raise ValueError(
            "expected a problem without token_costs: copies that join the bank have no cost"
        )


def _resume_unchanged(runs: RunState) -> RunState:
    """Return the run, ready for the next round with the same bank."""
    state, pool = jax.tree.map(lambda leaf: leaf[0], (runs.state, runs.stats.pool))
    return resume_run(runs, state, pool, 0)


def _continue_with(
    chain: Int[np.ndarray, "L"],
    restart_key: Array | None,
    args: RunArguments,
    problem: Problem,
    runs: RunState,
    chains: Int[np.ndarray, "Q L"],
    front_chains: Int[np.ndarray, "F L"],
    *,
    training_calls: int,
) -> tuple[RunState, bool]:
    """Score the chain of copies, and move the search to the new bank unless `restart_key` is None.

    Returns:
      The run, and False if the budget does not suffice to move the search to the new bank.
    """
    spent = int(runs.stats.layer_calls[0])
    state, pool, front = jax.tree.map(
        lambda leaf: leaf[0], (runs.state, runs.stats.pool, runs.stats.front)
    )
    loss = evaluate(problem, chain[None]).loss
    old = merge(empty_pool(args.num_finalists, problem), jnp.asarray(chains), pool.loss)
    pool = merge(old, jnp.asarray(chain)[None], loss)
    front = merge_front(
        front._replace(chains=front_chains), problem, jnp.asarray(chain)[None], loss
    )
    front = jax.tree.map(lambda leaf: leaf[None], front)
    runs = runs._replace(stats=runs.stats._replace(front=front))
    paid, calls = training_calls + count_chain_layers(chain), 0
    if restart_key is not None:
        state, calls = _move_search(restart_key, args.search, state, problem, pool.chains)
    is_affordable = spent + paid + calls <= args.budget
    charged = paid + calls * is_affordable
    return resume_run(runs, state, pool, charged, 1, int(not jnp.isfinite(loss[0]))), is_affordable


def _move_search(
    key: Array, search: Search, state: PyTree, problem: Problem, chains: Array
) -> tuple[PyTree, int]:
    """Return the state of a search under new weights, and its cost in layer calls."""
    problem = problem.without_names()
    if isinstance(search, Refreshable):
        state, calls = _refresh(search, state, problem, chains)
        return state, int(calls)
    return init_search(search, key, problem), 0


@jax.jit
def _refresh(
    search: Refreshable, state: PyTree, problem: Problem, chains: Array
) -> tuple[PyTree, Array]:
    return search.refresh(state, problem, chains)


def _record_totals(runs: RunState) -> Trace:
    """Return the totals of the run as one more step for its trace."""
    stats = runs.stats
    return Trace(stats.layer_calls[None], stats.pool.loss[None, :, 0], jnp.ones((1, 1), bool))
