"""Search over the tree of prefixes by an actor-critic that reads activations.

A step extends one open prefix by every layer and looks at what came out. The critic predicts the lowest loss to be found
behind each open prefix; the actor takes the best of each length in turn, or now and then any (epsilon-greedy). The critic
is a network that was trained on other banks, where one is given, and on top of it least squares that learn this bank while
it is searched: their targets are those of Q-learning, the best of stopping here and of what is predicted for the children
(least-squares temporal differences, Bradtke and Barto 1996; fitted Q iteration, Ernst et al. 2005).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Int, Key, Shaped
from jchain.agent import critic as critic_lib
from jchain.agent.observations import NUM_FEATURES, Observe, log_loss, lowest, observe
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_all, apply_token
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info

# Banks of more layers tell them apart by random codes of this length.
_MAX_CODES = 64
_CODE_SEED = 0
# The constant input of the least squares is large, so that it is hardly held back.
_CONSTANT = 10.0


class Prefixes(NamedTuple):
    """Open prefixes by their number of layers."""

    chains: Int[Array, "D W L"]  # [D, W, L], -1 behind the layers
    features: Float[Array, "D W F"]  # [D, W, F]
    inputs: Float[Array, "D W I"]  # [D, W, I], of the least squares
    stop: Float[Array, "D W"]  # [D, W], log loss of the best head
    base: Float[Array, "D W"]  # [D, W], what the network predicts; +inf where no prefix stands


class State(NamedTuple):
    """What the next step needs."""

    prefixes: Prefixes
    last: Int[Array, "L"]  # [L], the prefix that was extended last
    children: Shaped[Array, "N B ..."]  # [N, B, ...F], activations of its children
    center: Float[Array, "F"]  # [F], mean features of the layers behind the stem
    weights: Float[Array, "D I"]  # [D, I], of the least squares
    spread: Float[
        Array, "D I I"
    ]  # [D, I, I], inverse of ridge + the inputs' second moments, times ridge
    turn: Int[Array, ""]  # the length whose turn it is


class _Children(NamedTuple):
    """One prefix extended by each layer."""

    hidden: Shaped[Array, "N B ..."]
    features: Float[Array, "N F"]
    loss: Float[Array, "N K"]
    chains: Int[Array, "N L"]


@pytree_dataclass
class CriticSearch:
    """Tree search by a critic that reads activations.

    A step extends one prefix by all `N` layers and scores the children by every head, for `N` layer calls. The activations of
    the last children are kept; those of an older prefix are computed again, which costs its number of layers.

    Attributes:
      critic: from `jchain.pretrain_critic`; None to start from the loss of the best head.
      width: open prefixes kept of each length; the ones predicted worst make room.
      ridge: how strongly the least squares hold to the network's prediction; `jnp.inf` to learn nothing in this search.
      epsilon: how often any open prefix is taken in place of the best.
      observe: what is seen of a prefix: `jchain.agent.observations.observe`, or `jchain.chainbench.tabular.observe` where losses are looked up.
    """

    critic: Any = None
    width: int = static(default=2048)
    ridge: float = 2.0
    epsilon: float = 0.1
    observe: Observe = static(default=observe)

    def __post_init__(self) -> None:
        critic_lib.check(self.critic)
        if self.width < 1:
            raise ValueError(f"expected a width of at least 1, got {self.width}")

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        hidden = problem.bank.embed(problem.data.x)
        root = self.observe(problem, hidden, hidden)
        if root.features.shape != (NUM_FEATURES,):
            raise ValueError(
                f"expected {NUM_FEATURES} features of a prefix, got shape {list(root.features.shape)}"
            )
        lengths = max(problem.max_layers, 1)
        shape = (lengths, self.width)
        size = 3 * _codes(problem).shape[1] + 2 * NUM_FEATURES + 1
        prefixes = Prefixes(
            jnp.full((*shape, problem.max_layers + 1), PADDING, jnp.int32),
            jnp.zeros((*shape, NUM_FEATURES)).at[0, 0].set(root.features),
            jnp.zeros((*shape, size)),
            jnp.zeros(shape).at[0, 0].set(log_loss(lowest(root.loss))),
            # The only one of its length: what is predicted for it does not matter.
            jnp.full(shape, jnp.inf).at[0, 0].set(0.0),
        )
        return State(
            prefixes,
            jnp.full(problem.max_layers + 1, PADDING, jnp.int32),
            jnp.zeros((problem.bank.num_layers, *hidden.shape), hidden.dtype),
            jnp.zeros(NUM_FEATURES),
            jnp.zeros((lengths, size)),
            jnp.tile(jnp.eye(size)[None], (lengths, 1, 1)),
            jnp.zeros((), jnp.int32),
        )

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        prefixes = state.prefixes
        length = _next_length(state)
        place = self._act(key, state, length)
        parent = jax.tree.map(lambda leaf: leaf[length, place], prefixes)
        is_there = jnp.isfinite(parent.base)
        does_extend = is_there & (length < problem.max_layers)
        hidden, num_again = _recall(state, problem, parent.chains, length)
        children = _extend(self.observe, problem, parent.chains, hidden, length)
        center = jnp.where(length == 0, children.features.mean(axis=0), state.center)
        candidates = self._judge(problem, parent, children, center, length + 1)

        is_last = length + 1 >= problem.max_layers
        predicted = _predict(
            candidates.base,
            candidates.inputs,
            state.weights[jnp.minimum(length + 1, len(state.weights) - 1)],
        )
        value = jnp.where(is_last, candidates.stop, predicted)
        stop = jnp.where(length >= problem.min_layers, parent.stop, jnp.inf)
        target = (
            jnp.minimum(stop, jnp.min(jnp.where(jnp.isnan(value), jnp.inf, value))) - parent.base
        )
        learned = _learn(
            state.weights[length], state.spread[length], parent.inputs, target, self.ridge
        )
        does_learn = does_extend & jnp.isfinite(target)
        weights, spread = jax.tree.map(
            lambda new, old: jnp.where(does_learn, new, old),
            learned,
            (state.weights[length], state.spread[length]),
        )
        prefixes = prefixes._replace(base=prefixes.base.at[length, place].set(jnp.inf))
        state = State(
            prefixes,
            parent.chains,
            children.hidden,
            jnp.where(does_extend, center, state.center),
            state.weights.at[length].set(weights),
            state.spread.at[length].set(spread),
            (length + 1) % len(state.weights),
        )
        state = _insert(
            state, candidates, jnp.where(does_extend & ~is_last, predicted, jnp.inf), length + 1
        )
        layer_calls = jnp.where(does_extend, problem.bank.num_layers + num_again, 0)
        return state, _report(problem, hidden, children, length, is_there, does_extend, layer_calls)

    def _act(self, key: Key[Array, ""], state: State, length: Int[Array, ""]) -> Int[Array, ""]:
        """Where the next prefix of this length stands."""
        coin_key, place_key = jax.random.split(key)
        base, inputs = state.prefixes.base[length], state.prefixes.inputs[length]
        best = jnp.argmin(_predict(base, inputs, state.weights[length]))
        any_one = jnp.argmax(
            jnp.where(jnp.isfinite(base), jax.random.uniform(place_key, base.shape), -1.0)
        )
        return jnp.where(jax.random.uniform(coin_key) < self.epsilon, any_one, best)

    def _judge(
        self,
        problem: Problem,
        parent: Any,
        children: _Children,
        center: Array,
        length: Int[Array, ""],
    ) -> Prefixes:
        """The children as open prefixes, `[N, ...]`."""
        stop = log_loss(jax.vmap(lowest)(children.loss))
        change = children.features - parent.features[None]
        gain = jnp.zeros_like(stop)
        if self.critic is not None:
            # What is behind the longest prefixes is not predicted, so their number may be anything.
            at = jnp.minimum(length, max(problem.max_layers - 1, 0))
            seen = critic_lib.make_inputs(
                children.features, change, center, at, max(problem.max_layers, 1)
            )
            gain = self.critic.gain(seen)
        inputs = _describe(problem, children, change, center, length)
        return Prefixes(children.chains, children.features, inputs, stop, stop - gain)


def _predict(
    base: Float[Array, "W"], inputs: Float[Array, "W I"], weights: Float[Array, "I"]
) -> Float[Array, "W"]:
    """Log of the lowest loss behind each prefix: what the network says, and what was learned here."""
    return base + inputs @ weights


def _learn(
    weights: Float[Array, "I"],
    spread: Float[Array, "I I"],
    x: Float[Array, "I"],
    target: Array,
    ridge: Any,
) -> tuple[Float[Array, "I"], Float[Array, "I I"]]:
    """One step of recursive least squares (Sherman and Morrison 1950): exactly ridge regression on all steps so far."""
    spread_x = spread @ x
    factor = spread_x / (ridge + x @ spread_x)
    return weights + factor * (target - x @ weights), spread - factor[:, None] * spread_x[None]


def _next_length(state: State) -> Int[Array, ""]:
    """The first length from the turn on of which a prefix is open."""
    is_open = jnp.isfinite(state.prefixes.base).any(axis=1)
    order = (state.turn + jnp.arange(is_open.size)) % is_open.size
    return order[jnp.argmax(is_open[order])]


def _recall(
    state: State, problem: Problem, prefix: Int[Array, "L"], length: Int[Array, ""]
) -> tuple[Shaped[Array, "B ..."], Int[Array, ""]]:
    """Activations of a prefix and the layer calls that they took: none for the children of the last one."""
    slots = jnp.arange(prefix.size)
    is_child = (length > 0) & jnp.all(jnp.where(slots == length - 1, PADDING, prefix) == state.last)
    again = jnp.where(is_child, 0, length)

    def apply(slot: Array, hidden: Array) -> Array:
        made = apply_token(problem.bank.layers, jnp.maximum(prefix[slot], 0), hidden)
        return jnp.where(slot < again, made, hidden)

    start = jnp.where(
        is_child, state.children[prefix[length - 1]], problem.bank.embed(problem.data.x)
    )
    return jax.lax.fori_loop(0, problem.max_layers - 1, apply, start), again


def _extend(
    observe: Observe,
    problem: Problem,
    prefix: Int[Array, "L"],
    hidden: Array,
    length: Int[Array, ""],
) -> _Children:
    made = apply_all(problem.bank.layers, hidden)
    observed = jax.vmap(lambda child: observe(problem, child, hidden))(made)
    slots = jnp.arange(problem.max_layers + 1)[None]
    tokens = jnp.arange(problem.bank.num_layers, dtype=jnp.int32)[:, None]
    chains = jnp.where(slots == length, tokens, prefix[None])
    loss = observed.loss + problem.layer_penalty(chains)[:, None]
    return _Children(made, observed.features, jnp.where(jnp.isfinite(loss), loss, jnp.inf), chains)


def _codes(problem: Problem) -> Float[Array, "N C"]:
    num_layers = problem.bank.num_layers
    if num_layers <= _MAX_CODES:
        return jnp.eye(num_layers)
    return jax.random.normal(jax.random.key(_CODE_SEED), (num_layers, _MAX_CODES)) / _MAX_CODES**0.5


def _describe(
    problem: Problem, children: _Children, change: Array, center: Array, length: Int[Array, ""]
) -> Float[Array, "N I"]:
    """Inputs of the least squares: last token, the one before it, all tokens, and features relative to parent and bank."""
    codes = _codes(problem)
    is_layer = jnp.arange(children.chains.shape[1]) < length
    tokens = jnp.where(is_layer[None, :, None], codes[children.chains], 0.0)
    before = tokens[:, jnp.maximum(length - 2, 0)] * (length > 1)
    relative = jnp.clip(
        jnp.concatenate([change, children.features - center[None]], axis=1), -4.0, 4.0
    )
    constant = jnp.full((codes.shape[0], 1), _CONSTANT)
    return jnp.concatenate([codes, before, tokens.sum(axis=1), relative, constant], axis=1)


def _insert(
    state: State, candidates: Prefixes, value: Float[Array, "N"], length: Int[Array, ""]
) -> State:
    """The best children take free places, then those of what is predicted worst. No value, no place."""
    prefixes = state.prefixes
    row = jnp.minimum(length, prefixes.base.shape[0] - 1)
    kept = _predict(prefixes.base[row], prefixes.inputs[row], state.weights[row])
    size = min(value.size, kept.size)
    worst, places = jax.lax.top_k(kept, size)
    best = jnp.argsort(value)[:size]
    place = jnp.where(value[best] < worst, places, kept.size)
    return state._replace(
        prefixes=jax.tree.map(
            lambda old, new: old.at[row, place].set(new[best].astype(old.dtype), mode="drop"),
            prefixes,
            candidates,
        )
    )


def _report(
    problem: Problem,
    hidden: Array,
    children: _Children,
    length: Int[Array, ""],
    is_there: Bool[Array, ""],
    does_extend: Bool[Array, ""],
    layer_calls: Int[Array, ""],
) -> Info:
    is_root = is_there & (length == 0) & (problem.min_layers == 0)
    is_end = does_extend & (length + 1 >= problem.min_layers)
    root_loss = jnp.where(is_root, env.head_losses(problem, hidden), jnp.inf)
    empty = jnp.full_like(children.chains[0], PADDING)
    bare = jnp.where(is_root, env.append_heads(problem, empty, length), PADDING)
    ends = jax.vmap(lambda chain: env.append_heads(problem, chain, length + 1))(children.chains)
    ends = jnp.where(is_end, ends, PADDING).reshape(-1, empty.size)
    loss = jnp.concatenate([root_loss, jnp.where(is_end, children.loss, jnp.inf).reshape(-1)])
    return Info(
        jnp.concatenate([bare, ends]), jnp.where(jnp.isfinite(loss), loss, jnp.inf), layer_calls
    )
