"""Groups: the layers or heads of a bank that share a module and stack their params."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, PyTree
from jchain.pytree import pytree_dataclass, static

# A batch, or only its shape and dtype.
ArrayOrShape = Array | np.ndarray | jax.ShapeDtypeStruct
_MAX_CHARACTERS = 80


@pytree_dataclass
class LayerGroup:
    """The layers (or heads) of a bank that share one module, so that their params stack.

    Attributes:
      params: the stacked params, with leaves `[n, ...]` for a group of n members.
      module: the Flax module that all members share.
      tokens: the token of each member in the bank, in the order of the leading axis.
    """

    params: PyTree
    module: nn.Module = static()
    tokens: tuple[int, ...] = static()

    def __repr__(self) -> str:
        return (
            f"LayerGroup({len(self.tokens)} {describe_module(self.module)}, tokens {self.tokens})"
        )

    def apply(self, index: Int[Array, ""] | int, x: Array) -> Array:
        """Apply one member to a batch.

        Args:
          index: index of the member in the group, which is not its token.
          x: the activations of a batch, `[B, ...F]`.
        """
        # After a traced index into an axis of size 1, XLA on CPU (jax 0.10.2) computes a wrong mean
        # of squares of a vmapped product, so the index is the constant 0 here.
        place = 0 if len(self.tokens) == 1 else index
        return apply_module(self.module, pick(self.params, place), x)


def apply_module(module: nn.Module, params: PyTree, x: Array | np.ndarray) -> Array:
    """Apply a module to a batch, with no params if `params` is None."""
    variables = {"params": {} if params is None else params}
    return module.apply(variables, x)  # pyright: ignore[reportReturnType]


def describe_module(module: nn.Module) -> str:
    """Describe a module in one line, as in `ResidualMLP(64, hidden=128)`.

    Fields that have their default values are left out.

    Args:
      module: any Flax module.
    """
    parts = []
    for name, field in type(module).__dataclass_fields__.items():
        value = getattr(module, name, None)
        if name in ("parent", "name") or value is field.default:
            continue
        is_required = field.default is dataclasses.MISSING and not any("=" in p for p in parts)
        parts.append(_describe_value(value) if is_required else f"{name}={_describe_value(value)}")
    text = f"{type(module).__name__}({', '.join(parts)})"
    return text if len(text) <= _MAX_CHARACTERS else f"{type(module).__name__}(...)"


def describe_groups(groups: object, kind: str) -> str | None:
    """Describe how many members each module has, as in "3 layers: 2 Dense(5), 1 ResidualMLP(5)".

    Args:
      groups: the groups of layers or heads of a bank.
      kind: "layer" or "head".

    Returns:
      The description, or None if `groups` holds the placeholders that JAX may put into a bank.
    """
    if not isinstance(groups, tuple) or not all(isinstance(g, LayerGroup) for g in groups):
        return None
    num = sum(len(group.tokens) for group in groups)
    if num == 1:
        return f"1 {kind}: {describe_module(groups[0].module)}"
    counts = (f"{len(group.tokens)} {describe_module(group.module)}" for group in groups)
    return f"{num} {kind}s: {', '.join(counts)}"


def _describe_value(value: object) -> str:
    if isinstance(value, nn.Module):
        return describe_module(value)
    return getattr(value, "__name__", None) or repr(value)


def group_by_module(
    module: nn.Module | Sequence[nn.Module], params: Sequence[PyTree], kind: str, first_token: int
) -> tuple[LayerGroup, ...]:
    """Stack params into one group per module, in the order of the first member of each group.

    Args:
      module: the module of all members, or one module per member.
      params: the params of each member.
      kind: "layer" or "head", for error messages.
      first_token: the token of the first member; the other members get the next tokens.

    Raises:
      ValueError: if modules and params differ in number, or params do not stack.
    """
    modules = [module] * len(params) if isinstance(module, nn.Module) else [*module]
    if len(modules) != len(params):
        raise ValueError(
            f"expected one {kind} module, or one per params, {len(params)}, got {len(modules)}"
        )
    groups = []
    for shared in dict.fromkeys(modules):
        places = [i for i, other in enumerate(modules) if other == shared]
        stacked = _stack({f"{kind} {i}": params[i] for i in places})
        groups.append(LayerGroup(stacked, shared, tuple(first_token + i for i in places)))
    return tuple(groups)


def merge(members: list[tuple[LayerGroup, np.ndarray]]) -> tuple[LayerGroup, ...]:
    """Merge groups into one group per module, with new tokens in ascending order.

    Args:
      members: pairs of a group and an array `new`, where `new[token]` is the new token of a member,
        or -1 to drop that member.

    Raises:
      ValueError: if the params of one module do not stack.
    """
    merged = []
    for module in dict.fromkeys(group.module for group, _ in members):
        same = [(group, new) for group, new in members if group.module == module]
        tokens = np.concatenate([new[list(group.tokens)] for group, new in same])
        order = [i for i in np.argsort(tokens, kind="stable") if tokens[i] >= 0]
        if order:
            # Stack the first members only to check that the groups fit together.
            _stack(
                {
                    f"token {new[group.tokens[0]]} of the new bank": pick(group.params, 0)
                    for group, new in same
                }
            )
            params = jax.tree.map(
                lambda *leaves: jnp.concatenate(leaves), *(group.params for group, _ in same)
            )
            new_tokens = tuple(int(tokens[i]) for i in order)
            merged.append(LayerGroup(pick(params, np.array(order)), module, new_tokens))
    return tuple(merged)


def put(group: LayerGroup, token: int, params: PyTree) -> LayerGroup:
    """Return the group with new weights for one token.

    Args:
      group: the group to change.
      token: the token of the member whose weights are replaced.
      params: the new weights of that member.

    Raises:
      ValueError: if params differ in structure, shape, or dtype from those that they replace.
    """
    place = group.tokens.index(token)
    old = pick(group.params, place)
    _check_same_structure(params, old, f"params do not fit token {token}", "the bank")
    new = jax.tree.map(lambda leaf, own: leaf.at[place].set(own), group.params, params)
    return LayerGroup(new, group.module, group.tokens)


def add_copies(group: LayerGroup, tokens: Sequence[int]) -> LayerGroup:
    """Return the group extended by copies of its own members, in turn, under new tokens.

    Args:
      group: the group to extend.
      tokens: the token of each copy.
    """
    places = np.arange(len(group.tokens) + len(tokens)) % len(group.tokens)
    return LayerGroup(pick(group.params, places), group.module, (*group.tokens, *tokens))


def pick(params: PyTree, index: Array | np.ndarray | int | tuple[int, ...]) -> PyTree:
    """Pick the params of one or several members from a stack.

    Args:
      params: the stacked params, with leaves `[n, ...]`.
      index: the index of a member, or an array of indices.
    """
    return jax.tree.map(lambda leaf: leaf[index], params)


def check_keeps_shape(
    group: LayerGroup, x: ArrayOrShape, *, allow_other_dtype: bool = False
) -> None:
    """Check that a layer's output has the shape and dtype of its input.

    Args:
      group: the group of layers to check.
      x: a batch of input, or its shape and dtype.
      allow_other_dtype: whether the output may have another dtype, so that only shapes must agree.

    Raises:
      ValueError: if the output has another shape or dtype, or the module does not accept the input.
    """
    name = f"layer {type(group.module).__name__}"
    out = _find_output(lambda x: group.apply(0, x), x, name)
    if out.shape != x.shape or (out.dtype != x.dtype and not allow_other_dtype):
        raise ValueError(
            f"{name} must keep the shape of its input: expected {x.dtype}{list(x.shape)}, "
            f"got {out.dtype}{list(out.shape)}"
        )


def check_stem(stem: nn.Module | None, params: PyTree, x: ArrayOrShape) -> ArrayOrShape:
    """Check that a stem accepts an input, and return the shape and dtype of its output.

    Args:
      stem: the stem; None for the identity.
      params: params of the stem.
      x: a batch of raw input, or its shape and dtype.

    Raises:
      ValueError: if the stem does not accept this input.
    """
    if stem is None:
        return x
    name = f"stem {type(stem).__name__}"
    return _find_output(lambda x: apply_module(stem, params, x), x, name)


def check_same_stem(stems: Sequence[tuple[nn.Module | None, PyTree]]) -> None:
    """Check that all stems are equal.

    Args:
      stems: the module and params of each bank's stem; the module is None if a bank has no stem.

    Raises:
      ValueError: if a stem's module or params differ from those of the first stem.
    """
    first, first_params = stems[0]
    expected = jax.tree.structure(first_params or {})
    for i, (stem, params) in enumerate(stems):
        is_same = stem == first and jax.tree.structure(params or {}) == expected
        leaves = jax.tree.leaves(params), jax.tree.leaves(first_params)
        if not is_same or not all(np.array_equal(*pair) for pair in zip(*leaves, strict=True)):
            raise ValueError(
                f"expected banks with the same stem, but the stem of bank {i} differs from bank 0's"
            )


def _find_output(
    apply_fn: Callable[[Array], Array], x: ArrayOrShape, name: str
) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the output for an input like `x`."""
    try:
        return jax.eval_shape(apply_fn, x)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"{name} does not take an input of shape {list(x.shape)}: {str(error).splitlines()[0]}"
        ) from None


def find_input_shape(group: LayerGroup) -> tuple[int, ...] | None:
    """Guess the input shape of a group from the sizes of its params.

    The sizes in the params are tried one by one, because Flax rejects shapes that do not fit its
    kernels. A shape that the layers keep is preferred.

    Args:
      group: the group of layers.

    Returns:
      The shape of one example, or None if the module accepts none of the shapes that were tried.
    """
    sizes = sorted({size for leaf in jax.tree.leaves(group.params) for size in leaf.shape[1:]})
    accepted = []
    for spatial in ((), (8,), (8, 8)):
        for size in sizes:
            shape = (*spatial, size)
            try:
                out = jax.eval_shape(group.apply, 0, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
            except Exception:
                continue
            if out.shape == (1, *shape):
                return shape
            accepted.append(shape)
    return accepted[0] if accepted else None


def _stack(params: dict[str, PyTree]) -> PyTree:
    """Stack params on a new leading axis; the keys of the dict name them in error messages."""
    (first, expected), *others = params.items()
    for name, tree in others:
        _check_same_structure(tree, expected, f"params of {name} do not stack", first)
    return jax.tree.map(
        lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *params.values()
    )


def _check_same_structure(params: PyTree, other: PyTree, problem: str, name: str) -> None:
    """Check that params have the structure, shapes, and dtypes of `other`, the params of `name`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    others, expected_structure = jax.tree_util.tree_flatten_with_path(other)
    if structure != expected_structure:
        raise ValueError(f"{problem}: expected the structure {expected_structure}, got {structure}")
    for (path, leaf), (_, expected) in zip(leaves, others, strict=True):
        leaf, expected = jnp.asarray(leaf), jnp.asarray(expected)
        if leaf.shape != expected.shape or leaf.dtype != expected.dtype:
            raise ValueError(
                f"{problem}: expected {expected.dtype}{list(expected.shape)} "
                f"at {jax.tree_util.keystr(path)} as in {name}, "
                f"got {leaf.dtype}{list(leaf.shape)}"
            )
