"""Gradient steps on the layers and heads of single chains of a bank.

Every layer and head has its own optimizer state, so the weights of a layer that no chain uses stay
exactly the same.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jchain._typing import Array, Bool, Float, Int, Key, PyTree
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import PADDING, ChainSpace
from jchain.engine.head_calls import compute_head_loss
from jchain.engine.layer_calls import apply_layers
from jchain.groups import LayerGroup
from jchain.modules import unwrap
from jchain.problem import Problem
from jchain.train import BATCH_SIZE, OPTIMIZER, is_stepwise

# A layer costs one call each for its forward pass, the gradient of its input, and the gradient of
# its weights.
CALLS_PER_LAYER = 3

T = TypeVar("T")


class State(NamedTuple):
    """A bank in training and the state of its optimizer."""

    bank: Bank
    # One state per group of layers, then one per group of heads; leaves are [n, ...].
    opt_states: tuple[PyTree, ...]


@checked
def training_cost(
    num_layers: int | Int[np.ndarray, "*P"], num_train: int, num_examples: int, num_steps: int = 1
) -> int:
    """Compute the cost of gradient steps, in layer calls on `num_examples` examples, rounded up.

    A step applies each layer once to a minibatch of 128 examples and takes the gradients of its
    input and its weights, which count as one call each. A layer that occurs twice in a chain counts
    twice.

    Args:
      num_layers: number of layers of the chain, or of each of several chains.
      num_train: number of examples in the split to train on. If there are fewer than 128, each
        minibatch holds all of them.
      num_examples: number of examples in the split that layer calls are counted on.
      num_steps: number of gradient steps on each chain.
    """
    num_calls = CALLS_PER_LAYER * num_steps * int(np.sum(num_layers))
    return math.ceil(num_calls * min(BATCH_SIZE, num_train) / num_examples)


@checked
def tune_chain(
    key: Key[Array, ""],
    problem: Problem,
    chain: Int[ArrayLike, "L"],
    *,
    num_steps: int = 100,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    tokens: Sequence[int] | None = None,
) -> Bank:
    """Take gradient steps on one chain and return the new bank.

    The layers and the head of the chain get new weights, versions, and origins. The rest of the
    bank stays unchanged.

    Each step draws a random minibatch of 128 examples. The gradients of a layer that occurs twice
    in the chain are added. A layer skips a step that would make its weights infinite or nan. Banks
    in half precision are trained in float32 and rounded once, at the end.

    Args:
      key: the PRNG key of the minibatches; consumed by this call.
      problem: the problem, which has the bank, the split to train on, and the loss.
      chain: the tokens of the chain, `[L]`.
      num_steps: number of gradient steps.
      optimizer: the optax optimizer, which is applied to each layer and head separately; AdamW by
        default.
      tokens: the layers and heads of the chain to train; all of them if None.

    Raises:
      ValueError: if `chain` is not a chain of the bank, `tokens` are not in it, or `num_steps` is
        below 0.
    """
    bank = problem.bank
    checked = bank.validate(np.asarray(chain))
    *route, head = [int(token) for token in checked if token != PADDING]
    tuned = list(dict.fromkeys([*route, head] if tokens is None else tokens))
    if num_steps < 0 or not set(tuned) <= {*route, head}:
        raise ValueError(
            f"expected num_steps of at least 0 and tokens of the chain {[*route, head]}, "
            f"got {num_steps} and {tuned}"
        )
    if num_steps == 0 or not tuned:
        return bank
    # Leave out the rest of the bank, whose gradient is zero. A bank must have a layer, so the first
    # layer of the bank is kept if the chain has no layers.
    members = [*dict.fromkeys(route or [0]), head]
    small = upcast_bank(bank.take(members[:-1], members[-1:])).without_names()
    path = tuple(members.index(token) for token in (*route, head))
    is_tuned = jnp.array([member in tuned for member in members])
    state = init(small, optimizer)
    if is_stepwise((small.layers, small.heads)):
        for t in range(num_steps):
            step_key = jax.random.fold_in(key, t)
            state = _step_path(state, step_key, problem.with_bank(small), path, is_tuned, optimizer)
    else:
        # Chains with the same number of distinct layers share one program, for any num_steps.
        padded = jnp.array([*path, *[PADDING] * (problem.max_layers - len(route))])
        state = _loop(state, key, problem.with_bank(small), padded, is_tuned, optimizer, num_steps)
    return bank.replace(
        tuned,
        [
            _round_as(state.bank.get_params(members.index(token)), bank.get_params(token))
            for token in tuned
        ],
        origins=[f"{num_steps} gradient steps from {bank.origins[token]}" for token in tuned]
        if bank.origins
        else None,
    )


@checked
def upcast_bank(bank: Bank) -> Bank:
    """Cast the half-precision weights of a bank to float32.

    In half precision, small gradient steps would be lost to rounding.

    Args:
      bank: a bank in any precision.
    """
    wide = jax.tree.map(_upcast, (bank.layers, bank.heads, bank.stem_params))
    return dataclasses.replace(bank, layers=wide[0], heads=wide[1], stem_params=wide[2])


def _upcast(leaf: Array) -> Array:
    is_half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if is_half else leaf


def _round_as(params: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: new.astype(old.dtype), params, like)


@checked
def init(bank: Bank, optimizer: optax.GradientTransformation) -> State:
    """Return the state of training before the first step.

    Args:
      bank: the bank to train.
      optimizer: the optax optimizer, which is applied to each layer and head separately.
    """
    groups = (*bank.layers, *bank.heads)
    return State(bank, tuple(_map_members(optimizer.init, group)(group.params) for group in groups))


@checked
def train_on(
    key: Key[Array, ""],
    state: State,
    problem: Problem,
    chains: Int[Array, "U L"],
    optimizer: optax.GradientTransformation,
) -> State:
    """Take one gradient step on each chain in turn, each on its own minibatch.

    This function can be jitted. Each step increases the versions of the chain's layers and head by
    one. A row that is all -1 holds no chain and changes nothing.

    Args:
      key: the PRNG key of the minibatches; consumed by this call.
      state: the state that `init` or the previous call returned.
      problem: a problem with the split to train on and the loss; its bank is not used.
      chains: int32 `[U, L]`; the chains to train, in order.
      optimizer: the optimizer that was passed to `init`.
    """

    def step(state: State, slot: tuple[Array, Array]) -> tuple[State, None]:
        key, chain = slot
        tokens = jnp.arange(state.bank.num_layers + state.bank.num_heads)
        is_trained = (tokens[:, None] == chain[None]).any(axis=1)
        # A row without a chain needs a valid path too, but none of its tokens is trained.
        path = jnp.where(chain[0] == PADDING, space.head_alone, chain)
        state = _step(state, key, problem, path, is_trained, optimizer)
        versions = state.bank.get_versions() + is_trained
        return state._replace(bank=dataclasses.replace(state.bank, versions=versions)), None

    space = ChainSpace(state.bank.num_layers, state.bank.num_heads, chains.shape[1] - 1)
    bank = dataclasses.replace(state.bank, versions=state.bank.get_versions())
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(chains.shape[0]))
    return jax.lax.scan(step, state._replace(bank=bank), (keys, chains))[0]


def _step(
    state: State,
    key: Key[Array, ""],
    problem: Problem,
    path: tuple[int, ...] | Array,
    is_trained: Bool[Array, "E"],
    optimizer: optax.GradientTransformation,
) -> State:
    """Take one gradient step on one chain; only the marked layers and heads change."""
    bank, num = state.bank, problem.num_examples
    rows = jax.random.choice(key, num, (min(BATCH_SIZE, num),), replace=False)
    part = problem.take(rows)
    groups = (*bank.layers, *bank.heads)

    def loss(params: tuple[PyTree, ...]) -> Float[Array, ""]:
        return _compute_loss(part.with_bank(_with_params(bank, params)), path)

    params = tuple(group.params for group in groups)
    gradients = jax.grad(loss)(params)
    updated = [
        _update(own, gradient, opt_state, is_trained[np.array(group.tokens)], group, optimizer)
        for group, own, gradient, opt_state in zip(
            groups, params, gradients, state.opt_states, strict=True
        )
    ]
    return State(
        _with_params(bank, tuple(new for new, _ in updated)),
        tuple(opt_state for _, opt_state in updated),
    )


_step_path = jax.jit(_step, static_argnames=("path", "optimizer"))


@partial(jax.jit, static_argnames="optimizer")
def _loop(
    state: State,
    key: Array,
    problem: Problem,
    path: Array,
    is_trained: Array,
    optimizer: optax.GradientTransformation,
    num_steps: ArrayLike,
) -> State:
    def step(t: Array, state: State) -> State:
        return _step(state, jax.random.fold_in(key, t), problem, path, is_trained, optimizer)

    return jax.lax.fori_loop(0, num_steps, step, state)


def _update(
    params: PyTree,
    gradient: PyTree,
    opt_state: PyTree,
    is_trained: Bool[Array, "n"],
    group: LayerGroup,
    optimizer: optax.GradientTransformation,
) -> tuple[PyTree, PyTree]:
    """Update the params and the optimizer state of a group, both with leaves `[n, ...]`.

    Members that are not trained, or whose new weights are not finite, stay unchanged.
    """
    project = getattr(unwrap(group.module), "project", None)

    def update(params: PyTree, gradient: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        new = optax.apply_updates(params, updates)
        return (new if project is None else project(new)), opt_state

    updated = _map_members(update, group)(params, gradient, opt_state)
    for leaf in jax.tree.leaves(updated[0]):
        is_trained &= jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(is_trained.reshape(-1, *(1 for _ in new.shape[1:])), new, old)

    return jax.tree.map(keep, updated, (params, opt_state))


def _map_members(fn: Callable[..., T], group: LayerGroup) -> Callable[..., T]:
    """Map a function over the members of a group."""
    # The size is explicit, because a group without params has no axis to infer it from.
    return jax.vmap(fn, axis_size=len(group.tokens))


def _with_params(bank: Bank, params: Sequence[PyTree]) -> Bank:
    """Return the bank with new params: for each group of layers, then for each group of heads."""
    groups = [
        dataclasses.replace(group, params=own)
        for own, group in zip(params, (*bank.layers, *bank.heads), strict=True)
    ]
    num = len(bank.layers)
    return dataclasses.replace(bank, layers=tuple(groups[:num]), heads=tuple(groups[num:]))


def _compute_loss(problem: Problem, path: tuple[int, ...] | Array) -> Float[Array, ""]:
    """Compute the loss of a chain.

    A tuple of tokens is unrolled, because branches hide convolutions from XLA on CPU.
    """
    bank, x = problem.bank, problem.data.x
    if not isinstance(path, tuple):
        hidden, head = apply_layers(bank, path, x)
        return compute_head_loss(problem, head, hidden)
    hidden = bank.embed(x)
    for token in path[:-1]:
        group, member = bank.find(token)
        hidden = group.apply(member, hidden)
    return compute_head_loss(problem, path[-1], hidden)
