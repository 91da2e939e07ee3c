"""What tree searches share: the children of a prefix, and the chains that end prefixes."""

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Int, Shaped
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_all
from jchain.problem import Problem


def extend_prefix(
    problem: Problem,
    prefix: Int[Array, "L"],
    length: Int[Array, ""],
    hidden: Shaped[Array, "B ..."],
) -> tuple[Int[Array, "N L"], Shaped[Array, "N B ..."]]:
    """Extend a prefix by every layer, for one layer call each.

    Args:
      problem: the bank.
      prefix: tokens of the prefix, then -1, `[L]`.
      length: layers of the prefix.
      hidden: activations of the prefix, `[B, ...F]`.

    Returns:
      The children, `[N, L]`, and their activations, `[N, B, ...F]`.
    """
    return env.append_layers(problem, prefix, length), apply_all(problem.bank.layers, hidden)


def end_prefixes(
    problem: Problem,
    prefixes: Int[Array, "R L"],
    length: Int[Array, "R"],
    loss: Float[Array, "R K"],
    is_scored: Bool[Array, "R"],
) -> tuple[Int[Array, "Q L"], Float[Array, "Q"]]:
    """List the chains that end prefixes with each head, in the form of `Info`.

    Args:
      problem: the bank.
      prefixes: tokens of each prefix, then -1, `[R, L]`.
      length: layers of each prefix, `[R]`.
      loss: loss of each prefix with each head, layer penalty included, `[R, K]`.
      is_scored: True for the prefixes to list, `[R]`.

    Returns:
      Chains `[R * K, L]` and losses `[R * K]`: rows of -1 and `+inf` for prefixes that are not
      scored, and `+inf` for a loss that is not finite.
    """
    chains = jax.vmap(lambda prefix, t: env.append_heads(problem, prefix, t))(prefixes, length)
    chains = jnp.where(is_scored[:, None, None], chains, PADDING)
    loss = jnp.where(is_scored[:, None] & jnp.isfinite(loss), loss, jnp.inf)
    return chains.reshape(-1, prefixes.shape[1]), loss.reshape(-1)


def end_children(
    problem: Problem,
    prefix: Int[Array, "L"],
    length: Int[Array, ""],
    hidden: Shaped[Array, "B ..."],
    children: Int[Array, "N L"],
    loss: Float[Array, "N K"],
    is_open: Bool[Array, ""],
    does_extend: Bool[Array, ""],
) -> tuple[Int[Array, "Q L"], Float[Array, "Q"]]:
    """List the chains that end the children of a prefix, in the form of `Info`.

    The chains that end the empty prefix come first, because it is not a child of any prefix.
    Chains of fewer than `min_layers` layers are left out.

    Args:
      problem: bank, split, loss.
      prefix: tokens of the prefix, then -1, `[L]`.
      length: layers of the prefix.
      hidden: activations of the prefix, `[B, ...F]`.
      children: tokens of its children, `[N, L]`.
      loss: loss of each child with each head, layer penalty included, `[N, K]`.
      is_open: False if there is no prefix to extend.
      does_extend: True if the children were computed.

    Returns:
      Chains `[(1 + N) * K, L]` and losses `[(1 + N) * K]`, as from `end_prefixes`.
    """
    is_root = is_open & (length == 0) & (problem.min_layers == 0)
    is_end = does_extend & (length + 1 >= problem.min_layers)
    num_children = children.shape[0]
    return end_prefixes(
        problem,
        jnp.concatenate([prefix[None], children]),
        length + (jnp.arange(1 + num_children) > 0),
        jnp.concatenate([env.head_losses(problem, hidden)[None], loss]),
        jnp.append(is_root, jnp.full(num_children, is_end)),
    )
