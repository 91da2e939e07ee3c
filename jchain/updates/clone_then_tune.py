"""The policy that tunes copies of layers between rounds of the search."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Array, Int, PyTree
from jchain.engine.evaluate import evaluate
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search import base
from jchain.search.base import Refreshable, Search
from jchain.search.progress import Progress
from jchain.train import OPTIMIZER
from jchain.updates.clones import CloneBank
from jchain.updates.policies import (
    Outcome,
    Policy,
    RunArguments,
    check_budget,
    check_sizes,
    count_chain_layers,
    init_search,
    make_training_problem,
    mention_reserved_calls,
    reserve_for_tuning,
    resume_run,
    training_cost,
)


@pytree_dataclass
class CloneThenTune(Policy):
    """In rounds: search, then tune copies of the best chain's layers, which join the bank.

    The original layers and all heads stay unchanged, to the bit. Copies take tokens that the bank
    has reserved (`Bank.reserve`), so all rounds share one program. Until then these tokens hold
    copies of other layers, which chains may use. Copies may be copied again; their origin names the
    source. If a module has no reserved token left, its layers are used unchanged. After each round
    a search that is `Refreshable` continues; any other search restarts, and the best chains so far
    are kept.

    Attributes:
      num_rounds: equal parts of the budget.
      num_steps: gradient steps in each round.
      capacity: tokens reserved for copies of each module; enough for all rounds if None.
      optimizer: any optax transformation.
    """

    num_rounds: int = static(default=4)
    num_steps: int = static(default=100)
    capacity: int | None = static(default=None)
    optimizer: optax.GradientTransformation = static(default=OPTIMIZER)

    def __post_init__(self) -> None:
        check_sizes(num_rounds=self.num_rounds, num_steps=self.num_steps)
        if self.capacity is not None:
            check_sizes(capacity=self.capacity)

    def _run(self, args: RunArguments) -> Outcome:
        base.check_arguments(args.search, args.problem, args.budget, args.num_finalists)
        budget, problem = args.budget, args.problem
        training = make_training_problem(problem, args.train)
        _check_problem(args.search, problem)
        reserved = reserve_for_tuning(problem, args.train, self.num_steps)
        check_budget(budget, self.num_rounds * reserved)
        capacity = self.num_rounds * problem.max_layers if self.capacity is None else self.capacity
        clones = CloneBank.reserve(problem.bank, capacity)
        start_key, *round_keys = jax.random.split(args.key, self.num_rounds + 1)
        problem = problem.with_bank(clones.bank)
        runs = base.init_runs(start_key[None], args.search, problem, args.num_finalists)
        traces, update_calls = [], 0
        with Progress(budget, is_shown=args.progress) as line:
            for i, round_key in enumerate(round_keys):
                tune_key, restart_key = jax.random.split(round_key)
                round_budget = budget * (i + 1) // self.num_rounds - reserved
                stop = base.StopRule(np.int32(round_budget), np.float32(-np.inf))
                runs, trace = base.advance_runs(
                    runs, args.search, problem, stop, line, keeps_state=True
                )
                traces.append(trace)
                if int(runs.stats.layer_calls[0]) + reserved > budget:
                    break
                best = clones.replace_free_tokens(runs.stats.pool.chains[0])
                clones, chain = self._tune_best(tune_key, clones, training, runs, best)
                if chain is None:
                    runs = _resume_unchanged(runs)
                    continue
                problem = problem.with_bank(clones.bank)
                cost = training_cost(problem, args.train, count_chain_layers(chain), self.num_steps)
                update_calls += cost
                key = restart_key if i < self.num_rounds - 1 else None
                runs, is_affordable = _continue_with(
                    chain, key, args, problem, runs, best, training_calls=cost
                )
                traces.append(_record_totals(runs))
                if not is_affordable:
                    break
        trace = jax.tree.map(lambda *leaves: np.concatenate(leaves), *traces)
        with mention_reserved_calls(reserved, budget):
            return Outcome(clones.bank, base.make_results(runs, trace, budget)[0], update_calls)

    def _tune_best(
        self,
        key: Array,
        clones: CloneBank,
        training: Problem,
        runs: base.RunState,
        chains: Int[np.ndarray, "Q L"],
    ) -> tuple[CloneBank, Int[np.ndarray, "L"] | None]:
        """The bank with tuned copies of the best chain, and their chain; None if no copy."""
        if not np.isfinite(runs.stats.pool.loss[0, 0]):
            return clones, None
        clones, chain = clones.tune_clones(
            key, training, chains[0], num_steps=self.num_steps, optimizer=self.optimizer
        )
        return clones, None if (chain == chains[0]).all() else chain


def _check_problem(search: Search, problem: Problem) -> None:
    """Check what a bank that grows cannot support."""
    if base.holds_chains(search):
        raise ValueError(
            "expected a search without starts: heads get other tokens when copies join the bank"
        )
    if problem.layer_cost.ndim > 0:
        raise ValueError(
            f"expected one layer_cost for all layers, got {problem.layer_cost.shape[0]}"
        )


def _resume_unchanged(runs: base.RunState) -> base.RunState:
    state, pool = jax.tree.map(lambda leaf: leaf[0], (runs.state, runs.stats.pool))
    return resume_run(runs, state, pool, 0)


def _continue_with(
    chain: Int[np.ndarray, "L"],
    restart_key: Array | None,
    args: RunArguments,
    problem: Problem,
    runs: base.RunState,
    chains: Int[np.ndarray, "Q L"],
    *,
    training_calls: int,
) -> tuple[base.RunState, bool]:
    """Score the chain of copies, and move the search to the new bank unless `restart_key` is None.

    Returns:
      The run, and False if the budget does not pay for moving the search.
    """
    spent = int(runs.stats.layer_calls[0])
    state, pool = jax.tree.map(lambda leaf: leaf[0], (runs.state, runs.stats.pool))
    loss = evaluate(problem, chain[None]).loss
    old = base.merge(base.empty_pool(args.num_finalists, problem), jnp.asarray(chains), pool.loss)
    pool = base.merge(old, jnp.asarray(chain)[None], loss)
    paid, calls = training_calls + count_chain_layers(chain), 0
    if restart_key is not None:
        state, calls = _move_search(restart_key, args.search, state, problem, pool.chains)
    is_affordable = spent + paid + calls <= args.budget
    charged = paid + calls * is_affordable
    return resume_run(runs, state, pool, charged, 1, int(not jnp.isfinite(loss[0]))), is_affordable


def _move_search(
    key: Array, search: Search, state: PyTree, problem: Problem, chains: Array
) -> tuple[PyTree, int]:
    """The state of a search under new weights, and its cost in layer calls."""
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


def _record_totals(runs: base.RunState) -> base.Trace:
    """The totals of the run, as one more step of its trace."""
    stats = runs.stats
    return base.Trace(stats.layer_calls[None], stats.pool.loss[None, :, 0], jnp.ones((1, 1), bool))
