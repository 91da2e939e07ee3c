"""What the gradient says of each layer of a chain: its weights, how fast each should change, and how much each matters.

Importance is `|w dL/dw|`, the change of loss to first order when a weight is set to 0 (Mozer and Smolensky 1989; Molchanov et al.
2017, arXiv:1611.06440). The empirical Fisher is the mean over examples of the square of the gradient of an example's loss.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Float
from jchain.data import Batch
from jchain.groups import LayerGroup
from jchain.problem import Problem, upcast

# Examples whose gradients are held at once.
_CHUNK = 8


class TensorReport(NamedTuple):
    """One tensor of one layer: arrays of its shape."""

    weights: Float[np.ndarray, "..."]
    gradient: Float[np.ndarray, "..."]  # of the loss
    fisher: Float[
        np.ndarray, "..."
    ]  # mean over examples of the squared gradient of an example's loss

    @property
    def importance(self) -> Float[np.ndarray, "..."]:
        """By how much the loss would change, to first order, were the weight 0."""
        return np.abs(self.weights * self.gradient)


class LayerReport(NamedTuple):
    """One layer of a chain."""

    slot: int
    name: str
    tensors: dict[str, TensorReport]  # by path, `Dense_0/kernel`

    def reduce(self) -> dict[str, dict[str, float]]:
        """By tensor, and under `""` of the whole layer: root mean squares of weights and gradient, sums of importance and Fisher."""
        parts = {path: [tensor] for path, tensor in self.tensors.items()} | {
            "": [*self.tensors.values()]
        }
        return {path: _reduce(tensors) for path, tensors in parts.items()}


def report_layers(problem: Problem, chain: Any) -> list[LayerReport]:
    """A report of each layer of a chain, first to last.

    The gradient of each example's loss is computed, 8 at a time: three layer calls for each layer, but of as many small batches.

    Raises:
      ValueError: `chain` is no chain of this bank, or its loss is not finite.
    """
    bank = problem.bank
    tokens = chain_lib.validate(
        np.asarray(chain), bank.num_layers, bank.num_heads, problem.max_layers
    )
    if tokens.ndim != 1:
        raise ValueError(
            f"expected one chain of shape [{problem.max_layers + 1}], got {list(tokens.shape)}"
        )
    route = tuple(int(token) for token in tokens if token >= 0)
    owns = [_take(bank.layers, token)[1] for token in route[:-1]]
    loss, gradients, fisher = _differentiate(problem.without_names(), owns, route)
    if not np.isfinite(loss):
        raise ValueError(f"expected a chain of finite loss, got {float(loss)}")
    return [
        LayerReport(slot, bank.names[token] if bank.names else str(token), _name_tensors(*trees))
        for slot, (token, *trees) in enumerate(
            zip(route[:-1], owns, gradients, fisher, strict=True)
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


def _name_tensors(weights: Any, gradient: Any, fisher: Any) -> dict[str, TensorReport]:
    paths, _ = jax.tree_util.tree_flatten_with_path(weights)
    names = ["/".join(str(getattr(key, "key", key)) for key in path) for path, _ in paths]
    leaves = zip(
        *(map(np.asarray, jax.tree.leaves(tree)) for tree in (weights, gradient, fisher)),
        strict=True,
    )
    return {name: TensorReport(*arrays) for name, arrays in zip(names, leaves, strict=True)}


def _take(groups: tuple[LayerGroup, ...], token: int) -> tuple[LayerGroup, Any]:
    group = next(group for group in groups if token in group.tokens)
    return group, jax.tree.map(lambda leaf: leaf[group.tokens.index(token)], group.params)


@partial(jax.jit, static_argnames="route")
def _differentiate(
    problem: Problem, owns: list[Any], route: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    """Loss, its gradients by the weights of each layer, and their empirical Fisher."""
    bank = problem.bank
    head, head_params = _take(bank.heads, route[-1])

    def find_loss(owns: list[Any], x: Any, y: Any) -> Any:
        hidden = bank.embed(x[None])
        for token, params in zip(route[:-1], owns, strict=True):
            hidden = _take(bank.layers, token)[0].module.apply({"params": params}, hidden)
        outputs: Any = head.module.apply({"params": head_params}, hidden)
        return jnp.mean(problem.loss_fn(outputs, y[None]))

    def visit(example: Batch) -> Any:
        loss, gradients = jax.value_and_grad(find_loss)(owns, *example)
        gradients = jax.tree.map(upcast, gradients)
        return loss, gradients, jax.tree.map(jnp.square, gradients)

    def add(total: Any, example: Batch) -> Any:
        return jax.tree.map(jnp.add, total, visit(example)), None

    num_examples = problem.data.x.shape[0]
    num_whole = num_examples - num_examples % _CHUNK
    chunks = jax.tree.map(lambda a: a[:num_whole].reshape(-1, _CHUNK, *a.shape[1:]), problem.data)
    rest = jax.tree.map(lambda a: a[num_whole:], problem.data)

    def add_chunk(total: Any, chunk: Batch) -> Any:
        return jax.tree.map(lambda a, b: a + b.sum(axis=0), total, jax.vmap(visit)(chunk)), None

    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(visit, jax.tree.map(lambda a: a[0], problem.data)),
    )
    total = jax.lax.scan(add_chunk, zero, chunks)[0]
    total = jax.lax.scan(add, total, rest)[0]
    return jax.tree.map(lambda a: a / num_examples, total)
