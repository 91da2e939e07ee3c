"""Weights, gradients, importance, and empirical Fisher information of each layer of a chain.

Importance is `|w dL/dw|`, the first-order change in loss when a weight is set to 0 (Mozer and
Smolensky 1989; Molchanov et al. 2017, arXiv:1611.06440). The empirical Fisher information is the
mean over examples of the squared gradient of an example's loss.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, PyTree
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import ChainsLike
from jchain.engine.head_calls import compute_head_loss
from jchain.problem import Problem
from jchain.pytree import upcast

# The number of examples whose gradients are in memory at the same time.
_CHUNK = 8

T = TypeVar("T")


class TensorReport(NamedTuple):
    """The report of one tensor of a layer, as arrays of the tensor's shape."""

    weights: Float[np.ndarray, "..."]
    gradient: Float[np.ndarray, "..."]  # the gradient of the loss of the split
    # the mean over examples of the squared gradient of an example's loss
    fisher: Float[np.ndarray, "..."]

    @property
    def importance(self) -> Float[np.ndarray, "..."]:
        """The absolute first-order change in loss when a weight is set to 0."""
        return np.abs(self.weights * self.gradient)


class LayerReport(NamedTuple):
    """The report of one layer of a chain."""

    slot: int
    name: str  # the name of the layer, or its token if the bank has no names
    tensors: dict[str, TensorReport]  # tensors by path, such as `Dense_0/kernel`

    def reduce(self) -> dict[str, dict[str, float]]:
        """Summarize each tensor, keyed by its path, and the whole layer, keyed by `""`.

        `weights` and `gradient` are root mean squares; `importance` and `fisher` are sums.
        """
        parts = {path: [tensor] for path, tensor in self.tensors.items()} | {
            "": [*self.tensors.values()]
        }
        return {path: _reduce(tensors) for path, tensors in parts.items()}


@checked
def report_layers(problem: Problem, chain: ChainsLike) -> list[LayerReport]:
    """Report on each layer of a chain, from first to last.

    The gradient of each example's loss is computed, for 8 examples at a time. This costs three
    layer calls per layer, made on batches of one example.

    Args:
      problem: the bank, the split of data, and the loss.
      chain: the tokens of the chain, `[L]`.

    Raises:
      ValueError: if `chain` is invalid for this bank, or its loss is not finite.
    """
    bank = problem.bank
    tokens = problem.space.validate(chain)
    if tokens.ndim != 1:
        raise ValueError(
            f"expected one chain of shape [{problem.max_layers + 1}], got {list(tokens.shape)}"
        )
    path = tuple(int(token) for token in tokens if token >= 0)
    params = [_take_params(bank, token) for token in path[:-1]]
    loss, gradients, fisher = _differentiate(problem.without_names(), params, path)
    if not np.isfinite(loss):
        raise ValueError(f"expected a chain of finite loss, got {float(loss)}")
    return [
        LayerReport(slot, bank.names[token] if bank.names else str(token), _name_tensors(*trees))
        for slot, (token, *trees) in enumerate(
            zip(path[:-1], params, gradients, fisher, strict=True)
        )
    ]


def _reduce(tensors: list[TensorReport]) -> dict[str, float]:
    def gather(name: str) -> np.ndarray:
        return np.concatenate([np.ravel(getattr(tensor, name)) for tensor in tensors])

    root_mean_squares = {
        name: float(np.sqrt(np.mean(gather(name) ** 2))) for name in ("weights", "gradient")
    }
    return root_mean_squares | {
        name: float(gather(name).sum()) for name in ("importance", "fisher")
    }


def _name_tensors(weights: PyTree, gradient: PyTree, fisher: PyTree) -> dict[str, TensorReport]:
    paths, _ = jax.tree_util.tree_flatten_with_path(weights)
    names = ["/".join(str(getattr(key, "key", key)) for key in path) for path, _ in paths]
    leaves = zip(
        *(map(np.asarray, jax.tree.leaves(tree)) for tree in (weights, gradient, fisher)),
        strict=True,
    )
    return {name: TensorReport(*arrays) for name, arrays in zip(names, leaves, strict=True)}


def _take_params(bank: Bank, token: int) -> PyTree:
    group, index = bank.find(token)
    return jax.tree.map(lambda leaf: leaf[index], group.params)


@partial(jax.jit, static_argnames="path")
def _differentiate(
    problem: Problem, params: list[PyTree], path: tuple[int, ...]
) -> tuple[Array, list[PyTree], list[PyTree]]:
    """Compute the loss, and each layer's weight gradient and empirical Fisher information."""
    bank = problem.bank

    def compute_loss(params: list[PyTree], part: Problem) -> Array:
        hidden = bank.embed(part.data.x)
        for token, own in zip(path[:-1], params, strict=True):
            group, index = bank.find(token)
            hidden = group.apply_params(index, own, hidden)
        return compute_head_loss(part, path[-1], hidden)

    def differentiate(index: Array) -> tuple[Array, list[PyTree], list[PyTree]]:
        part = problem.read_part(index, 1)
        loss, gradients = jax.value_and_grad(compute_loss)(params, part)
        gradients = jax.tree.map(upcast, gradients)
        return loss, gradients, jax.tree.map(jnp.square, gradients)

    return _mean_over_examples(differentiate, problem.num_examples)


def _mean_over_examples(fn: Callable[[Array], T], num_examples: int) -> T:
    """Compute the mean of `fn(index)` over examples, for `_CHUNK` examples at a time."""

    def add(total: T, index: Array) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, fn(index)), None

    def add_chunk(total: T, chunk: Array) -> tuple[T, None]:
        return jax.tree.map(lambda a, b: a + b.sum(axis=0), total, jax.vmap(fn)(chunk)), None

    indices = jnp.arange(num_examples)
    num_whole = num_examples - num_examples % _CHUNK
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(fn, indices[0]))
    total = jax.lax.scan(add_chunk, zero, indices[:num_whole].reshape(-1, _CHUNK))[0]
    total = jax.lax.scan(add, total, indices[num_whole:])[0]
    return jax.tree.map(lambda a: a / num_examples, total)
