"""Actor-critic over prefixes: PPO with lambda returns, imitation of the best chains, and restarts from their prefixes.

PPO: Schulman et al. 2017, arXiv:1707.06347, losses from rlax. Imitation: priority queue training, Abolafia et al. 2018,
arXiv:1801.03526. Restarts: go back to what was good, then explore, Ecoffet et al. 2021, arXiv:2004.12919. One step samples
chains from the policy, scores them together, so that shared prefixes are charged once, and updates the controller on them
and on the best ones so far a few times. With replay, earlier chains join them, and V-trace (Espeholt et al. 2018,
arXiv:1802.01561) corrects for the policy having moved since. An encoding that observes what a prefix does to data has the
layers applied while chains are sampled; what was seen is kept beside them, so that updates apply none again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jchain import chain as chain_lib
from jchain import env
from jchain._typing import Array, Bool, Float, Int, Key, PyTree
from jchain.agent import edit_features as advice_lib
from jchain.agent import observations
from jchain.agent.edit_features import Advice
from jchain.agent.encoding import ActorCriticNetwork, TokenEncoding, entry_features
from jchain.agent.replay_buffer import Replay, Sample, empty_replay, recall, remember
from jchain.agent.rewards import rank_rewards
from jchain.bank import Bank
from jchain.chain import PADDING, count_layers
from jchain.engine import score_cache
from jchain.engine.evaluate import evaluate
from jchain.engine.prefix_sharing import count_calls
from jchain.engine.score_cache import ScoreCache
from jchain.gradient.edit_scores import KINDS
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
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
    cache: ScoreCache | None  # None where layers are applied along the way
    replay: Replay | None  # None where nothing is replayed
    elite_features: Float[Array, "Q L F"]  # [Q, L, F], as of a rollout


class Rollout(NamedTuple):
    """Episodes, padded to L steps."""

    chains: Int[Array, "P L"]  # [P, L]
    log_prob: Float[Array, "P L"]  # [P, L], of the actions when they were taken
    reward: Float[Array, "P"]  # [P], at the step that takes the head
    features: Float[
        Array, "P L F"
    ]  # [P, L, F], what was seen before each token; F is 0 where nothing is


@pytree_dataclass
class ActorCritic:
    """An agent that builds chains token by token.

    Attributes:
      encoding: how a prefix is seen: `TokenEncoding()` (discrete), `WeightEncoding()` (continuous), `ObservedEncoding(...)` (what
        it does to data) or a `JointEncoding` of them. One that observes pays for the distinct (prefix, layer) of each step's
        chains, those that were scored before included, as it keeps no activations.
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
      entry_features: what is seen of the bank's entries, `[N + K, D]`: `jchain.agent.encoding.entry_features`, or
        `jchain.chainbench.tabular.entry_features` where losses are looked up.
      num_replays: earlier chains that join each update, with V-trace in place of PPO for all; the tokens of a prefix that was
        kept count as taken by the policy.
      replay_size: chains that are remembered for it, R.
      reward_fn: rewards of the chains of an update from their losses: of `jchain.agent.rewards`.
      params: to start from, as `jchain.agent.pretrain.pretrain_agent` makes them on other banks; None for random ones.
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
    params: Any = None

    def __post_init__(self) -> None:
        if self.score_kind is not None and self.score_kind not in KINDS:
            raise ValueError(
                f"expected a score_kind of {', '.join(KINDS)} or None, got {self.score_kind!r}"
            )
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
        entries, observe = self.entry_features(problem.bank), self.encoding.observe
        root = jax.eval_shape(lambda: observations.observe_root(observe, problem).features)
        seen = jnp.zeros(root.shape, root.dtype)
        params: dict[str, Any] = {
            "controller": ActorCriticNetwork(self.encoding).init(key, entries, seen)
        }
        advice = None
        if self.score_kind is not None:
            params["advice"], advice = advice_lib.init_weights(), advice_lib.init(problem)
        if self.params is not None:
            params = take_over(self.params, params)
        elite = empty_pool(self.num_elites, problem)
        return State(
            params,
            self._optimizer().init(params),
            Sight(entries, advice),
            elite,
            score_cache.init(problem) if observe is None else None,
            empty_replay(self.replay_size, problem, seen) if self.num_replays else None,
            jnp.zeros((*elite.chains.shape, *seen.shape), seen.dtype),
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        controller = ActorCriticNetwork(self.encoding)
        sight, advice_calls = self._look(state, problem)
        replay, replay_key = state.replay, key
        if replay is not None:
            key, replay_key = jax.random.split(key)
        keys = jax.random.split(key, (2, self.num_chains))
        prefixes = jax.vmap(
            lambda k: draw_prefix(k, state.elite, jnp.asarray(self.restart_rate), problem)
        )(keys[0])
        sample = jax.vmap(
            lambda k, prefix: sample_chain(k, controller, state.params, sight, prefix, problem)
        )(keys[1], prefixes)
        chains, loss, cache = sample.chain, sample.loss, state.cache
        if cache is None:
            layer_calls = count_calls(chains, problem.bank.num_layers)[0]
        else:
            cache, loss, layer_calls = score_cache.evaluate_cached(cache, problem, chains)
        sample = joined = sample._replace(loss=loss)
        if replay is not None:
            replay = remember(replay, sample)
            joined = jax.tree.map(
                lambda *a: jnp.concatenate(a), sample, recall(replay_key, replay, self.num_replays)
            )
        rollout = Rollout(
            joined.chain, joined.log_prob, self.reward_fn(joined.loss), joined.features
        )
        elite = merge(state.elite, chains, loss)
        elite_features = find_features(
            elite,
            jnp.concatenate([state.elite.chains, chains]),
            jnp.concatenate([state.elite_features, sample.features]),
        )

        def update(carry: Any, _: None) -> Any:
            params, opt_state = carry
            gradient = jax.grad(self._loss)(
                params, controller, sight, rollout, elite, elite_features, problem
            )
            updates, opt_state = self._optimizer().update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = jax.lax.scan(
            update, (state.params, state.opt_state), length=self.num_epochs
        )
        info = Info(chains, loss, layer_calls + advice_calls)
        return State(params, opt_state, sight, elite, cache, replay, elite_features), info

    def value(
        self, state: State, chains: Int[Array, "P L"], problem: Problem
    ) -> Float[Array, "P L"]:
        """What the critic predicts before each token of chains: the reward that its policy will get. 0 behind the head.

        The unit is that of `reward_fn`; ranks have none. An encoding that observes has the layers of the chains applied.
        """
        _, values = self._replay(state, chains, problem)
        length = count_layers(chains, problem.bank.num_layers)[:, None]
        return jnp.where(jnp.arange(chains.shape[1])[None] <= length, values, 0.0)

    def policy(
        self, state: State, chains: Int[Array, "P L"], problem: Problem
    ) -> Float[Array, "P L E"]:
        """Log-probabilities of all tokens before each token of chains; what stands behind the head means nothing."""
        return jax.nn.log_softmax(self._replay(state, chains, problem)[0])

    def _replay(
        self, state: State, chains: Int[Array, "P L"], problem: Problem
    ) -> tuple[Array, Array]:
        controller = ActorCriticNetwork(self.encoding)

        def replay(chain: Array) -> tuple[Array, Array]:
            features = observations.observe_chain(self.encoding.observe, problem, chain)
            return replay_chain(controller, state.params, state.sight, chain, features, problem)

        return jax.vmap(replay)(chains)

    def refresh(
        self, state: State, problem: Problem, chains: Int[Array, "Q L"]
    ) -> tuple[State, Int[Array, ""]]:
        """As `jchain.search.base.Refreshable`: the controller stays, its best chains are scored again, replay begins anew."""
        rows = jnp.concatenate([state.elite.chains, chains.astype(jnp.int32)])
        is_there = rows[:, 0] != PADDING
        bare = chain_lib.bare(problem.bank.num_layers, problem.max_layers)
        scored, cache = jnp.where(is_there[:, None], rows, bare[None]), state.cache
        if cache is None:
            out = evaluate(problem, scored)
            loss, layer_calls = out.loss, out.layer_calls
        else:
            cache, loss, layer_calls = score_cache.evaluate_cached(cache, problem, scored)
        features = jax.vmap(partial(observations.observe_chain, self.encoding.observe, problem))(
            scored
        )
        elite = merge(
            empty_pool(self.num_elites, problem), rows, jnp.where(is_there, loss, jnp.inf)
        )
        advice = None if self.score_kind is None else advice_lib.init(problem)
        replay = (
            None
            if state.replay is None
            else empty_replay(self.replay_size, problem, features[0, 0])
        )
        sight = Sight(self.entry_features(problem.bank), advice)
        elite_features = find_features(elite, rows, features)
        return State(
            state.params, state.opt_state, sight, elite, cache, replay, elite_features
        ), layer_calls

    def _look(self, state: State, problem: Problem) -> tuple[Sight, Int[Array, ""]]:
        """What is seen now, and the layer calls that it costs."""
        if state.sight.advice is None or self.score_kind is None:
            return state.sight, jnp.zeros((), jnp.int32)
        advice, layer_calls = advice_lib.update(
            state.sight.advice, problem, state.elite.chains[0], self.score_kind
        )
        return state.sight._replace(advice=advice), layer_calls

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.learning_rate))

    def _loss(
        self,
        params: PyTree,
        controller: ActorCriticNetwork,
        sight: Sight,
        rollout: Rollout,
        elite: Pool,
        elite_features: Float[Array, "Q L F"],
        problem: Problem,
    ) -> Float[Array, ""]:
        loss = self._rollout_loss(params, controller, sight, rollout, problem)
        imitation = imitation_loss(params, controller, sight, elite, elite_features, problem)
        return loss + self.imitation_weight * imitation

    def _rollout_loss(
        self,
        params: PyTree,
        controller: ActorCriticNetwork,
        sight: Sight,
        rollout: Rollout,
        problem: Problem,
    ) -> Float[Array, ""]:
        import rlax

        logits, values = jax.vmap(
            lambda chain, seen: replay_chain(controller, params, sight, chain, seen, problem)
        )(rollout.chains, rollout.features)
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


def take_over(given: PyTree, fresh: PyTree) -> PyTree:
    """The given params, of the types of fresh ones.

    Raises:
      ValueError: they are those of another controller.
    """
    shapes = [
        [(jax.tree.structure(tree)), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]]
        for tree in (given, fresh)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"expected params of the controller of this encoding, {shapes[1]}, got {shapes[0]}"
        )
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), given, fresh)


def find_features(
    elite: Pool, chains: Int[Array, "P L"], features: Float[Array, "P L F"]
) -> Float[Array, "Q L F"]:
    """What was seen of the best chains, which are among these."""
    is_same = (elite.chains[:, None] == chains[None]).all(axis=-1)
    return features[jnp.argmax(is_same, axis=1)]


def draw_prefix(
    key: Key[Array, ""], elite: Pool, restart_rate: Float[Array, ""], problem: Problem
) -> Int[Array, "L"]:
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
    params: PyTree,
    controller: ActorCriticNetwork,
    sight: Sight,
    elite: Pool,
    features: Float[Array, "Q L F"],
    problem: Problem,
) -> Float[Array, ""]:
    """Mean negative log-likelihood of the elite's tokens, over chains and slots as the other terms."""
    logits, _ = jax.vmap(
        lambda chain, seen: replay_chain(controller, params, sight, chain, seen, problem)
    )(elite.chains, features)
    log_prob = jnp.where(elite.chains == PADDING, 0.0, take_log_prob(logits, elite.chains))
    num_there = jnp.isfinite(elite.loss).sum()
    return -jnp.sum(jnp.mean(log_prob, axis=1)) / jnp.maximum(num_there, 1)


def take_log_prob(logits: Float[Array, "P L E"], chains: Int[Array, "P L"]) -> Float[Array, "P L"]:
    """Log-probability of each token; what stands behind the head means nothing."""
    actions = jnp.maximum(chains, 0)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], axis=-1)[..., 0]


def sample_chain(
    key: Key[Array, ""],
    controller: ActorCriticNetwork,
    params: PyTree,
    sight: Sight,
    prefix: Int[Array, "L"],
    problem: Problem,
) -> Sample:
    """One chain that goes on from a prefix by the policy.

    Where the policy sees no activations, nothing is computed along the way: the finished chains are scored together.
    """
    num_layers, observe = problem.bank.num_layers, controller.encoding.observe
    observed = observations.observe_root(observe, problem)
    view = _start(controller, params, sight, observed.features)

    def act(carry: Any, slot: Any) -> Any:
        view, is_done, observed = carry
        t, key, kept = slot
        logits, _ = _act(controller, params, sight, view, t, env.legal_actions(problem, t))
        token = jnp.where(kept == PADDING, jax.random.categorical(key, logits), kept)
        log_prob = jnp.where(is_done, 0.0, jax.nn.log_softmax(logits)[token])
        taken = jnp.where(is_done, PADDING, token).astype(jnp.int32)
        after = observations.observe_next(observe, problem, observed, taken)
        view = _advance(controller, params, sight, view, t, token, after.features)
        return (view, is_done | (token >= num_layers), after), (taken, log_prob, observed.features)

    slots = (
        jnp.arange(problem.max_layers + 1),
        jax.random.split(key, problem.max_layers + 1),
        prefix,
    )
    (_, _, last), (chain, log_prob, features) = jax.lax.scan(
        act, (view, jnp.array(False), observed), slots
    )
    loss = last.loss[chain[count_layers(chain, num_layers)] - num_layers] + problem.layer_penalty(
        chain
    )
    return Sample(chain, log_prob, features, jnp.where(jnp.isfinite(loss), loss, jnp.inf))


def replay_chain(
    controller: ActorCriticNetwork,
    params: PyTree,
    sight: Sight,
    chain: Int[Array, "L"],
    features: Float[Array, "L F"],
    problem: Problem,
) -> tuple[Float[Array, "L E"], Float[Array, "L"]]:
    """Logits and value before each token of a given chain, before which these features were seen.

    What stands behind its head means nothing.
    """

    def act(view: _View, slot: Any) -> Any:
        t, token, after = slot
        out = _act(controller, params, sight, view, t, env.legal_actions(problem, t))
        return _advance(controller, params, sight, view, t, jnp.maximum(token, 0), after), out

    after = jnp.concatenate([features[1:], features[-1:]])
    start = _start(controller, params, sight, features[0])
    _, (logits, values) = jax.lax.scan(act, start, (jnp.arange(chain.shape[0]), chain, after))
    return logits, values


class _View(NamedTuple):
    """A prefix as the agent sees it."""

    memory: Any  # of the encoding
    keys: Float[Array, "E H"]  # of the entries
    is_advised: Bool[Array, ""]  # it is that of the advised chain


def _start(
    controller: ActorCriticNetwork, params: PyTree, sight: Sight, seen: Float[Array, "F"]
) -> _View:
    memory: Any = controller.apply(
        params["controller"], sight.entries, seen, method="initial_carry"
    )
    keys: Any = controller.apply(params["controller"], sight.entries, method="embed")
    return _View(memory, keys, jnp.array(True))


def _advance(
    controller: ActorCriticNetwork,
    params: PyTree,
    sight: Sight,
    view: _View,
    slot: Int[Array, ""],
    token: Int[Array, ""],
    seen: Float[Array, "F"],
) -> _View:
    """The view of the prefix with one token more, behind which this is seen."""
    memory = controller.apply(
        params["controller"], view.memory, token, sight.entries, seen, method="advance"
    )
    is_advised = (
        view.is_advised
        if sight.advice is None
        else view.is_advised & (sight.advice.chain[slot] == token)
    )
    return view._replace(memory=memory, is_advised=is_advised)


def _act(
    controller: ActorCriticNetwork,
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
