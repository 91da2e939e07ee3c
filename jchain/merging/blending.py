"""Weights that are mixed from those of two layers, or whose residual branch is scaled.

The mixes are those of model merging, applied to one layer at a time and to each of its params.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, PyTree
from jchain.arguments import is_integer
from jchain.groups import LayerGroup
from jchain.modules import describe_module
from jchain.pytree import pick

BlendMethod = Literal["linear", "slerp", "task_arithmetic", "ties"]
# Directions whose cosine exceeds this are mixed linearly, as the angle between them is too small.
_SLERP_LIMIT = 0.9995


@runtime_checkable
class HasBranch(Protocol):
    """A module of a residual layer, `x + branch(x)`, that knows which params scale the branch."""

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which the branch is multiplied by a factor.

        Args:
          params: the params of the layer.
          factor: the factor.
        """
        ...


class Blend(NamedTuple):
    """How the weights of a new layer are mixed."""

    first: int  # token
    second: int  # token
    weight: float
    base: int | None = None  # token


class Member(NamedTuple):
    """A new layer."""

    group: LayerGroup  # the group that it becomes a member of
    params: PyTree
    state: PyTree


def read_blends(
    mixes: Sequence[tuple[int, int, float]],
    method: BlendMethod,
    base: int | Sequence[int] | None,
    num_layers: int,
) -> list[Blend]:
    """Check the mixes of `Bank.blend`.

    Args:
      mixes: for each new layer, the tokens of two layers, and a weight.
      method: how they are mixed.
      base: token of the layer that the two layers were trained from, one for all mixes or one for
        each; None for the methods that have none.
      num_layers: number of layers of the bank.

    Raises:
      ValueError: if a mix is not of this form, a token is not a layer, a weight is not finite, or
        the method needs a base and there is none, or the reverse.
    """
    if len(mixes) == 0:
        raise ValueError("expected at least one mix, got none")
    needs_base = method in ("task_arithmetic", "ties")
    if needs_base != (base is not None):
        expected = "the token of the layer that both come from" if needs_base else "None"
        raise ValueError(f"expected base to be {expected} with method {method!r}, got {base!r}")
    bases = [*base] if isinstance(base, Sequence) else [base] * len(mixes)
    if len(bases) != len(mixes):
        raise ValueError(f"expected a base for each of {len(mixes)} mixes, got {len(bases)}")
    found = []
    for i, (mix, own_base) in enumerate(zip(mixes, bases, strict=True)):
        if not isinstance(mix, Sequence) or len(mix) != 3:
            raise ValueError(f"expected mix {i} to be (layer, layer, weight), got {mix!r:.80}")
        tokens = [token for token in (mix[0], mix[1], own_base) if token is not None]
        check_layers(tokens, num_layers, f"mix {i}")
        found.append(
            Blend(
                int(mix[0]),
                int(mix[1]),
                check_finite(mix[2], f"the weight of mix {i}"),
                None if own_base is None else int(own_base),
            )
        )
    return found


def read_factors(factors: Sequence[tuple[int, float]], num_layers: int) -> list[tuple[int, float]]:
    """Check the factors of `Bank.scale`.

    Args:
      factors: for each new layer, the token of a layer, and a factor.
      num_layers: number of layers of the bank.

    Raises:
      ValueError: if one is not of this form, a token is not a layer, or a factor is not finite.
    """
    if len(factors) == 0:
        raise ValueError("expected at least one factor, got none")
    found = []
    for i, pair in enumerate(factors):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"expected factor {i} to be (layer, factor), got {pair!r:.80}")
        check_layers(pair[:1], num_layers, f"factor {i}")
        found.append((int(pair[0]), check_finite(pair[1], f"factor {i}")))
    return found


def check_layers(tokens: Sequence[object], num_layers: int, where: str) -> None:
    """Check that tokens are those of layers.

    Args:
      tokens: what should be tokens.
      num_layers: number of layers of the bank.
      where: what the tokens are part of, for the error.

    Raises:
      ValueError: if one is not.
    """
    for token in tokens:
        if not (is_integer(token) and 0 <= int(str(token)) < num_layers):
            raise ValueError(
                f"expected tokens of layers in 0..{num_layers - 1} in {where}, got {token!r:.80}"
            )


def check_finite(value: object, name: str) -> float:
    """Check that a value is a finite number, and return it as a float.

    Args:
      value: the value.
      name: what it is, for the error.

    Raises:
      ValueError: if it is not.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if not is_number or isinstance(value, bool) or not np.isfinite(value):
        raise ValueError(f"expected {name} to be a finite number, got {value!r:.80}")
    return float(value)


def blend_layers(
    find: Callable[[int], tuple[LayerGroup, int]],
    blends: Sequence[Blend],
    method: BlendMethod,
    density: float,
) -> list[Member]:
    """Mix the weights of layers.

    Args:
      find: a function that finds the group of a layer and its index there (`Bank.find`).
      blends: what to mix.
      method: how to mix it.
      density: share of the entries that `ties` keeps.

    Returns:
      For each mix, the new layer. Other collections than params are those of its first layer.

    Raises:
      ValueError: if the layers of a mix have different modules or stages, or there is not enough
        memory.
    """
    mixed, num_bytes = [], 0
    for blend in blends:
        group, _ = find(blend.first)
        tokens = [blend.second, *([] if blend.base is None else [blend.base])]
        for token in tokens:
            other, _ = find(token)
            if other is not group:
                raise ValueError(
                    "expected layers of one module and one shape to blend, got "
                    f"{describe_module(group.module)} (token {blend.first}) and "
                    f"{describe_module(other.module)} (token {token})"
                )
        num_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(group.params)) // len(group.tokens)
    import psutil  # late, as evaluation must run without it

    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise ValueError(
            f"expected blended layers that fit into memory, {available / 2**30:.1f} GiB, got "
            f"{len(blends)} of {num_bytes / 2**30:.1f} GiB in all"
        )
    for blend in blends:
        group, first = find(blend.first)
        rows = [first, find(blend.second)[1]]
        base = None if blend.base is None else find(blend.base)[1]
        params = jax.tree.map(
            lambda leaf, rows=rows, base=base, weight=blend.weight: _mix(
                method, leaf, rows, base, weight, density
            ),
            group.params,
        )
        mixed.append(Member(group, params, pick(group.state, first)))
    return mixed


def _mix(
    method: BlendMethod,
    leaf: Array,
    rows: Sequence[int],
    base: int | None,
    weight: float,
    density: float,
) -> Array:
    """Mix two rows of a stacked param, in float32. Integers are those of the first row."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf[rows[0]]
    a, b = (leaf[row].astype(jnp.float32) for row in rows)
    if method == "linear":
        mixed = (1 - weight) * a + weight * b
    elif method == "slerp":
        mixed = slerp(a, b, weight)
    else:
        origin = leaf[base].astype(jnp.float32)
        change = (a - origin) + (b - origin)
        if method == "ties":
            change = merge_signs(jnp.stack([a - origin, b - origin]), density)
        mixed = origin + weight * change
    return mixed.astype(leaf.dtype)


def slerp(a: Float[Array, "*F"], b: Float[Array, "*F"], weight: float) -> Float[Array, "*F"]:
    """Interpolate on the arc between the directions of two arrays (Shoemake 1985).

    As in mergekit, the arrays themselves are combined with the factors of the arc between their
    directions, and arrays of almost the same direction are interpolated linearly.

    Args:
      a: the array at weight 0.
      b: the array at weight 1.
      weight: the position on the arc.
    """
    norms = jnp.linalg.norm(a.ravel()), jnp.linalg.norm(b.ravel())
    cosine = jnp.vdot(a, b) / jnp.maximum(norms[0] * norms[1], 1e-30)
    angle = jnp.arccos(jnp.clip(cosine, -_SLERP_LIMIT, _SLERP_LIMIT))
    on_arc = (jnp.sin((1 - weight) * angle) * a + jnp.sin(weight * angle) * b) / jnp.sin(angle)
    return jnp.where(jnp.abs(cosine) > _SLERP_LIMIT, (1 - weight) * a + weight * b, on_arc)


def merge_signs(changes: Float[Array, "M *F"], density: float) -> Float[Array, "*F"]:
    """Merge changes of weights by TIES (Yadav et al. 2023, arXiv:2306.01708).

    Each change keeps its entries of largest absolute value. Per entry, the sign with the larger sum
    is chosen, and the changes of that sign are averaged.

    Args:
      changes: the changes, one per model.
      density: share of the entries that each change keeps, above 0 and at most 1.
    """
    flat = changes.reshape(len(changes), -1)
    num_kept = max(1, round(density * flat.shape[1]))
    # Ties at the threshold are all kept.
    smallest = jnp.sort(jnp.abs(flat), axis=1)[:, -num_kept, None]
    trimmed = jnp.where(jnp.abs(flat) >= smallest, flat, 0.0)
    sign = jnp.sign(trimmed.sum(axis=0, keepdims=True))
    agrees = (jnp.sign(trimmed) == sign) & (sign != 0)
    merged = jnp.where(agrees, trimmed, 0.0).sum(axis=0) / jnp.maximum(agrees.sum(axis=0), 1)
    return merged.reshape(changes.shape[1:])


def scale_layers(
    find: Callable[[int], tuple[LayerGroup, int]], factors: Sequence[tuple[int, float]]
) -> list[Member]:
    """Scale the residual branches of layers.

    Args:
      find: as for `blend_layers`.
      factors: tokens of layers, each with a factor.

    Returns:
      For each factor, the layer with its new params.

    Raises:
      ValueError: if a layer has no residual branch that can be scaled.
    """
    scaled = []
    for token, factor in factors:
        group, index = find(token)
        if not isinstance(group.module, HasBranch):
            raise ValueError(
                "expected layers with a residual branch, whose module has the method "
                f"scale_branch(params, factor), got {describe_module(group.module)} (token {token})"
            )
        params, state = pick((group.params, group.state), index)
        scaled.append(Member(group, group.module.scale_branch(params, factor), state))
    return scaled
