"""Problems whose chains are scored already, with layers that only look the losses up.

A search runs on them as on the problem they stand for, with the same charges and, up to the rounding of sums, the same
results, in a small part of the time: the manner in which tabular benchmarks are used (NAS-Bench-101, Ying et al. 2019,
arXiv:1902.09635). An activation is the number of its prefix, a layer goes from it to the number of the child.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Array, Float, Int, Shaped
from jchain.bank import Bank, LayerGroup
from jchain.data import Batch
from jchain.features import NUM_FEATURES, Observation
from jchain.problem import Problem

_TOKEN = "token"


class Child(nn.Module):
    """A layer: from the number of a prefix to that of the prefix with one layer more.

    Prefixes are numbered as `jchain.chain.enumerate_all` orders them, so that the children of `i` are `N i + 1 .. N i + N`.

    Attributes:
      num_layers: N.
    """

    num_layers: int

    @nn.compact
    def __call__(self, x: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        return x * self.num_layers + 1 + self.get_variable("params", _TOKEN)


class Stop(nn.Module):
    """A head: the numbers of a prefix and of the head, by which `get_loss` looks the loss up."""

    @nn.compact
    def __call__(self, x: Int[Array, "B 1"]) -> Int[Array, "B 2"]:
        return jnp.concatenate([x, jnp.full_like(x, self.get_variable("params", _TOKEN))], axis=1)


def get_loss(outputs: Shaped[Array, "B 2"], y: Float[Array, "B C R"]) -> Float[Array, "B"]:
    """The loss of a prefix that a head ends; infinite where the prefix is none."""
    # Problems measure outputs as floats, in which numbers below 2^24 are exact.
    prefix, head = outputs.astype(jnp.int32).T
    return y.at[jnp.arange(len(y)), prefix, head].get(mode="fill", fill_value=jnp.inf)


def observe(problem: Problem, hidden: Int[Array, "B 1"], parent: Int[Array, "B 1"]) -> Observation:
    """`jchain.features.observe`, looked up: for `CriticSearch(observe=...)`. Prefixes without features have 0."""
    num_heads = problem.bank.num_heads
    row = problem.data.y[0].at[hidden[0, 0]].get(mode="fill", fill_value=jnp.inf)
    features = row[num_heads:]
    return Observation(jnp.where(jnp.isfinite(features), features, 0.0), row[:num_heads])


def make_problem(
    bank: Bank, loss: Float[np.ndarray, "C"], max_layers: int, features: Float[np.ndarray, "V F"] | None = None
) -> Problem:
    """The problem of a bank whose chains have these losses.

    The weights of the bank stay in it, for encodings that read them; they are not applied.

    Args:
      bank: the layers and heads.
      loss: of every chain, price included, in the order of `jchain.chain.enumerate_all`; `+inf` where it is not finite.
      max_layers: most layers of a chain.
      features: of the first prefixes in that order, for `observe`; None where no search reads them.

    Raises:
      ValueError: there are not as many losses as chains, or features of another size.
    """
    num_chains = chain_lib.count(bank.num_layers, bank.num_heads, max_layers)
    if np.shape(loss) != (num_chains,):
        raise ValueError(f"expected the losses of all {num_chains:,} chains, got shape {list(np.shape(loss))}")
    table = np.asarray(loss, np.float32).reshape(-1, bank.num_heads)
    if features is not None:
        if features.ndim != 2 or features.shape[1] != NUM_FEATURES or len(features) > len(table):
            raise ValueError(
                f"expected features [V, {NUM_FEATURES}] of at most {len(table):,} prefixes, got {list(features.shape)}"
            )
        rows = np.zeros((len(table), NUM_FEATURES), np.float32)
        rows[: len(features)] = features
        table = np.concatenate([table, rows], axis=1)
    layers = tuple(_replace(group, Child(bank.num_layers), 0) for group in bank.layers)
    heads = tuple(_replace(group, Stop(), bank.num_layers) for group in bank.heads)
    numbers = Bank(layers, heads, names=bank.names, origins=bank.origins, parents=bank.parents, num_steps=bank.num_steps)
    return Problem(numbers, Batch(jnp.zeros((1, 1), jnp.int32), jnp.asarray(table)[None]), max_layers, loss_fn=get_loss)


def _replace(group: LayerGroup, module: nn.Module, offset: int) -> LayerGroup:
    """The group with another module, which reads the place of its token among layers or heads."""
    params: Any = {"weights": group.params, _TOKEN: jnp.asarray(group.tokens, jnp.int32) - offset}
    return LayerGroup(params, module, group.tokens)
