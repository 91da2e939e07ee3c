"""Tabular Q-learning with experience replay, as MetaQNN (Baker, Gupta, Naik and Raskar 2016, arXiv:1611.02167).

The state is how many layers there are and the last one, so that the table stays small whatever the number of chains.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Int, Key
from jchain.agent.rewards import plain_rewards
from jchain.chain import PADDING, count_layers
from jchain.engine import score_cache
from jchain.engine.score_cache import ScoreCache
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class State(NamedTuple):
    """The table, and what is replayed."""

    values: Float[
        Array, "L M E"
    ]  # [L, N + 1, E], by slot, last layer (N where there is none) and token
    chains: Int[Array, "R L"]  # [R, L], the last ones scored, as a ring
    reward: Float[Array, "R"]
    num_steps: Int[Array, ""]
    cache: ScoreCache


@pytree_dataclass
class QLearning:
    """Epsilon-greedy chains; then updates on chains drawn from the last ones.

    Attributes:
      num_chains: chains per step, P.
      replay_size: chains that are remembered, R.
      num_replays: of them, replayed in each step.
      learning_rate: of the table.
      decay: epsilon is `decay ** steps`, but at least `min_epsilon`.
      min_epsilon: share of random tokens that stays.
      reward_fn: rewards of the chains of a step from their losses: of `jchain.agent.rewards`, but ranks, which change with the step.
    """

    num_chains: int = static(default=16)
    replay_size: int = static(default=1024)
    num_replays: int = static(default=64)
    learning_rate: float = 0.1
    decay: float = 0.98
    min_epsilon: float = 0.1
    reward_fn: Callable[[Float[Array, "P"]], Float[Array, "P"]] = static(default=plain_rewards)

    def __post_init__(self) -> None:
        sizes = (self.num_chains, self.num_replays)
        if min(sizes) < 1 or self.replay_size < self.num_chains:
            raise ValueError(
                f"expected num_chains of at least 1, num_replays of at least 1, and a replay_size of at least num_chains, "
                f"got {sizes[0]}, {sizes[1]} and {self.replay_size}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        num_slots, num_layers = problem.max_layers + 1, problem.bank.num_layers
        return State(
            jnp.zeros((num_slots, num_layers + 1, num_layers + problem.bank.num_heads)),
            jnp.full((self.replay_size, num_slots), PADDING, jnp.int32),
            jnp.zeros(self.replay_size),
            jnp.array(0),
            score_cache.init(problem),
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        act_key, replay_key = jax.random.split(key)
        epsilon = jnp.maximum(jnp.asarray(self.decay) ** state.num_steps, self.min_epsilon)
        keys = jax.random.split(act_key, self.num_chains)
        chains = jax.vmap(lambda k: sample_chain(k, state.values, epsilon, problem))(keys)
        cache, loss, layer_calls = score_cache.evaluate_cached(state.cache, problem, chains)

        place = (state.num_steps * self.num_chains + jnp.arange(self.num_chains)) % self.replay_size
        remembered = state.chains.at[place].set(chains)
        rewards = state.reward.at[place].set(self.reward_fn(loss).astype(state.reward.dtype))
        num_steps = state.num_steps + 1
        num_there = jnp.minimum(num_steps * self.num_chains, self.replay_size)
        drawn = jax.random.randint(replay_key, (self.num_replays,), 0, num_there)

        def replay(values: Array, row: Array) -> tuple[Array, None]:
            return update(
                values, remembered[row], rewards[row], jnp.asarray(self.learning_rate), problem
            ), None

        values, _ = jax.lax.scan(replay, state.values, drawn)
        return State(values, remembered, rewards, num_steps, cache), Info(chains, loss, layer_calls)

    def value(
        self, state: State, chains: Int[Array, "P L"], problem: Problem
    ) -> Float[Array, "P L"]:
        """What the table predicts before each token of chains: the best reward behind it, 0 where nothing was tried.

        0 also behind the head. The unit is that of `reward_fn`.
        """

        def read(chain: Array) -> Array:
            state_values, is_legal = look_up(state.values, chain, problem)
            best = jnp.max(jnp.where(is_legal, state_values, -jnp.inf), axis=1)
            return jnp.where(
                jnp.arange(chain.shape[0]) <= count_layers(chain, problem.bank.num_layers),
                best,
                0.0,
            )

        return jax.vmap(read)(chains)


def sample_chain(
    key: Key[Array, ""], values: Float[Array, "L M E"], epsilon: Float[Array, ""], problem: Problem
) -> Int[Array, "L"]:
    """One epsilon-greedy chain."""
    num_layers = problem.bank.num_layers

    def act(
        carry: tuple[Array, Array], slot: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        last, is_done = carry
        t, key = slot
        explore_key, random_key = jax.random.split(key)
        legal = jnp.where(env.legal_actions(problem, t), 0.0, -jnp.inf)
        random = jax.random.categorical(random_key, legal)
        token = jnp.where(
            jax.random.uniform(explore_key) < epsilon, random, jnp.argmax(values[t, last] + legal)
        )
        is_end = is_done | (token >= num_layers)
        return (jnp.where(is_end, last, token), is_end), jnp.where(is_done, PADDING, token).astype(
            jnp.int32
        )

    slots = (jnp.arange(problem.max_layers + 1), jax.random.split(key, problem.max_layers + 1))
    return jax.lax.scan(act, (jnp.array(num_layers), jnp.array(False)), slots)[1]


def update(
    values: Float[Array, "L M E"],
    chain: Int[Array, "L"],
    reward: Float[Array, ""],
    rate: Float[Array, ""],
    problem: Problem,
) -> Float[Array, "L M E"]:
    """The table after one chain, whose reward comes with its head; states differ by slot, so all at once."""
    import rlax

    slots = jnp.arange(chain.shape[0])
    length = count_layers(chain, problem.bank.num_layers)
    last = find_last(chain, problem)
    action = jnp.maximum(chain, 0)
    state_values, is_legal = look_up(values, chain, problem)
    next_values = jnp.roll(jnp.where(is_legal, state_values, -jnp.inf), -1, axis=0)
    # Behind the head nothing follows; 0 * inf would be nan.
    next_values = jnp.where((slots < length)[:, None], next_values, 0.0)
    rewards = jnp.where(slots == length, reward, 0.0)
    discount = (slots < length).astype(values.dtype)
    error = jax.vmap(rlax.q_learning)(state_values, action, rewards, discount, next_values)
    return values.at[slots, last, action].add(rate * error * (slots <= length))


def look_up(
    values: Float[Array, "L M E"], chain: Int[Array, "L"], problem: Problem
) -> tuple[Float[Array, "L E"], Bool[Array, "L E"]]:
    """The values of all tokens before each token of a chain, and which of them may be taken."""
    slots = jnp.arange(chain.shape[0])
    is_legal: Bool[Array, "L E"] = jax.vmap(lambda t: env.legal_actions(problem, t))(slots)
    return values[slots, find_last(chain, problem)], is_legal


def find_last(chain: Int[Array, "L"], problem: Problem) -> Int[Array, "L"]:
    """The layer before each slot, N where there is none."""
    num_layers = problem.bank.num_layers
    is_layer = jnp.arange(chain.shape[0]) < count_layers(chain, num_layers)
    return jnp.concatenate([jnp.array([num_layers]), jnp.where(is_layer, chain, 0)[:-1]])
