"""Actor-critic over prefixes: PPO, imitation of the best chains, and restarts from their prefixes.

The policy is trained by PPO with lambda returns (Schulman et al. 2017, arXiv:1707.06347). It also
imitates the best chains, as in priority queue training (Abolafia et al. 2018, arXiv:1801.03526).
Restarts return to good states before they explore (Ecoffet et al. 2021, arXiv:2004.12919). The
losses and their equations are in `jchain.agent.losses`.

One step samples chains from the policy, scores them together, so that shared prefixes are charged
only once, and updates the network a few times on these chains and on the best chains so far. With
replay, each update also uses earlier chains, and V-trace (Espeholt et al. 2018, arXiv:1802.01561)
corrects for the older policy that sampled them. An encoding that observes what a prefix does to
data applies the layers while chains are sampled. Its observations are kept with the chains, so that
updates apply no layers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jchain._typing import Array, Float, Int, Key, PyTree
from jchain.agent import encoding as encodings
from jchain.agent import losses, observations
from jchain.agent.edit_features import (
    empty_edit_features,
    init_edit_weights,
    update_edit_features,
)
from jchain.agent.policy import (
    EDIT_WEIGHTS,
    NETWORK,
    NetworkInputs,
    Policy,
    cast_params,
    evaluate_actions,
)
from jchain.agent.replay_buffer import ReplayBuffer, empty_replay_buffer
from jchain.agent.rewards import compute_rewards, rank_rewards
from jchain.agent.rollout import Rollout, drop_empty, restore_empty, sample_chain, sample_prefix
from jchain.arguments import (
    check_at_least_one,
    check_fields,
    check_integers,
    check_numbers,
    checked,
)
from jchain.bank import Bank
from jchain.chain import PADDING
from jchain.engine import score_cache
from jchain.engine.evaluation import evaluate_filled
from jchain.engine.prefix_sharing import count_calls
from jchain.engine.score_cache import ScoreCache
from jchain.gradient.slot_scores import KINDS, ScoreKind
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.pool import Pool, empty_pool, merge
from jchain.search.protocol import Info


class State(NamedTuple):
    """The state that one step passes to the next."""

    params: PyTree  # the params of the policy
    opt_state: PyTree
    inputs: NetworkInputs
    elite: Pool  # the best chains so far
    cache: ScoreCache | None  # None if the encoding observes: layers are applied while sampling
    replay_buffer: ReplayBuffer | None  # None if nothing is replayed
    # [Q, L, F], observed when the elite was sampled; None if F = 0
    elite_features: Float[Array, "Q L F"] | None


class Learner(NamedTuple):
    """The part of the state that an update changes."""

    params: PyTree
    opt_state: PyTree


@pytree_dataclass
class ActorCritic:
    """An agent that builds chains token by token.

    Attributes:
      encoding: encoding of a prefix: `TokenEncoding()` (discrete), `WeightEncoding()` (continuous),
        `ObservedEncoding(...)` (what the prefix does to data), or a `JointEncoding` of these. With
        an encoding that observes, each step pays for the distinct (prefix, layer) pairs of all its
        chains, even of chains that were scored before, because no activations are kept.
      num_chains: number of chains per step, P.
      num_epochs: number of updates per step.
      learning_rate: learning rate of Adam.
      entropy_weight: weight of the entropy bonus.
      critic_weight: weight of half the squared TD(lambda) error.
      lambda_: mixing parameter of the lambda returns.
      clip: how far PPO's probability ratio may move from 1.
      imitation_weight: weight of the mean negative log-likelihood of the best chains.
      restart_rate: probability that a chain starts from a prefix of one of the best chains.
      num_elites: number of best chains that are kept for imitation and restarts, Q.
      entry_features: function that computes features of the bank's entries, `[N + K, D]`:
        `jchain.agent.encoding.entry_features`, or `jchain.chainbench.tabular.entry_features` for
        tabulated problems.
      score_kind: kind of edit scores (`jchain.gradient.score_edits`) that the actor gets as input:
        the scores of each entry at each slot of the best chain so far. Their layer calls are
        charged. None to give the actor no edit scores.
      num_replays: number of earlier chains that are added to each update. If it is not 0, updates
        use V-trace instead of PPO. If a chain started from a prefix of one of the best chains, the
        prefix's tokens count as sampled by the policy.
      replay_size: number of chains that the replay buffer holds, R.
      reward_fn: function that maps the losses of an update's chains to rewards
        (`jchain.agent.rewards`).
      params: initial params, for example from `jchain.agent.pretrain.pretrain_agent` on other
        banks; None for random params.

    Raises:
      ValueError: if `score_kind` is unknown, `num_chains` is below 2, `num_epochs` or `num_elites`
        is below 1, `num_replays` is negative, or `replay_size` is below `num_chains`.
    """

    is_deterministic = False
    needs_invertible = False

    encoding: encodings.Encoding = static(default=encodings.TokenEncoding())
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
    entry_features: Callable[[Bank], Float[Array, "E D"]] = static(default=encodings.entry_features)
    score_kind: ScoreKind | None = static(default=None)
    num_replays: int = static(default=0)
    replay_size: int = static(default=1024)
    reward_fn: Callable[[Float[Array, "P"]], Float[Array, "P"]] = static(default=rank_rewards)
    params: PyTree = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.score_kind is not None and self.score_kind not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(f"expected a score_kind of {kinds} or None, got {self.score_kind!r}")
        check_at_least_one(num_epochs=self.num_epochs, num_elites=self.num_elites)
        check_integers(at_least=2, num_chains=self.num_chains)
        check_integers(at_least=0, num_replays=self.num_replays)
        check_integers(at_least=self.num_chains, replay_size=self.replay_size)
        check_numbers(
            at_least=0,
            learning_rate=self.learning_rate,
            entropy_weight=self.entropy_weight,
            critic_weight=self.critic_weight,
            clip=self.clip,
            imitation_weight=self.imitation_weight,
        )
        check_numbers(at_least=0, at_most=1, lambda_=self.lambda_, restart_rate=self.restart_rate)

    @property
    def needs_gradient(self) -> bool:
        """True if the actor reads edit scores, which take gradients through layers."""
        return self.score_kind is not None

    @property
    def reads_activations(self) -> bool:
        """True if the encoding observes activations, or the actor reads edit scores."""
        return self.encoding.observe is not None or self.needs_gradient

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the first state: random or given params, and no chains."""
        inputs, observe = self._init_inputs(problem), self.encoding.observe
        root = jax.eval_shape(lambda: observations.observe_root(observe, problem).features)
        root_features = jnp.zeros(root.shape, root.dtype)
        network = encodings.ActorCriticNetwork(self.encoding)
        params: dict[str, PyTree] = {NETWORK: network.init(key, inputs.entries, root_features)}
        if inputs.edit_features is not None:
            params[EDIT_WEIGHTS] = init_edit_weights()
        if self.params is not None:
            params = cast_params(self.params, params)
        elite, replay_buffer = empty_pool(self.num_elites, problem), None
        if self.num_replays > 0:
            replay_buffer = empty_replay_buffer(self.replay_size, problem, root_features)
        return State(
            params,
            self._optimizer().init(params),
            inputs,
            elite,
            score_cache.init(problem) if observe is None else None,
            replay_buffer,
            drop_empty(jnp.zeros((*elite.chains.shape, *root.shape), root.dtype)),
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
        """Imitate the starts first; see `jchain.search.protocol.Startable`.

        Args:
          key: the PRNG key; not used.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        observe_one = partial(observations.observe_chain, self.encoding.observe, problem)
        elite = merge(state.elite, chains, loss)
        features = gather_features(elite, chains, jax.vmap(observe_one)(chains))
        cache = state.cache
        if cache is not None:
            cache = score_cache.add(cache, problem, chains, loss)
        return state._replace(elite=elite, cache=cache, elite_features=drop_empty(features))

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Sample chains, score them, and update the policy on them for `num_epochs` epochs."""
        inputs, edit_calls = self._update_inputs(state, problem)
        policy = Policy(encodings.ActorCriticNetwork(self.encoding), state.params, inputs)
        # Without replay, only the rollout needs a key, so the key is not split.
        is_replaying = state.replay_buffer is not None
        rollout_key, replay_key = jax.random.split(key) if is_replaying else (key, key)

        rollout = self._sample_rollout(rollout_key, policy, state.elite, problem)
        rollout, cache, layer_calls = score_rollout(state.cache, rollout, problem)
        elite, elite_features = update_elite(state, rollout)
        replay_buffer, batch = self._replay(replay_key, state.replay_buffer, rollout)
        rewards = compute_rewards(self.reward_fn, batch.loss)

        # The batch, its old log-probabilities, and the elite are the same in all epochs.
        def loss_fn(params: PyTree) -> Float[Array, ""]:
            now = dataclasses.replace(policy, params=params)
            policy_loss = self._policy_loss(now, batch, rewards, problem, is_replaying)
            imitation = self._imitation_loss(now, elite, elite_features, problem)
            return policy_loss + self.imitation_weight * imitation

        def update(learner: Learner, _: None) -> tuple[Learner, None]:
            gradient = jax.grad(loss_fn)(learner.params)
            updates, opt_state = self._optimizer().update(gradient, learner.opt_state)
            return Learner(optax.apply_updates(learner.params, updates), opt_state), None

        learner = Learner(state.params, state.opt_state)
        learner, _ = jax.lax.scan(update, learner, length=self.num_epochs)
        info = Info(rollout.chains, rollout.loss, layer_calls + edit_calls)
        features = drop_empty(elite_features)
        return State(*learner, inputs, elite, cache, replay_buffer, features), info

    @checked
    def value(
        self, state: State, problem: Problem, chains: Int[Array, "P L"]
    ) -> Float[Array, "P L"]:
        """Predict the expected reward of the policy before each token of the chains.

        The prediction is 0 after the head. It is in the units of `reward_fn` (ranks are unitless).
        An encoding that observes applies the layers of the chains.

        Args:
          state: the state, which holds the params.
          problem: the bank, the split of data, and the loss.
          chains: the chains, `[P, L]`.
        """
        _, values = self._evaluate(state, chains, problem)
        length = problem.space.count_layers(chains)[:, None]
        return jnp.where(jnp.arange(chains.shape[1])[None] <= length, values, 0.0)

    @checked
    def policy(
        self, state: State, problem: Problem, chains: Int[Array, "P L"]
    ) -> Float[Array, "P L E"]:
        """Compute the log-probabilities of all tokens before each token of the chains.

        Rows after the head token are undefined.

        Args:
          state: the state, which holds the params.
          problem: the bank, the split of data, and the loss.
          chains: the chains, `[P, L]`.
        """
        return jax.nn.log_softmax(self._evaluate(state, chains, problem)[0])

    @checked
    def refresh(
        self, state: State, problem: Problem, chains: Int[Array, "Q L"]
    ) -> tuple[State, Int[Array, ""]]:
        """Keep the params, score the best chains again, and empty the replay buffer.

        See `jchain.search.protocol.Refreshable`.

        Args:
          state: the state before the weights of the bank changed.
          problem: the problem with the new weights.
          chains: other good chains to score and store, `[Q, L]`; a row of -1 holds no chain.
        """
        rows = jnp.concatenate([state.elite.chains, chains.astype(jnp.int32)])
        is_chain = rows[:, 0] != PADDING
        scored = jnp.where(is_chain[:, None], rows, problem.space.head_alone[None])
        cache = state.cache
        if cache is None:
            out = evaluate_filled(problem, scored)
            loss, layer_calls = out.loss, out.layer_calls
        else:
            cache, loss, layer_calls = score_cache.evaluate_cached(cache, problem, scored)
        observe_one = partial(observations.observe_chain, self.encoding.observe, problem)
        features = jax.vmap(observe_one)(scored)
        loss = jnp.where(is_chain, loss, jnp.inf)
        elite = merge(empty_pool(self.num_elites, problem), rows, loss)
        replay_buffer = state.replay_buffer
        if replay_buffer is not None:
            replay_buffer = empty_replay_buffer(self.replay_size, problem, features[0, 0])
        refreshed = state._replace(
            inputs=self._init_inputs(problem),
            elite=elite,
            cache=cache,
            replay_buffer=replay_buffer,
            elite_features=drop_empty(gather_features(elite, rows, features)),
        )
        return refreshed, layer_calls

    def _init_inputs(self, problem: Problem) -> NetworkInputs:
        edit_features = None if self.score_kind is None else empty_edit_features(problem)
        return NetworkInputs(
            encodings.get_entries(self.entry_features, problem.bank), edit_features
        )

    def _update_inputs(
        self, state: State, problem: Problem
    ) -> tuple[NetworkInputs, Int[Array, ""]]:
        """Return the inputs for the best chain so far, and the layer calls of its edit scores."""
        edit_features = state.inputs.edit_features
        if edit_features is None or self.score_kind is None:
            return state.inputs, jnp.zeros((), jnp.int32)
        edit_features, layer_calls = update_edit_features(
            edit_features, problem, state.elite.chains[0], self.score_kind
        )
        return state.inputs._replace(edit_features=edit_features), layer_calls

    def _sample_rollout(
        self, key: Key[Array, ""], policy: Policy, elite: Pool, problem: Problem
    ) -> Rollout:
        """Sample chains from the policy, `[P, ...]`; some start from a prefix of the elite."""
        prefix_keys, chain_keys = jax.random.split(key, (2, self.num_chains))
        num_elites, restart_rate = jnp.isfinite(elite.loss).sum(), jnp.asarray(self.restart_rate)
        prefixes = jax.vmap(
            lambda k: sample_prefix(k, elite.chains, num_elites, restart_rate, problem.space)
        )(prefix_keys)
        return jax.vmap(lambda k, prefix: sample_chain(k, policy, prefix, problem))(
            chain_keys, prefixes
        )

    def _replay(
        self, key: Key[Array, ""], replay_buffer: ReplayBuffer | None, rollout: Rollout
    ) -> tuple[ReplayBuffer | None, Rollout]:
        """Make the batch of the updates: the rollout and, with replay, chains from the buffer."""
        if replay_buffer is None:
            return None, rollout
        replay_buffer = replay_buffer.add(rollout)
        replayed = replay_buffer.sample(key, self.num_replays)
        return replay_buffer, jax.tree.map(lambda *a: jnp.concatenate(a), rollout, replayed)

    def _policy_loss(
        self,
        policy: Policy,
        batch: Rollout,
        rewards: Float[Array, "P"],
        problem: Problem,
        is_replaying: bool,
    ) -> Float[Array, ""]:
        """Sum the actor, entropy, and critic losses of a batch: PPO, or V-trace with replay."""
        logits, values = jax.vmap(
            lambda chain, features: evaluate_actions(policy, chain, features, problem)
        )(batch.chains, batch.features)
        length = problem.space.count_layers(batch.chains)
        episode = jax.vmap(partial(losses.make_episode, dtype=values.dtype))(
            batch.chains, length, rewards
        )
        if is_replaying:
            loss_fn = partial(losses.vtrace_loss, lambda_=self.lambda_)
        else:
            loss_fn = partial(losses.ppo_loss, lambda_=self.lambda_, clip=self.clip)
        actor, critic = jax.vmap(loss_fn)(logits, values, batch.log_probs, episode)
        entropy = jax.vmap(losses.entropy_loss)(logits, episode.w_t)
        return jnp.mean(actor + self.entropy_weight * entropy + self.critic_weight * critic)

    def _imitation_loss(
        self, policy: Policy, elite: Pool, features: Float[Array, "Q L F"], problem: Problem
    ) -> Float[Array, ""]:
        """Compute the mean imitation loss of the best chains; rows of -1 add 0."""
        logits, _ = jax.vmap(
            lambda chain, features: evaluate_actions(policy, chain, features, problem)
        )(elite.chains, features)
        loss = jax.vmap(losses.imitation_loss)(logits, elite.chains, elite.chains != PADDING)
        return jnp.sum(loss) / jnp.maximum(jnp.isfinite(elite.loss).sum(), 1)

    def _evaluate(
        self, state: State, chains: Int[Array, "P L"], problem: Problem
    ) -> tuple[Float[Array, "P L E"], Float[Array, "P L"]]:
        """Compute logits and values before each token of the chains."""
        policy = Policy(encodings.ActorCriticNetwork(self.encoding), state.params, state.inputs)

        def evaluate_one(chain: Int[Array, "L"]) -> tuple[Float[Array, "L E"], Float[Array, "L"]]:
            features = observations.observe_chain(self.encoding.observe, problem, chain)
            return evaluate_actions(policy, chain, features, problem)

        return jax.vmap(evaluate_one)(chains)

    def _optimizer(self) -> optax.GradientTransformation:
        """Make the optimizer: Adam, with gradients clipped to norm 1 to limit bad batches."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.learning_rate))


def score_rollout(
    cache: ScoreCache | None, rollout: Rollout, problem: Problem
) -> tuple[Rollout, ScoreCache | None, Int[Array, ""] | Float[Array, ""]]:
    """Score a rollout; return it with its losses, the score cache, and the layer calls.

    Without a cache, the layers were applied while sampling, so the losses are known, and every
    chain is charged.
    """
    if cache is None:
        return rollout, None, count_calls(rollout.chains, problem.bank.num_layers)[0]
    cache, loss, layer_calls = score_cache.evaluate_cached(cache, problem, rollout.chains)
    return rollout._replace(loss=loss), cache, layer_calls


def update_elite(state: State, rollout: Rollout) -> tuple[Pool, Float[Array, "Q L F"]]:
    """Return the best chains after a rollout, and their observed features."""
    elite = merge(state.elite, rollout.chains, rollout.loss)
    chains = jnp.concatenate([state.elite.chains, rollout.chains])
    before = restore_empty(state.elite_features, state.elite.chains)
    features = jnp.concatenate([before, rollout.features])
    return elite, gather_features(elite, chains, features)


def gather_features(
    elite: Pool, chains: Int[Array, "P L"], features: Float[Array, "P L F"]
) -> Float[Array, "Q L F"]:
    """Look up the features of the best chains, all of which must be among `chains`."""
    is_same = (elite.chains[:, None] == chains[None]).all(axis=-1)
    return features[jnp.argmax(is_same, axis=1)]
