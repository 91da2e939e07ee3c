"""The best chain of each length: of a ChainBench problem, and those that a search finds within a budget."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from records import use_tables

import jchain as jc

DEPTH = jc.chainbench.MAX_LAYERS
LENGTHS = tuple(range(1, DEPTH + 1))
# A run is over that made so many more steps that cost nothing than others: it has next to nothing left to ask.
MAX_FREE_STEPS, MAX_STEPS = 100, 1000
NUM_TRACED = 41  # steps whose chains' lengths are counted


class Front(NamedTuple):
    """The best chain of each number of layers."""

    loss: jax.Array  # [B, D + 1], +inf where there is none
    place: jax.Array  # [B, D + 1], in the table


class Run(NamedTuple):
    """A run between two steps."""

    key: Any
    state: Any
    layer_calls: Any
    num_free: Any  # steps that cost nothing, less those that cost something since
    is_over: Any  # [B], by budget
    scored: Front
    stops: Front  # every stop of what was scored by every head
    lengths: Any  # [T, D + 1], how many chains of each length a step scored


class Table:
    """What is known of a problem."""

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
        self.unit = float(self.loss[self.best[0]])  # of prices

    def problem(self, price: float = 0.0, length: int | None = None) -> jc.Problem:
        """With losses that are looked up: of one length where one is given, with a price in units of the best head's loss."""
        most = DEPTH if length is None else length
        bank, features = self.solved.bank, self.solved.features
        num_chains = jc.chain.count(bank.num_layers, bank.num_heads, most)
        num_prefixes = jc.chain.count(bank.num_layers, 1, most)
        priced = self.loss + price * self.unit * self.length
        least = 0 if length is None else length
        return jc.chainbench.tabular.make_problem(
            bank, priced[:num_chains], most, features[:num_prefixes], min_layers=least
        )

    def read(self, places: np.ndarray, split: str = "search") -> np.ndarray:
        """Losses; +inf where there is no chain."""
        return np.where(places >= 0, self.solved.loss[split][places], np.inf)

    def at_most(self, places: np.ndarray) -> np.ndarray:
        """Losses `[..., D]` of the best of at most 1, 2, ... layers, of the best of each length `[..., D + 1]`."""
        return np.minimum.accumulate(self.read(places), axis=-1)[..., 1:]

    def regret(self, places: np.ndarray) -> np.ndarray:
        """Of the best of at most 1, 2, ... layers, `[..., D]`."""
        truth = self.at_most(self.best)
        middle = np.array([np.median(self.loss[self.length <= n]) for n in LENGTHS])
        return np.minimum((self.at_most(places) - truth) / (middle - truth), 1.0)

    def test_regret(self, places: np.ndarray) -> np.ndarray:
        loss = self.solved.loss["test"]
        return (loss[places] - loss.min()) / (np.median(loss) - loss.min())


def spend(
    keys: Any, search: Any, table: "Table", problem: jc.Problem, budgets: np.ndarray
) -> list[np.ndarray]:
    """Places of what was found within each budget, `[S, B, D + 1]`, scored and by stops; and lengths."""
    # What stops lose, without the price, which all chains of one length share.
    loss = jnp.asarray(
        table.loss[
            : jc.chain.count(problem.bank.num_layers, problem.bank.num_heads, problem.max_layers)
        ]
    )
    truth = jnp.asarray(table.loss[table.best[: problem.max_layers + 1]])
    scored, stops, lengths = spend_all(
        keys, use_tables(search), problem.without_names(), loss, truth, jnp.asarray(budgets)
    )
    pad = [(0, 0), (0, 0), (0, DEPTH - problem.max_layers)]
    fronts = [np.pad(np.asarray(front.place), pad, constant_values=-1) for front in (scored, stops)]
    return [*fronts, np.pad(np.asarray(lengths), pad)]


@jax.jit
def spend_all(
    keys: Any,
    search: Any,
    problem: jc.Problem,
    loss: jax.Array,
    truth: jax.Array,
    budgets: jax.Array,
) -> tuple[Any, Any, Any]:
    """Steps of all runs, counted as `jc.run` counts them, until the largest budget is used, with all that they score."""
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
        return t + 1, jax.vmap(lambda run: step_one(t, run, search, problem, loss, truth, budgets))(
            runs
        )

    # Outside of the vmap, as in jc.run: within, each step would copy the whole state.
    carry = (jnp.array(0), jax.vmap(start)(keys))
    runs = jax.lax.while_loop(lambda carry: ~carry[1].is_over.all(), step, carry)[1]
    return runs.scored, runs.stops, runs.lengths


def step_one(
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
    is_there = info.chains[:, 0] >= 0
    chains = jnp.where(
        is_there[:, None],
        info.chains,
        jnp.full_like(info.chains[0], -1).at[0].set(num_layers)[None],
    )
    length = jc.chain.count_layers(chains, num_layers)
    place = jc.chain.index(chains, num_layers, num_heads)
    scored = improve(run.scored, jnp.where(is_there, info.loss, jnp.inf), place, length, is_counted)
    ends, end_length = find_stops(problem, chains)
    end_place = jc.chain.index(ends, num_layers, num_heads)
    end_loss = jnp.where(
        jnp.repeat(is_there, end_length.size // is_there.size), loss[end_place], jnp.inf
    )
    stops = improve(run.stops, end_loss, end_place, end_length, is_counted)
    counts = jnp.sum(
        (length[:, None] == jnp.arange(problem.max_layers + 1)) & is_there[:, None], axis=0
    )
    lengths = run.lengths.at[t].set(jnp.where(is_counted[-1], counts, 0), mode="drop")
    # Nothing is left to be found where it has the best chain of each length.
    is_scored = (loss[scored.place] <= truth) & (scored.place >= 0) | (
        jnp.arange(truth.size) < problem.min_layers
    )
    is_over |= (is_scored & (stops.loss <= truth)).all(axis=1)
    return Run(key, state, layer_calls, num_free, is_over, scored, stops, lengths)


def improve(
    front: Front, loss: jax.Array, place: jax.Array, length: jax.Array, is_counted: jax.Array
) -> Front:
    """The front of before and of these chains, where they count."""
    own = jnp.where(length[None] == jnp.arange(front.loss.shape[1])[:, None], loss[None], jnp.inf)
    is_better = (own.min(axis=1)[None] < front.loss) & is_counted[:, None]
    best = own.argmin(axis=1)
    return Front(
        jnp.where(is_better, own.min(axis=1)[None], front.loss),
        jnp.where(is_better, place[best][None], front.place),
    )


def find_stops(problem: jc.Problem, chains: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each chain ended after each of its layers by each head, `[P L K, L]`, and their lengths; the last ones repeated."""
    num_layers, slots = problem.bank.num_layers, jnp.arange(chains.shape[1])
    length = jc.chain.count_layers(chains, num_layers)
    end = jnp.minimum(slots[None], length[:, None])[:, :, None, None]
    head = (num_layers + jnp.arange(problem.bank.num_heads))[None, None, :, None]
    rows = jnp.where(slots < end, chains[:, None, None], jnp.where(slots == end, head, -1))
    ends = jnp.broadcast_to(end[..., 0], rows.shape[:-1])
    return rows.reshape(-1, slots.size), ends.reshape(-1)
