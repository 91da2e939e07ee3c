"""Groups: the layers or heads of a bank that share a module, as stacked params."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, PyTree
from jchain.pytree import pytree_dataclass, static


@pytree_dataclass
class LayerGroup:
    """The layers (or heads) of a bank that share one module, so that their params stack.

    Attributes:
      params: every leaf `[n, ...]`, n the members of the group.
      module: the Flax module they share.
      tokens: the bank's token of each member, in the order of the leading axis.
    """

    params: PyTree
    module: nn.Module = static()
    tokens: tuple[int, ...] = static()

    def apply(self, index: Int[Array, ""] | int, x: Array) -> Array:
        """Member `index` (its place in the group, not its token) applied to a batch `[B, ...F]`."""
        # A traced index into an axis of one: XLA on CPU (jax 0.10.2) gets the mean of squares of a vmapped product wrong.
        place = 0 if len(self.tokens) == 1 else index
        return self.module.apply({"params": jax.tree.map(lambda leaf: leaf[place], self.params)}, x)  # pyright: ignore[reportReturnType]


def group_by_module(
    module: nn.Module | Sequence[nn.Module], params: Sequence[PyTree], kind: str, first_token: int
) -> tuple[LayerGroup, ...]:
    """A group per module, in the order in which they come."""
    modules = [module] * len(params) if isinstance(module, nn.Module) else [*module]
    if len(modules) != len(params):
        raise ValueError(
            f"expected one {kind} module, or {len(params)} as there are params, got {len(modules)}"
        )
    groups = []
    for kept in dict.fromkeys(modules):
        places = [i for i, other in enumerate(modules) if other == kept]
        stacked = _stack({f"{kind} {i}": params[i] for i in places})
        groups.append(LayerGroup(stacked, kept, tuple(first_token + i for i in places)))
    return tuple(groups)


def merge(members: list[tuple[LayerGroup, np.ndarray]]) -> tuple[LayerGroup, ...]:
    """Groups with new tokens (`new[token]`, -1 to leave out), one per module, each in the order of its tokens."""
    merged = []
    for module in dict.fromkeys(group.module for group, _ in members):
        same = [(group, new) for group, new in members if group.module == module]
        tokens = np.concatenate([new[list(group.tokens)] for group, new in same])
        order = [i for i in np.argsort(tokens, kind="stable") if tokens[i] >= 0]
        if order:
            _stack(
                {
                    f"token {new[group.tokens[0]]} of the new bank": pick(group.params, 0)
                    for group, new in same
                }
            )
            whole = jax.tree.map(
                lambda *leaves: jnp.concatenate(leaves), *(group.params for group, _ in same)
            )
            merged.append(
                LayerGroup(
                    pick(whole, np.array(order)), module, tuple(int(tokens[i]) for i in order)
                )
            )
    return tuple(merged)


def put(group: LayerGroup, token: int, params: PyTree) -> LayerGroup:
    """The group with other weights of one member."""
    place = group.tokens.index(token)
    _check_alike(params, pick(group.params, place), f"params do not fit token {token}", "the bank")
    new = jax.tree.map(lambda leaf, own: leaf.at[place].set(own), group.params, params)
    return LayerGroup(new, group.module, group.tokens)


def pick(params: PyTree, index: Any) -> PyTree:
    """One member of a stack, or several in another order."""
    return jax.tree.map(lambda leaf: leaf[index], params)


def check_keeps_shape(group: LayerGroup, x: Any, *, of_any_dtype: bool = False) -> None:
    """Check the contract of a layer, output like input, on a batch that need only have `.shape` and `.dtype`.

    Raises:
      ValueError: the output has another shape or dtype, or the module does not take such an input.
    """
    try:
        out = jax.eval_shape(group.apply, 0, x)
    except (
        Exception
    ) as error:  # whatever a user's module raises: said again with what was asked of it
        raise ValueError(
            f"layer {type(group.module).__name__} does not take an input of shape {list(x.shape)}: {str(error).splitlines()[0]}"
        ) from None
    if out.shape != x.shape or (out.dtype != x.dtype and not of_any_dtype):
        raise ValueError(
            f"layer {type(group.module).__name__} must keep the shape of its input: expected {x.dtype}{list(x.shape)}, "
            f"got {out.dtype}{list(out.shape)}"
        )


def find_input_shape(group: LayerGroup) -> tuple[int, ...] | None:
    """A feature shape that the module takes with these params, one that it keeps where there is such a one: Flax refuses those
    that its kernels were not made for."""
    sizes = sorted({size for leaf in jax.tree.leaves(group.params) for size in leaf.shape[1:]})
    taken = []
    for spatial in ((), (8,), (8, 8)):
        for size in sizes:
            shape = (*spatial, size)
            try:
                out = jax.eval_shape(group.apply, 0, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
            except Exception:
                continue
            if out.shape == (1, *shape):
                return shape
            taken.append(shape)
    return taken[0] if taken else None


def _stack(params: dict[str, PyTree]) -> PyTree:
    """Params by the names that errors call them, with a leading axis."""
    (first, expected), *others = params.items()
    for name, tree in others:
        _check_alike(tree, expected, f"params of {name} do not stack", first)
    return jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *params.values()
    )


def _check_alike(params: PyTree, other: PyTree, problem: str, name: str) -> None:
    """Same structure, shapes and dtypes as the params of `name`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    others, expected_structure = jax.tree_util.tree_flatten_with_path(other)
    if structure != expected_structure:
        raise ValueError(f"{problem}: expected the structure {expected_structure}, got {structure}")
    for (path, leaf), (_, expected) in zip(leaves, others, strict=True):
        leaf, expected = jnp.asarray(leaf), jnp.asarray(expected)
        if leaf.shape != expected.shape or leaf.dtype != expected.dtype:
            raise ValueError(
                f"{problem}: expected {expected.dtype}{list(expected.shape)} at {jax.tree_util.keystr(path)} as in "
                f"{name}, got {leaf.dtype}{list(leaf.shape)}"
            )
