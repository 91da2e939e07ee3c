"""Calls of layers and heads, and estimates of the memory that they take.

`jchain.engine.head_calls` turns calls of heads into losses.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jchain._typing import Activations, Array, Int, PyTree
from jchain.bank import Bank
from jchain.chain import count_layers
from jchain.groups import LayerGroup, check_keeps_shape, infer_head_output
from jchain.modules import Module, apply_module, check_stem
from jchain.modules.activations import count_examples
from jchain.problem import Problem

T = TypeVar("T")

# The largest number of bytes that one call of a head may return. If the outputs would be larger,
# such as the logits of a large vocabulary, the examples are split into parts.
_OUTPUT_LIMIT = 2**26


@contextlib.contextmanager
def explain_wrong_input(bank: Bank, x: PyTree) -> Iterator[None]:
    """Raise a clear error if a computation fails because the bank does not accept its input.

    Args:
      bank: the bank.
      x: a batch of raw input, or what stands in its place.

    Raises:
      ValueError: if the stem, a layer, or a head does not accept its input.
    """
    try:
        yield
    except Exception:
        hidden = check_stem(bank.stem, bank.stem_params, x)
        for group in bank.layers:
            check_keeps_shape(group, hidden, bank.names)
        for group in bank.heads:
            infer_head_output(group, hidden, bank.names)
        raise


def apply_token(
    groups: tuple[LayerGroup, ...], token: Int[Array, ""], hidden: Activations
) -> PyTree:
    """Apply one layer (or head) to a batch, which is one layer call (or head call).

    Args:
      groups: the groups of a bank's layers, or of its heads.
      token: the token of the layer or head.
      hidden: the input of the layer or head, `[B, ...F]`, or a pytree of such arrays.

    Returns:
      Activations like `hidden`, or the output of a head, which is one array.
    """
    group_of, member_of = locate(groups)
    branches = [partial(group.apply, member_of[token]) for group in groups]
    return jax.lax.switch(group_of[token], branches, hidden)


def apply_layers(
    bank: Bank, tokens: Int[Array, "L"], x: Activations
) -> tuple[Activations, Int[Array, ""]]:
    """Apply the stem and the layers of one chain, and return the activations and its head.

    Args:
      bank: the bank with the layers.
      tokens: the tokens of the chain.
      x: the raw input, `[B, ...]`, or a pytree of such arrays.
    """
    hidden = bank.embed(x)
    for token in tokens[:-1]:
        is_layer = (token >= 0) & (token < bank.num_layers)
        hidden = jax.lax.cond(
            is_layer, partial(apply_token, bank.layers), lambda _, h: h, token, hidden
        )
    return hidden, tokens[count_layers(tokens, bank.num_layers)]


def apply_all(groups: tuple[LayerGroup, ...], hidden: Activations) -> PyTree:
    """Apply every layer (or head) to the same batch, with one layer call (or head call) each.

    Args:
      groups: the groups of a bank's layers, or of its heads.
      hidden: the input that they share, `[B, ...F]`, or a pytree of such arrays.

    Returns:
      The outputs, `[E, B, ...G]`, or a pytree of such arrays, in the order of the tokens.
    """
    outputs: list[PyTree] = []
    for group in groups:

        def call(trees: tuple[PyTree, PyTree], module: Module = group.module) -> PyTree:
            return apply_module(module, *trees, hidden)

        stacked = group.params, group.state

        if count_convolutions(group, hidden) > 1:
            # Under vmap, all convolutions except the first become grouped convolutions, which take
            # up to twice as long on CPU as applying one layer at a time.
            one_by_one = partial(jax.lax.map, call)
            outputs.append(
                jax.lax.platform_dependent(stacked, cpu=one_by_one, default=jax.vmap(call))
            )
        else:
            # A module without params has no leaf from which vmap could read the axis size.
            outputs.append(jax.vmap(call, axis_size=len(group.tokens))(stacked))
    order = np.argsort([token for group in groups for token in group.tokens])
    if len(outputs) == 1:
        return outputs[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *outputs)


def locate(groups: tuple[LayerGroup, ...]) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """Return the group of each token, and its index in that group.

    Both are -1 for tokens that are in none of these groups.

    Args:
      groups: the groups of a bank's layers, or of its heads.
    """
    size = 1 + max(token for group in groups for token in group.tokens)
    group_of, member_of = np.full(size, -1), np.full(size, -1)
    for i, group in enumerate(groups):
        group_of[list(group.tokens)] = i
        member_of[list(group.tokens)] = np.arange(len(group.tokens))
    return jnp.asarray(group_of), jnp.asarray(member_of)


def has_large_outputs(problem: Problem, hidden: PyTree, width: int) -> bool:
    """Return whether the outputs of several head calls are too large to be made at once.

    Args:
      problem: the problem with the heads.
      hidden: the activations of one chain. Only their shapes and dtypes are read.
      width: the number of head calls.
    """
    return width * nbytes(get_output_shape(problem, hidden)) > _OUTPUT_LIMIT


def map_in_parts(run: Callable[[Int[Array, "_"]], T], num: int, size: int) -> tuple[T, T | None]:
    """Apply a function to the indices of `num` examples, `size` at a time.

    Args:
      run: a function that maps indices of examples to a pytree of arrays.
      num: the number of examples.
      size: the number of examples in a part.

    Returns:
      The stacked results of the full parts, and the result of the remaining examples or None if no
      examples remain.
    """
    whole = jax.lax.map(lambda start: run(start + jnp.arange(size)), jnp.arange(num // size) * size)
    rest = num % size
    return whole, run(num - rest + jnp.arange(rest)) if rest else None


def count_examples_per_call(problem: Problem, hidden: PyTree, width: int) -> int:
    """Return the number of examples whose outputs fit in one call of heads.

    Args:
      problem: the problem, whose bank has the heads.
      hidden: the activations of one chain. Only their shapes and dtypes are read.
      width: the number of chains in the call.
    """
    parts = -(-width * nbytes(get_output_shape(problem, hidden)) // _OUTPUT_LIMIT)
    return max(1, count_examples(hidden) // max(1, parts))


def infer_hidden(problem: Problem) -> PyTree:
    """Return the shapes and dtypes of the activations that layers map."""
    return jax.eval_shape(problem.bank.embed, problem.data.x)


def get_output_shape(problem: Problem, hidden: PyTree) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a head's outputs."""
    return jax.eval_shape(
        lambda problem, hidden: problem.bank.heads[0].apply(0, hidden), problem, hidden
    )


def estimate_call_bytes(groups: tuple[LayerGroup, ...], hidden: PyTree) -> int:
    """Estimate the temporaries of one call, in bytes, as twice the largest array in a layer."""
    avals = [
        var.aval
        for group in groups
        for equation in _trace(group, hidden)
        for var in equation.outvars
    ]
    return 2 * max(map(nbytes, avals), default=0)


def get_member_bytes(group: LayerGroup) -> int:
    """Return the size of the weights of one layer of a group, in bytes."""
    return nbytes((group.params, group.state)) // len(group.tokens)


def count_convolutions(group: LayerGroup, hidden: PyTree) -> int:
    """Return the number of convolutions in one layer of a group."""
    return sum(
        equation.primitive.name == "conv_general_dilated" for equation in _trace(group, hidden)
    )


def _trace(group: LayerGroup, hidden: PyTree) -> list[JaxprEqn]:
    """Return the equations of one call, including the equations of inner jaxprs."""
    member = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), group)
    return [*_equations(jax.make_jaxpr(lambda group, x: group.apply(0, x))(member, hidden).jaxpr)]


def _equations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def nbytes(x: PyTree) -> int:
    """Return the size in bytes of an array, or of a pytree of arrays or of abstract values."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
