"""Fronts: the best chain of each length, of a ChainBench problem or of a search."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from records import use_tables

import jchain as jc

DEPTH = jc.chainbench.MAX_LAYERS
LENGTHS = tuple(range(1, DEPTH + 1))
NUM_TRACED = 41  # number of first steps for which lengths of chains are counted


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
    every stop of the scored chains added. The lengths are `[S, T, D + 1]`.
    """
    results = jc.run_many(
        keys, use_tables(search), problem, budget=int(budgets[-1]), starts=None, record="chains"
    )
    found = [read_fronts(result, table, problem, budgets) for result in results]
    pad = [(0, 0), (0, 0), (0, DEPTH - problem.max_layers)]
    scored, stops, lengths = (np.stack(rows) for rows in zip(*found, strict=True))
    return [
        *(np.pad(front, pad, constant_values=-1) for front in (scored, stops)),
        np.pad(lengths, pad),
    ]


def read_fronts(
    result: jc.Result, table: "Table", problem: jc.Problem, budgets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the fronts at each budget, and the lengths of the chains, from the scored chains."""
    scored, truth = result.scored, table.loss[table.best[: problem.max_layers + 1]]
    assert scored is not None
    num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
    space = jc.chain.ChainSpace(num_layers, num_heads, problem.max_layers)
    length = np.asarray(jc.chain.count_layers(jnp.asarray(scored.chains), num_layers))
    place = np.asarray(space.index(jnp.asarray(scored.chains)))
    ends, end_length = find_stops(problem, jnp.asarray(scored.chains))
    end_place, end_length = np.asarray(space.index(ends)), np.asarray(end_length)
    # Stops are compared without the penalty, which is the same for all chains of one length.
    end_loss = table.loss[end_place]
    per_chain = len(end_place) // max(len(place), 1)
    fronts = np.full((2, len(budgets), len(truth)), -1)
    for i, budget in enumerate(budgets):
        num = int(np.searchsorted(scored.layer_calls, budget, side="right"))
        fronts[0, i] = find_front(scored.loss[:num], place[:num], length[:num], len(truth))
        ends = slice(0, num * per_chain)
        fronts[1, i] = find_front(end_loss[ends], end_place[ends], end_length[ends], len(truth))
    step = scored.step - 1
    # A run with the best chain of each length is complete, so what follows is not counted.
    missing = [
        np.flatnonzero((length == n) & (table.loss[place] <= truth[n]))[:1]
        for n in range(problem.min_layers, len(truth))
    ]
    missing += [
        np.flatnonzero((end_length == n) & (end_loss <= truth[n]))[:1] // per_chain
        for n in range(len(truth))
    ]
    last = step[max(rows[0] for rows in missing)] if all(map(len, missing)) else NUM_TRACED
    lengths = np.zeros((NUM_TRACED, len(truth)), int)
    is_traced = (step < NUM_TRACED) & (step <= last)
    np.add.at(lengths, (step[is_traced], length[is_traced]), 1)
    return fronts[0], fronts[1], lengths


def find_front(
    loss: np.ndarray, place: np.ndarray, length: np.ndarray, num_lengths: int
) -> np.ndarray:
    """Return the place of the best chain of each length, or -1 if there is none."""
    front = np.full(num_lengths, -1)
    for n in range(num_lengths):
        rows = np.flatnonzero((length == n) & np.isfinite(loss))
        if len(rows):
            front[n] = place[rows[loss[rows].argmin()]]
    return front


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
