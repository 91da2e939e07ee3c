"""A chain, computed, and how a change of its outputs is read as a change of its loss."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jchain import chain as chain_lib
from jchain import env
from jchain._typing import Array, Float, Int, Shaped
from jchain.bank import Bank
from jchain.engine.layer_calls import apply_token, find_part, map_parts
from jchain.groups import LayerGroup
from jchain.problem import Problem, upcast
from jchain.pytree import is_concrete

# Outputs of an example up to which each has its row of the Jacobian, and products where there are more.
_MAX_OUTPUTS, _NUM_WIDE = 64, 17
# Seeds the samples of wide outputs. Constant, so that scores of one chain are the same in every process.
_SAMPLE_SEED = 0


class Forward(NamedTuple):
    """A chain, computed."""

    length: Int[Array, ""]
    hidden: Shaped[Array, "L B ..."]  # [L, B, ...F], what each slot reads
    loss: Float[Array, ""]  # without the price of layers
    heads: Float[Array, "K"]  # the loss of each head, likewise


def check_chain(problem: Problem, chain: Any) -> Array:
    """One chain of a problem; its tokens are checked where they are not traced.

    Raises:
      ValueError: it is no chain of this bank, or not one of its length.
    """
    if is_concrete(chain):
        chain = chain_lib.validate(chain, problem.bank.num_layers, problem.bank.num_heads)
    if jnp.shape(chain) != (problem.max_layers + 1,):
        raise ValueError(
            f"expected one chain of shape [{problem.max_layers + 1}], got {list(jnp.shape(chain))}"
        )
    return jnp.asarray(chain)


def forward_pass(problem: Problem, chain: Int[Array, "L"]) -> Forward:
    """One forward pass, for a layer call for each layer."""
    bank = problem.bank
    length = chain_lib.count_layers(chain, bank.num_layers)

    def apply(hidden: Array, slot: Any) -> tuple[Array, Array]:
        t, token = slot
        made = jax.lax.cond(
            t < length, partial(apply_token, bank.layers), lambda _, h: h, token, hidden
        )
        return made, hidden

    last, hidden = jax.lax.scan(apply, bank.embed(problem.data.x), (jnp.arange(chain.size), chain))
    losses = env.head_losses(problem, last)
    return Forward(length, hidden, losses[chain[length] - bank.num_layers], losses)


def all_members(bank: Bank) -> tuple[Int[Array, "_"], ...]:
    """For each group of a bank's layers the places of all."""
    return tuple(jnp.arange(len(group.tokens)) for group in bank.layers)


def map_layers(
    score: Callable[[Array], Any],
    bank: Bank,
    members: tuple[Int[Array, "_"], ...],
    hidden: Array,
    chunk: int,
) -> Any:
    """What `score` says of each layer's output for one input, `[N, ...]`, so many at a time; nan for those not in `members`."""

    def place(group: LayerGroup, rows: Array) -> tuple[Array, Any]:
        made = jax.lax.map(
            lambda member: score(group.apply(member, hidden)), rows, batch_size=chunk
        )
        return jnp.asarray(group.tokens)[rows], made

    parts = [
        place(group, rows)
        for group, rows in zip(bank.layers, members, strict=True)
        if rows.shape[0]
    ]
    tokens = jnp.concatenate([part[0] for part in parts])
    return jax.tree.map(
        lambda *made: (
            jnp.full((bank.num_layers, *made[0].shape[1:]), jnp.nan, made[0].dtype)
            .at[tokens]
            .set(jnp.concatenate(made))
        ),
        *(part[1] for part in parts),
    )


class Reading(NamedTuple):
    """How the change of the loss is read off changes of the outputs."""

    num_products: int  # vector-Jacobian products, R
    make_vector: Callable[
        [Array], Array
    ]  # the vector of each, of the shape of the outputs, at least float32
    read: Callable[
        [Array], Array
    ]  # from their products with a change of activations, `[B, R]`, to the change of loss
    is_sampled: bool = False  # by samples that stand for a mean over all examples


def pull_head(
    problem: Problem, chain: Int[Array, "L"], forward: Forward, kind: str, num_products: int | None
) -> tuple[Reading, Float[Array, "R B ..."]]:
    """How changes of the outputs are read, and the vectors by what the head reads, `[R, B, ...F]`.

    Examples go through the head in parts where outputs would be large, unless few outputs or classes are read one by one.

    Raises:
      ValueError: too few products, or activations are of float16, in which the gradient of a mean over many labels vanishes.
    """
    hidden = forward.hidden[forward.length]
    if hidden.dtype == jnp.float16:
        raise ValueError(
            "expected activations of bfloat16 or wider for gradients, got float16: load weights with dtype="
        )
    head = partial(apply_token, problem.bank.heads, chain[forward.length])

    def pull(part: Problem, hidden: Array, share: float, key: Array) -> tuple[Reading, Array]:
        outputs, back = jax.vjp(head, hidden)
        reading = choose_reading(part, outputs, kind, num_products, share, key)
        vectors = jnp.arange(reading.num_products)
        # One at a time: those of wide outputs are the largest arrays here.
        return reading, jax.lax.map(
            lambda i: back(reading.make_vector(i).astype(outputs.dtype))[0], vectors
        )

    key, num = jax.random.key(_SAMPLE_SEED), hidden.shape[0]
    size, outputs = find_part(problem, hidden, 1), jax.eval_shape(head, hidden)
    if size == num or not (kind == "activations" or _is_sampled(problem, outputs, num_products)):
        return pull(problem, hidden, 1.0, key)

    def pull_part(rows: Array) -> Array:
        return pull(
            problem.take(rows), hidden[rows], rows.size / num, jax.random.fold_in(key, rows[0])
        )[1]

    found, rest = map_parts(pull_part, num, size)
    found = jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1, *hidden.shape[1:])
    if rest is not None:
        found = jnp.concatenate([found, rest], axis=1)
    return choose_reading(problem, outputs, kind, num_products), found


def choose_reading(
    problem: Problem,
    outputs: Any,
    kind: str,
    num_products: int | None,
    share: float = 1.0,
    key: Array | None = None,
) -> Reading:
    """Of `jchain.gradient.score_edits`, for linearized scores or those by activations.

    Args:
      problem: of the examples that the outputs are of.
      outputs: of the head; their shape and dtype are enough where the vectors are not made and no output is read by itself.
      kind: linearized or activations.
      num_products: None for as many as the outputs ask for.
      share: of all examples.
      key: of samples.

    Raises:
      ValueError: too few products.
    """
    if isinstance(outputs, jax.Array):
        outputs = upcast(outputs)
    key = jax.random.key(_SAMPLE_SEED) if key is None else key
    find_gradient = jax.grad(lambda outputs: share * problem.compute_metrics(outputs)[0])
    if kind == "activations":
        return Reading(1, lambda _: find_gradient(outputs), lambda dots: dots.sum())
    num_products = _count_products(outputs, num_products)
    if has_classes(problem, outputs):
        return _read_classes(problem, outputs, num_products)
    if not _is_sampled(problem, outputs, num_products):
        return _read_outputs(problem, outputs)
    is_softmax = problem.loss_fn is optax.softmax_cross_entropy_with_integer_labels
    least = 2 if is_softmax else 3
    if num_products < least:
        raise ValueError(
            f"expected num_products of at least {least} for outputs like these, got {num_products}"
        )
    if is_softmax:
        return _sample_labels(
            outputs, find_gradient, key, num_products - 1, problem.data.y.size / share
        )
    return _sample_signs(outputs, find_gradient, key, (num_products - 1) // 2)


def _count_products(outputs: Any, num_products: int | None) -> int:
    if num_products is not None:
        return num_products
    num_outputs = outputs.size // outputs.shape[0]
    return num_outputs if num_outputs <= _MAX_OUTPUTS else _NUM_WIDE


def _is_sampled(problem: Problem, outputs: Any, num_products: int | None) -> bool:
    num_outputs = outputs.size // outputs.shape[0]
    return (
        not has_classes(problem, outputs) and _count_products(outputs, num_products) < num_outputs
    )


def has_classes(problem: Problem, outputs: Any) -> bool:
    """Whether the loss is a softmax over the classes of one label for each example."""
    is_softmax = problem.loss_fn is optax.softmax_cross_entropy_with_integer_labels
    return is_softmax and len(outputs.shape) == 2 and outputs.shape[1] > 1


def _read_classes(problem: Problem, logits: Array, num_products: int) -> Reading:
    """A softmax sees what each class has more than the label: the likeliest ones each, the others as one, by their mean."""
    label = problem.data.y[:, None]
    num_classes = logits.shape[1]
    is_whole = num_products >= num_classes - 1
    num_single = num_classes - 1 if is_whole else num_products - 1
    others = jnp.where(jnp.arange(num_classes)[None] == label, -jnp.inf, logits)
    top, single = jax.lax.top_k(others, num_single)
    rest = jnp.put_along_axis(others, single, -jnp.inf, axis=1, inplace=False)
    own = jnp.take_along_axis(logits, label, axis=1)
    margins, mean = top - own, jnp.zeros_like(logits)
    if not is_whole:
        margins = jnp.concatenate(
            [margins, jax.nn.logsumexp(rest, axis=1, keepdims=True) - own], axis=1
        )
        mean = jax.nn.softmax(rest)
    padded = jnp.pad(single, ((0, 0), (0, 1)))

    def make_vector(i: Array) -> Array:
        one = jax.nn.one_hot(padded[:, i], num_classes, dtype=logits.dtype)
        return jnp.where(i < num_single, one, mean) - jax.nn.one_hot(
            label[:, 0], num_classes, dtype=logits.dtype
        )

    def find_loss(margins: Array) -> Array:
        return jax.nn.logsumexp(jnp.pad(margins, ((0, 0), (1, 0))), axis=1).mean()

    return Reading(
        margins.shape[1], make_vector, lambda dots: find_loss(margins + dots) - find_loss(margins)
    )


def _read_outputs(problem: Problem, outputs: Array) -> Reading:
    loss = problem.compute_metrics(outputs)[0]
    num_outputs = outputs.size // outputs.shape[0]

    def make_vector(i: Array) -> Array:
        row = jnp.zeros(num_outputs, outputs.dtype).at[i].set(1.0)
        return jnp.broadcast_to(row.reshape(1, *outputs.shape[1:]), outputs.shape)

    return Reading(
        num_outputs,
        make_vector,
        lambda dots: problem.compute_metrics(outputs + dots.reshape(outputs.shape))[0] - loss,
    )


def _sample_labels(
    outputs: Any,
    find_gradient: Callable[[Array], Array],
    key: Array,
    num_samples: int,
    num_labels: float,
) -> Reading:
    """To second order, the Hessian in expectation over labels drawn from the softmax (Fisher)."""

    def sample(i: Array) -> Array:
        label = jax.random.categorical(jax.random.fold_in(key, i), outputs)
        residual = jax.nn.one_hot(label, outputs.shape[-1], dtype=outputs.dtype) - jax.nn.softmax(
            outputs
        )
        return residual / num_labels**0.5

    def make_vector(i: Array) -> Array:
        return jax.lax.cond(i == 0, lambda: find_gradient(outputs), lambda: sample(i - 1))

    def read(dots: Array) -> Array:
        return dots[:, 0].sum() + 0.5 * jnp.sum(dots[:, 1:] ** 2) / num_samples

    return Reading(1 + num_samples, make_vector, read, True)


def _sample_signs(
    outputs: Any, find_gradient: Callable[[Array], Array], key: Array, num_samples: int
) -> Reading:
    """To second order, the Hessian in expectation over random signs (Hutchinson), two products for each."""

    def sample(i: Array) -> Array:
        sign_key = jax.random.fold_in(key, i % num_samples)
        signs = jax.random.rademacher(sign_key, outputs.shape, outputs.dtype)
        return jax.lax.cond(
            i < num_samples, lambda: signs, lambda: jax.jvp(find_gradient, (outputs,), (signs,))[1]
        )

    def make_vector(i: Array) -> Array:
        return jax.lax.cond(i == 0, lambda: find_gradient(outputs), lambda: sample(i - 1))

    def read(dots: Array) -> Array:
        signs, bent = dots[:, 1 : 1 + num_samples], dots[:, 1 + num_samples :]
        return dots[:, 0].sum() + 0.5 * jnp.sum(signs * bent) / num_samples

    return Reading(1 + 2 * num_samples, make_vector, read, True)


def full_nan(shape: Any) -> Array:
    """What stands for scores where nothing is known."""
    return jnp.full(
        shape.shape, jnp.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 0, shape.dtype
    )


def has_gradient(before: Array, rows: Array) -> Array:
    """False where all of the gradient is lost in a layer: a 0 before it would be a wrong number."""
    return jnp.any(before != 0) | ~jnp.any(rows != 0)


def flatten_rows(array: Shaped[Array, "B ..."]) -> Shaped[Array, "B R"]:
    """Each row as one vector."""
    return array.reshape(array.shape[0], -1)
