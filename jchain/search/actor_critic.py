"""Actor-critic over prefixes: PPO with lambda returns, imitation of the best chains, and restarts from their prefixes.

PPO: Schulman et al. 2017, arXiv:1707.06347, losses from rlax. Imitation: priority queue training, Abolafia et al. 2018,
arXiv:1801.03526. Restarts: go back to what was good, then explore, Ecoffet et al. 2021, arXiv:2004.12919. One step samples
chains from the policy, scores them together, so that shared prefixes are charged once, and updates the controller on them
and on the best ones so far a few times. With replay, earlier chains join them, and V-trace (Espeholt et al. 2018,
arXiv:1802.01561) corrects for the policy having moved since.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jchain import advice as advice_lib
from jchain import env
from jchain import memo as memo_lib
from jchain._typing import Array, Bool, Float, Int, Key, PyTree
from jchain.advice import Advice
from jchain.bank import Bank
from jchain.chain import PADDING, count_layers
from jchain.encoding import Controller, TokenEncoding, entry_features
from jchain.gradient import KINDS
from jchain.memo import Memo
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.rewards import rank_rewards
from jchain.search.base import Info, Pool, empty_pool, merge


class Sight(NamedTuple):
    """What the agent sees of the bank."""

    entries: Float[Array, "E D"]  # [N + K, D], features of the bank's entries
    advice: Advice | None  # of the best chain before this step


class State(NamedTuple):
    """What the next step needs."""

    params: PyTree  # of the controller, and of advice
    opt_state: PyTree
    sight: Sight
    elite: Pool
    memo: Memo
    replay: "Replay | None"  # None where nothing is replayed


class Rollout(NamedTuple):
    """Episodes, padded to L steps."""

    chains: Int[Array, "P L"]  # [P, L]
    log_prob: Float[Array, "P L"]  # [P, L], of the actions when they were taken
    reward: Float[Array, "P"]  # [P], at the step that takes the head


class Replay(NamedTuple):
    """The last chains, as a ring."""

    chains: Int[Array, "R L"]  # [R, L]
    log_prob: Float[Array, "R L"]  # [R, L], of the tokens when they were taken
    loss: Float[Array, "R"]
    num_stored: Int[Array, ""]  # since the start


@pytree_dataclass
class ActorCritic:
    """An agent that builds chains token by token.

    Attributes:
      encoding: how a prefix is seen: `TokenEncoding()` (discrete) or `WeightEncoding()` (continuous).
      num_chains: chains per step, P.
      num_epochs: updates on them.
      learning_rate: of Adam.
      entropy_weight: weight of the entropy bonus.
      critic_weight: weight of half the squared TD(lambda) error.
      lambda_: mixing of the lambda returns.
      clip: how far PPO's probability ratio may move.
      imitation_weight: weight of the mean negative log-likelihood of the best chains.
      restart_rate: share of chains that go on from a prefix of one of the best chains.
      num_elites: best chains that are kept for both, Q.
      score_kind: of the scores of edits of the best chain so far (`jchain.gradient.score_edits`) that the actor sees of each entry
        at each slot, and that are charged; none when None.
      entry_features: what is seen of the bank's entries, `[N + K, D]`: `jchain.encoding.entry_features`, or
        `jchain.lookup.entry_features` where losses are looked up.
      num_replays: earlier chains that join each update, with V-trace in place of PPO for all; the tokens of a prefix that was
        kept count as taken by the policy.
      replay_size: chains that are remembered for it, R.
      reward_fn: rewards of the chains of an update from their losses: of `jchain.rewards`.
    """

    encoding: Any = static(default=TokenEncoding())
    num_chains: int = static(default=32)
    num_epochs: int = static(default=4)
    learning_rate: float = 3e-3
    entropy_weight: float = 0.5
    critic_weight: float = 0.5
    lambda_: float = 0.95
    clip: float = 0.2
    imitation_weight: float = 0.5
    restart_rate: float = 0.2
    num_elites: int = static(default=16)
    entry_features: Callable[[Bank], Float[Array, "E D"]] = static(default=entry_features)
    score_kind: str | None = static(default=None)
    num_replays: int = static(default=0)
    replay_size: int = static(default=1024)
    reward_fn: Callable[[Float[Array, "P"]], Float[Array, "P"]] = static(default=rank_rewards)

    def __post_init__(self) -> None:
        if self.score_kind is not None and self.score_kind not in KINDS:
            raise ValueError(f"expected a score_kind of {', '.join(KINDS)} or None, got {self.score_kind!r}")
        if self.num_chains < 2 or min(self.num_epochs, self.num_elites) < 1:
            raise ValueError(
                f"expected num_chains of at least 2, num_epochs and num_elites of at least 1, got {self.num_chains}, "
                f"{self.num_epochs} and {self.num_elites}"
            )
        if self.num_replays < 0 or self.replay_size < self.num_chains:
            raise ValueError(
                f"expected num_replays of at least 0 and a replay_size of at least num_chains, got {self.num_replays} and "
                f"{self.replay_size}"
            )

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        entries = self.entry_features(problem.bank)
        params: dict[str, Any] = {"controller": Controller(self.encoding).init(key, entries)}
        advice = None
        if self.score_kind is not None:
            params["advice"], advice = advice_lib.init_weights(), advice_lib.init(problem)
        elite = empty_pool(self.num_elites, problem)
        sight = Sight(entries, advice)
        replay = empty_replay(self.replay_size, problem) if self.num_replays else None
        return State(params, self._optimizer().init(params), sight, elite, memo_lib.init(problem), replay)

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        controller = Controller(self.encoding)
        sight, advice_calls = self._look(state, problem)
        replay, replay_key = state.replay, key
        if replay is not None:
            key, replay_key = jax.random.split(key)
        keys = jax.random.split(key, (2, self.num_chains))
        prefixes = jax.vmap(lambda k: draw_prefix(k, state.elite, jnp.asarray(self.restart_rate), problem))(keys[0])
        chains, log_prob = jax.vmap(
            lambda k, prefix: sample_chain(k, controller, state.params, sight, prefix, problem)
        )(keys[1], prefixes)
        memo, loss, layer_calls = memo_lib.score(state.memo, problem, chains)
        joined = chains, log_prob, loss
        if replay is not None:
            replay = remember(replay, chains, log_prob, loss)
            joined = jax.tree.map(lambda *a: jnp.concatenate(a), joined, recall(replay_key, replay, self.num_replays))
        rollout = Rollout(joined[0], joined[1], self.reward_fn(joined[2]))
        elite = merge(state.elite, chains, loss)

        def update(carry: Any, _: None) -> Any:
            params, opt_state = carry
            gradient = jax.grad(self._loss)(params, controller, sight, rollout, elite, problem)
            updates, opt_state = self._optimizer().update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = jax.lax.scan(update, (state.params, state.opt_state), length=self.num_epochs)
        info = Info(chains, loss, layer_calls + advice_calls)
        return State(params, opt_state, sight, elite, memo, replay), info

    def value(self, state: State, chains: Int[Array, "P L"], problem: Problem) -> Float[Array, "P L"]:
        """What the critic predicts before each token of chains: the reward that its policy will get. 0 behind the head.

        The unit is that of `reward_fn`; ranks have none.
        """
        _, values = self._replay(state, chains, problem)
        length = count_layers(chains, problem.bank.num_layers)[:, None]
        return jnp.where(jnp.arange(chains.shape[1])[None] <= length, values, 0.0)

    def policy(self, state: State, chains: Int[Array, "P L"], problem: Problem) -> Float[Array, "P L E"]:
        """Log-probabilities of all tokens before each token of chains; what stands behind the head means nothing."""
        return jax.nn.log_softmax(self._replay(state, chains, problem)[0])

    def _replay(self, state: State, chains: Int[Array, "P L"], problem: Problem) -> tuple[Array, Array]:
        controller = Controller(self.encoding)
        return jax.vmap(lambda chain: replay_chain(controller, state.params, state.sight, chain, problem))(chains)

    def _look(self, state: State, problem: Problem) -> tuple[Sight, Int[Array, ""]]:
        """What is seen now, and the layer calls that it costs."""
        if state.sight.advice is None or self.score_kind is None:
            return state.sight, jnp.zeros((), jnp.int32)
        advice, layer_calls = advice_lib.update(state.sight.advice, problem, state.elite.chains[0], self.score_kind)
        return state.sight._replace(advice=advice), layer_calls

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.learning_rate))

    def _loss(
        self, params: PyTree, controller: Controller, sight: Sight, rollout: Rollout, elite: Pool, problem: Problem
    ) -> Float[Array, ""]:
        loss = self._rollout_loss(params, controller, sight, rollout, problem)
        return loss + self.imitation_weight * imitation_loss(params, controller, sight, elite, problem)

    def _rollout_loss(
        self, params: PyTree, controller: Controller, sight: Sight, rollout: Rollout, problem: Problem
    ) -> Float[Array, ""]:
        import rlax

        logits, values = jax.vmap(lambda chain: replay_chain(controller, params, sight, chain, problem))(rollout.chains)
        length = count_layers(rollout.chains, problem.bank.num_layers)[:, None]
        slots = jnp.arange(rollout.chains.shape[1])[None]
        is_step = (slots <= length).astype(values.dtype)
        reward = jnp.where(slots == length, rollout.reward[:, None], 0.0)
        discount = (slots < length).astype(values.dtype)
        next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
        ratio = jnp.exp(take_log_prob(logits, rollout.chains) - rollout.log_prob)
        lambda_ = jnp.asarray(self.lambda_, values.dtype)
        if self.num_replays:
            # Without gradient: V-trace's is that of the log-probabilities, weighted by the clipped ratio.
            out = jax.vmap(rlax.vtrace_td_error_and_advantage, in_axes=(0, 0, 0, 0, 0, None))(
                values, next_values, reward, discount, jax.lax.stop_gradient(ratio), lambda_
            )
            td_error, advantage = out.errors, jax.lax.stop_gradient(out.pg_advantage)
            actions = jnp.maximum(rollout.chains, 0)
            actor = jax.vmap(rlax.policy_gradient_loss)(logits, actions, advantage, is_step)
        else:
            td_error = jax.vmap(rlax.td_lambda, in_axes=(0, 0, 0, 0, None))(
                values, reward, discount, next_values, lambda_
            )
            # The lambda return minus the value is the advantage (generalized advantage estimation).
            advantage = jax.lax.stop_gradient(td_error)
            actor = jax.vmap(rlax.clipped_surrogate_pg_loss, in_axes=(0, 0, None))(
                ratio, advantage * is_step, self.clip
            )
        entropy = jax.vmap(rlax.entropy_loss)(logits, is_step)
        critic = 0.5 * jnp.mean(jnp.square(td_error) * is_step, axis=1)
        return jnp.mean(actor + self.entropy_weight * entropy + self.critic_weight * critic)


def empty_replay(size: int, problem: Problem) -> Replay:
    """Places for so many chains."""
    shape = (size, problem.max_layers + 1)
    return Replay(
        jnp.full(shape, PADDING, jnp.int32), jnp.zeros(shape), jnp.full(size, jnp.inf), jnp.zeros((), jnp.int32)
    )


def remember(
    replay: Replay, chains: Int[Array, "P L"], log_prob: Float[Array, "P L"], loss: Float[Array, "P"]
) -> Replay:
    """With these chains in the place of the oldest."""
    place = (replay.num_stored + jnp.arange(chains.shape[0])) % replay.loss.shape[0]
    return Replay(
        replay.chains.at[place].set(chains),
        replay.log_prob.at[place].set(log_prob),
        replay.loss.at[place].set(loss.astype(replay.loss.dtype)),
        replay.num_stored + chains.shape[0],
    )


def recall(key: Key[Array, ""], replay: Replay, num: int) -> tuple[Array, Array, Array]:
    """Chains, log-probabilities and losses of some that are remembered; one may come more than once."""
    num_there = jnp.minimum(replay.num_stored, replay.loss.shape[0])
    row = jax.random.randint(key, (num,), 0, num_there)
    return replay.chains[row], replay.log_prob[row], replay.loss[row]


def draw_prefix(key: Key[Array, ""], elite: Pool, restart_rate: Float[Array, ""], problem: Problem) -> Int[Array, "L"]:
    """Where a chain starts: after some of the layers of one of the best chains, or, as `1 - restart_rate`, after none.

    Each number of its layers is as likely. Chains that keep the same ones pay for them once a step.
    """
    row_key, cut_key, restart_key = jax.random.split(key, 3)
    num_there = jnp.isfinite(elite.loss).sum()
    chain = elite.chains[jax.random.randint(row_key, (), 0, jnp.maximum(num_there, 1))]
    cut = jax.random.randint(cut_key, (), 0, count_layers(chain, problem.bank.num_layers) + 1)
    is_kept = (jnp.arange(chain.shape[0]) < cut) & (jax.random.uniform(restart_key) < restart_rate)
    return jnp.where(is_kept, chain, PADDING)


def imitation_loss(
    params: PyTree, controller: Controller, sight: Sight, elite: Pool, problem: Problem
) -> Float[Array, ""]:
    """Mean negative log-likelihood of the elite's tokens, over chains and slots as the other terms."""
    logits, _ = jax.vmap(lambda chain: replay_chain(controller, params, sight, chain, problem))(elite.chains)
    log_prob = jnp.where(elite.chains == PADDING, 0.0, take_log_prob(logits, elite.chains))
    num_there = jnp.isfinite(elite.loss).sum()
    return -jnp.sum(jnp.mean(log_prob, axis=1)) / jnp.maximum(num_there, 1)


def take_log_prob(logits: Float[Array, "P L E"], chains: Int[Array, "P L"]) -> Float[Array, "P L"]:
    """Log-probability of each token; what stands behind the head means nothing."""
    actions = jnp.maximum(chains, 0)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], axis=-1)[..., 0]


def sample_chain(
    key: Key[Array, ""],
    controller: Controller,
    params: PyTree,
    sight: Sight,
    prefix: Int[Array, "L"],
    problem: Problem,
) -> tuple[Int[Array, "L"], Float[Array, "L"]]:
    """One chain that goes on from a prefix by the policy, and the policy's log-probability of each of its tokens.

    It is 0 behind the head. The policy sees no activations, so nothing is computed along the way: the finished chains are
    scored together.
    """
    num_layers = problem.bank.num_layers
    view = _start(controller, params, sight)

    def act(carry: Any, slot: Any) -> Any:
        view, is_done = carry
        t, key, kept = slot
        logits, _ = _act(controller, params, sight, view, t, env.legal_actions(problem, t))
        token = jnp.where(kept == PADDING, jax.random.categorical(key, logits), kept)
        log_prob = jnp.where(is_done, 0.0, jax.nn.log_softmax(logits)[token])
        taken = jnp.where(is_done, PADDING, token)
        view = _advance(controller, params, sight, view, t, token)
        return (view, is_done | (token >= num_layers)), (taken.astype(jnp.int32), log_prob)

    slots = (jnp.arange(problem.max_layers + 1), jax.random.split(key, problem.max_layers + 1), prefix)
    _, (chain, log_prob) = jax.lax.scan(act, (view, jnp.array(False)), slots)
    return chain, log_prob


def replay_chain(
    controller: Controller, params: PyTree, sight: Sight, chain: Int[Array, "L"], problem: Problem
) -> tuple[Float[Array, "L E"], Float[Array, "L"]]:
    """Logits and value before each token of a given chain; what stands behind its head means nothing."""

    def act(view: _View, slot: Any) -> Any:
        t, token = slot
        out = _act(controller, params, sight, view, t, env.legal_actions(problem, t))
        return _advance(controller, params, sight, view, t, jnp.maximum(token, 0)), out

    _, (logits, values) = jax.lax.scan(act, _start(controller, params, sight), (jnp.arange(chain.shape[0]), chain))
    return logits, values


class _View(NamedTuple):
    """A prefix as the agent sees it."""

    memory: Any  # of the encoding
    keys: Float[Array, "E H"]  # of the entries
    is_advised: Bool[Array, ""]  # it is that of the advised chain


def _start(controller: Controller, params: PyTree, sight: Sight) -> _View:
    memory: Any = controller.apply(params["controller"], sight.entries, method="initial_carry")
    keys: Any = controller.apply(params["controller"], sight.entries, method="embed")
    return _View(memory, keys, jnp.array(True))


def _advance(
    controller: Controller, params: PyTree, sight: Sight, view: _View, slot: Int[Array, ""], token: Int[Array, ""]
) -> _View:
    memory = controller.apply(params["controller"], view.memory, token, sight.entries, method="advance")
    is_advised = view.is_advised if sight.advice is None else view.is_advised & (sight.advice.chain[slot] == token)
    return view._replace(memory=memory, is_advised=is_advised)


def _act(
    controller: Controller,
    params: PyTree,
    sight: Sight,
    view: _View,
    slot: Int[Array, ""],
    is_legal: Bool[Array, "E"],
) -> tuple[Float[Array, "E"], Float[Array, ""]]:
    """Logits of the next token, and the value of the prefix."""
    state = controller.apply(params["controller"], view.memory, method="read")
    out: Any = controller.apply(params["controller"], state, view.keys, method="act")
    logits, value = out
    if sight.advice is not None:
        logits += advice_lib.read(sight.advice, slot, view.is_advised) @ params["advice"]
    return jnp.where(is_legal, logits, -1e9), value
