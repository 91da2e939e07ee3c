"""Groups: the layers or heads of a bank that share a module and stack their params."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, PyTree
from jchain.arguments import check_fields, check_integers, checked
from jchain.modules import (
    Module,
    apply_module,
    check_is_array,
    check_layer,
    check_rows,
    convert,
    describe_module,
    infer_output,
    is_nnx,
    split_variables,
)
from jchain.modules.activations import count_examples
from jchain.modules.pickling import Picklable
from jchain.pytree import describe_type, get_first_line, pick, pytree_dataclass, static
from jchain.stages.arguments import read_stages
from jchain.tokens import check_is_tokens


@pytree_dataclass
class LayerGroup(Picklable):
    """The layers (or heads) of a bank that share one module, so that their params stack.

    Attributes:
      params: the stacked params, with leaves `[n, ...]` for a group of n members.
      module: the module that all members share: a Flax linen module, or what `jchain.modules` made
        of an nnx module or a function.
      tokens: the token of each member in the bank, in the order of the leading axis.
      state: the other collections of variables by name, such as `batch_stats`, stacked in the same
        way; None if the module has none. Nothing in jchain changes or differentiates them.
      stages: the stage that the members read, and the stage that they write; heads write the stage
        that they read. Both are 0 in a bank without stages.

    Raises:
      ValueError: if the tokens are not different integers of at least 0, or a leaf does not have
        one row per token.
    """

    params: PyTree
    module: Module = static()
    tokens: tuple[int, ...] = static()
    state: PyTree = None
    stages: tuple[int, int] = static(default=(0, 0))

    def __post_init__(self) -> None:
        check_fields(self)
        check_is_tokens(self.tokens)
        check_integers(at_least=0, **{"the stage read": self.stages[0]})
        check_integers(at_least=0, **{"the stage written": self.stages[1]})
        check_rows((self.params, self.state), len(self.tokens))

    def __repr__(self) -> str:
        name = describe_module(self.module)
        stages = f", stages {self.stages}" if self.stages != (0, 0) else ""
        return f"LayerGroup({len(self.tokens)} {name}, tokens {self.tokens}{stages})"

    @checked
    def apply(self, index: Int[Array, ""] | int, x: PyTree) -> PyTree:
        """Apply one member to a batch.

        Args:
          index: index of the member in the group, which is not its token.
          x: the activations of a batch, `[B, ...F]`, or a pytree of such arrays.
        """
        params, state = pick((self.params, self.state), self._locate(index))
        return apply_module(self.module, params, state, x)

    @checked
    def apply_params(self, index: Int[Array, ""] | int, params: PyTree, x: PyTree) -> PyTree:
        """Apply one member with other params, for example to differentiate them.

        Args:
          index: index of the member in the group.
          params: the params to apply instead of the member's own.
          x: the activations of a batch, `[B, ...F]`, or a pytree of such arrays.
        """
        return apply_module(self.module, params, pick(self.state, self._locate(index)), x)

    def _locate(self, index: Int[Array, ""] | int) -> Int[Array, ""] | int:
        # After a traced index into an axis of size 1, XLA on CPU (jax 0.10.2) computes a wrong mean
        # of squares of a vmapped product, so the index is the constant 0 here.
        return 0 if len(self.tokens) == 1 else index

    @checked
    def take(self, index: Int[Array, ""] | int) -> PyTree:
        """Return the variables of one member, in the form that `Bank.stack` takes.

        Args:
          index: index of the member in the group.
        """
        params, state = pick((self.params, self.state), index)
        return params if state is None else {"params": params, **state}


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
    names = [describe_module(group.module) for group in groups]
    if any(group.stages != (0, 0) for group in groups):
        names = [
            f"{name} (stage {' to '.join(str(stage) for stage in dict.fromkeys(group.stages))})"
            for name, group in zip(names, groups, strict=True)
        ]
    if num == 1:
        return f"1 {kind}: {names[0]}"
    counts = (f"{len(group.tokens)} {name}" for group, name in zip(groups, names, strict=True))
    return f"{num} {kind}s: {', '.join(counts)}"


def group_by_module(
    module: object,
    params: Sequence[PyTree] | None,
    kind: str,
    first_token: int,
    stages: object = None,
) -> tuple[LayerGroup, ...]:
    """Stack params into one group per module, in the order of the first member of each group.

    Members that share a module but differ in their stages are in different groups.

    Args:
      module: the module of all members, or one module per member: Flax linen or nnx modules, or
        functions `apply_fn(params, x)`.
      params: the params of each member, or all its collections of variables; None for an nnx
        module, which carries its own.
      kind: "layer" or "head", for error messages.
      first_token: the token of the first member; the other members get the next tokens.
      stages: the stages of the members (see `jchain.stages.arguments.read_stages`); None for 0.

    Raises:
      ValueError: if there are no members, modules and params differ in number, a module is of
        another kind or has no params, stages are invalid, or params do not stack.
    """
    if params is not None and not isinstance(params, list | tuple):
        raise ValueError(
            f"expected a list with the params of each {kind}, got {describe_type(params)}"
        )
    several = [*module] if isinstance(module, list | tuple) else None
    given = [None] * (1 if several is None else len(several)) if params is None else [*params]
    modules = [module] * len(given) if several is None else several
    if params is None and not all(map(is_nnx, modules)):
        raise ValueError(
            f"expected the params of each {kind}, such as [{kind}.init(key, x)['params']], got "
            "None: only nnx modules carry their own"
        )
    if len(modules) != len(given):
        raise ValueError(
            f"expected one {kind} module or {len(given)} (one per set of params), "
            f"got {len(modules)}"
        )
    if not modules:
        raise ValueError(f"empty bank: expected at least one {kind}, got none")
    pairs = zip(modules, given, strict=True)
    members = [convert(own, tree, f"{kind} {i}") for i, (own, tree) in enumerate(pairs)]
    pairs_of_stages = read_stages(stages, len(members), kind)
    keys = [(member.module, own) for member, own in zip(members, pairs_of_stages, strict=True)]
    groups = []
    for key in dict.fromkeys(keys):
        indices = [i for i, other in enumerate(keys) if other == key]
        params, state = (
            _stack({f"{kind} {i}": getattr(members[i], field) for i in indices})
            for field in ("params", "state")
        )
        tokens = tuple(first_token + i for i in indices)
        groups.append(LayerGroup(params, key[0], tokens, state, key[1]))
    return tuple(groups)


def merge_groups(members: list[tuple[LayerGroup, np.ndarray]]) -> tuple[LayerGroup, ...]:
    """Merge groups into one group per module, with new tokens in ascending order.

    Args:
      members: pairs of a group and an array `new`, where `new[token]` is the new token of a member,
        or -1 to drop that member.

    Raises:
      ValueError: if the params of one module do not stack.
    """
    merged = []
    for module, stages in dict.fromkeys((group.module, group.stages) for group, _ in members):
        same = [
            (group, new)
            for group, new in members
            if group.module == module and group.stages == stages
        ]
        tokens = np.concatenate([new[list(group.tokens)] for group, new in same])
        order = [i for i in np.argsort(tokens, kind="stable") if tokens[i] >= 0]
        if order:
            # Stack the first members only to check that the groups fit together.
            _stack(
                {
                    f"token {new[group.tokens[0]]} of the new bank": pick(_get_trees(group), 0)
                    for group, new in same
                }
            )
            joined = jax.tree.map(
                lambda *leaves: jnp.concatenate(leaves), *(_get_trees(group) for group, _ in same)
            )
            params, state = pick(joined, np.array(order))
            kept = tuple(int(tokens[i]) for i in order)
            merged.append(LayerGroup(params, module, kept, state, stages))
    return tuple(merged)


def _get_trees(group: LayerGroup) -> tuple[PyTree, PyTree]:
    return group.params, group.state


def put(group: LayerGroup, token: int, params: PyTree) -> LayerGroup:
    """Return the group with new weights for one token.

    Args:
      group: the group to change.
      token: the token of the member whose weights are replaced.
      params: the new weights of that member.

    Raises:
      ValueError: if params differ in structure, shape, or dtype from the weights that they replace.
    """
    index = group.tokens.index(token)
    new = _read_variables(group.module, params, f"token {token}")
    old = pick(_get_trees(group), index)
    if new[1] is None:
        new = new[0], old[1]
    _check_same_structure(new, old, f"params do not fit token {token}", "the bank")
    params, state = jax.tree.map(lambda leaf, own: leaf.at[index].set(own), _get_trees(group), new)
    return dataclasses.replace(group, params=params, state=state)


def _read_variables(module: Module, params: PyTree, name: str) -> tuple[PyTree, PyTree]:
    """Split the new weights of a member: an nnx module, all collections, or only the params."""
    if is_nnx(params):
        converted = convert(params, None, name)
        return converted.params, converted.state
    return split_variables(module, params)


def add_copies(group: LayerGroup, tokens: Sequence[int]) -> LayerGroup:
    """Return the group extended by copies of its members, cycling through them.

    Args:
      group: the group to extend.
      tokens: the new token of each copy.
    """
    indices = np.arange(len(group.tokens) + len(tokens)) % len(group.tokens)
    params, state = pick(_get_trees(group), indices)
    tokens = (*group.tokens, *tokens)
    return dataclasses.replace(group, params=params, tokens=tokens, state=state)


def check_keeps_shape(
    group: LayerGroup,
    x: PyTree,
    names: Sequence[str] = (),
    *,
    allow_other_dtype: bool = False,
) -> None:
    """Check that a group's layers have an output of the structure and shapes of their input.

    Args:
      group: the group of layers to check.
      x: a batch of input, one array or a pytree of arrays, or their shapes and dtypes.
      names: the names of the bank's tokens, for errors; empty if there are none.
      allow_other_dtype: whether the output may have other dtypes, so that only shapes must agree.

    Raises:
      ValueError: if the output has another structure, shape, or dtype, the module does not accept
        the input, or it needs collections of variables that the bank does not have.
    """
    name, (params, state) = describe_member(group, names), pick(_get_trees(group), 0)
    check_layer(group.module, params, state, x, name, allow_other_dtype=allow_other_dtype)


def make_sample(input_shape: PyTree) -> PyTree:
    """Return the shapes and dtypes of two examples, before there is data.

    Args:
      input_shape: the shape of the input without the batch dimension, or a pytree with a shape or a
        `jax.ShapeDtypeStruct` for each array. A tuple or list of integers is a shape, of float32.

    Raises:
      ValueError: if `input_shape` has other leaves.
    """

    def make_batch(shape: object) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32
        if isinstance(shape, jax.ShapeDtypeStruct):
            shape, dtype = shape.shape, shape.dtype
        if not _is_shape(shape):
            raise ValueError(
                "expected input_shape as a tuple of integers, or a pytree of such tuples and of "
                f"jax.ShapeDtypeStruct, got {describe_type(shape)}"
            )
        # Two examples: a layer that only fits one would mix them.
        return jax.ShapeDtypeStruct((2, *shape), dtype)

    return jax.tree.map(make_batch, input_shape, is_leaf=_is_shape)


def _is_shape(value: object) -> TypeGuard[tuple[int, ...] | list[int]]:
    """Return whether a value is one shape, and not a container of shapes."""
    return isinstance(value, tuple | list) and all(isinstance(size, Integral) for size in value)


def infer_head_output(
    group: LayerGroup, x: PyTree, names: Sequence[str] = ()
) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the output of a group's heads.

    Args:
      group: the group of heads.
      x: a batch of input, one array or a pytree of arrays, or their shapes and dtypes.
      names: the names of the bank's tokens, for errors; empty if there are none.

    Raises:
      ValueError: if the output is not one array, or as for `jchain.modules.infer_output`.
    """
    name, (params, state) = describe_member(group, names), pick(_get_trees(group), 0)
    out = infer_output(group.module, params, state, x, name)
    check_is_array(out, name)
    if out.shape[:1] != (count_examples(x),):
        raise ValueError(
            f"{name} must return one row per example, [{count_examples(x)}, ...], got shape "
            f"{list(out.shape)}"
        )
    return out


def describe_member(group: LayerGroup, names: Sequence[str]) -> str:
    """Describe the first member of a group, for errors: `net0/2 (Dense(5)), token 2,`.

    Args:
      group: the group.
      names: the names of the bank's tokens; empty if there are none.
    """
    token = group.tokens[0]
    module = describe_module(group.module)
    return f"{names[token]} ({module}), token {token}," if names else f"token {token} ({module})"


def check_same_stem(stems: Sequence[tuple[Module | None, PyTree]]) -> None:
    """Check that all stems are equal.

    Args:
      stems: the module and params of each bank's stem; the module is None if a bank has no stem.

    Raises:
      ValueError: if a stem's module or params differ from the first stem's.
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


def _stack(params: dict[str, PyTree]) -> PyTree:
    """Stack params on a new leading axis; the keys of the dict name them in error messages."""
    trees = {name: _to_arrays(tree, f"params of {name}") for name, tree in params.items()}
    (first, expected), *others = trees.items()
    for name, tree in others:
        _check_same_structure(tree, expected, f"params of {name} do not stack", first)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees.values())


def _to_arrays(tree: PyTree, name: str) -> PyTree:
    """Convert the leaves of a tree, which may be those of NumPy or PyTorch."""

    def convert_leaf(path: tuple[object, ...], leaf: object) -> Array:
        try:
            return jnp.asarray(leaf)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, RuntimeError) as error:
            where = jax.tree_util.keystr(path)  # pyright: ignore[reportArgumentType]
            raise ValueError(
                f"{name}: expected an array at {where}, got {describe_type(leaf)}: "
                f"{get_first_line(error)}"
            ) from None

    return jax.tree_util.tree_map_with_path(convert_leaf, tree)


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


def move_tokens(groups: Sequence[LayerGroup], distance: int) -> tuple[LayerGroup, ...]:
    """Return groups whose tokens are larger by `distance`.

    Args:
      groups: the groups to renumber.
      distance: the number to add to each token.
    """
    return tuple(
        dataclasses.replace(group, tokens=tuple(token + distance for token in group.tokens))
        for group in groups
    )
