"""Tabular problems: every chain has been scored in advance, and losses are only looked up.

As in tabular benchmarks (NAS-Bench-101, Ying et al. 2019, arXiv:1902.09635), a search takes a small
fraction of the time that it takes on the original problem. It has the same cost in layer calls and,
up to the rounding of sums, the same results. Prefixes are numbered, and the activation of a prefix
is its number. A layer maps the number of a prefix to the number of its child.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int, PyTree, Shaped
from jchain.agent.encoding import entry_features as sketch_entries
from jchain.agent.observations import Observation, Observe
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import ChainSpace
from jchain.data import Batch
from jchain.engine.backend import jit_for_problem
from jchain.engine.layer_calls import apply_all
from jchain.groups import LayerGroup
from jchain.modules import unwrap
from jchain.problem import Problem

_TOKEN, _ENTRY = "token", "entry"
_MAX_PREFIXES = 2**24  # heads output the numbers as float32, which is exact up to this


class TabularLayer(nn.Module):
    """A layer that maps the number of a prefix to the number of its child, with one more layer.

    Prefixes are numbered in the order of `ChainSpace.enumerate`, so the children of `i` are
    `N i + 1 .. N i + N`.

    Attributes:
      num_layers: number of layers in the bank, N.
    """

    num_layers: int

    @nn.compact
    def __call__(self, x: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        return x * self.num_layers + 1 + self.get_variable("params", _TOKEN)


class TabularHead(nn.Module):
    """A head that outputs the numbers of the prefix and of itself, for `look_up_loss`."""

    @nn.compact
    def __call__(self, x: Int[Array, "B 1"]) -> Float[Array, "B 2"]:
        numbers = jnp.concatenate(
            [x, jnp.full_like(x, self.get_variable("params", _TOKEN))], axis=1
        )
        return numbers.astype(jnp.float32)


@checked
def look_up_loss(outputs: Float[Array, "B 2"], y: Float[Array, "B C R"]) -> Float[Array, "B"]:
    """Look up the loss of a prefix that a head ends; it is infinite for an invalid prefix.

    Args:
      outputs: the outputs of a `TabularHead`: the numbers of the prefix and of the head.
      y: the table of losses.
    """
    prefix, head = outputs.astype(jnp.int32).T
    return y.at[jnp.arange(len(y)), prefix, head].get(mode="fill", fill_value=jnp.inf)


@checked
def observe(
    problem: Problem, hidden: Shaped[Array, "B ..."], parent: Shaped[Array, "B ..."]
) -> Observation:
    """Look up the features and losses of a prefix, for `CriticSearch(observe=...)`.

    The features are zeros for a prefix without features.

    Args:
      problem: a problem from `make_problem`, with features.
      hidden: the number of the prefix.
      parent: not used, because the prefix alone determines its observation.

    Raises:
      ValueError: if the problem was made without features, or not by `make_problem`.
    """
    num_heads = problem.bank.num_heads
    if problem.loss_fn is not look_up_loss or problem.data.y.shape[-1] == num_heads:
        raise ValueError(
            "expected a problem that jchain.chainbench.tabular.make_problem made with features"
        )
    row = problem.data.y[0].at[hidden[0, 0]].get(mode="fill", fill_value=jnp.inf)
    features = row[num_heads:]
    return Observation(jnp.where(jnp.isfinite(features), features, 0.0), row[:num_heads])


@checked
def entry_features(bank: Bank) -> Float[Array, "E D"]:
    """Look up the entry features of the original bank, for `ActorCritic(entry_features=...)`.

    `jchain.agent.encoding.entry_features` computed them from the original bank.

    Args:
      bank: the bank of a problem from `make_problem`.

    Raises:
      ValueError: if the bank does not come from `make_problem`.
    """
    groups = (*bank.layers, *bank.heads)
    if any(not isinstance(unwrap(group.module), TabularLayer | TabularHead) for group in groups):
        raise ValueError(
            "expected the bank of a problem that jchain.chainbench.tabular.make_problem made"
        )
    rows = jnp.concatenate([group.params[_ENTRY] for group in groups])
    return (
        jnp.zeros_like(rows)
        .at[jnp.array([token for group in groups for token in group.tokens])]
        .set(rows)
    )


@checked
def make_problem(
    bank: Bank,
    loss: Float[np.ndarray, "C"],
    max_layers: int,
    features: Float[np.ndarray, "V F"] | None = None,
    *,
    min_layers: int = 0,
) -> Problem:
    """Make a tabular problem from a bank and the losses of all its chains.

    The bank of the tabular problem holds a sketch of the weights, for `entry_features`, instead of
    the weights. Banks with equal numbers of layers and heads share compiled programs, even if their
    modules differ.

    Args:
      bank: the layers and heads.
      loss: the loss of every chain of 0 to `max_layers` layers, with the layer penalty, in the
        order of `ChainSpace.enumerate`, `[C]`; `+inf` if not finite. If the bank has stages, only
        legal chains are listed.
      max_layers: the maximum number of layers of a chain.
      features: the features of the first V prefixes in that order, for `observe`, `[V, F]` with any
        F; None if no search reads them. If the bank has stages, prefixes that are not legal have
        rows, too.
      min_layers: the minimum number of layers of a chain that a search makes.

    Raises:
      ValueError: if the numbers of losses and chains differ, there are more than 16,777,216
        prefixes, or there are features for more prefixes than exist.
    """
    space = ChainSpace(bank.num_layers, bank.num_heads, max_layers, stages=bank.stages)
    num_chains = space.num_chains
    if np.shape(loss) != (num_chains,):
        raise ValueError(
            f"expected the losses of all {num_chains:,} chains, got shape {list(np.shape(loss))}"
        )
    _check_size(bank, max_layers)
    table = np.full(dataclasses.replace(space, stages=None).num_chains, np.inf, np.float32)
    table[_locate_chains(space)] = loss
    table = table.reshape(-1, bank.num_heads)
    if features is not None:
        if features.ndim != 2 or not features.shape[1] or len(features) > len(table):
            raise ValueError(
                f"expected features [V, F] of at most {len(table):,} prefixes, got "
                f"{list(features.shape)}"
            )
        rows = np.zeros((len(table), features.shape[1]), np.float32)
        rows[: len(features)] = features
        table = np.concatenate([table, rows], axis=1)
    entries = sketch_entries(bank)
    layers = tuple(
        _make_tabular(group, TabularLayer(bank.num_layers), 0, entries) for group in bank.layers
    )
    heads = tuple(
        _make_tabular(group, TabularHead(), bank.num_layers, entries) for group in bank.heads
    )
    numbers = Bank(
        layers,
        heads,
        names=bank.names,
        origins=bank.origins,
        parents=bank.parents,
        num_steps=bank.num_steps,
    )
    data = Batch(jnp.zeros((1, 1), jnp.int32), jnp.asarray(table)[None])
    return Problem(numbers, data, max_layers, loss_fn=look_up_loss, min_layers=min_layers)


@checked
def tabulate(problem: Problem, observe: Observe) -> Problem:
    """Make the tabular form of a problem, with an observation of every prefix.

    The number of layer calls is the same as for scoring all chains.

    Args:
      problem: a problem with so few chains that all can be scored.
      observe: the function that observes each prefix, such as `jchain.agent.observations.observe`.

    Raises:
      ValueError: as for `make_problem`.
    """
    _check_size(problem.bank, problem.max_layers)
    seen = _observe_all(problem, observe=observe)
    loss = np.where(np.isfinite(seen.loss), seen.loss, np.inf).reshape(-1)
    space = dataclasses.replace(problem.space, min_layers=0)
    loss = loss[_locate_chains(space)]
    if problem.max_cost is not None:
        chains = space.enumerate()
        loss = np.where(
            problem.exceeds_limit(problem.chain_cost(jnp.asarray(chains))), np.inf, loss
        )
    features = np.asarray(seen.features)
    return make_problem(
        problem.bank, loss, problem.max_layers, features, min_layers=problem.min_layers
    )


def _locate_chains(space: ChainSpace) -> Int[np.ndarray, "C"] | slice:
    """Return the row of each chain among all chains, also those that do not follow the stages."""
    if space.stages is None:
        return slice(None)
    return np.asarray(dataclasses.replace(space, stages=None).index(jnp.asarray(space.enumerate())))


def _check_size(bank: Bank, max_layers: int) -> None:
    num_prefixes = ChainSpace(bank.num_layers, 1, max_layers).num_chains
    if num_prefixes > _MAX_PREFIXES:
        raise ValueError(f"expected at most {_MAX_PREFIXES:,} prefixes, got {num_prefixes:,}")


@jit_for_problem(static_argnames=["observe"])
def _observe_all(problem: Problem, *, observe: Observe) -> Observation:
    """Observe every prefix, `[V, ...]`, in the order of `ChainSpace.enumerate`."""
    penalty = jnp.broadcast_to(problem.layer_cost, (problem.bank.num_layers,))

    def observe_tree(hidden: PyTree, parent: PyTree, paid: Array, length: int) -> list[Observation]:
        root = observe(problem, hidden, parent)
        levels = [root._replace(loss=root.loss + paid)]
        if length < problem.max_layers:
            children = (apply_all(problem.bank.layers, hidden), paid + penalty)
            # Only the leaves are vmapped, because vmap keeps all activations of a level.
            map_children = jax.vmap if length + 1 == problem.max_layers else _map_in_sequence
            levels += map_children(
                lambda child, spent: observe_tree(child, hidden, spent, length + 1)
            )(*children)
        return levels

    hidden = problem.bank.embed(problem.data.x)
    levels = observe_tree(hidden, hidden, jnp.zeros(()), 0)
    flat = [
        jax.tree.map(lambda leaf, depth=depth: leaf.reshape(-1, *leaf.shape[depth:]), level)
        for depth, level in enumerate(levels)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *flat)


def _map_in_sequence(
    fn: Callable[[Array, Array], list[Observation]],
) -> Callable[[Array, Array], list[Observation]]:
    """Return a function like `jax.vmap(fn)`, which applies `fn` in sequence instead."""
    return lambda *rows: jax.lax.map(lambda row: fn(*row), rows)


def _make_tabular(
    group: LayerGroup, module: nn.Module, offset: int, entries: Float[Array, "E D"]
) -> LayerGroup:
    """Make a tabular group, whose params hold tokens counted from `offset` and entry features."""
    tokens = jnp.asarray(group.tokens, jnp.int32)
    params = {_TOKEN: tokens - offset, _ENTRY: entries[tokens]}
    return LayerGroup(params, module, group.tokens, stages=group.stages)
