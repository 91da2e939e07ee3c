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
from jchain.engine import apply_token
from jchain.problem import Problem

# Outputs of an example up to which each has its row of the Jacobian.
MAX_OUTPUTS = 64
# Seeds the samples of wide outputs. Constant, so that scores of one chain are the same in every process.
_SAMPLE_SEED = 0


class Forward(NamedTuple):
    """A chain, computed."""

    length: Int[Array, ""]
    hidden: Shaped[Array, "L B ..."]  # [L, B, ...F], what each slot reads
    outputs: Float[Array, "B ..."]
    loss: Float[Array, ""]  # without the price of layers
    heads: Float[Array, "K"]  # the loss of each head, likewise


def go_forward(problem: Problem, chain: Int[Array, "L"]) -> Forward:
    """One forward pass, for a layer call for each layer."""
    bank = problem.bank
    length = chain_lib.count_layers(chain, bank.num_layers)

    def apply(hidden: Array, slot: Any) -> tuple[Array, Array]:
        t, token = slot
        made = jax.lax.cond(t < length, partial(apply_token, bank.layers), lambda _, h: h, token, hidden)
        return made, hidden

    last, hidden = jax.lax.scan(apply, bank.embed(problem.data.x), (jnp.arange(chain.size), chain))
    outputs = apply_token(bank.heads, chain[length], last)
    return Forward(length, hidden, outputs, problem.measure(outputs)[0], env.stop_losses(problem, last))


def choose_rows(
    problem: Problem, forward: Forward, kind: str, num_samples: int
) -> tuple[int, Callable[[Array], Array], Callable[[Array], Array]]:
    """How the change of the loss is read off changes of the outputs.

    Returns:
      The number of vector-Jacobian products `R`; the vector of each, like the outputs; and the function from their products
      with a change of activations, `[B, R]`, to the predicted change of loss.
    """
    outputs = forward.outputs
    num_outputs = outputs.size // outputs.shape[0]

    def total(outputs: Array) -> Array:
        return problem.measure(outputs)[0]

    gradient = jax.grad(total)
    if kind == "activations":
        return 1, lambda i: gradient(outputs), lambda dots: dots.sum()
    is_softmax = problem.loss_fn is optax.softmax_cross_entropy_with_integer_labels
    if num_outputs <= MAX_OUTPUTS:
        # A softmax sees differences of its outputs alone: those to the last one will do.
        is_relative = is_softmax and outputs.ndim == 2 and num_outputs > 1
        num_rows = num_outputs - is_relative

        def make_seed(i: Array) -> Array:
            row = jnp.zeros(num_outputs, outputs.dtype).at[i].set(1.0)
            row = row.at[-1].set(-1.0) if is_relative else row
            return jnp.broadcast_to(row.reshape(1, *outputs.shape[1:]), outputs.shape)

        def read(dots: Array) -> Array:
            change = jnp.pad(dots, ((0, 0), (0, num_outputs - num_rows)))
            return total(outputs + change.reshape(outputs.shape)) - forward.loss

        return num_rows, make_seed, read

    key = jax.random.key(_SAMPLE_SEED)

    def sample_label(i: Array) -> Array:
        label = jax.random.categorical(jax.random.fold_in(key, i), outputs)
        residual = jax.nn.one_hot(label, outputs.shape[-1], dtype=outputs.dtype) - jax.nn.softmax(outputs)
        return residual / problem.data.y.size**0.5

    def sample_sign(i: Array) -> Array:
        sign_key = jax.random.fold_in(key, i % num_samples)
        signs = jax.random.rademacher(sign_key, outputs.shape, outputs.dtype)
        return jax.lax.cond(i < num_samples, lambda: signs, lambda: jax.jvp(gradient, (outputs,), (signs,))[1])

    def read_labels(dots: Array) -> Array:
        return dots[:, 0].sum() + 0.5 * jnp.sum(dots[:, 1:] ** 2) / num_samples

    def read_signs(dots: Array) -> Array:
        signs, bent = dots[:, 1 : 1 + num_samples], dots[:, 1 + num_samples :]
        return dots[:, 0].sum() + 0.5 * jnp.sum(signs * bent) / num_samples

    sample, num_rows, read = (
        (sample_label, 1 + num_samples, read_labels) if is_softmax else (sample_sign, 1 + 2 * num_samples, read_signs)
    )
    return num_rows, lambda i: jax.lax.cond(i == 0, lambda: gradient(outputs), lambda: sample(i - 1)), read
