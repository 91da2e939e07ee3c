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
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_all, apply_token, evaluate_heads
from jchain.problem import Problem
from jchain.pytree import is_concrete, pick
from jchain.stages.legal_chains import cheapest_rest, find_extensible, find_open
from jchain.stages.table import StageTable


class State(NamedTuple):
    """The state of an episode."""

    chain: Int[Array, "L"]  # [L], the tokens taken so far, then -1
    length: Int[Array, ""]  # number of layers taken so far
    is_done: Bool[Array, ""]  # True after a head was taken
    # [B, ...F], activations of the prefix on the whole split, or a pytree of such arrays
    hidden: Activations


def reset(problem: Problem) -> State:
    """Return the state of the empty prefix.

    Args:
      problem: the problem, whose stem is applied to the whole split.
    """
    chain = jnp.full(problem.max_layers + 1, PADDING, jnp.int32)
    return State(
        chain, jnp.zeros((), jnp.int32), jnp.array(False), problem.bank.embed(problem.data.x)
    )


def legal_actions(
    problem: Problem,
    length: Int[Array, ""],
    cost: Float[Array, ""] | None = None,
    stage: Int[Array, ""] | None = None,
) -> Bool[Array, "E"]:
    """Return the mask `[N + K]` of tokens that may follow a prefix; True means allowed.

    Layers are allowed if the prefix has fewer than `max_layers` layers, and heads are allowed if it
    has at least `min_layers`. If the cost of the prefix is given, and the problem has a `max_cost`,
    a token is allowed only if the prefix can then be completed within the limit. In a bank with
    stages, a token is allowed only if it reads the stage that the prefix has reached, and if a head
    can then be reached within `max_layers`. At least one token is always allowed.

    Args:
      problem: the problem, which defines the tokens and the allowed number of layers.
      length: number of layers in the prefix.
      cost: cost of the prefix, in the unit of `token_cost`; None to ignore the limit.
      stage: the stage that the prefix has reached (see `next_stage`); None without stages.

    Raises:
      ValueError: if the bank has stages and `stage` is None.
    """
    if (stages := problem.bank.stages) is not None:
        if stage is None:
            raise ValueError("expected the stage of the prefix for a bank with stages, got None")
        return _legal_actions_in_stages(problem, stages, length, cost, stage)
    num_layers = problem.bank.num_layers
    tokens = jnp.arange(num_layers + problem.bank.num_heads)
    is_legal = jnp.where(
        tokens < num_layers, length < problem.max_layers, length >= problem.min_layers
    )
    if problem.max_cost is None or cost is None:
        return is_legal
    layers, heads = problem.token_cost[:num_layers], problem.token_cost[num_layers:]
    num_missing = jnp.maximum(problem.min_layers - length - 1, 0)
    rest = jnp.where(tokens < num_layers, num_missing * layers.min() + heads.min(), 0.0)
    total = jnp.where(is_legal, cost + problem.token_cost + rest, jnp.inf)
    return is_legal & (~problem.exceeds_limit(total) | (total == total.min()))


def _legal_actions_in_stages(
    problem: Problem, stages: StageTable, length: Array, cost: Array | None, stage: Array
) -> Bool[Array, "E"]:
    num_layers = problem.bank.num_layers
    reads, writes = jnp.asarray(stages.reads), jnp.asarray(stages.writes)
    is_layer = jnp.arange(reads.size) < num_layers
    is_read = (reads == stage) & (is_layer | (length >= problem.min_layers))
    after = jnp.minimum(length + 1, problem.max_layers + 1)
    is_open = jnp.asarray(find_open(stages, problem.min_layers, problem.max_layers))
    is_legal = is_read & (~is_layer | is_open[after, writes])
    if problem.max_cost is not None and cost is not None:
        costs = cheapest_rest(stages, problem.min_layers, problem.max_layers, problem.token_cost)
        rest = jnp.where(is_layer, costs[after, writes], 0.0)
        total = jnp.where(is_legal, cost + problem.token_cost + rest, jnp.inf)
        is_legal &= ~problem.exceeds_limit(total) | (total == total.min())
    # No token may follow a prefix that is not one of a chain of the space. Any will do there.
    return is_legal | ~is_legal.any()


def first_stage(problem: Problem) -> Int[Array, ""] | None:
    """Return the stage of the empty prefix, which is 0; None for a bank without stages.

    Args:
      problem: the problem, whose bank may have stages.
    """
    return None if problem.bank.stages is None else jnp.zeros((), jnp.int32)


def next_stage(
    problem: Problem, stage: Int[Array, ""] | None, token: Int[Array, ""]
) -> Int[Array, ""] | None:
    """Return the stage that a prefix has reached after one more token.

    Args:
      problem: the problem, whose bank may have stages.
      stage: the stage before the token; None for a bank without stages.
      token: the token. A head or padding leaves the stage unchanged.
    """
    if (stages := problem.bank.stages) is None or stage is None:
        return None
    is_layer = (token >= 0) & (token < problem.bank.num_layers)
    written = jnp.asarray(stages.writes, jnp.int32)[jnp.maximum(token, 0)]
    return jnp.where(is_layer, written, stage)


def prefix_stages(problem: Problem, chain: Int[Array, "L"]) -> Int[Array, "L"] | None:
    """Return the stage before each token of a chain; None for a bank without stages.

    Args:
      problem: the problem, whose bank may have stages.
      chain: int32 `[L]`; the tokens of the chain. Entries after the head are undefined.
    """
    stages = problem.bank.stages
    return None if stages is None else stages.follow(chain)


def reached_stage(problem: Problem, prefix: Int[Array, "L"]) -> Int[Array, ""] | None:
    """Return the stage that a prefix has reached; None for a bank without stages.

    Args:
      problem: the problem, whose bank may have stages.
      prefix: int32 `[L]`; the tokens of the prefix, padded with -1.
    """
    stages = problem.bank.stages
    return None if stages is None else stages.reached(prefix)


def can_continue(problem: Problem, prefixes: Int[Array, "*P L"]) -> Bool[Array, "*P"]:
    """Return whether a layer may follow each prefix in some chain of the space.

    Costs are ignored.

    Args:
      problem: the problem, which defines the space.
      prefixes: int32 `[..., L]`; the tokens of each prefix, padded with -1.
    """
    length, stages = problem.space.count_layers(prefixes), problem.bank.stages
    if stages is None:
        return length < problem.max_layers
    is_open = find_extensible(stages, problem.min_layers, problem.max_layers)
    return jnp.asarray(is_open)[length, stages.reached(prefixes)] & stages.is_legal(prefixes)


def prefix_costs(problem: Problem, chain: Int[Array, "L"]) -> Float[Array, "L"]:
    """Compute the cost of the prefix before each token of a chain, in the unit of `token_cost`.

    Costs are added one by one, so that a sampler that adds costs gets the same bits.

    Args:
      problem: the problem, which gives the costs; all costs are 0 if it has no `max_cost`.
      chain: int32 `[L]`; the tokens of the chain.
    """
    if problem.max_cost is None:
        return jnp.zeros(chain.shape[0], jnp.float32)

    def add(cost: Array, token: Array) -> tuple[Array, Array]:
        return add_cost(problem, cost, token), cost

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chain)[1]


def add_cost(problem: Problem, cost: Float[Array, ""], token: Int[Array, ""]) -> Float[Array, ""]:
    """Add the cost of a token to that of a prefix. Without a `max_cost`, the cost stays 0.

    Args:
      problem: the problem, which gives the costs.
      cost: the cost of the prefix.
      token: the token that extends the prefix; -1 costs nothing.
    """
    if problem.max_cost is None:
        return cost
    return cost + jnp.where(token >= 0, problem.token_cost[jnp.maximum(token, 0)], 0.0)


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
    chains = problem.space.sample(key, num_chains)
    if problem.max_cost is None:
        return chains
    redraw = partial(_redraw, problem=problem)
    # Any other key than those that `sample` has split off.
    keys = jax.random.split(jax.random.fold_in(key, num_chains), num_chains)
    is_over = problem.exceeds_limit(problem.chain_cost(chains))
    return jnp.where(is_over[:, None], jax.vmap(redraw)(keys, chains), chains)


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
        is_legal = legal_actions(problem, t, cost, stage)
        is_wanted = is_legal & jnp.where(t < wanted, is_layer, ~is_layer)
        logits = jnp.where(jnp.where(is_wanted.any(), is_wanted, is_legal), 0.0, -jnp.inf)
        token = jax.random.categorical(key, logits.astype(jnp.float32))
        token = jnp.where(is_done, PADDING, token).astype(jnp.int32)
        cost, stage = add_cost(problem, cost, token), next_stage(problem, stage, token)
        return (cost, stage, is_done | (token >= num_layers)), token

    start = (jnp.zeros((), jnp.float32), first_stage(problem), jnp.array(False))
    return jax.lax.scan(draw, start, (slots, jax.random.split(key, slots.size)))[1]


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
        loss = head_loss(problem, token, hidden) + problem.layer_penalty(chain)
        return jnp.where(jnp.isfinite(loss), -loss, -jnp.inf)

    def no_reward(token: Array, hidden: PyTree) -> Array:
        return jnp.zeros_like(jax.eval_shape(end_reward, token, hidden))

    reward = jax.lax.cond(is_head, end_reward, no_reward, action, hidden)
    return State(chain, state.length + is_layer, state.is_done | is_head, hidden), reward


def append_layers(
    problem: Problem, chain: Int[Array, "L"], length: Int[Array, ""]
) -> Int[Array, "N L"]:
    """Extend a prefix by each layer, which gives prefixes `[N, L]`.

    Args:
      problem: the problem whose bank has the tokens to append.
      chain: int32 `[L]`; the tokens of the prefix, padded with -1.
      length: number of layers in the prefix.
    """
    layers = jnp.arange(problem.bank.num_layers, dtype=jnp.int32)
    return jnp.where((jnp.arange(chain.size) == length)[None], layers[:, None], chain[None])


def append_heads(
    problem: Problem, chain: Int[Array, "L"], length: Int[Array, ""]
) -> Int[Array, "K L"]:
    """End a prefix with each head, which gives chains `[K, L]`.

    Args:
      problem: the problem whose bank has the tokens to append.
      chain: int32 `[L]`; the tokens of the prefix, padded with -1.
      length: number of layers in the prefix.
    """
    heads = problem.bank.num_layers + jnp.arange(problem.bank.num_heads, dtype=jnp.int32)
    return jnp.where((jnp.arange(chain.size) == length)[None], heads[:, None], chain[None])


def head_loss(problem: Problem, head: Int[Array, ""], hidden: Activations) -> Float[Array, ""]:
    """Compute the loss of one head, without the layer penalty.

    Args:
      problem: the problem whose heads, labels, and loss are used.
      head: the token of the head.
      hidden: the activations of the prefix on the whole split, `[B, ...F]`, or a pytree of such
        arrays.
    """
    call = jax.vmap(partial(apply_token, problem.bank.heads, head))
    return evaluate_heads(problem, call, pick(hidden, None))[0][0]


def head_losses(problem: Problem, hidden: Activations) -> Float[Array, "K"]:
    """Compute the loss of each head, `[K]`, without the layer penalty.

    Args:
      problem: the problem whose heads, labels, and loss are used.
      hidden: the activations of the prefix on the whole split, `[B, ...F]`, or a pytree of such
        arrays.
    """

    def call(hidden: PyTree) -> Array:
        return apply_all(problem.bank.heads, pick(hidden, 0))

    return evaluate_heads(problem, call, pick(hidden, None))[0]


def _check_legal(problem: Problem, state: State, action: int) -> None:
    """Raise ValueError if the action is illegal."""
    cost, stage = problem.chain_cost(state.chain), reached_stage(problem, state.chain)
    is_legal = np.asarray(legal_actions(problem, state.length, cost, stage))
    if not 0 <= action < is_legal.size or not is_legal[action]:
        legal = np.flatnonzero(is_legal)
        least = f"at least {problem.min_layers} and " if problem.min_layers > 0 else ""
        allowed = f"{legal[0]}..{legal[-1]}"
        if stage is not None:
            allowed = f"{legal.tolist()}, which follow stage {int(stage)}"
        raise ValueError(
            f"illegal action {action} after {int(state.length)} of {least}at most "
            f"{problem.max_layers} layers: expected a token in {allowed}"
            + ("" if problem.max_cost is None else " that keeps the chain within max_cost")
        )
