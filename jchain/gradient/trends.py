"""Trends of weight gradients: running means and variances over many chains, in several contexts.

For each weight index, the gradient of the loss is averaged (Welford 1962) over all slots and
chains, and also separately for each slot, for each preceding layer, and for each layer itself. The
interface is functional, as in optax: `init` makes a state, and `update` adds one chain. Trends
score swaps without the gradient of the chain that is edited, and so without layer calls.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int
from jchain.arguments import checked
from jchain.chain import ChainsLike
from jchain.gradient.edit_scores import weight_gradients
from jchain.gradient.linearize import check_chain, flatten_rows
from jchain.gradient.weight_space import only_group
from jchain.problem import Problem

Context = Literal["everywhere", "slot", "before", "layer"]
CONTEXTS: tuple[Context, ...] = get_args(Context)


class Moments(NamedTuple):
    """The mean and variance of the gradient of each weight index in each context."""

    num_seen: Float[Array, "C"]  # [C], number of gradients
    mean: Float[Array, "C W"]  # [C, W]
    square: Float[Array, "C W"]  # [C, W], sum of squared deviations from the mean

    @property
    def variance(self) -> Float[Array, "C W"]:
        """Unbiased variance, `[C, W]`; nan in contexts with fewer than two gradients."""
        return self.square / jnp.where(self.num_seen > 1, self.num_seen - 1, jnp.nan)[:, None]


class Trends(NamedTuple):
    """Moments in four kinds of contexts.

    The `W` weights are the flattened leaves of a layer's params.
    """

    everywhere: Moments  # a single context
    slot: Moments  # D contexts: the slot of the layer
    before: Moments  # N + 1 contexts: the preceding layer, where the last context is the stem
    layer: Moments  # N contexts: the layer itself


class _Row(NamedTuple):
    """The gradients of one slot, or of all slots stacked."""

    gradient: Float[Array, "*D W"]
    is_seen: Bool[Array, "*D"]  # False for gradients to leave out
    contexts: tuple[Int[Array, "*D"], ...]  # in the order of the fields of `Trends`


@checked
def init(problem: Problem) -> Trends:
    """Create the state before the first chain.

    Args:
      problem: the problem, whose layers must share one module.

    Raises:
      ValueError: if the layers have more than one module, because their weights then have no
        indices in common.
    """
    num_weights = stack_weights(problem).shape[1]

    def empty(num_contexts: int) -> Moments:
        zeros = jnp.zeros((num_contexts, num_weights))
        return Moments(jnp.zeros(num_contexts), zeros, zeros)

    num_layers = problem.bank.num_layers
    return Trends(empty(1), empty(problem.max_layers), empty(num_layers + 1), empty(num_layers))


@checked
def update(trends: Trends, problem: Problem, chain: ChainsLike) -> Trends:
    """Add the gradients of one chain.

    This costs four layer calls per layer. A chain whose gradients are not all finite is left out.

    Args:
      trends: the state so far.
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`.

    Raises:
      ValueError: for the same reasons as `jchain.gradient.weight_gradients`.
    """
    gradients = weight_gradients(problem, chain)[:-1]
    tokens, slots = jnp.asarray(chain)[:-1], jnp.arange(problem.max_layers)
    is_layer = slots < problem.space.count_layers(jnp.asarray(chain))
    is_seen = is_layer & jnp.isfinite(jnp.where(is_layer[:, None], gradients, 0.0)).all()
    before = jnp.where(slots == 0, problem.bank.num_layers, jnp.roll(tokens, 1))

    def add(trends: Trends, row: _Row) -> tuple[Trends, None]:
        moments = (
            _add(moments, context, row.gradient, row.is_seen)
            for moments, context in zip(trends, row.contexts, strict=True)
        )
        return Trends(*moments), None

    contexts = (jnp.zeros_like(slots), slots, jnp.maximum(before, 0), jnp.maximum(tokens, 0))
    rows = _Row(jnp.nan_to_num(gradients), is_seen, contexts)
    return jax.lax.scan(add, trends, rows)[0]


def _add(moments: Moments, context: Array, gradient: Array, is_seen: Array) -> Moments:
    """Add one gradient to one context, unless it is left out."""
    count = moments.num_seen[context] + 1
    change = gradient - moments.mean[context]
    mean = moments.mean[context] + change / count
    context = jnp.where(is_seen, context, moments.num_seen.size)
    return Moments(
        moments.num_seen.at[context].set(count, mode="drop"),
        moments.mean.at[context].set(mean, mode="drop"),
        moments.square.at[context].add(change * (gradient - mean), mode="drop"),
    )


@checked
def predict_swaps(
    trends: Trends, problem: Problem, chain: ChainsLike, context: Context = "slot"
) -> Float[Array, "L N"]:
    """Predict the change in loss of each swap from mean gradients, without one of this chain.

    The score of layer `b` at slot `t` is `<mean, W_b - W_t>`, plus the change of the layer penalty.
    This is like `jchain.swap_scores` with `kind="weights"`, except that it uses the mean gradient
    of a context instead of the gradient of this chain, and so costs no layer calls.

    Args:
      trends: the trends of the problem's bank.
      problem: the problem with the bank and the `layer_cost`.
      chain: the tokens of the chain whose layers are swapped, `[L]`.
      context: the kind of context: `"everywhere"`, `"slot"`, `"before"`, or `"layer"`.

    Returns:
      The scores, `[L, N]`; nan for slots without a layer and for contexts without gradients.

    Raises:
      ValueError: if the context is unknown, or `chain` is invalid for this bank.
    """
    if context not in CONTEXTS:
        raise ValueError(f"expected a context of {', '.join(CONTEXTS)}, got {context!r}")
    chain = check_chain(problem, chain)
    slots, num_layers = jnp.arange(chain.size), problem.bank.num_layers
    length = problem.space.count_layers(chain)
    moments: Moments = getattr(trends, context)
    contexts = {
        "everywhere": jnp.zeros_like(slots),
        "slot": jnp.minimum(slots, problem.max_layers - 1),
        "before": jnp.where(slots == 0, num_layers, jnp.roll(chain, 1)),
        "layer": jnp.minimum(chain, num_layers - 1),
    }
    index = jnp.maximum(contexts[context], 0)
    weights = stack_weights(problem)
    penalty = jnp.broadcast_to(problem.layer_cost, (num_layers,))
    scores = moments.mean[index] @ weights.T + penalty[None]
    own = jnp.take_along_axis(scores, jnp.clip(chain, 0, num_layers - 1)[:, None], axis=1)
    is_known = (slots < length) & (moments.num_seen[index] > 0)
    return jnp.where(is_known[:, None], scores - own, jnp.nan)


@checked
def stack_weights(problem: Problem) -> Float[Array, "N W"]:
    """Stack the weights of all layers, one row per layer, in the order of tokens.

    Args:
      problem: the problem, whose layers must share one module.

    Raises:
      ValueError: if the layers have more than one module.
    """
    group = only_group(problem.bank)
    rows = jnp.concatenate([flatten_rows(leaf) for leaf in jax.tree.leaves(group.params)], axis=1)
    return rows[jnp.argsort(jnp.array(group.tokens))]
