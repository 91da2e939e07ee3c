"""Calls of heads, and the losses and accuracies that follow from them.

If a head ends in a large linear map (`jchain.modules.OutputMap`) and the loss reads its outputs in
parts (`jchain.losses.TokenLoss`), the outputs are never kept, and the map is applied only to the
tokens that the loss reads. Otherwise, the outputs of as many examples as fit in a limit are made at
a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, PyTree
from jchain.engine.backend import default_memory_limit
from jchain.engine.layer_calls import (
    apply_token,
    count_examples_per_call,
    estimate_call_bytes,
    get_member_bytes,
    get_output_shape,
    has_large_outputs,
    map_in_parts,
    nbytes,
)
from jchain.groups import LayerGroup
from jchain.losses import (
    PartSizes,
    TokenLoss,
    find_token_losses,
    has_default_accuracy,
    score_output_map,
)
from jchain.modules import FunctionModule, OutputMap, read_output_map
from jchain.problem import Problem
from jchain.pytree import pick, upcast

T = TypeVar("T")

# Fewer outputs per token than this are made all at once.
_MIN_OUTPUTS = 4096
# The size of a part on CPU, 4 MiB in float32, which stays in the cache (`benchmarks/head_loss.py`).
_CPU_SIZES = PartSizes(1024, 1024)
# On other backends, a part has this share of the memory limit, within these numbers of bytes.
_PART_SHARE, _LEAST_PART, _MOST_PART = 1 / 64, 2**26, 2**29
_MOST_OUTPUTS = 2**14
# The number of arrays of the size of a part that exist at the same time, by measurement on CPU.
_NUM_PARTS = 2


class _Reading(NamedTuple):
    """How the losses of a problem read the outputs of its heads in parts."""

    losses: tuple[TokenLoss, ...]  # the loss and, if there is one, the accuracy
    sizes: PartSizes
    num_tokens: int  # the number of tokens that the heads are applied to
    dtype: Any  # of the loss


def _find_reading(problem: Problem, hidden: PyTree) -> _Reading | None:
    """Return how the outputs are read in parts, or None if they are made at once."""
    outputs = get_output_shape(problem, hidden)
    if len(outputs.shape) < 2 or outputs.shape[-1] < _MIN_OUTPUTS:
        return None
    y, shape = problem.data.y, outputs.shape[:-1]
    losses = find_token_losses(problem.loss_fn, problem.accuracy_fn, y, outputs.shape)
    if losses is None or not all(_has_rows(loss, y, shape) for loss in losses):
        return None
    for group in problem.bank.heads:
        found = jax.eval_shape(lambda group, h: _read(group, h), group, hidden)
        if found is None or found.features.shape[:-1] != shape:
            return None
    num_tokens = outputs.size // outputs.shape[-1]
    if problem.read_tokens is not None:
        num_tokens = min(num_tokens, problem.read_tokens.total)
    dtype = jnp.promote_types(jnp.float32, outputs.dtype)
    sizes = _choose_sizes(num_tokens, outputs.shape[-1], dtype.itemsize)
    return _Reading(losses, sizes, num_tokens, dtype)


def _has_rows(loss: TokenLoss, y: PyTree, shape: tuple[int, ...]) -> bool:
    """Return whether the targets of a loss have one row for each row of outputs."""
    targets = jax.eval_shape(lambda y: loss.read_labels(y)[0], y)
    return all(leaf.shape[: len(shape)] == shape for leaf in jax.tree.leaves(targets))


def _choose_sizes(num_tokens: int, num_outputs: int, itemsize: int) -> PartSizes:
    """Choose the size of a part of the outputs."""
    if jax.default_backend() == "cpu":
        sizes = _CPU_SIZES
    else:
        limit = int(_PART_SHARE * default_memory_limit())
        limit = min(max(limit, _LEAST_PART), _MOST_PART) // itemsize
        columns = min(num_outputs, _MOST_OUTPUTS)
        sizes = PartSizes(max(1, limit // columns), columns)
    return PartSizes(min(sizes.num_tokens, num_tokens), min(sizes.num_outputs, num_outputs))


def _read(group: LayerGroup, hidden: PyTree) -> OutputMap | None:
    """Return the last step of the first head of a group."""
    params, state = pick((group.params, group.state), 0)
    return read_output_map(group.module, params, state, hidden)


def is_read_in_parts(problem: Problem, hidden: PyTree) -> bool:
    """Return whether the loss reads the outputs of heads in parts, so that they are never kept.

    Args:
      problem: the problem with the heads and the loss.
      hidden: the activations of one chain. Only their shapes and dtypes are read.
    """
    return _find_reading(problem, hidden) is not None


def prepare_heads(problem: Problem, hidden: PyTree) -> tuple[LayerGroup, ...]:
    """Return the heads in the form in which `evaluate_heads` needs them to be called.

    These are the heads of the bank, or heads that return their loss and accuracy.

    Args:
      problem: the problem with the heads and the loss.
      hidden: the activations of one chain. Only their shapes and dtypes are read.
    """
    reading = _find_reading(problem, hidden)
    if reading is None:
        return problem.bank.heads

    def average(*values: Array) -> tuple[Array, Array]:
        means = [jnp.mean(own, dtype=reading.dtype) for own in values]
        return means[0], means[1] if len(means) > 1 else jnp.full_like(means[0], jnp.nan)

    return _add_losses(problem, reading, average)


def _add_losses(
    problem: Problem, reading: _Reading, summarize: Callable[..., PyTree]
) -> tuple[LayerGroup, ...]:
    """Return heads that return `summarize(*values)`, where a loss has values `[B, ...]`."""

    def add_loss(group: LayerGroup) -> LayerGroup:
        def score(trees: tuple[PyTree, PyTree], hidden: PyTree) -> PyTree:
            output = read_output_map(group.module, *trees, hidden)
            assert output is not None
            y, sizes, num_tokens = problem.data.y, reading.sizes, reading.num_tokens
            return summarize(*score_output_map(reading.losses, output, y, sizes, num_tokens))

        trees = group.params, group.state
        return LayerGroup(trees, FunctionModule(score), group.tokens, None, group.stages)

    return tuple(map(add_loss, problem.bank.heads))


def evaluate_heads(
    problem: Problem, call: Callable[[PyTree], PyTree], hidden: PyTree
) -> tuple[Array, Array]:
    """Compute the loss, without the layer penalty, and accuracy of head calls, `[W]` each.

    If the outputs are large and must be kept, examples are processed in parts. The results are then
    the mean over the parts, weighted by their size.

    Args:
      problem: the problem with the labels and the loss.
      call: a function that maps activations `[W, B, ...F]` to what the heads of `prepare_heads`
        return for them, with a leading axis W.
      hidden: the inputs of the heads, `[W, B, ...F]`, or a pytree of such arrays.
    """
    if is_read_in_parts(problem, pick(hidden, 0)):
        return call(hidden)
    width, num_examples = jax.tree.leaves(hidden)[0].shape[:2]
    size = count_examples_per_call(problem, pick(hidden, 0), width)

    def evaluate_part(rows: Array) -> tuple[Array, Array]:
        part = call(pick(hidden, (slice(None), rows)))
        return jax.vmap(problem.take(rows).loss_and_accuracy)(part)

    if size == num_examples:
        return jax.vmap(problem.loss_and_accuracy)(call(hidden))
    results, rest = map_in_parts(evaluate_part, num_examples, size)
    results = jax.tree.map(lambda a: a.sum(axis=0) * size, results)
    if rest is not None:
        results = jax.tree.map(lambda a, b: a + num_examples % size * b, results, rest)
    return jax.tree.map(lambda a: a / num_examples, results)


def map_prefixes(problem: Problem, fn: Callable[[PyTree], T], hidden: PyTree) -> T:
    """Apply a function that calls every head to the activations of several prefixes.

    Prefixes are processed together, or one at a time if the outputs of their heads are large.

    Args:
      problem: the problem with the heads.
      fn: a function of the activations of one prefix, `[B, ...F]`.
      hidden: the activations of each prefix, `[N, B, ...F]`, or a pytree of such arrays.
    """
    num_prefixes, first = jax.tree.leaves(hidden)[0].shape[0], pick(hidden, 0)
    if is_read_in_parts(problem, first) or has_large_outputs(
        problem, first, num_prefixes * problem.bank.num_heads
    ):
        return jax.lax.map(fn, hidden)
    return jax.vmap(fn)(hidden)


def compute_head_loss(
    problem: Problem, token: int | Int[Array, ""], hidden: PyTree
) -> Float[Array, ""]:
    """Compute the mean loss of one head, without the layer penalty. It can be differentiated.

    Args:
      problem: the problem with the heads, the labels, and the loss.
      token: the token of the head. An integer avoids a branch.
      hidden: the input of the head, `[B, ...F]`, or a pytree of such arrays.
    """
    reading = _find_reading(problem, hidden)
    if reading is None:
        outputs = _call(problem.bank.heads, token, hidden)
        return jnp.mean(problem.loss_fn(outputs, problem.data.y))
    alone = reading._replace(losses=reading.losses[:1])
    heads = _add_losses(problem, alone, lambda loss: jnp.mean(loss, dtype=reading.dtype))
    return _call(heads, token, hidden)


def score_examples(
    problem: Problem, token: int | Int[Array, ""], hidden: PyTree
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Compute the loss and the accuracy of one head on each example.

    Args:
      problem: the problem with the heads, the labels, and the loss.
      token: the token of the head.
      hidden: the input of the head, `[B, ...F]`, or a pytree of such arrays.
    """

    def average(*values: Array) -> tuple[Array, Array]:
        means = [own.reshape(own.shape[0], -1).mean(axis=1) for own in values]
        return means[0], means[1] if len(means) > 1 else jnp.full_like(means[0], jnp.nan)

    if (reading := _find_reading(problem, hidden)) is not None:
        return _call(_add_losses(problem, reading, average), token, hidden)
    outputs, y = upcast(_call(problem.bank.heads, token, hidden)), problem.data.y
    values = [problem.loss_fn(outputs, y)]
    if problem.accuracy_fn is not None:
        values.append(problem.accuracy_fn(outputs, y))
    elif has_default_accuracy(y, outputs.shape):
        values.append((jnp.argmax(outputs, axis=-1) == y).astype(outputs.dtype))
    return average(*values)


def _call(groups: tuple[LayerGroup, ...], token: int | Array, hidden: PyTree) -> PyTree:
    if not isinstance(token, int):
        return apply_token(groups, token, hidden)
    group = next(group for group in groups if token in group.tokens)
    return group.apply(group.tokens.index(token), hidden)


def empty_results(problem: Problem, hidden: PyTree, size: int) -> tuple[Array, Array]:
    """Return zeros for loss and accuracy, `[size]` each, with the dtypes of the problem."""
    results = jax.eval_shape(
        lambda h: problem.loss_and_accuracy(problem.bank.heads[0].apply(0, h)), hidden
    )
    return jax.tree.map(lambda a: jnp.zeros(size, a.dtype), results)


def estimate_head_bytes(problem: Problem, hidden: PyTree, width: int) -> int:
    """Estimate the temporaries of a call of heads for `width` chains, in bytes."""
    reading = _find_reading(problem, hidden)
    if reading is not None:
        part = reading.sizes.num_tokens * reading.sizes.num_outputs * reading.dtype.itemsize
        outputs = get_output_shape(problem, hidden)
        tokens = nbytes(hidden) * reading.num_tokens * outputs.shape[-1] // outputs.size
        # The weights of one of several heads are copied.
        groups = [group for group in problem.bank.heads if len(group.tokens) > 1]
        copied = max(map(get_member_bytes, groups), default=0)
        return width * (_NUM_PARTS * part + nbytes(hidden) + 2 * tokens + copied)
    rows = count_examples_per_call(problem, hidden, width)
    part = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), hidden
    )
    return width * estimate_call_bytes(problem.bank.heads, part)
