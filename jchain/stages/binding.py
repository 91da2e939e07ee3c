"""Binding a bank with stages to data, which makes all its activations flat arrays of one shape.

The shapes of the stages are inferred from the output of the stem through the layers. The modules of
the bank are then wrapped (`jchain.modules.StagedModule`), so that everything that works on a bank
whose layers keep one shape works on this one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax

from jchain._typing import PyTree
from jchain.groups import (
    LayerGroup,
    check_keeps_shape,
    describe_member,
    infer_head_output,
    make_sample,
)
from jchain.modules import Module, StagedModule, check_stem, infer_output, unwrap
from jchain.modules.activations import check_one_array, describe_shapes
from jchain.pytree import pick
from jchain.stages.table import StageTable


@runtime_checkable
class _Bank(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def layers(self) -> tuple[LayerGroup, ...]: ...
    @property
    def heads(self) -> tuple[LayerGroup, ...]: ...
    @property
    def stem(self) -> Module | None: ...
    @property
    def stem_params(self) -> PyTree: ...
    @property
    def names(self) -> tuple[str, ...]: ...


B = TypeVar("B", bound=_Bank)


def make_table(
    layers: Sequence[LayerGroup], heads: Sequence[LayerGroup], names: tuple[str, ...] = ()
) -> StageTable | None:
    """Return the stages of each layer and head, or None if all belong to stage 0.

    Args:
      layers: the groups of a bank's layers.
      heads: the groups of its heads.
      names: the names of its tokens, for errors; empty if there are none.
    """
    groups = (*layers, *heads)
    if all(group.stages == (0, 0) for group in groups):
        return None
    pairs = {token: group.stages for group in groups for token in group.tokens}
    num_layers = sum(len(group.tokens) for group in layers)
    return StageTable(
        tuple(pairs[token] for token in range(num_layers)),
        tuple(pairs[token][0] for token in range(num_layers, len(pairs))),
        names,
    )


def get_last_stage(layers: Sequence[LayerGroup]) -> int:
    """Return the last stage that layers write, which heads read by default.

    Args:
      layers: the groups of a bank's layers.
    """
    return max(group.stages[1] for group in layers)


def is_bound(bank: _Bank) -> bool:
    """Return whether the modules of a bank are wrapped for data of one shape.

    Args:
      bank: the bank.
    """
    return any(isinstance(group.module, StagedModule) for group in (*bank.layers, *bank.heads))


def bind(bank: B, x: PyTree) -> B:
    """Return the bank with modules whose activations are flat arrays. Works while tracing.

    Args:
      bank: a bank with stages, which may be bound to other data.
      x: a batch of raw input, or its shape and dtype.

    Raises:
      ValueError: if the stem does not accept the data, or as for `infer_stage_shapes`.
    """
    bank = unbind(bank)
    hidden = check_stem(bank.stem, bank.stem_params, x)
    found = infer_stage_shapes(bank.layers, bank.heads, hidden, bank.names)
    shapes = {stage: shape.shape[1:] for stage, shape in found.items()}
    width = max(math.prod(shape) for shape in shapes.values())

    def wrap(group: LayerGroup, is_head: bool) -> LayerGroup:
        read, write = group.stages
        out = None if is_head else shapes[write]
        return dataclasses.replace(
            group, module=StagedModule(group.module, shapes[read], out, width)
        )

    return dataclasses.replace(
        bank,
        layers=tuple(wrap(group, False) for group in bank.layers),
        heads=tuple(wrap(group, True) for group in bank.heads),
        stem=StagedModule(bank.stem, None, shapes[0], width),
    )


def unbind(bank: B) -> B:
    """Return the bank as it was before it was bound to data.

    Args:
      bank: the bank, which is returned itself if it is not bound.
    """
    if not is_bound(bank):
        return bank

    def strip(groups: tuple[LayerGroup, ...]) -> tuple[LayerGroup, ...]:
        return tuple(dataclasses.replace(g, module=unwrap(g.module)) for g in groups)

    return dataclasses.replace(
        bank, layers=strip(bank.layers), heads=strip(bank.heads), stem=unwrap(bank.stem)
    )


def infer_stage_shapes(
    layers: Sequence[LayerGroup],
    heads: Sequence[LayerGroup],
    hidden: PyTree,
    names: Sequence[str] = (),
    *,
    allow_other_dtype: bool = False,
) -> dict[int, jax.ShapeDtypeStruct]:
    """Infer the shape and dtype of each stage from those of stage 0.

    Args:
      layers: the groups of a bank's layers.
      heads: the groups of its heads.
      hidden: the output of the stem, or its shape and dtype.
      names: the names of the bank's tokens, for errors; empty if there are none.
      allow_other_dtype: whether layers may change the dtype, so that only shapes must agree.

    Raises:
      ValueError: if activations are not one array, no layer leads to a stage that is read, two
        layers write one stage with different shapes, a layer changes the dtype, or a module does
        not accept the shape of its stage.
    """
    check_one_array(activations=hidden)
    shapes = {0: jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)}
    writers, left = {0: "the stem"}, list(layers)
    while ready := [group for group in left if group.stages[0] in shapes]:
        left = [group for group in left if group.stages[0] not in shapes]
        for group in ready:
            read, write = group.stages
            name, (params, state) = (
                describe_member(group, names),
                pick((group.params, group.state), 0),
            )
            out = infer_output(group.module, params, state, shapes[read], name)
            check_one_array(**{f"the output of {name}": out})
            if out.dtype != hidden.dtype and not allow_other_dtype:
                raise ValueError(
                    f"{name} must keep the dtype of its input: expected {hidden.dtype}, got "
                    f"{out.dtype}; cast the data, the params, or the output"
                )
            _check_output(name, out, shapes[read], shapes.get(write), group.stages, writers)
            shapes.setdefault(write, jax.ShapeDtypeStruct(out.shape, out.dtype))
            writers.setdefault(write, name.rstrip(","))
    for group in (*left, *heads):
        stage = group.stages[0]
        if stage not in shapes:
            raise ValueError(
                f"expected layers that lead from stage 0 to stage {stage}, which "
                f"{describe_member(group, names)} reads, got none"
            )
    for group in heads:
        infer_head_output(group, shapes[group.stages[0]], names)
    return shapes


def _check_output(
    name: str,
    out: jax.ShapeDtypeStruct,
    before: jax.ShapeDtypeStruct,
    expected: jax.ShapeDtypeStruct | None,
    stages: tuple[int, int],
    writers: dict[int, str],
) -> None:
    """Check the output of a layer, given the shape of the stage that it writes, if it is known."""
    read, write = stages
    if out.shape[:1] != before.shape[:1]:
        raise ValueError(
            f"{name} must keep the examples on the leading axis: expected [{before.shape[0]}, ...],"
            f" got {describe_shapes(out)}"
        )
    if expected is None or out.shape == expected.shape:
        return
    what = f"write stage {write} in the shape that {writers[write]} gives it"
    if read == write:
        what = f"keep the shape of stage {read}"
    raise ValueError(
        f"{name} must {what}: expected {describe_shapes(expected)}, got {describe_shapes(out)}"
    )


def check_input_shape(
    layers: Sequence[LayerGroup],
    heads: Sequence[LayerGroup],
    input_shape: PyTree,
    names: Sequence[str] = (),
) -> None:
    """Check the shapes that layers map, before there is data.

    Args:
      layers: the groups of a bank's layers.
      heads: the groups of its heads, which are checked only in a bank with stages.
      input_shape: the shape of the input of the first layer; see `jchain.groups.make_sample`.
      names: the names of the bank's tokens, for errors; empty if there are none.

    Raises:
      ValueError: if `input_shape` is of another form, or a layer does not map the shape that it
        should; see `jchain.groups.check_keeps_shape` and `infer_stage_shapes`.
    """
    sample = make_sample(input_shape)
    if make_table(layers, heads) is not None:
        infer_stage_shapes(layers, heads, sample, names, allow_other_dtype=True)
        return
    for group in layers:
        check_keeps_shape(group, sample, names, allow_other_dtype=True)


def check_no_stages(layers: Sequence[LayerGroup], what: str) -> None:
    """Check that a bank has no stages, for methods that need layers that keep one shape.

    Args:
      layers: the groups of the bank's layers.
      what: the method, for the error.

    Raises:
      ValueError: if the bank has stages.
    """
    if any(group.stages != (0, 0) or isinstance(group.module, StagedModule) for group in layers):
        raise ValueError(f"expected a bank without stages for {what}, got a bank with stages")
