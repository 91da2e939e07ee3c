"""Exact values of ChainBench's prefixes, to measure how well a critic predicts them."""

from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from records import correlate

import jchain as jc

DEPTHS = (1, 2, 3)  # of prefixes with room for a layer; the empty prefix has no rank


class Truth(NamedTuple):
    """The exact values of a problem."""

    chains: np.ndarray  # [12^3, L], through all prefixes with room for a layer
    best: list[np.ndarray]  # best reachable log reward of the prefixes of each depth 0..3
    stop: list[np.ndarray]  # log reward of stopping by each head, depth 0..4, [12^d, K]


def find_truth(solved: Any) -> Truth:
    """Find the best reachable reward of each prefix, from the losses of all chains."""
    num_layers, depth = solved.bank.num_layers, jc.chainbench.MAX_LAYERS
    reward = np.asarray(jc.agent.rewards.log_rewards(jnp.asarray(solved.loss["search"]))).reshape(
        -1, solved.bank.num_heads
    )
    edges = np.cumsum([0, *(num_layers**d for d in range(depth + 1))])
    stop = [reward[a:b] for a, b in pairwise(edges)]
    best = [stop[-1].max(axis=1)]
    for level in stop[-2::-1]:
        best.insert(
            0, np.maximum(level.max(axis=1), best[0].reshape(len(level), num_layers).max(axis=1))
        )
    return Truth(
        np.pad(list_chains(depth - 1), ((0, 0), (0, 1)), constant_values=-1), best[:-1], stop
    )


def evaluate_policy(policy: np.ndarray, truth: Truth) -> list[np.ndarray]:
    """Return the expected log reward of a policy from each prefix of depth 0..3.

    Args:
      policy: probability of each token at each slot of all chains of `list_chains`,
        `[12^4, 5, N + K]`.
      truth: exact values of the problem.
    """
    num_layers, depth = jc.chainbench.NUM_LAYERS, jc.chainbench.MAX_LAYERS
    levels: list[np.ndarray] = []
    for d in range(depth, -1, -1):
        probability = policy[:: num_layers ** (depth - d), d]
        value = np.sum(probability[:, num_layers:] * truth.stop[d], axis=1)
        if levels:
            value += np.sum(
                probability[:, :num_layers] * levels[0].reshape(len(value), num_layers), axis=1
            )
        levels.insert(0, value)
    return levels[:-1]


def list_chains(depth: int) -> np.ndarray:
    """List all chains of `depth` layers and the first head, `[C, depth + 1]`.

    They are in lexicographic order.
    """
    num_layers = jc.chainbench.NUM_LAYERS
    chains = np.stack([*np.indices((num_layers,) * depth).reshape(depth, -1)], axis=1)
    return np.pad(chains, ((0, 0), (0, 1)), constant_values=num_layers)


def split_by_depth(values: np.ndarray) -> list[np.ndarray]:
    """Split values by the depth of their prefix.

    The values are at the slots of `Truth.chains`, `[12^3, 4]`.
    """
    num_layers = jc.chainbench.NUM_LAYERS
    return [values[:: num_layers ** (values.shape[1] - 1 - d), d] for d in range(values.shape[1])]


def count_visits(chains: np.ndarray) -> list[np.ndarray]:
    """Count how many of the last chains start with each prefix, by depth.

    Only prefixes with room for a layer are counted.
    """
    num_layers = jc.chainbench.NUM_LAYERS
    rows = chains.reshape(-1, chains.shape[-1])
    rows = rows[rows[:, 0] >= 0]
    counts, number = [np.array([len(rows)])], np.zeros(len(rows), int)
    for depth in DEPTHS:
        is_there = (rows[:, depth - 1] >= 0) & (rows[:, depth - 1] < num_layers)
        rows, number = rows[is_there], number[is_there] * num_layers + rows[is_there, depth - 1]
        counts.append(np.bincount(number, minlength=num_layers**depth))
    return counts


def compare_values(
    predicted: list[np.ndarray], truth: list[np.ndarray], weights: Any = None
) -> np.ndarray:
    """Compute the weighted rank correlation, bias, and RMSE over prefixes, or nan."""
    rows = []
    for depth in DEPTHS:
        weight = np.ones(len(truth[depth])) if weights is None else weights[depth]
        is_there = weight > 0
        if not is_there.any():
            continue
        error = predicted[depth] - truth[depth]
        rank = (
            correlate(predicted[depth][is_there], truth[depth][is_there])
            if is_there.sum() >= 5
            else np.nan
        )
        rows.append(
            (rank, np.average(error, weights=weight), np.average(error**2, weights=weight) ** 0.5)
        )
    if not rows:
        return np.full(3, np.nan)
    columns = np.array(rows).T
    return np.array([np.nanmean(c) if np.isfinite(c).any() else np.nan for c in columns])


def correlate_open_prefixes(truth: Truth, chains: np.ndarray, predicted: np.ndarray) -> float:
    """Average over depths the rank correlation over the open prefixes of a depth."""
    ranks = []
    for depth in DEPTHS:
        is_open = np.isfinite(predicted[depth])
        if is_open.sum() >= 5:
            number = np.zeros(is_open.sum(), int)
            for slot in range(depth):
                number = number * jc.chainbench.NUM_LAYERS + chains[depth][is_open][:, slot]
            ranks.append(correlate(-predicted[depth][is_open], truth.best[depth][number]))
    return float(np.mean(ranks)) if ranks else np.nan
