"""Tabular problems: every chain was scored before, and layers only look up the losses.

A search on a tabular problem has the same cost in layer calls as on the original problem and, up to
rounding of sums, the same results, in a small part of the time, as in tabular benchmarks
(NAS-Bench-101, Ying et al. 2019, arXiv:1902.09635). An activation is the number of its prefix. A
layer maps it to the number of the child.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int, Shaped
from jchain.agent.encoding import entry_features as sketch_entries
from jchain.agent.observations import Observation, Observe
from jchain.bank import Bank
from jchain.chain import ChainSpace
from jchain.data import Batch
from jchain.engine.backend import jit_for_problem
from jchain.engine.layer_calls import apply_all
from jchain.groups import LayerGroup
from jchain.problem import Problem

_TOKEN, _ENTRY = "token", "entry"
_MAX_PREFIXES = 2**24  # heads output the numbers as float32, which is exact up to here


class TabularLayer(nn.Module):
    """A layer: maps the number of a prefix to that of the prefix with one more layer.

    Prefixes are numbered in the order of `ChainSpace.enumerate`, so the children of `i` are
    `N i + 1 .. N i + N`.

    Attributes:
      num_layers: N.
    """

    num_layers: int

    @nn.compact
    def __call__(self, x: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        return x * self.num_layers + 1 + self.get_variable("params", _TOKEN)


class TabularHead(nn.Module):
    """A head: outputs the numbers of a prefix and of the head, by which `look_up_loss` looks up."""

    @nn.compact
    def __call__(self, x: Int[Array, "B 1"]) -> Float[Array, "B 2"]:
        numbers = jnp.concatenate(
            [x, jnp.full_like(x, self.get_variable("params", _TOKEN))], axis=1
        )
        return numbers.astype(jnp.float32)


def look_up_loss(outputs: Float[Array, "B 2"], y: Float[Array, "B C R"]) -> Float[Array, "B"]:
    """Look up the loss of a prefix that a head ends; infinite for an invalid prefix.

    Args:
      outputs: of `TabularHead`.
      y: the table.
    """
    prefix, head = outputs.astype(jnp.int32).T
    return y.at[jnp.arange(len(y)), prefix, head].get(mode="fill", fill_value=jnp.inf)


def observe(
    problem: Problem, hidden: Shaped[Array, "B ..."], parent: Shaped[Array, "B ..."]
) -> Observation:
    """Look up features and losses of a prefix: for `CriticSearch(observe=...)`.

    Prefixes without features have zeros.

    Args:
      problem: from `make_problem`, with features.
      hidden: the number of the prefix.
      parent: unused, as an observation is looked up by the prefix alone.

    Raises:
      ValueError: the problem was made without features, or not by `make_problem`.
    """
    num_heads = problem.bank.num_heads
    if problem.loss_fn is not look_up_loss or problem.data.y.shape[-1] == num_heads:
        raise ValueError(
            "expected a problem that jchain.chainbench.tabular.make_problem made with features"
        )
    row = problem.data.y[0].at[hidden[0, 0]].get(mode="fill", fill_value=jnp.inf)
    features = row[num_heads:]
    return Observation(jnp.where(jnp.isfinite(features), features, 0.0), row[:num_heads])


def entry_features(bank: Bank) -> Float[Array, "E D"]:
    """`jchain.agent.encoding.entry_features` of the original bank.

    For `ActorCritic(entry_features=...)`.

    Args:
      bank: of a problem from `make_problem`.

    Raises:
      ValueError: the bank is not that of a problem from `make_problem`.
    """
    groups = (*bank.layers, *bank.heads)
    if any(not isinstance(group.module, TabularLayer | TabularHead) for group in groups):
        raise ValueError(
            "expected the bank of a problem that jchain.chainbench.tabular.make_problem made"
        )
    rows = jnp.concatenate([group.params[_ENTRY] for group in groups])
    return (
        jnp.zeros_like(rows)
        .at[jnp.array([token for group in groups for token in group.tokens])]
        .set(rows)
    )


def make_problem(
    bank: Bank,
    loss: Float[np.ndarray, "C"],
    max_layers: int,
    features: Float[np.ndarray, "V F"] | None = None,
    *,
    min_layers: int = 0,
) -> Problem:
    """Make the tabular problem of a bank whose chains have these losses.

    Its bank holds a sketch of the weights, for `entry_features`, instead of the weights. Banks with
    equal numbers of layers and heads share compiled programs, even if their modules differ.

    Args:
      bank: the layers and heads.
      loss: of every chain of 0 to `max_layers` layers, layer penalty included, in the order of
        `ChainSpace.enumerate`; `+inf` if it is not finite.
      max_layers: most layers of a chain.
      features: of the first prefixes in that order, for `observe`, any number of each; None if no
        search reads them.
      min_layers: fewest layers of a chain that a search makes.

    Raises:
      ValueError: the numbers of losses and chains differ, there are more than 16,777,216 prefixes,
        or features of more prefixes than there are.
    """
    num_chains = ChainSpace(bank.num_layers, bank.num_heads, max_layers).num_chains
    if np.shape(loss) != (num_chains,):
        raise ValueError(
            f"expected the losses of all {num_chains:,} chains, got shape {list(np.shape(loss))}"
        )
    _check_size(bank, max_layers)
    table = np.asarray(loss, np.float32).reshape(-1, bank.num_heads)
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


def tabulate(problem: Problem, observe: Observe) -> Problem:
    """Make the tabular form of a problem, with an observation of every prefix.

    It takes as many layer calls as scoring all chains.

    Args:
      problem: a problem with few enough chains to score all.
      observe: what to record of each prefix, as `jchain.agent.observations.observe`.

    Raises:
      ValueError: as `make_problem`.
    """
    _check_size(problem.bank, problem.max_layers)
    seen = _observe_all(problem, observe=observe)
    loss = np.where(np.isfinite(seen.loss), seen.loss, np.inf)
    features = np.asarray(seen.features)
    return make_problem(
        problem.bank, loss.reshape(-1), problem.max_layers, features, min_layers=problem.min_layers
    )


def _check_size(bank: Bank, max_layers: int) -> None:
    num_prefixes = ChainSpace(bank.num_layers, 1, max_layers).num_chains
    if num_prefixes > _MAX_PREFIXES:
        raise ValueError(f"expected at most {_MAX_PREFIXES:,} prefixes, got {num_prefixes:,}")


@jit_for_problem(static_argnames=["observe"])
def _observe_all(problem: Problem, *, observe: Observe) -> Observation:
    """Observations of every prefix, `[V, ...]`, in the order of `ChainSpace.enumerate`."""
    penalty = jnp.broadcast_to(problem.layer_cost, (problem.bank.num_layers,))

    def observe_tree(hidden: Array, parent: Array, paid: Array, length: int) -> list[Observation]:
        root = observe(problem, hidden, parent)
        levels = [root._replace(loss=root.loss + paid)]
        if length < problem.max_layers:
            children = (apply_all(problem.bank.layers, hidden), paid + penalty)
            # Only the leaves are in one vmap: it keeps all activations of its level.
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
    """As `jax.vmap`, by `jax.lax.map`."""
    return lambda *rows: jax.lax.map(lambda row: fn(*row), rows)


def _make_tabular(
    group: LayerGroup, module: nn.Module, offset: int, entries: Float[Array, "E D"]
) -> LayerGroup:
    """The group with a tabular module, whose params are the token, counted from `offset`."""
    tokens = jnp.asarray(group.tokens, jnp.int32)
    return LayerGroup({_TOKEN: tokens - offset, _ENTRY: entries[tokens]}, module, group.tokens)
