"""Tabular Q-learning with experience replay, as in MetaQNN (Baker et al. 2016, arXiv:1611.02167).

A state consists of the number of layers and the last layer, so the size of the table does not grow
with the number of chains.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int, Key
from jchain.agent.rewards import compute_rewards, plain_rewards
from jchain.arguments import (
    check_at_least_one,
    check_functions,
    check_integers,
    check_numbers,
    checked,
)
from jchain.chain import PADDING
from jchain.engine import prefix_rules, score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.protocol import Info


class State(NamedTuple):
    """The table of values, and the chains to replay."""

    # [L, N + 1, N + K], the table, indexed by slot, last layer (N if there is none), and token
    values: Float[Array, "L M E"]
    chains: Int[Array, "R L"]  # [R, L], the last R chains, as a ring buffer
    reward: Float[Array, "R"]  # [R], the reward of each of these chains
    num_steps: Int[Array, ""]
    cache: ScoreCache


@pytree_dataclass
class QLearning:
    """Tabular Q-learning: epsilon-greedy chains, and updates of the table on recent chains.

    Attributes:
      num_chains: number of chains per step, P.
      replay_size: number of chains that are kept for replay, R.
      num_replays: number of chains that are replayed in each step.
      learning_rate: learning rate of the table.
      decay: factor by which epsilon, the probability of a random token, shrinks in each step:
        epsilon is `decay ** steps`, but at least `min_epsilon`.
      min_epsilon: lower bound of epsilon.
      reward_fn: function that maps the losses of a step's chains to rewards
        (`jchain.agent.rewards`). Rank rewards do not work, because they depend on the other chains
        of the step.

    Raises:
      ValueError: if `num_chains` or `num_replays` is below 1, or `replay_size` is below
        `num_chains`.
    """

    is_deterministic = False
    needs_gradient = False
    needs_invertible = False
    reads_activations = False

    num_chains: int = static(default=16)
    replay_size: int = static(default=1024)
    num_replays: int = static(default=64)
    learning_rate: float = 0.1
    decay: float = 0.98
    min_epsilon: float = 0.1
    reward_fn: Callable[[Float[Array, "P"]], Float[Array, "P"]] = static(default=plain_rewards)

    def __post_init__(self) -> None:
        check_at_least_one(num_chains=self.num_chains, num_replays=self.num_replays)
        check_functions(reward_fn=self.reward_fn)
        check_integers(at_least=self.num_chains, replay_size=self.replay_size)
        check_numbers(at_least=0, learning_rate=self.learning_rate)
        check_numbers(at_least=0, at_most=1, decay=self.decay, min_epsilon=self.min_epsilon)

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state, with a table of zeros."""
        num_slots, num_layers = problem.max_layers + 1, problem.bank.num_layers
        return State(
            jnp.zeros((num_slots, num_layers + 1, num_layers + problem.bank.num_heads)),
            jnp.full((self.replay_size, num_slots), PADDING, jnp.int32),
            jnp.zeros(self.replay_size),
            jnp.array(0),
            score_cache.init(problem),
        )

    @checked
    def start(
        self,
        key: Key[Array, ""],
        state: State,
        problem: Problem,
        chains: Int[Array, "C L"],
        loss: Float[Array, "C"],
    ) -> State:
        """Update the table once on each start; see `jchain.search.protocol.Startable`.

        Args:
          key: the PRNG key; not used.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        rewards = compute_rewards(self.reward_fn, loss).astype(state.reward.dtype)
        rate = jnp.asarray(self.learning_rate)

        def learn(values: Array, row: Array) -> tuple[Array, None]:
            return update(values, chains[row], rewards[row], rate, problem), None

        values, _ = jax.lax.scan(learn, state.values, jnp.arange(len(chains)))
        cache = score_cache.add(state.cache, problem, chains, loss)
        return state._replace(values=values, cache=cache)

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Sample and score chains, then update the table on replayed chains."""
        act_key, replay_key = jax.random.split(key)
        epsilon = jnp.maximum(jnp.asarray(self.decay) ** state.num_steps, self.min_epsilon)
        keys = jax.random.split(act_key, self.num_chains)
        chains = jax.vmap(lambda k: sample_chain(k, state.values, epsilon, problem))(keys)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        place = (state.num_steps * self.num_chains + jnp.arange(self.num_chains)) % self.replay_size
        replayable = state.chains.at[place].set(chains)
        rewards = state.reward.at[place].set(
            compute_rewards(self.reward_fn, loss).astype(state.reward.dtype)
        )
        num_steps = state.num_steps + 1
        num_stored = jnp.minimum(num_steps * self.num_chains, self.replay_size)
        drawn = jax.random.randint(replay_key, (self.num_replays,), 0, num_stored, jnp.int32)
        rate = jnp.asarray(self.learning_rate)

        def replay(values: Array, row: Array) -> tuple[Array, None]:
            return update(values, replayable[row], rewards[row], rate, problem), None

        values, _ = jax.lax.scan(replay, state.values, drawn)
        return State(values, replayable, rewards, num_steps, cache), Info(chains, loss, layer_calls)

    @checked
    def value(
        self, state: State, problem: Problem, chains: Int[Array, "P L"]
    ) -> Float[Array, "P L"]:
        """Look up the best predicted reward before each token of the chains.

        The prediction is 0 after the head and for states that were never tried. It is in the
        units of `reward_fn`.

        Args:
          state: the state, which holds the table.
          problem: the problem, which determines which tokens are allowed.
          chains: the chains, `[P, L]`.
        """

        def read(chain: Array) -> Array:
            state_values, is_legal = look_up(state.values, chain, problem)
            best = jnp.max(jnp.where(is_legal, state_values, -jnp.inf), axis=1)
            is_step = jnp.arange(chain.shape[0]) <= problem.space.count_layers(chain)
            return jnp.where(is_step, best, 0.0)

        return jax.vmap(read)(chains)


def sample_chain(
    key: Key[Array, ""], values: Float[Array, "L M E"], epsilon: Float[Array, ""], problem: Problem
) -> Int[Array, "L"]:
    """Sample one epsilon-greedy chain.

    Args:
      key: the PRNG key; consumed by this call.
      values: the table, `[L, N + 1, N + K]`.
      epsilon: the probability of a random token.
      problem: the problem, which determines which tokens are allowed.
    """
    num_layers = problem.bank.num_layers

    def act(
        carry: tuple[Array, Array, Array, Array | None], slot: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array, Array, Array | None], Array]:
        last, is_done, cost, stage = carry
        t, key = slot
        explore_key, random_key = jax.random.split(key)
        is_legal = prefix_rules.legal_actions(problem, t, cost, stage)
        legal = jnp.where(is_legal, 0.0, -jnp.inf).astype(jnp.float32)
        random = jax.random.categorical(random_key, legal)
        is_random = jax.random.uniform(explore_key, (), jnp.float32) < epsilon
        token = jnp.where(is_random, random, jnp.argmax(values[t, last] + legal))
        is_end = is_done | (token >= num_layers)
        taken = jnp.where(is_done, PADDING, token).astype(jnp.int32)
        cost = prefix_rules.add_cost(problem, cost, taken)
        stage = prefix_rules.next_stage(problem, stage, taken)
        return (jnp.where(is_end, last, token), is_end, cost, stage), taken

    slots = (jnp.arange(problem.max_layers + 1), jax.random.split(key, problem.max_layers + 1))
    zero, stage = jnp.zeros((), jnp.float32), prefix_rules.first_stage(problem)
    start = (jnp.array(num_layers), jnp.array(False), zero, stage)
    return jax.lax.scan(act, start, slots)[1]


def update(
    values: Float[Array, "L M E"],
    chain: Int[Array, "L"],
    reward: Float[Array, ""],
    rate: Float[Array, ""],
    problem: Problem,
) -> Float[Array, "L M E"]:
    """Update the table on one chain, whose reward is given at its head.

    For every slot `t` up to the head, the update with learning rate `alpha` is

        q(s_t, a_t) += alpha * (r_t + discount_t * max_a q(s_{t+1}, a) - q(s_t, a_t))

    All slots are updated at once, because no two slots share a state.

    Args:
      values: the table, `[L, N + 1, N + K]`.
      chain: the chain, `[L]`.
      reward: the reward of the chain.
      rate: the learning rate.
      problem: the problem, which determines which tokens are allowed.
    """
    import rlax

    slots = jnp.arange(chain.shape[0])
    length = problem.space.count_layers(chain)
    last = find_last(chain, problem)
    action = jnp.maximum(chain, 0)
    state_values, is_legal = look_up(values, chain, problem)
    next_values = jnp.roll(jnp.where(is_legal, state_values, -jnp.inf), -1, axis=0)
    # Use 0 instead of -inf after the head, where the discount is 0, since 0 * inf would be nan.
    next_values = jnp.where((slots < length)[:, None], next_values, 0.0)
    rewards = jnp.where(slots == length, reward, 0.0)
    discount = (slots < length).astype(values.dtype)
    error = jax.vmap(rlax.q_learning)(state_values, action, rewards, discount, next_values)
    return values.at[slots, last, action].add(rate * error * (slots <= length))


def look_up(
    values: Float[Array, "L M E"], chain: Int[Array, "L"], problem: Problem
) -> tuple[Float[Array, "L E"], Bool[Array, "L E"]]:
    """Look up the values of all tokens before each token of a chain, and which are allowed.

    Args:
      values: the table, `[L, N + 1, N + K]`.
      chain: the chain, `[L]`.
      problem: the problem, which determines which tokens are allowed.
    """
    slots = jnp.arange(chain.shape[0])
    is_legal: Bool[Array, "L E"] = jax.vmap(partial(prefix_rules.legal_actions, problem))(
        slots, prefix_rules.prefix_costs(problem, chain), prefix_rules.prefix_stages(problem, chain)
    )
    return values[slots, find_last(chain, problem)], is_legal


def find_last(chain: Int[Array, "L"], problem: Problem) -> Int[Array, "L"]:
    """Find the layer before each slot, or N if there is none.

    Args:
      chain: the chain, `[L]`.
      problem: the problem, which gives the number of layers, N.
    """
    is_layer = jnp.arange(chain.shape[0]) < problem.space.count_layers(chain)
    return jnp.concatenate(
        [jnp.array([problem.bank.num_layers]), jnp.where(is_layer, chain, 0)[:-1]]
    )
