"""The decision process of a problem, as pure functions of one episode that can be vmapped.

A state is a prefix and its activations. An action is a token: a layer extends the prefix, which
costs one layer call, and a head ends the episode. The reward is minus the loss of the chain when a
head is taken, and 0 before that.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Activations, Array, Bool, Float, Int, Key, PyTree
from jchain.arguments import check_at_least_one, check_integers, checked
from jchain.chain import PADDING
from jchain.engine import prefix_rules
from jchain.engine.head_calls import evaluate_heads, prepare_heads
from jchain.engine.layer_calls import apply_all, apply_token
from jchain.problem import Problem
from jchain.pytree import is_concrete, pick
from jchain.stages.legal_chains import find_extensible


class State(NamedTuple):
    """The state of an episode.

    Attributes:
      chain: the tokens taken so far, then -1, `[L]`.
      length: the number of layers taken so far.
      is_done: True after a head was taken.
      hidden: the activations of the prefix on the whole split, `[B, ...F]`, or a pytree of such
        arrays.
    """

    chain: Int[Array, "L"]
    length: Int[Array, ""]
    is_done: Bool[Array, ""]
    hidden: Activations


@checked
def reset(problem: Problem) -> State:
    """Return the state of the empty prefix.

    Args:
      problem: the problem, whose stem is applied to the whole split.
    """
    chain = jnp.full(problem.max_layers + 1, PADDING, jnp.int32)
    return State(
        chain, jnp.zeros((), jnp.int32), jnp.array(False), problem.bank.embed(problem.data.x)
    )


@checked
def legal_actions(problem: Problem, prefix: Int[Array, "L"]) -> Bool[Array, "E"]:
    """Return the mask `[N + K]` of tokens that may follow a prefix; True means allowed.

    Layers are allowed if the prefix has fewer than `max_layers` layers, and heads are allowed if it
    has at least `min_layers`. If the problem has a `max_cost`, a token is allowed only if the
    prefix can then be completed within the limit. In a bank with stages, a token is allowed only if
    it reads the stage that the prefix has reached, and if a head can then be reached within
    `max_layers`. At least one token is always allowed.

    Args:
      problem: the problem, which defines the tokens and the allowed chains.
      prefix: int32 `[L]`; the layers of the prefix, padded with -1.
    """
    _check_tokens(problem, prefix)
    length, cost = problem.space.count_layers(prefix), problem.chain_cost(prefix)
    stages = problem.space.stages
    stage = None if stages is None else stages.reached(prefix)
    return prefix_rules.legal_actions(problem, length, cost, stage)


@checked
def can_continue(problem: Problem, prefixes: Int[Array, "*P L"]) -> Bool[Array, "*P"]:
    """Return whether a layer may follow each prefix in some chain of the space.

    Costs are ignored.

    Args:
      problem: the problem, which defines the space.
      prefixes: int32 `[..., L]`; the tokens of each prefix, padded with -1.
    """
    length, stages = problem.space.count_layers(prefixes), problem.space.stages
    if stages is None:
        return length < problem.max_layers
    is_open = find_extensible(stages, problem.min_layers, problem.max_layers)
    return jnp.asarray(is_open)[length, stages.reached(prefixes)] & stages.is_legal(prefixes)


@checked
def sample_chains(key: Key[Array, ""], problem: Problem, num_chains: int) -> Int[Array, "P L"]:
    """Draw chains uniformly from the space of a problem, with replacement.

    If the problem has a `max_cost`, a chain that exceeds it is drawn again token by token: each
    layer uniformly from those that still fit, until the drawn number of layers is reached or no
    layer fits, and then a head that fits.

    Args:
      key: the PRNG key; consumed by this call.
      problem: the problem, which defines the space and the limit.
      num_chains: number of chains to draw, P.
    """
    check_at_least_one(num_chains=num_chains)
    if problem.max_cost is None:
        return problem.space.sample(key, num_chains)
    sample_key, redraw_key = jax.random.split(key)
    chains = problem.space.sample(sample_key, num_chains)
    redraw = partial(_redraw, problem=problem)
    keys = jax.random.split(redraw_key, num_chains)
    is_over = problem.exceeds_limit(problem.chain_cost(chains))
    return jnp.where(is_over[:, None], jax.vmap(redraw)(keys, chains), chains)


@checked
def neighbors(
    problem: Problem, chain: Int[Array, "L"]
) -> tuple[Int[Array, "M L"], Bool[Array, "M"]]:
    """List every chain that is one edit away from a chain, as `ChainSpace.neighbors` does.

    Args:
      problem: the problem, which defines the space and the limit of the cost.
      chain: int32 `[L]`; the tokens of the chain to edit.

    Returns:
      The chains, `[M, L]`, and a mask, `[M]`, which is also False for chains over `max_cost`.
    """
    if is_concrete(chain):
        problem.bank.validate(chain)
    chains, is_neighbor = problem.space.neighbors(chain)
    return chains, is_neighbor & ~problem.exceeds_limit(problem.chain_cost(chains))


def _redraw(key: Key[Array, ""], chain: Int[Array, "L"], problem: Problem) -> Int[Array, "L"]:
    """Draw a chain within the limit that has at most as many layers as a given one."""
    num_layers, slots = problem.bank.num_layers, jnp.arange(chain.shape[0])
    wanted = problem.space.count_layers(chain)
    is_layer = jnp.arange(num_layers + problem.bank.num_heads) < num_layers

    def draw(
        carry: tuple[Array, Array | None, Array], slot: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array | None, Array], Array]:
        cost, stage, is_done = carry
        t, key = slot
        is_legal = prefix_rules.legal_actions(problem, t, cost, stage)
        is_wanted = is_legal & jnp.where(t < wanted, is_layer, ~is_layer)
        logits = jnp.where(jnp.where(is_wanted.any(), is_wanted, is_legal), 0.0, -jnp.inf)
        token = jax.random.categorical(key, logits.astype(jnp.float32))
        token = jnp.where(is_done, PADDING, token).astype(jnp.int32)
        cost = prefix_rules.add_cost(problem, cost, token)
        stage = prefix_rules.next_stage(problem, stage, token)
        return (cost, stage, is_done | (token >= num_layers)), token

    start = (jnp.zeros((), jnp.float32), prefix_rules.first_stage(problem), jnp.array(False))
    return jax.lax.scan(draw, start, (slots, jax.random.split(key, slots.size)))[1]


@checked
def step(problem: Problem, state: State, action: Int[Array, ""]) -> tuple[State, Float[Array, ""]]:
    """Take an action.

    If the episode is done, the state is unchanged and the reward is 0. If the loss is not finite,
    the reward is `-inf`.

    Args:
      problem: the problem that defines the episode.
      state: the state before the action.
      action: the token to take.

    Returns:
      The next state and the reward.

    Raises:
      ValueError: if the action is illegal. This is checked only if neither the action nor the state
        is traced. The result of a traced illegal action is undefined.
    """
    if is_concrete((state, action)) and not state.is_done:
        _check_legal(problem, state, int(action))
    bank = problem.bank
    is_layer = (action < bank.num_layers) & ~state.is_done
    is_head = (action >= bank.num_layers) & ~state.is_done
    hidden = jax.lax.cond(
        is_layer, lambda t, h: apply_token(bank.layers, t, h), lambda _, h: h, action, state.hidden
    )
    chain = jnp.where(is_layer | is_head, state.chain.at[state.length].set(action), state.chain)

    def end_reward(token: Array, hidden: PyTree) -> Array:
        loss = head_loss(problem, token, hidden) + problem.penalty(chain)
        return jnp.where(jnp.isfinite(loss), -loss, -jnp.inf)

    def no_reward(token: Array, hidden: PyTree) -> Array:
        return jnp.zeros_like(jax.eval_shape(end_reward, token, hidden))

    reward = jax.lax.cond(is_head, end_reward, no_reward, action, hidden)
    return State(chain, state.length + is_layer, state.is_done | is_head, hidden), reward


@checked
def append_layers(
    problem: Problem, chain: Int[Array, "L"], length: Int[Array, ""]
) -> Int[Array, "N L"]:
    """Extend a prefix by each layer, which gives prefixes `[N, L]`.

    Args:
      problem: the problem whose bank has the tokens to append.
      chain: int32 `[L]`; the tokens of the prefix, padded with -1.
      length: number of layers in the prefix.
    """
    _check_slot(problem, length)
    layers = jnp.arange(problem.bank.num_layers, dtype=jnp.int32)
    return jnp.where((jnp.arange(chain.size) == length)[None], layers[:, None], chain[None])


@checked
def append_heads(
    problem: Problem, chain: Int[Array, "L"], length: Int[Array, ""]
) -> Int[Array, "K L"]:
    """End a prefix with each head, which gives chains `[K, L]`.

    Args:
      problem: the problem whose bank has the tokens to append.
      chain: int32 `[L]`; the tokens of the prefix, padded with -1.
      length: number of layers in the prefix.
    """
    _check_slot(problem, length)
    heads = problem.bank.num_layers + jnp.arange(problem.bank.num_heads, dtype=jnp.int32)
    return jnp.where((jnp.arange(chain.size) == length)[None], heads[:, None], chain[None])


@checked
def head_loss(problem: Problem, head: Int[Array, ""], hidden: Activations) -> Float[Array, ""]:
    """Compute the loss of one head, without the layer penalty.

    `max_cost` is ignored. To respect it, add `problem.penalty(chain)`, which is `+inf` for a
    chain over the limit.

    Args:
      problem: the problem whose heads, labels, and loss are used.
      head: the token of the head.
      hidden: the activations of the prefix on the whole split, `[B, ...F]`, or a pytree of such
        arrays.
    """
    if is_concrete(head):
        first, end = problem.bank.num_layers, problem.bank.num_layers + problem.bank.num_heads
        check_integers(at_least=first, at_most=end - 1, head=int(head))
    call = jax.vmap(partial(apply_token, prepare_heads(problem, hidden), head))
    return evaluate_heads(problem, call, pick(hidden, None))[0][0]


@checked
def head_losses(problem: Problem, hidden: Activations) -> Float[Array, "K"]:
    """Compute the loss of each head, `[K]`, without the layer penalty.

    `max_cost` and stages are ignored. To respect them, add `problem.head_penalties(prefix)`, which
    is `+inf` for heads that make an illegal chain or one over the limit.

    Args:
      problem: the problem whose heads, labels, and loss are used.
      hidden: the activations of the prefix on the whole split, `[B, ...F]`, or a pytree of such
        arrays.
    """

    heads = prepare_heads(problem, hidden)
    return evaluate_heads(problem, lambda h: apply_all(heads, pick(h, 0)), pick(hidden, None))[0]


def _check_slot(problem: Problem, length: Array) -> None:
    if is_concrete(length):
        check_integers(at_least=0, at_most=problem.max_layers, length=int(length))


def _check_tokens(problem: Problem, tokens: Array) -> None:
    """Check that tokens are those of the bank, or padding."""
    if not is_concrete(tokens):
        return
    row, end = np.asarray(tokens), problem.bank.num_layers + problem.bank.num_heads
    if ((row < -1) | (row >= end)).any():
        raise ValueError(f"expected tokens in 0..{end - 1}, or -1, got {row.tolist()}")


def _check_legal(problem: Problem, state: State, action: int) -> None:
    """Raise ValueError if the action is illegal."""
    is_legal = np.asarray(legal_actions(problem, state.chain))
    if not 0 <= action < is_legal.size or not is_legal[action]:
        legal = np.flatnonzero(is_legal)
        least = f"at least {problem.min_layers} and " if problem.min_layers > 0 else ""
        allowed = f"{legal[0]}..{legal[-1]}"
        if (stages := problem.space.stages) is not None:
            stage = int(stages.reached(state.chain))
            after = f"position {stage - 1}" if stages.is_ordered else f"stage {stage}"
            allowed = f"{legal.tolist()}, which follow {after}"
        raise ValueError(
            f"illegal action {action} after {int(state.length)} of {least}at most "
            f"{problem.max_layers} layers: expected a token in {allowed}"
            + ("" if problem.max_cost is None else " that keeps the chain within max_cost")
        )
