"""Trends per weight index: what the gradient of a weight was, over the chains seen so far, in each context.

Running means and variances (Welford 1962) of the gradient of the loss by each weight index, over all slots and chains, by slot,
by the layer before, and by the layer itself. Functional, as optax is: `init` makes a state, `update` one that has seen a chain
more. A trend names the layers that it asks for without a gradient of the chain at hand, so for no layer call.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jchain import chain as chain_lib
from jchain._typing import Array, Float
from jchain.gradient.edit_scores import weight_gradients
from jchain.gradient.linearize import ChainLike, check_chain, flatten_rows
from jchain.gradient.weight_space import only_group
from jchain.problem import Problem


class Moments(NamedTuple):
    """Of the gradient of each weight index, in each context."""

    num_seen: Float[Array, "C"]  # [C], gradients seen
    mean: Float[Array, "C W"]  # [C, W]
    square: Float[Array, "C W"]  # [C, W], sum of squared deviations from the mean

    @property
    def variance(self) -> Float[Array, "C W"]:
        """Unbiased; nan in contexts of fewer than two gradients."""
        return self.square / jnp.where(self.num_seen > 1, self.num_seen - 1, jnp.nan)[:, None]


class Trends(NamedTuple):
    """Moments by context. `W` weights in the order of the leaves of a layer's params, each flattened."""

    everywhere: Moments  # one context
    slot: Moments  # [D], the slot of the layer
    before: Moments  # [N + 1], the layer before it, last: the stem
    layer: Moments  # [N], the layer itself


def init(problem: Problem) -> Trends:
    """Nothing seen.

    Raises:
      ValueError: the layers are of several modules, whose weights have no indices in common.
    """
    num_weights = stack_weights(problem).shape[1]

    def empty(num_contexts: int) -> Moments:
        zeros = jnp.zeros((num_contexts, num_weights))
        return Moments(jnp.zeros(num_contexts), zeros, zeros)

    num_layers = problem.bank.num_layers
    return Trends(empty(1), empty(problem.max_layers), empty(num_layers + 1), empty(num_layers))


def update(trends: Trends, problem: Problem, chain: ChainLike) -> Trends:
    """The trends with one chain more, for four layer calls for each of its layers. A chain with a gradient that is not finite
    is left out.

    Raises:
      ValueError: as `jchain.gradient.weight_gradients`.
    """
    gradients = weight_gradients(problem, chain)[:-1]
    tokens, slots = jnp.asarray(chain)[:-1], jnp.arange(problem.max_layers)
    is_layer = slots < chain_lib.count_layers(jnp.asarray(chain), problem.bank.num_layers)
    is_seen = is_layer & jnp.isfinite(jnp.where(is_layer[:, None], gradients, 0.0)).all()
    before = jnp.where(slots == 0, problem.bank.num_layers, jnp.roll(tokens, 1))

    def add(trends: Trends, row: Any) -> tuple[Trends, None]:
        gradient, is_seen, *contexts = row
        parts = (
            _add(moments, context, gradient, is_seen)
            for moments, context in zip(trends, contexts, strict=True)
        )
        return Trends(*parts), None

    rows = (
        jnp.nan_to_num(gradients),
        is_seen,
        jnp.zeros_like(slots),
        slots,
        jnp.maximum(before, 0),
        jnp.maximum(tokens, 0),
    )
    return jax.lax.scan(add, trends, rows)[0]


def _add(moments: Moments, context: Array, gradient: Array, is_seen: Array) -> Moments:
    count = moments.num_seen[context] + 1
    change = gradient - moments.mean[context]
    mean = moments.mean[context] + change / count
    context = jnp.where(is_seen, context, moments.num_seen.size)
    return Moments(
        moments.num_seen.at[context].set(count, mode="drop"),
        moments.mean.at[context].set(mean, mode="drop"),
        moments.square.at[context].add(change * (gradient - mean), mode="drop"),
    )


def score_swaps(
    trends: Trends, problem: Problem, chain: ChainLike, context: str = "slot"
) -> Float[Array, "L N"]:
    """Predicted change of loss of putting layer `b` at slot `t`, as `kind="weights"` of `jchain.swap_scores`, by the mean
    gradient of a context in place of the gradient of this chain: `<mean, W_b - W_t>`, price of layers included.

    Args:
      trends: of this bank.
      problem: likewise.
      chain: whose layers are swapped.
      context: `"everywhere"`, `"slot"`, `"before"` or `"layer"`.

    Returns:
      `[L, N]`; nan where the chain has no layer or the context was not seen.

    Raises:
      ValueError: the context is none, or `chain` is no chain of this bank.
    """
    if context not in Trends._fields:
        raise ValueError(f"expected a context of {', '.join(Trends._fields)}, got {context!r}")
    chain = check_chain(problem, chain)
    slots, num_layers = jnp.arange(chain.size), problem.bank.num_layers
    length = chain_lib.count_layers(chain, num_layers)
    moments: Moments = getattr(trends, context)
    places = {
        "everywhere": jnp.zeros_like(slots),
        "slot": jnp.minimum(slots, problem.max_layers - 1),
        "before": jnp.where(slots == 0, num_layers, jnp.roll(chain, 1)),
        "layer": jnp.minimum(chain, num_layers - 1),
    }
    place = jnp.maximum(places[context], 0)
    weights = stack_weights(problem)
    along = (
        moments.mean[place] @ weights.T + jnp.broadcast_to(problem.layer_cost, (num_layers,))[None]
    )
    own = jnp.take_along_axis(along, jnp.clip(chain, 0, num_layers - 1)[:, None], axis=1)
    is_known = (slots < length) & (moments.num_seen[place] > 0)
    return jnp.where(is_known[:, None], along - own, jnp.nan)


def stack_weights(problem: Problem) -> Float[Array, "N W"]:
    """The weights of each layer in one row, in the order of tokens.

    Raises:
      ValueError: as `init`.
    """
    group = only_group(problem.bank)
    rows = jnp.concatenate([flatten_rows(leaf) for leaf in jax.tree.leaves(group.params)], axis=1)
    return rows[jnp.argsort(jnp.array(group.tokens))]
