"""Calls of layers and heads: of one, of all of a group, of heads in parts; and what a call takes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, PyTree
from jchain.groups import LayerGroup
from jchain.problem import Problem

# Outputs of one call of a head, as the logits of a large vocabulary, beyond which examples go through it in parts; in bytes.
_OUTPUT_LIMIT = 2**26


def apply_token(groups: tuple[LayerGroup, ...], token: Int[Array, ""], hidden: Array) -> Array:
    """The member of `groups` with this token, applied to a batch: one layer call (or head call)."""
    group_of, member_of = locate(groups)
    branches = [partial(group.apply, member_of[token]) for group in groups]
    return jax.lax.switch(group_of[token], branches, hidden)


def apply_all(groups: tuple[LayerGroup, ...], hidden: Array) -> Array:
    """Every member of `groups` applied to one batch, `[E, B, ...G]` in the order of tokens: as many layer (or head) calls."""
    made: list[Any] = []
    for group in groups:

        def call(params: PyTree, module: nn.Module = group.module) -> Any:
            return module.apply({"params": params}, hidden)

        if count_convolutions(group, hidden) > 1:
            # All but the first would become grouped convolutions, up to twice as slow on CPU as one member at a time.
            one_by_one = partial(jax.lax.map, call)
            made.append(
                jax.lax.platform_dependent(group.params, cpu=one_by_one, default=jax.vmap(call))
            )
        else:
            # A module without params has none to take their number from.
            made.append(jax.vmap(call, axis_size=len(group.tokens))(group.params))
    order = np.argsort([token for group in groups for token in group.tokens])
    return made[0] if len(made) == 1 else jnp.concatenate(made)[order]


def locate(groups: tuple[LayerGroup, ...]) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """Group and place in the group of each token; -1 for tokens of none of these groups."""
    size = 1 + max(token for group in groups for token in group.tokens)
    group_of, member_of = np.full(size, -1), np.full(size, -1)
    for i, group in enumerate(groups):
        group_of[list(group.tokens)] = i
        member_of[list(group.tokens)] = np.arange(len(group.tokens))
    return jnp.asarray(group_of), jnp.asarray(member_of)


def evaluate_heads(
    problem: Problem, call: Callable[[Array], Array], hidden: Array
) -> tuple[Array, Array]:
    """Loss, without price, and accuracy `[W]` of the outputs that `call` makes of activations `[W, B, ...F]`.

    Examples go through it in parts where outputs would be large, and what is returned is the mean of the parts by their size.
    """
    width, num = hidden.shape[:2]
    size = find_part(problem, hidden[0], width)

    def measure(rows: Array) -> tuple[Array, Array]:
        return jax.vmap(problem.take(rows).compute_metrics)(call(hidden[:, rows]))

    if size == num:
        return jax.vmap(problem.compute_metrics)(call(hidden))
    found, rest = map_parts(measure, num, size)
    found = jax.tree.map(lambda a: a.sum(axis=0) * size, found)
    if rest is not None:
        found = jax.tree.map(lambda a, b: a + num % size * b, found, rest)
    return jax.tree.map(lambda a: a / num, found)


def map_parts(run: Callable[[Int[Array, "_"]], Any], num: int, size: int) -> tuple[Any, Any]:
    """What `run` makes of the indices of so many of `num` examples at a time, stacked, and of those left over, None for none."""
    whole = jax.lax.map(lambda start: run(start + jnp.arange(size)), jnp.arange(num // size) * size)
    rest = num % size
    return whole, run(num - rest + jnp.arange(rest)) if rest else None


def find_part(problem: Problem, hidden: Any, width: int) -> int:
    """How many examples of `width` chains go through a head at a time; `hidden` is that of one."""
    parts = -(-width * nbytes(find_outputs(problem, hidden)) // _OUTPUT_LIMIT)
    return max(1, hidden.shape[0] // max(1, parts))


def find_outputs(problem: Problem, hidden: Any) -> Any:
    """Shape and dtype of what heads return."""
    return jax.eval_shape(
        lambda problem, hidden: problem.bank.heads[0].apply(0, hidden), problem, hidden
    )


def find_call_bytes(groups: tuple[LayerGroup, ...], hidden: Any) -> int:
    """An estimate of the temporaries of one call: twice the largest array that one of these makes."""
    made = [
        var.aval
        for group in groups
        for equation in _trace(group, hidden)
        for var in equation.outvars
    ]
    return 2 * max((nbytes(aval) for aval in made), default=0)


def find_head_bytes(problem: Problem, hidden: Any, width: int) -> int:
    """An estimate of the temporaries of a call of heads for so many chains."""
    rows = find_part(problem, hidden, width)
    return width * find_call_bytes(
        problem.bank.heads, jax.ShapeDtypeStruct((rows, *hidden.shape[1:]), hidden.dtype)
    )


def find_member_bytes(group: LayerGroup) -> int:
    return sum(nbytes(leaf) for leaf in jax.tree.leaves(group.params)) // len(group.tokens)


def count_convolutions(group: LayerGroup, hidden: Any) -> int:
    return sum(
        equation.primitive.name == "conv_general_dilated" for equation in _trace(group, hidden)
    )


def _trace(group: LayerGroup, hidden: Any) -> list[Any]:
    """The equations of one call."""
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), group)
    return [*_equations(jax.make_jaxpr(lambda group, x: group.apply(0, x))(member, hidden).jaxpr)]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def nbytes(x: Any) -> int:
    return int(np.prod(x.shape)) * x.dtype.itemsize
