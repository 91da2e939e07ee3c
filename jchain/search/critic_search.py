"""Search over the tree of prefixes with a critic that reads activations.

A step extends one open prefix by every layer and observes the children. For each open prefix, the
critic predicts the lowest loss among the chains that start with it. The search cycles through the
lengths of prefixes. At each length it extends the open prefix with the lowest prediction, or
sometimes a random one (epsilon-greedy).

The critic is the sum of a network that was pretrained on other banks (if one is given) and a linear
correction that is fitted to this bank during the search. As in Q-learning, the correction's target
is the minimum of the loss of stopping at the prefix and the predictions for its children
(least-squares temporal differences, Bradtke and Barto 1996; fitted Q iteration, Ernst et al. 2005).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jchain._typing import Activations, Array, Bool, Float, Int, Key, PyTree
from jchain.agent import critic as critic_lib
from jchain.agent.observations import (
    LOSS_UNIT,
    NUM_FEATURES,
    Observation,
    Observe,
    compress_loss,
    lowest,
    observe,
)
from jchain.arguments import check_at_least_one, check_functions, check_numbers, checked
from jchain.chain import PADDING
from jchain.engine.head_calls import map_prefixes
from jchain.engine.layer_calls import apply_token
from jchain.modules.activations import make_buffer
from jchain.problem import Problem
from jchain.pytree import describe_type, pick, pytree_dataclass, static
from jchain.search.prefixes import (
    count_extensions,
    end_children,
    extend_prefix,
    rank_prefixes,
)
from jchain.search.protocol import Info

# In banks of up to this many layers, each layer has a one-hot code. In larger banks, each layer has
# a random code of this length.
_MAX_CODES = 64
_CODE_SEED = 0
# The constant input of the regression is large, so that the ridge penalty hardly affects its
# weight.
_CONSTANT = 10.0
# The prediction before online learning for a prefix that no head fits: that of a loss of 1.
_UNKNOWN = math.asinh(1 / (2 * LOSS_UNIT))


class Prefixes(NamedTuple):
    """The open prefixes, grouped by their number of layers."""

    chains: Int[Array, "D W L"]  # [D, W, L], layer tokens, padded with -1
    features: Float[Array, "D W F"]  # [D, W, F], observed features
    inputs: Float[Array, "D W I"]  # [D, W, I], inputs of the online correction
    stop_loss: Float[Array, "D W"]  # [D, W], compressed loss of stopping with the best head
    # [D, W], the critic's prediction before online learning; +inf in an empty row
    prior_prediction: Float[Array, "D W"]


class State(NamedTuple):
    """The state that one step passes to the next."""

    prefixes: Prefixes
    last: Int[Array, "L"]  # [L], the prefix that was extended last
    children: PyTree  # leaves [N, B, ...F], activations of the children of `last`
    mean_features: Float[Array, "F"]  # [F], mean features of the prefixes of one layer
    weights: Float[Array, "D I"]  # [D, I], weights of the online correction
    inverse_gram: Float[Array, "D I I"]  # [D, I, I], ridge * inverse of (ridge * I + X^T X)
    next_length: Int[Array, ""]  # the length to try first in the next step
    guide: Int[Array, "L"]  # [L], the start whose prefixes are extended first; -1 if there is none


class _Children(NamedTuple):
    """The children of one prefix: the prefix extended by each layer."""

    chains: Int[Array, "N L"]
    hidden: PyTree
    features: Float[Array, "N F"]
    loss: Float[Array, "N K"]  # [N, K], +inf if not finite


@pytree_dataclass
class CriticSearch:
    """Tree search with a critic that reads activations.

    A step extends one prefix by each of the `N` layers and scores the children with every head. It
    costs `N` layer calls, or in a bank with stages as many as there are layers that read its stage.
    Only the activations of the last children are kept, so extending an older prefix costs one more
    layer call per layer of that prefix, to recompute its activations.

    Attributes:
      critic: a critic from `jchain.pretrain_critic`; None to use the loss of the best head.
      width: number of open prefixes of each length to keep; those with the highest predicted loss
        are evicted.
      ridge: ridge penalty of the online correction; `jnp.inf` disables online learning.
      epsilon: probability of extending a random open prefix instead of the best one.
      observe: function that observes a prefix: `jchain.agent.observations.observe`, or
        `jchain.chainbench.tabular.observe` for problems with tabulated losses.

    Raises:
      ValueError: if the critic was trained on other features, or `width` is less than 1.
    """

    needs_gradient = False
    needs_invertible = False
    reads_activations = True

    critic: critic_lib.Critic | None = None
    width: int = static(default=2048)
    ridge: float = 2.0
    epsilon: float = 0.1
    observe: Observe = static(default=observe)

    def __post_init__(self) -> None:
        critic_lib.check(self.critic)
        check_at_least_one(width=self.width)
        check_functions(observe=self.observe)
        check_numbers(at_least=0, is_finite=False, ridge=self.ridge)
        check_numbers(at_least=0, at_most=1, epsilon=self.epsilon)

    @property
    def is_deterministic(self) -> bool:
        """True if `epsilon` is 0, so that no random prefix is extended."""
        return bool(self.epsilon == 0)

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the state in which only the empty prefix is open.

        Raises:
          ValueError: if `observe` does not return `NUM_FEATURES` features.
        """
        hidden = problem.bank.embed(problem.data.x)
        root = self.observe(problem, hidden, hidden)
        if not isinstance(root, Observation):
            raise ValueError(
                f"expected observe to return an Observation, got {describe_type(root)}"
            )
        if root.features.shape != (NUM_FEATURES,):
            raise ValueError(
                f"expected {NUM_FEATURES} features of a prefix, got shape "
                f"{list(root.features.shape)}"
            )
        root_loss = root.loss
        if problem.space.stages is not None:
            empty = jnp.full(problem.max_layers + 1, PADDING, jnp.int32)
            root_loss = root_loss + problem.head_penalties(empty)
        lengths = max(problem.max_layers, 1)
        shape = (lengths, self.width)
        size = 3 * _layer_codes(problem).shape[1] + 2 * NUM_FEATURES + 1
        prefixes = Prefixes(
            jnp.full((*shape, problem.max_layers + 1), PADDING, jnp.int32),
            jnp.zeros((*shape, NUM_FEATURES)).at[0, 0].set(root.features),
            jnp.zeros((*shape, size)),
            jnp.zeros(shape).at[0, 0].set(compress_loss(lowest(root_loss))),
            # Any finite prediction marks a prefix as open. Its value does not matter, because no
            # other prefix is open.
            jnp.full(shape, jnp.inf).at[0, 0].set(0.0),
        )
        return State(
            prefixes,
            jnp.full(problem.max_layers + 1, PADDING, jnp.int32),
            make_buffer((problem.bank.num_layers,), hidden),
            jnp.zeros(NUM_FEATURES),
            jnp.zeros((lengths, size)),
            jnp.tile(jnp.eye(size)[None], (lengths, 1, 1)),
            jnp.zeros((), jnp.int32),
            jnp.full(problem.max_layers + 1, PADDING, jnp.int32),
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
        """Extend the prefixes of the best start first; see `jchain.search.protocol.Startable`.

        Args:
          key: the PRNG key; not used.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, `[C, L]`.
          loss: their losses, `[C]`.
        """
        return state._replace(guide=chains[jnp.argmin(loss)])

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Extend one open prefix by every layer."""
        prefixes = state.prefixes
        length = _choose_length(state)
        row = self._select(key, state, length)
        parent = jax.tree.map(lambda leaf: leaf[length, row], prefixes)
        is_open = jnp.isfinite(parent.prior_prediction)
        should_extend = is_open & (length < problem.max_layers)
        hidden, num_recomputed = _recompute(state, problem, parent.chains, length)
        children = _observe_children(self.observe, problem, parent.chains, hidden, length)
        mean_features = jnp.where(
            length == 0, _average_features(problem, children), state.mean_features
        )
        candidates = self._make_candidates(problem, parent, children, mean_features, length + 1)

        is_last = length + 1 >= problem.max_layers
        next_weights = state.weights[jnp.minimum(length + 1, len(state.weights) - 1)]
        predicted = _predict(candidates.prior_prediction, candidates.inputs, next_weights)
        value = jnp.where(is_last, candidates.stop_loss, predicted)
        stop_loss = jnp.where(length >= problem.min_layers, parent.stop_loss, jnp.inf)
        best = jnp.minimum(stop_loss, jnp.min(jnp.where(jnp.isnan(value), jnp.inf, value)))
        weights, inverse_gram = self._learn(state, length, parent, best, should_extend)
        closed = prefixes.prior_prediction.at[length, row].set(jnp.inf)
        prefixes = prefixes._replace(prior_prediction=closed)
        state = State(
            prefixes,
            parent.chains,
            children.hidden,
            jnp.where(should_extend, mean_features, state.mean_features),
            weights,
            inverse_gram,
            (length + 1) % len(state.weights),
            state.guide,
        )
        value = jnp.where(should_extend & ~is_last, predicted, jnp.inf)
        state = _insert(state, candidates, value, length + 1)
        num_extensions = count_extensions(problem, parent.chains)
        layer_calls = jnp.where(should_extend, num_extensions + num_recomputed, 0)
        empty = jnp.full_like(parent.chains, PADDING)
        chains, loss = end_children(
            problem, empty, length, hidden, children.chains, children.loss, is_open, should_extend
        )
        return state, Info(chains, loss, layer_calls)

    def _select(self, key: Key[Array, ""], state: State, length: Int[Array, ""]) -> Int[Array, ""]:
        """Select the row of the prefix of this length to extend: the guide's, or epsilon-greedy."""
        coin_key, row_key = jax.random.split(key)
        prefixes = state.prefixes
        prior_prediction, inputs = prefixes.prior_prediction[length], prefixes.inputs[length]
        best = jnp.argmin(_predict(prior_prediction, inputs, state.weights[length]))
        order = jax.random.uniform(row_key, prior_prediction.shape, jnp.float32)
        random_row = jnp.argmax(jnp.where(jnp.isfinite(prior_prediction), order, -1.0))
        is_random = jax.random.uniform(coin_key, (), jnp.float32) < self.epsilon
        row = jnp.where(is_random, random_row, best)
        # The prefixes of the guide come first.
        guide = jnp.where(jnp.arange(state.guide.size) < length, state.guide, PADDING)
        is_guide = (prefixes.chains[length] == guide[None]).all(axis=1) & jnp.isfinite(
            prior_prediction
        )
        return jnp.where(is_guide.any(), jnp.argmax(is_guide), row)

    def _make_candidates(
        self,
        problem: Problem,
        parent: Prefixes,
        children: _Children,
        mean_features: Array,
        length: Int[Array, ""],
    ) -> Prefixes:
        """Make open prefixes of `length` layers from the children, `[N, ...]`."""
        stop_loss = compress_loss(jax.vmap(lowest)(children.loss))
        change = children.features - parent.features[None]
        gain = jnp.zeros_like(stop_loss)
        if self.critic is not None:
            # Prefixes of max_layers layers are outside the critic's range. Their predictions are
            # not used, so any valid length will do.
            critic_length = jnp.minimum(length, max(problem.max_layers - 1, 0))
            inputs = critic_lib.make_inputs(
                children.features, change, mean_features, critic_length, max(problem.max_layers, 1)
            )
            gain = self.critic.gain(inputs)
        inputs = _make_regression_inputs(problem, children, change, mean_features, length)
        prior = rank_prefixes(problem, children.chains, stop_loss - gain, children.hidden, _UNKNOWN)
        return Prefixes(children.chains, children.features, inputs, stop_loss, prior)

    def _learn(
        self,
        state: State,
        length: Int[Array, ""],
        parent: Prefixes,
        value: Float[Array, ""],
        should_extend: Bool[Array, ""],
    ) -> tuple[Float[Array, "D I"], Float[Array, "D I I"]]:
        """Fit the correction for this length to the value that was found for the parent."""
        target = value - parent.prior_prediction
        old = (state.weights[length], state.inverse_gram[length])
        learned = _update_least_squares(*old, parent.inputs, target, self.ridge)
        should_learn = should_extend & jnp.isfinite(target)
        weights, inverse_gram = jax.tree.map(
            lambda new, old: jnp.where(should_learn, new, old), learned, old
        )
        return (
            state.weights.at[length].set(weights),
            state.inverse_gram.at[length].set(inverse_gram),
        )


def _predict(
    prior_prediction: Float[Array, "W"], inputs: Float[Array, "W I"], weights: Float[Array, "I"]
) -> Float[Array, "W"]:
    """Predict the log of the lowest loss after each prefix: the network plus the correction."""
    return prior_prediction + inputs @ weights


def _update_least_squares(
    weights: Float[Array, "I"],
    inverse_gram: Float[Array, "I I"],
    x: Float[Array, "I"],
    target: Array,
    ridge: ArrayLike,
) -> tuple[Float[Array, "I"], Float[Array, "I I"]]:
    """Take one step of recursive least squares.

    The result equals ridge regression on all steps so far (Sherman and Morrison 1950).
    """
    gram_x = inverse_gram @ x
    factor = gram_x / (ridge + x @ gram_x)
    return weights + factor * (target - x @ weights), inverse_gram - factor[:, None] * gram_x[None]


def _choose_length(state: State) -> Int[Array, ""]:
    """Return the first length with an open prefix, in cyclic order from `state.next_length`."""
    is_open = jnp.isfinite(state.prefixes.prior_prediction).any(axis=1)
    order = (state.next_length + jnp.arange(is_open.size)) % is_open.size
    return order[jnp.argmax(is_open[order])]


def _recompute(
    state: State, problem: Problem, prefix: Int[Array, "L"], length: Int[Array, ""]
) -> tuple[Activations, Int[Array, ""]]:
    """Compute the activations of a prefix and their cost, which is 0 if the last step kept them."""
    slots = jnp.arange(prefix.size)
    is_child = (length > 0) & jnp.all(jnp.where(slots == length - 1, PADDING, prefix) == state.last)
    num_layers = jnp.where(is_child, 0, length)

    def apply(slot: Array, hidden: PyTree) -> PyTree:
        outputs = apply_token(problem.bank.layers, jnp.maximum(prefix[slot], 0), hidden)
        return jax.tree.map(partial(jnp.where, slot < num_layers), outputs, hidden)

    start = jax.tree.map(
        partial(jnp.where, is_child),
        pick(state.children, prefix[length - 1]),
        problem.bank.embed(problem.data.x),
    )
    return jax.lax.fori_loop(0, problem.max_layers - 1, apply, start), num_layers


def _observe_children(
    observe: Observe,
    problem: Problem,
    prefix: Int[Array, "L"],
    hidden: Activations,
    length: Int[Array, ""],
) -> _Children:
    chains, outputs = extend_prefix(problem, prefix, length, hidden)
    observed = map_prefixes(problem, lambda child: observe(problem, child, hidden), outputs)
    loss = observed.loss + problem.head_penalties(chains)
    loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf)
    return _Children(chains, outputs, observed.features, loss)


def _average_features(problem: Problem, children: _Children) -> Float[Array, "F"]:
    """Average the features of the children, without those that do not follow the stages."""
    if (stages := problem.space.stages) is None:
        return children.features.mean(axis=0)
    is_legal = stages.is_legal(children.chains)[:, None]
    total = jnp.where(is_legal, children.features, 0.0).sum(axis=0)
    return total / jnp.maximum(is_legal.sum(), 1)


def _layer_codes(problem: Problem) -> Float[Array, "N C"]:
    """Return the code of each layer for the regression."""
    num_layers = problem.bank.num_layers
    if num_layers <= _MAX_CODES:
        return jnp.eye(num_layers)
    codes = jax.random.normal(jax.random.key(_CODE_SEED), (num_layers, _MAX_CODES), jnp.float32)
    return codes / _MAX_CODES**0.5


def _make_regression_inputs(
    problem: Problem,
    children: _Children,
    change: Array,
    mean_features: Array,
    length: Int[Array, ""],
) -> Float[Array, "N I"]:
    """Make inputs: token codes (last, second to last, sum) and relative features, `[N, I]`."""
    codes = _layer_codes(problem)
    is_layer = jnp.arange(children.chains.shape[1]) < length
    tokens = jnp.where(is_layer[None, :, None], codes[children.chains], 0.0)
    before = tokens[:, jnp.maximum(length - 2, 0)] * (length > 1)
    relative = jnp.clip(
        jnp.concatenate([change, children.features - mean_features[None]], axis=1), -4.0, 4.0
    )
    constant = jnp.full((codes.shape[0], 1), _CONSTANT)
    return jnp.concatenate([codes, before, tokens.sum(axis=1), relative, constant], axis=1)


def _insert(
    state: State, candidates: Prefixes, value: Float[Array, "N"], length: Int[Array, ""]
) -> State:
    """Insert the best children into empty rows, then in place of prefixes with worse predictions.

    Children with a value of +inf are not inserted.
    """
    prefixes = state.prefixes
    level = jnp.minimum(length, prefixes.prior_prediction.shape[0] - 1)
    predicted = _predict(
        prefixes.prior_prediction[level], prefixes.inputs[level], state.weights[level]
    )
    size = min(value.size, predicted.size)
    worst, worst_rows = jax.lax.top_k(predicted, size)
    best = jnp.argsort(value)[:size]
    row = jnp.where(value[best] < worst, worst_rows, predicted.size)
    return state._replace(
        prefixes=jax.tree.map(
            lambda old, new: old.at[level, row].set(new[best].astype(old.dtype), mode="drop"),
            prefixes,
            candidates,
        )
    )
