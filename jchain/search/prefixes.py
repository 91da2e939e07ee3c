"""Helpers of tree searches: the children of a prefix, and the chains that end prefixes."""

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Activations, Array, Bool, Float, Int, PyTree
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_all
from jchain.problem import Problem


def extend_prefix(
    problem: Problem,
    prefix: Int[Array, "L"],
    length: Int[Array, ""],
    hidden: Activations,
) -> tuple[Int[Array, "N L"], PyTree]:
    """Extend a prefix by every layer, at a cost of one layer call per layer.

    Args:
      problem: the problem, which holds the bank.
      prefix: the tokens of the prefix, padded with -1, `[L]`.
      length: the number of layers of the prefix.
      hidden: the activations of the prefix, `[B, ...F]`, or a pytree of such arrays.

    Returns:
      The children, `[N, L]`, and their activations, with leaves `[N, B, ...F]`.
    """
    return env.append_layers(problem, prefix, length), apply_all(problem.bank.layers, hidden)


def rank_prefixes(
    problem: Problem,
    prefixes: Int[Array, "R L"],
    loss: Float[Array, "R"],
    hidden: PyTree,
    unknown: float,
) -> Float[Array, "R"]:
    """Return the scores by which a search ranks prefixes, given the loss of their best head.

    A prefix whose loss is finite is ranked by it. Other prefixes that a layer may follow get one
    value for all: those of a stage that no head reads, and those whose heads all overflow, unless
    the activations are nan, which no layer would mend. The rest get `+inf`.

    Args:
      problem: the problem, whose space may have stages.
      prefixes: the tokens of each prefix, padded with -1, `[R, L]`.
      loss: the loss of each prefix with its best head, `[R]`; not finite if there is none.
      hidden: the activations of each prefix, `[R, B, ...F]`, or a pytree of such arrays.
      unknown: the finite score of a prefix without a finite loss that may be extended.
    """

    def find_nan(hidden: PyTree) -> Bool[Array, "R"]:
        leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(hidden)]
        return jnp.stack([jnp.isnan(leaf).any(axis=1) for leaf in leaves]).any(axis=0)

    is_finite = jnp.isfinite(loss)
    has_nan = jax.lax.cond(is_finite.all(), lambda _: jnp.zeros(loss.shape, bool), find_nan, hidden)
    may_fit = jnp.isfinite(problem.head_penalties(prefixes)).any(axis=1)
    can_continue = env.can_continue(problem, prefixes)
    if (stages := problem.space.stages) is not None:
        may_fit |= ~stages.get_fitting_heads(prefixes).any(axis=1)
        loss = jnp.where(can_continue, loss, jnp.inf)
    is_unknown = ~is_finite & may_fit & can_continue & ~has_nan
    return jnp.where(is_unknown, unknown, loss)


def count_extensions(problem: Problem, prefix: Int[Array, "L"]) -> Int[Array, ""] | int:
    """Count the layers that may follow a prefix: the cost of extending it by each, in layer calls.

    Args:
      problem: the problem, whose space may have stages.
      prefix: the tokens of the prefix, padded with -1, `[L]`.
    """
    if (stages := problem.space.stages) is None:
        return problem.bank.num_layers
    reads = jnp.asarray(stages.reads[: problem.bank.num_layers])
    return jnp.sum(stages.fits(reads, stages.reached(prefix)), dtype=jnp.int32)


def end_prefixes(
    problem: Problem,
    prefixes: Int[Array, "R L"],
    length: Int[Array, "R"],
    loss: Float[Array, "R K"],
    is_scored: Bool[Array, "R"],
) -> tuple[Int[Array, "Q L"], Float[Array, "Q"]]:
    """List the chains that end prefixes with each head, in the format of `Info`.

    Args:
      problem: the problem, which holds the bank.
      prefixes: the tokens of each prefix, padded with -1, `[R, L]`.
      length: the number of layers of each prefix, `[R]`.
      loss: the loss of each prefix with each head, with the layer penalty, `[R, K]`.
      is_scored: a mask of the prefixes to list, `[R]`.

    Returns:
      Chains `[R * K, L]` and losses `[R * K]`. Prefixes that are not listed, and chains that do not
      follow the stages, have rows of -1 and losses of `+inf`. A loss that is not finite
      is `+inf` as well.
    """
    chains = jax.vmap(lambda prefix, t: env.append_heads(problem, prefix, t))(prefixes, length)
    chains = jnp.where(is_scored[:, None, None], chains, PADDING)
    if (stages := problem.space.stages) is not None:
        chains = jnp.where(stages.is_legal(chains)[..., None], chains, PADDING)
    loss = jnp.where(is_scored[:, None] & jnp.isfinite(loss), loss, jnp.inf)
    return chains.reshape(-1, prefixes.shape[1]), loss.reshape(-1)


def end_children(
    problem: Problem,
    prefix: Int[Array, "L"],
    length: Int[Array, ""],
    hidden: Activations,
    children: Int[Array, "N L"],
    loss: Float[Array, "N K"],
    is_open: Bool[Array, ""],
    is_extended: Bool[Array, ""],
) -> tuple[Int[Array, "Q L"], Float[Array, "Q"]]:
    """List the chains that end the children of a prefix, in the format of `Info`.

    The chains that end the prefix itself come first. They are listed only if it is the empty
    prefix, which is not a child of any prefix. Chains of fewer than `min_layers` layers are left
    out.

    Args:
      problem: the bank, the split of data, and the loss.
      prefix: the tokens of the prefix, padded with -1, `[L]`.
      length: the number of layers of the prefix.
      hidden: the activations of the prefix, `[B, ...F]`, or a pytree of such arrays.
      children: the tokens of its children, `[N, L]`.
      loss: the loss of each child with each head, with the layer penalty, `[N, K]`.
      is_open: whether there is a prefix to extend.
      is_extended: whether the prefix was extended, so that its children were scored.

    Returns:
      Chains `[(1 + N) * K, L]` and losses `[(1 + N) * K]`, as from `end_prefixes`.
    """
    is_root = is_open & (length == 0) & (problem.min_layers == 0)
    is_end = is_extended & (length + 1 >= problem.min_layers)
    num_children = children.shape[0]
    root_loss = env.head_losses(problem, hidden) + problem.head_penalties(prefix)
    return end_prefixes(
        problem,
        jnp.concatenate([prefix[None], children]),
        length + (jnp.arange(1 + num_children) > 0),
        jnp.concatenate([root_loss[None], loss]),
        jnp.append(is_root, jnp.full(num_children, is_end)),
    )
