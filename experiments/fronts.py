"""Fronts: the best chain of each length, of a ChainBench problem or of a search."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from records import use_tables

import jchain as jc

DEPTH = jc.chainbench.MAX_LAYERS
LENGTHS = tuple(range(1, DEPTH + 1))
# A run ends when free steps outnumber the others by MAX_FREE_STEPS: little is left to score.
MAX_FREE_STEPS, MAX_STEPS = 100, 1000
NUM_TRACED = 41  # number of first steps for which lengths of chains are counted


class Front(NamedTuple):
    """The best chain of each number of layers."""

    loss: jax.Array  # [B, D + 1], +inf without a chain
    place: jax.Array  # [B, D + 1], index into the table, -1 without a chain


class Run(NamedTuple):
    """The state of a run."""

    key: Any
    state: Any
    layer_calls: Any
    num_free: Any  # free steps minus later steps with a cost
    is_over: Any  # [B], by budget
    scored: Front
    stops: Front  # includes every stop of a scored chain by every head
    lengths: Any  # [T, D + 1], number of chains of each length that a step scored


class Table:
    """The losses of all chains of a ChainBench problem."""

    def __init__(self, folder: Path, name: str) -> None:
        self.solved = jc.chainbench.load(folder, name)
        self.loss = self.solved.loss["search"]
        bank = self.solved.bank
        self.length = np.asarray(
            jc.chain.count_layers(jnp.asarray(self.solved.chains), bank.num_layers)
        )
        self.best = np.array(
            [
                np.flatnonzero(self.length == n)[self.loss[self.length == n].argmin()]
                for n in range(DEPTH + 1)
            ]
        )
        self.unit = float(self.loss[self.best[0]])  # the unit of penalties

    def problem(self, penalty: float = 0.0, length: int | None = None) -> jc.Problem:
        """Return the problem with losses from the table.

        Args:
          penalty: layer penalty, in units of the best head's loss.
          length: number of layers of every chain; None for any.
        """
        most = DEPTH if length is None else length
        bank, features = self.solved.bank, self.solved.features
        num_chains = jc.chain.ChainSpace(bank.num_layers, bank.num_heads, most).num_chains
        num_prefixes = jc.chain.ChainSpace(bank.num_layers, 1, most).num_chains
        penalized = self.loss + penalty * self.unit * self.length
        least = 0 if length is None else length
        return jc.chainbench.tabular.make_problem(
            bank, penalized[:num_chains], most, features[:num_prefixes], min_layers=least
        )

    def read(self, places: np.ndarray, split: str = "search") -> np.ndarray:
        """Look up losses; +inf without a chain."""
        return np.where(places >= 0, self.solved.loss[split][places], np.inf)

    def at_most(self, places: np.ndarray) -> np.ndarray:
        """Return the lowest losses with at most 1, 2, ... layers, `[..., D]`, of a front."""
        return np.minimum.accumulate(self.read(places), axis=-1)[..., 1:]

    def regret(self, places: np.ndarray) -> np.ndarray:
        """Compute the regret of the best chain of at most 1, 2, ... layers, `[..., D]`."""
        truth = self.at_most(self.best)
        middle = np.array([np.median(self.loss[self.length <= n]) for n in LENGTHS])
        return np.minimum((self.at_most(places) - truth) / (middle - truth), 1.0)

    def test_regret(self, places: np.ndarray) -> np.ndarray:
        loss = self.solved.loss["test"]
        return (loss[places] - loss.min()) / (np.median(loss) - loss.min())


def run_fronts(
    keys: Any, search: Any, table: "Table", problem: jc.Problem, budgets: np.ndarray
) -> list[np.ndarray]:
    """Run a search, and return its fronts at each budget and the lengths of its chains.

    The fronts are places in the table, `[S, B, D + 1]`: those of the scored chains, and those with
    every stop of the scored chains added.
    """
    # Stops are compared without the penalty, which is the same for all chains of one length.
    loss = jnp.asarray(
        table.loss[
            : jc.chain.ChainSpace(
                problem.bank.num_layers, problem.bank.num_heads, problem.max_layers
            ).num_chains
        ]
    )
    truth = jnp.asarray(table.loss[table.best[: problem.max_layers + 1]])
    scored, stops, lengths = run_all_fronts(
        keys, use_tables(search), problem.without_names(), loss, truth, jnp.asarray(budgets)
    )
    pad = [(0, 0), (0, 0), (0, DEPTH - problem.max_layers)]
    fronts = [np.pad(np.asarray(front.place), pad, constant_values=-1) for front in (scored, stops)]
    return [*fronts, np.pad(np.asarray(lengths), pad)]


@jax.jit
def run_all_fronts(
    keys: Any,
    search: Any,
    problem: jc.Problem,
    loss: jax.Array,
    truth: jax.Array,
    budgets: jax.Array,
) -> tuple[Any, Any, Any]:
    """Run all seeds as `jc.run` does, up to the largest budget, and record what they score."""
    num_lengths = problem.max_layers + 1
    empty = Front(
        jnp.full((budgets.size, num_lengths), jnp.inf),
        jnp.full((budgets.size, num_lengths), -1, dtype=jnp.int32),
    )

    def start(key: Any) -> Run:
        key, init_key = jax.random.split(key)
        zero, is_over = jnp.zeros((), jnp.int32), jnp.zeros(budgets.size, bool)
        lengths = jnp.zeros((NUM_TRACED, num_lengths), jnp.int32)
        return Run(key, search.init(init_key, problem), zero, zero, is_over, empty, empty, lengths)

    def step(carry: tuple[Any, Run]) -> tuple[Any, Run]:
        t, runs = carry
        return t + 1, jax.vmap(lambda run: step_run(t, run, search, problem, loss, truth, budgets))(
            runs
        )

    # As in jc.run, the loop is outside of the vmap. Inside, each step would copy the whole state.
    carry = (jnp.array(0), jax.vmap(start)(keys))
    runs = jax.lax.while_loop(lambda carry: ~carry[1].is_over.all(), step, carry)[1]
    return runs.scored, runs.stops, runs.lengths


def step_run(
    t: Any,
    run: Run,
    search: Any,
    problem: jc.Problem,
    loss: jax.Array,
    truth: jax.Array,
    budgets: jax.Array,
) -> Run:
    num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
    key, step_key = jax.random.split(run.key)
    state, info = search.step(step_key, run.state, problem)
    layer_calls = run.layer_calls + info.layer_calls.astype(jnp.int32)
    num_free = jnp.where(info.layer_calls == 0, run.num_free + 1, jnp.maximum(run.num_free - 1, 0))
    is_counted = ~run.is_over & (layer_calls <= budgets)
    is_over = (
        ~is_counted | (layer_calls >= budgets) | (num_free >= MAX_FREE_STEPS) | (t + 1 >= MAX_STEPS)
    )
    is_chain = info.chains[:, 0] >= 0
    chains = jnp.where(
        is_chain[:, None],
        info.chains,
        jnp.full_like(info.chains[0], -1).at[0].set(num_layers)[None],
    )
    length = jc.chain.count_layers(chains, num_layers)
    place = jc.chain.ChainSpace(num_layers, num_heads, chains.shape[-1] - 1).index(chains)
    scored = improve(run.scored, jnp.where(is_chain, info.loss, jnp.inf), place, length, is_counted)
    ends, end_length = find_stops(problem, chains)
    end_place = jc.chain.ChainSpace(num_layers, num_heads, ends.shape[-1] - 1).index(ends)
    end_loss = jnp.where(
        jnp.repeat(is_chain, end_length.size // is_chain.size), loss[end_place], jnp.inf
    )
    stops = improve(run.stops, end_loss, end_place, end_length, is_counted)
    counts = jnp.sum(
        (length[:, None] == jnp.arange(problem.max_layers + 1)) & is_chain[:, None], axis=0
    )
    lengths = run.lengths.at[t].set(jnp.where(is_counted[-1], counts, 0), mode="drop")
    # A run with the best chain of each length is complete.
    is_scored = (loss[scored.place] <= truth) & (scored.place >= 0) | (
        jnp.arange(truth.size) < problem.min_layers
    )
    is_over |= (is_scored & (stops.loss <= truth)).all(axis=1)
    return Run(key, state, layer_calls, num_free, is_over, scored, stops, lengths)


def improve(
    front: Front, loss: jax.Array, place: jax.Array, length: jax.Array, is_counted: jax.Array
) -> Front:
    """Update the front with these chains, for the budgets that still count them."""
    own = jnp.where(length[None] == jnp.arange(front.loss.shape[1])[:, None], loss[None], jnp.inf)
    is_better = (own.min(axis=1)[None] < front.loss) & is_counted[:, None]
    best = own.argmin(axis=1)
    return Front(
        jnp.where(is_better, own.min(axis=1)[None], front.loss),
        jnp.where(is_better, place[best][None], front.place),
    )


def find_stops(problem: jc.Problem, chains: jax.Array) -> tuple[jax.Array, jax.Array]:
    """End each chain after each of its layers by each head.

    Returns:
      Chains `[P L K, L]`, with the last stop of a chain repeated, and their lengths `[P L K]`.
    """
    num_layers, slots = problem.bank.num_layers, jnp.arange(chains.shape[1])
    length = jc.chain.count_layers(chains, num_layers)
    end = jnp.minimum(slots[None], length[:, None])[:, :, None, None]
    head = (num_layers + jnp.arange(problem.bank.num_heads))[None, None, :, None]
    rows = jnp.where(slots < end, chains[:, None, None], jnp.where(slots == end, head, -1))
    ends = jnp.broadcast_to(end[..., 0], rows.shape[:-1])
    return rows.reshape(-1, slots.size), ends.reshape(-1)
