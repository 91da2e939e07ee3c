"""Pretraining across banks, so that a search of a new bank starts with a trained critic or agent.

A critic is trained by supervised learning. Every prefix of some small problems is observed, and its
target is the lowest loss among the chains that start with it. An actor-critic is trained by
searching the problems in turn.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain import env
from jchain._typing import Activations, Array, Float, Int, Key, PyTree
from jchain.agent.critic import Critic, Network, make_inputs
from jchain.agent.observations import compress_loss, lowest, observe
from jchain.arguments import checked
from jchain.chain import ChainSpace
from jchain.engine.backend import compiler_options, get_backend, jit_for_problem
from jchain.engine.head_calls import map_prefixes
from jchain.engine.layer_calls import apply_all
from jchain.problem import Problem
from jchain.stages.binding import check_no_stages

_MAX_PREFIXES = 2**20
_BATCH = (64, 64)  # the number of groups in a batch, and of prefixes from each group
_HUBER_DELTA = 0.5
_RANK_WEIGHT, _TEMPERATURE = 0.3, 0.1


class TrainingSet(NamedTuple):
    """Examples to train a critic: prefixes of 1 to `max_layers - 1` layers, shorter ones first."""

    inputs: Float[np.ndarray, "C I"]  # [C, I], inputs of a critic
    stop: Float[np.ndarray, "C"]  # [C], compressed loss of stopping with the best head
    best: Float[np.ndarray, "C"]  # [C], log of the lowest loss of all chains with this prefix
    sizes: tuple[int, ...]  # numbers of prefixes with 1, 2, ... layers


class PrefixLevel(NamedTuple):
    """All prefixes with the same number of layers, in the order of their tokens."""

    features: Float[Array, "V F"]  # [V, F], from `jchain.agent.observations.observe`
    change: Float[Array, "V F"]  # [V, F], features minus the parent's features
    stop: Float[Array, "V"]  # [V], compressed loss of stopping with the best head
    best: Float[Array, "V"]  # [V], log of the lowest loss of all chains with this prefix


@runtime_checkable
class AgentState(Protocol):
    """The state of an agent: a NamedTuple with at least these fields."""

    @property
    def params(self) -> PyTree: ...

    @property
    def opt_state(self) -> PyTree: ...

    def _replace(self, **changes: PyTree) -> "AgentState": ...


@runtime_checkable
class Agent(Protocol):
    """A search that trains params, such as `jchain.ActorCritic`."""

    def init(self, key: Key[Array, ""], problem: Problem) -> PyTree: ...

    def step(
        self, key: Key[Array, ""], state: PyTree, problem: Problem
    ) -> tuple[PyTree, object]: ...


@checked
def observe_prefixes(problem: Problem) -> list[PrefixLevel]:
    """Observe every prefix with room for one more layer.

    The number of layer calls is the same as for scoring all chains.

    Args:
      problem: a problem with at most 1,048,576 such prefixes.

    Returns:
      The prefixes of 0, 1, ..., `max_layers - 1` layers.

    Raises:
      ValueError: if `max_layers` is 0, there are more than 1,048,576 prefixes, or the problem has a
        `max_cost`, which critics do not know, or the bank has stages.
    """
    num_layers, max_layers = problem.bank.num_layers, problem.max_layers
    if max_layers < 1:
        raise ValueError(f"expected a problem with max_layers of at least 1, got {max_layers}")
    check_no_stages(problem.bank.layers, "training examples of a critic")
    if problem.max_cost is not None:
        raise ValueError(f"expected a problem without max_cost, got max_cost={problem.max_cost}")
    num_prefixes = ChainSpace(num_layers, 1, max_layers).num_chains
    if num_prefixes > _MAX_PREFIXES:
        raise ValueError(
            f"expected a problem of at most {_MAX_PREFIXES:,} prefixes, got {num_prefixes:,}"
        )
    return _observe_levels(problem)


@checked
def make_training_set(problem: Problem) -> TrainingSet:
    """Make training examples for a critic from all prefixes of a problem.

    Args:
      problem: a problem that `observe_prefixes` accepts.

    Raises:
      ValueError: if `max_layers` is less than 2, or as for `observe_prefixes`.
    """
    max_layers = problem.max_layers
    if max_layers < 2:
        raise ValueError(f"expected a problem with max_layers of at least 2, got {max_layers}")
    levels = observe_prefixes(problem)
    mean_features = levels[1].features.mean(axis=0)
    inputs = [
        np.asarray(make_inputs(level.features, level.change, mean_features, length, max_layers))
        for length, level in enumerate(levels)
        if length > 0
    ]
    return TrainingSet(
        np.concatenate(inputs),
        np.concatenate([level.stop for level in levels[1:]]),
        np.concatenate([level.best for level in levels[1:]]),
        tuple(len(rows) for rows in inputs),
    )


@checked
def pretrain_critic(
    key: Key[Array, ""],
    problems: Sequence[Problem | TrainingSet],
    *,
    num_steps: int = 1500,
    width: int = 32,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
) -> Critic:
    """Train one critic across problems, for `CriticSearch(critic=...)` on any bank.

    The training loss is the sum of two terms. One is the Huber loss of the predicted fall of the
    compressed loss. The other is a cross-entropy of ranking the prefixes of one length in one
    problem, which gives the best prefixes the largest weight (ListNet, Cao et al. 2007).

    Args:
      key: the PRNG key; consumed by this call.
      problems: small problems whose prefixes are all observed, or their training sets from
        `make_training_set`.
      num_steps: the number of steps of AdamW, each on 64 prefixes from each of 64 groups. A group
        is the prefixes of one length in one problem.
      width: the number of units in each of the network's two hidden layers.
      learning_rate: the initial learning rate, which decays to 0 along a cosine.
      weight_decay: the weight decay of AdamW.

    Raises:
      ValueError: if there is no problem, no loss is finite, a size is not positive, or as for
        `make_training_set`.
    """
    if not problems or num_steps < 1 or width < 1:
        raise ValueError(
            "expected at least one problem, num_steps and width of at least 1, got "
            f"{len(problems)}, {num_steps} and {width}"
        )
    sets = [
        problem if isinstance(problem, TrainingSet) else make_training_set(problem)
        for problem in problems
    ]
    sizes = np.array([size for one in sets for size in one.sizes])
    inputs, stop, best = (
        np.concatenate([getattr(one, name) for one in sets]) for name in ("inputs", "stop", "best")
    )
    # Leave out prefixes whose losses are not finite, because they have no target.
    is_finite = np.isfinite(inputs).all(axis=1) & np.isfinite(stop) & np.isfinite(best)
    sizes = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[is_finite], minlength=len(sizes))
    sizes = sizes[sizes > 0]
    if len(sizes) == 0:
        raise ValueError("expected problems with chains of finite loss, got none")
    inputs, stop, best = (jnp.asarray(rows[is_finite]) for rows in (inputs, stop, best))
    critic = Critic(None, inputs.mean(axis=0), inputs.std(axis=0) + 1e-3, width)
    groups = jnp.asarray(np.append(0, np.cumsum(sizes)[:-1])), jnp.asarray(sizes)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay=weight_decay
    )
    params = _fit(
        key, critic, inputs, stop, best, *groups, optimizer=optimizer, num_steps=num_steps
    )
    return Critic(params, critic.mean, critic.scale, width)


@checked
def pretrain_agent(
    key: Key[Array, ""], agent: Agent, problems: Sequence[Problem], *, num_steps: int
) -> PyTree:
    """Train params for `ActorCritic(params=...)` by searching problems in turn.

    The params and the optimizer state are carried from one problem to the next; everything else
    starts anew. Problems of the same shapes share compiled programs. This function can be vmapped
    over keys.

    Args:
      key: the PRNG key; consumed by this call.
      agent: the `ActorCritic` to train, starting from its own params.
      problems: the problems in the order of their searches; a problem may occur several times.
      num_steps: the number of steps of each search.

    Returns:
      The trained params.

    Raises:
      ValueError: if there is no problem, or `num_steps` is not positive.
    """
    if not problems or num_steps < 1:
        raise ValueError(
            "expected at least one problem and num_steps of at least 1, got "
            f"{len(problems)} and {num_steps}"
        )
    init_key, *keys = jax.random.split(key, 1 + len(problems))
    learner = _init_learner(init_key, agent, problems[0].without_names())
    for run_key, problem in zip(keys, problems, strict=True):
        train = _compile_train_agent(get_backend(problem))
        learner = train(run_key, agent, learner, problem.without_names(), num_steps=num_steps)
    return learner.params


class _Learner(NamedTuple):
    params: PyTree
    opt_state: PyTree


@jax.jit
def _init_learner(key: Key[Array, ""], agent: Agent, problem: Problem) -> _Learner:
    state: AgentState = agent.init(key, problem)
    return _Learner(state.params, state.opt_state)


@cache
def _compile_train_agent(backend: str) -> Callable[..., _Learner]:
    # Do not use `jit_for_problem`, which leaves out the compiler options if keys are vmapped. That
    # would change the results.
    options = compiler_options(backend)
    return jax.jit(_train_agent, static_argnames="num_steps", compiler_options=options)


def _train_agent(
    key: Key[Array, ""], agent: Agent, learner: _Learner, problem: Problem, *, num_steps: int
) -> _Learner:
    """Return the params and the optimizer state after some steps on a problem."""
    init_key, step_key = jax.random.split(key)
    state: AgentState = agent.init(init_key, problem)
    state = state._replace(params=learner.params, opt_state=learner.opt_state)

    def step(state: AgentState, key: Key[Array, ""]) -> tuple[AgentState, None]:
        return agent.step(key, state, problem)[0], None

    state, _ = jax.lax.scan(step, state, jax.random.split(step_key, num_steps))
    return _Learner(state.params, state.opt_state)


class _Prefix(NamedTuple):
    """A prefix to observe, with its activations."""

    hidden: Activations
    penalty: Float[Array, ""]  # the layer penalty of the prefix


@jit_for_problem()
def _observe_levels(problem: Problem) -> list[PrefixLevel]:
    """Observe all prefixes with room for one more layer, by number of layers: `[N^length, ...]`."""
    bank = problem.bank
    penalty = jnp.broadcast_to(problem.layer_cost, (bank.num_layers,))

    def observe_below(
        prefix: _Prefix, parent: Activations, parent_features: Array | None, length: int
    ) -> list[PrefixLevel]:
        """Observe a prefix and all prefixes that extend it, by their number of layers."""
        observed = observe(problem, prefix.hidden, parent)
        stop = lowest(observed.loss) + prefix.penalty
        children = _Prefix(apply_all(bank.layers, prefix.hidden), prefix.penalty + penalty)
        if length + 1 == problem.max_layers:
            deeper: list[PrefixLevel] = []
            losses = map_prefixes(problem, partial(env.head_losses, problem), children.hidden)
            reached = compress_loss(jax.vmap(lowest)(losses) + children.penalty)
        else:
            deeper = jax.lax.map(
                lambda c: observe_below(c, prefix.hidden, observed.features, length + 1), children
            )
            reached = deeper[0].best
        change = jnp.zeros_like(observed.features)
        if parent_features is not None:
            change = observed.features - parent_features
        # A prefix of fewer than `min_layers` layers may not stop.
        own = compress_loss(stop) if length >= problem.min_layers else jnp.inf
        best = jnp.minimum(own, jnp.min(reached))
        return [PrefixLevel(observed.features, change, compress_loss(stop), best), *deeper]

    hidden = bank.embed(problem.data.x)
    levels = observe_below(_Prefix(hidden, jnp.zeros(())), hidden, None, 0)
    return [
        jax.tree.map(lambda leaf, depth=depth: leaf.reshape(-1, *leaf.shape[depth:]), level)
        for depth, level in enumerate(levels)
    ]


@partial(jax.jit, static_argnames=("optimizer", "num_steps"))
def _fit(
    key: Key[Array, ""],
    critic: Critic,
    inputs: Float[Array, "C I"],
    stop: Float[Array, "C"],
    best: Float[Array, "C"],
    starts: Int[Array, "G"],
    sizes: Int[Array, "G"],
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> PyTree:
    """Fit the params of the critic's network to groups: prefixes of one length in one problem."""

    def loss_fn(params: PyTree, key: Key[Array, ""]) -> Float[Array, ""]:
        group_key, member_key = jax.random.split(key)
        group = jax.random.randint(group_key, _BATCH[:1], 0, sizes.size, jnp.int32)
        member = jax.random.randint(member_key, _BATCH, 0, sizes[group][:, None], jnp.int32)
        place = starts[group][:, None] + member
        gain = Critic(params, critic.mean, critic.scale, critic.width).gain(inputs[place])
        predicted = (gain - stop[place]) / _TEMPERATURE
        target = jax.nn.softmax(-best[place] / _TEMPERATURE)
        rank = optax.softmax_cross_entropy(predicted, target)
        huber = optax.huber_loss(gain, stop[place] - best[place], delta=_HUBER_DELTA)
        return huber.mean() + _RANK_WEIGHT * rank.mean()

    def update(
        carry: tuple[PyTree, PyTree], key: Key[Array, ""]
    ) -> tuple[tuple[PyTree, PyTree], None]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, key), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    init_key, step_key = jax.random.split(key)
    params = Network(critic.width).init(init_key, inputs[0])["params"]
    (params, _), _ = jax.lax.scan(
        update, (params, optimizer.init(params)), jax.random.split(step_key, num_steps)
    )
    return params
