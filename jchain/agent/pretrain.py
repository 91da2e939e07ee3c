"""Training across banks, so that a search of an unseen one starts from what was learned on others.

A critic, supervised: every prefix of small problems is looked at, with the lowest loss that can be reached behind it. Or an
actor-critic, which searches them in turn.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain import chain as chain_lib
from jchain import env
from jchain._typing import Array, Float, Int, Key, PyTree
from jchain.agent.critic import Critic, Network, make_inputs
from jchain.agent.observations import log_loss, lowest, observe
from jchain.engine.backend import compiler_options, find_backend
from jchain.engine.layer_calls import apply_all
from jchain.problem import Problem

_MAX_PREFIXES = 2**20
_BATCH = (64, 64)  # groups, prefixes of each
_HUBER_DELTA = 0.5
_RANK_WEIGHT, _TEMPERATURE = 0.3, 0.1


class Lesson(NamedTuple):
    """The prefixes of a problem that have at least one layer and room for one more, shorter ones first."""

    inputs: Float[np.ndarray, "C I"]  # of a critic
    stop: Float[np.ndarray, "C"]  # log loss of the best head
    best: Float[np.ndarray, "C"]  # log of the lowest loss of all chains that start so
    sizes: tuple[int, ...]  # prefixes of 1, 2, ... layers


class Visit(NamedTuple):
    """All prefixes of one number of layers, in the order of their tokens."""

    features: Float[Array, "V F"]  # `jchain.agent.observations.observe`
    change: Float[Array, "V F"]  # from those of the prefix without its last layer
    stop: Float[Array, "V"]  # log loss of the best head
    best: Float[Array, "V"]  # log of the lowest loss of all chains that start so


def observe_prefixes(problem: Problem) -> list[Visit]:
    """Look at every prefix that has room for one more layer, for as many layer calls as scoring all chains takes.

    Returns:
      The prefixes of 0, 1, ..., `max_layers - 1` layers.

    Raises:
      ValueError: chains have no layers, or there are more than 1,048,576 prefixes.
    """
    num_layers, max_layers = problem.bank.num_layers, problem.max_layers
    if max_layers < 1:
        raise ValueError(f"expected a problem of max_layers of at least 1, got {max_layers}")
    if chain_lib.count(num_layers, 1, max_layers) > _MAX_PREFIXES:
        raise ValueError(
            f"expected a problem of at most {_MAX_PREFIXES:,} prefixes, got {chain_lib.count(num_layers, 1, max_layers):,}"
        )
    return _compile_visit(find_backend(problem))(problem.without_names())


def study(problem: Problem) -> Lesson:
    """What a critic learns from a problem: its prefixes, looked at as `visit` does.

    Raises:
      ValueError: chains have fewer than two layers, or as `visit`.
    """
    max_layers = problem.max_layers
    if max_layers < 2:
        raise ValueError(f"expected a problem of max_layers of at least 2, got {max_layers}")
    levels = observe_prefixes(problem)
    center = levels[1].features.mean(axis=0)
    inputs = [
        np.asarray(make_inputs(level.features, level.change, center, length, max_layers))
        for length, level in enumerate(levels)
        if length > 0
    ]
    return Lesson(
        np.concatenate(inputs),
        np.concatenate([level.stop for level in levels[1:]]),
        np.concatenate([level.best for level in levels[1:]]),
        tuple(len(rows) for rows in inputs),
    )


def pretrain_critic(
    key: Key[Array, ""],
    problems: Sequence[Problem | Lesson],
    *,
    num_steps: int = 1500,
    width: int = 32,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
) -> Critic:
    """Train one critic across problems: `CriticSearch(critic=...)` then starts from it on any other bank.

    Its loss is the Huber loss of the predicted fall of the log loss, plus the cross-entropy of ranking prefixes of one
    length in one problem, in which the best ones weigh most (ListNet, Cao et al. 2007).

    Args:
      key: consumed.
      problems: small ones, of which all prefixes are looked at, or what `study` returned for them.
      num_steps: steps of AdamW, on 64 prefixes of each of 64 groups.
      width: of the network's two hidden layers.
      learning_rate: at the start; it falls to 0 along a cosine.
      weight_decay: of AdamW.

    Raises:
      ValueError: there is no problem, none of their losses is finite, a size is not positive, or as `study`.
    """
    if not problems or num_steps < 1 or width < 1:
        raise ValueError(
            f"expected at least one problem, num_steps and width of at least 1, got {len(problems)}, {num_steps} and {width}"
        )
    lessons = [problem if isinstance(problem, Lesson) else study(problem) for problem in problems]
    sizes = np.array([size for lesson in lessons for size in lesson.sizes])
    whole = [
        np.concatenate([getattr(lesson, name) for lesson in lessons])
        for name in ("inputs", "stop", "best")
    ]
    # Of the prefixes whose losses are not finite there is nothing to learn.
    is_finite = np.isfinite(whole[0]).all(axis=1) & np.isfinite(whole[1]) & np.isfinite(whole[2])
    sizes = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[is_finite], minlength=len(sizes))
    sizes = sizes[sizes > 0]
    if len(sizes) == 0:
        raise ValueError("expected problems with chains of finite loss, got none")
    inputs, stop, best = (jnp.asarray(rows[is_finite]) for rows in whole)
    critic = Critic(None, inputs.mean(axis=0), inputs.std(axis=0) + 1e-3, width)
    groups = jnp.asarray(np.append(0, np.cumsum(sizes)[:-1])), jnp.asarray(sizes)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay=weight_decay
    )
    params = _fit(
        key, critic, inputs, stop, best, *groups, optimizer=optimizer, num_steps=num_steps
    )
    return Critic(params, critic.mean, critic.scale, width)


def pretrain_agent(
    key: Key[Array, ""], agent: Any, problems: Sequence[Problem], *, num_steps: int
) -> PyTree:
    """Params of an actor-critic after it has searched these problems in turn: `ActorCritic(params=...)` starts from them.

    Params and the state of the optimizer are carried from one to the next; the rest is of each problem. Problems of the same
    shapes share compiled programs. It can be vmapped over keys.

    Args:
      key: consumed.
      agent: an `ActorCritic`, whose own params are the first.
      problems: one after the other; one that is to be searched again is given again.
      num_steps: steps of each search.

    Raises:
      ValueError: there is no problem, or num_steps is not positive.
    """
    if not problems or num_steps < 1:
        raise ValueError(
            f"expected at least one problem and num_steps of at least 1, got {len(problems)} and {num_steps}"
        )
    init_key, *keys = jax.random.split(key, 1 + len(problems))
    state = _begin(init_key, agent, problems[0].without_names())
    learned = state.params, state.opt_state
    for run_key, problem in zip(keys, problems, strict=True):
        learned = _compile_practise(find_backend(problem))(
            run_key, agent, learned, problem.without_names(), num_steps
        )
    return learned[0]


@jax.jit
def _begin(key: Key[Array, ""], agent: Any, problem: Problem) -> Any:
    return agent.init(key, problem)


@cache
def _compile_practise(backend: str) -> Any:
    return jax.jit(
        _practise, static_argnames="num_steps", compiler_options=compiler_options(backend)
    )


def _practise(
    key: Key[Array, ""], agent: Any, learned: Any, problem: Problem, num_steps: int
) -> Any:
    """Params and state of the optimizer after some steps on a problem."""
    init_key, step_key = jax.random.split(key)
    state = agent.init(init_key, problem)._replace(params=learned[0], opt_state=learned[1])

    def step(state: Any, key: Array) -> tuple[Any, None]:
        return agent.step(key, state, problem)[0], None

    state, _ = jax.lax.scan(step, state, jax.random.split(step_key, num_steps))
    return state.params, state.opt_state


@cache
def _compile_visit(backend: str) -> Any:
    return jax.jit(_visit_all, compiler_options=compiler_options(backend))


def _visit_all(problem: Problem) -> list[Visit]:
    """All prefixes with room for one more layer, by their number of layers: `[N^length, ...]`."""
    bank = problem.bank
    price = jnp.broadcast_to(problem.layer_cost, (bank.num_layers,))

    def visit_below(
        hidden: Array, paid: Array, parent: Array, seen: Any, length: int
    ) -> list[Visit]:
        observed = observe(problem, hidden, parent)
        stop = lowest(observed.loss) + paid
        children = (apply_all(bank.layers, hidden), paid + price)
        if length + 1 == problem.max_layers:
            deeper: list[Visit] = []
            reached = log_loss(
                jax.vmap(lambda h, p: lowest(env.head_losses(problem, h)) + p)(*children)
            )
        else:
            deeper = jax.lax.map(
                lambda c: visit_below(c[0], c[1], hidden, observed.features, length + 1), children
            )
            reached = deeper[0].best
        change = jnp.zeros_like(observed.features) if seen is None else observed.features - seen
        # Only from min_layers on a chain may stop here.
        own = log_loss(stop) if length >= problem.min_layers else jnp.inf
        best = jnp.minimum(own, jnp.min(reached))
        return [Visit(observed.features, change, log_loss(stop), best), *deeper]

    hidden = bank.embed(problem.data.x)
    levels = visit_below(hidden, jnp.zeros(()), hidden, None, 0)
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
) -> Any:
    def loss_fn(params: Any, key: Array) -> Array:
        group_key, member_key = jax.random.split(key)
        group = jax.random.randint(group_key, _BATCH[:1], 0, sizes.size)
        member = jax.random.randint(member_key, _BATCH, 0, sizes[group][:, None])
        place = starts[group][:, None] + member
        gain = Critic(params, critic.mean, critic.scale, critic.width).gain(inputs[place])
        predicted = (gain - stop[place]) / _TEMPERATURE
        wanted = jax.nn.softmax(-best[place] / _TEMPERATURE)
        rank = optax.softmax_cross_entropy(predicted, wanted)
        huber = optax.huber_loss(gain, stop[place] - best[place], delta=_HUBER_DELTA)
        return huber.mean() + _RANK_WEIGHT * rank.mean()

    def update(carry: Any, key: Array) -> Any:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, key), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    init_key, step_key = jax.random.split(key)
    params = Network(critic.width).init(init_key, inputs[0])["params"]
    (params, _), _ = jax.lax.scan(
        update, (params, optimizer.init(params)), jax.random.split(step_key, num_steps)
    )
    return params
