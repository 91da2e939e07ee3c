"""When do bank weights get updated? Four policies under one interface, each with the cost of its gradient steps charged.

`Frozen` never updates: we move to weights. `TuneFound` takes gradient steps on the chain that the search found. `CloneThenTune`
does so in the middle of the search, on copies that join the bank, so that the search goes on with both. `SharedUpdates` trains
the layers of the chains that the search samples while it samples them, as ENAS (Pham et al. 2018, arXiv:1802.03268).

Each policy is a frozen dataclass with `run(key, search, problem, train, budget=...)`. The search sees the split of the problem,
gradients see `train`. Layer calls of both are charged in the unit of the problem's split (`jchain.updates.tune.training_cost`).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Array, Int, Key
from jchain.bank import Bank
from jchain.chain import PADDING, count_layers
from jchain.data import Batch
from jchain.engine.evaluate import evaluate
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search import base
from jchain.search.base import Curve, Refreshable, Result, Search
from jchain.search.local_search import LocalSearch
from jchain.search.progress import Progress
from jchain.train import OPTIMIZER
from jchain.updates import tune
from jchain.updates.clones import CloneBank


class Outcome(NamedTuple):
    """What a search found, and the bank in which it is found."""

    bank: Bank  # with the weights that the losses of `result` belong to
    result: Result  # its layer calls are all that were spent, gradient steps included
    update_calls: int  # of them, those of gradient steps


@runtime_checkable
class Policy(Protocol):
    """When weights are updated."""

    def run(
        self,
        key: Key[Array, ""],
        search: Search,
        problem: Problem,
        train: Batch,
        *,
        budget: int,
        num_finalists: int = 16,
        progress: bool = False,
    ) -> Outcome:
        """Search, and update weights, until the budget is used.

        Args:
          key: consumed.
          search: how chains are proposed.
          problem: what to minimize over.
          train: the split that gradients are taken on.
          budget: layer calls on the problem's split, of the search and of gradient steps together; never exceeded.
          num_finalists: as for `jchain.run`.
          progress: as for `jchain.run`.

        Raises:
          ValueError: `train` does not fit the bank, the budget leaves nothing to search with, or as `jchain.run`.
        """
        ...


@pytree_dataclass
class Frozen:
    """Never: the bank is returned as it came, to the bit."""

    def run(
        self,
        key: Key[Array, ""],
        search: Search,
        problem: Problem,
        train: Batch,
        *,
        budget: int,
        num_finalists: int = 16,
        progress: bool = False,
    ) -> Outcome:
        result = base.run(
            key, search, problem, budget=budget, num_finalists=num_finalists, progress=progress
        )
        return Outcome(problem.bank, result, 0)


@pytree_dataclass
class TuneFound:
    """After the search: gradient steps on the layers and the head of the chain that was found, in place.

    Where they do not lower its loss on the problem's split, the bank stays as it was. Other chains change with the layers that
    they share with it, so it is the only finalist then.

    Attributes:
      num_steps: gradient steps.
      optimizer: any optax transformation.
    """

    num_steps: int = static(default=100)
    optimizer: optax.GradientTransformation = static(default=OPTIMIZER)

    def __post_init__(self) -> None:
        _check_sizes(num_steps=self.num_steps)

    def run(
        self,
        key: Key[Array, ""],
        search: Search,
        problem: Problem,
        train: Batch,
        *,
        budget: int,
        num_finalists: int = 16,
        progress: bool = False,
    ) -> Outcome:
        lesson = _make_lesson(problem, train)
        reserved = _price(problem, train, problem.max_layers, self.num_steps) + problem.max_layers
        _check_budget(budget, reserved)
        search_key, tune_key = jax.random.split(key)
        with _beside(reserved, budget):
            result = base.run(
                search_key,
                search,
                problem,
                budget=budget - reserved,
                num_finalists=num_finalists,
                progress=progress,
            )
        if not np.isfinite(result.best_loss):
            return Outcome(problem.bank, result, 0)
        chain = result.best_chain
        bank = tune.tune_chain(
            tune_key, lesson, chain, num_steps=self.num_steps, optimizer=self.optimizer
        )
        loss = float(evaluate(problem.with_bank(bank), chain[None]).loss[0])
        length = _count(chain)
        update_calls = _price(problem, train, length, self.num_steps)
        best = min(loss, result.best_loss)
        layer_calls = result.layer_calls + update_calls + length
        curve = Curve(
            np.append(result.curve.layer_calls, layer_calls),
            np.append(result.curve.best_loss, best),
        )
        result = result._replace(
            layer_calls=layer_calls, curve=curve, num_chains=result.num_chains + 1
        )
        if loss >= result.best_loss:
            return Outcome(problem.bank, result, update_calls)
        result = result._replace(
            best_loss=loss, finalists=chain[None], finalist_losses=np.array([loss], np.float32)
        )
        return Outcome(bank, result, update_calls)


@pytree_dataclass
class CloneThenTune:
    """In rounds: search, then gradient steps on copies of the layers of the best chain, which join the bank.

    The parents stay, to the bit, and so do heads. Copies take places that the bank holds ready (`Bank.reserve`), so that all
    rounds are one program; until then these hold copies of other layers, which chains may use. Copies may be copied in turn;
    their origin says of what. When no place of a module is left, its layers are used as they are. A search that is
    `Refreshable` goes on after each round, another one starts anew, with the best chains so far kept.

    Attributes:
      num_rounds: equal parts of the budget.
      num_steps: gradient steps in each.
      capacity: places for copies of each module; enough for all rounds when None.
      optimizer: any optax transformation.
    """

    num_rounds: int = static(default=4)
    num_steps: int = static(default=100)
    capacity: int | None = static(default=None)
    optimizer: optax.GradientTransformation = static(default=OPTIMIZER)

    def __post_init__(self) -> None:
        _check_sizes(num_rounds=self.num_rounds, num_steps=self.num_steps)
        if self.capacity is not None:
            _check_sizes(capacity=self.capacity)

    def run(
        self,
        key: Key[Array, ""],
        search: Search,
        problem: Problem,
        train: Batch,
        *,
        budget: int,
        num_finalists: int = 16,
        progress: bool = False,
    ) -> Outcome:
        base.check(search, problem, budget, num_finalists)
        lesson = _make_lesson(problem, train)
        if isinstance(search, LocalSearch) and search.starts is not None:
            raise ValueError(
                "expected a search without starts: with the copies that join the bank heads have other tokens"
            )
        if problem.layer_cost.ndim > 0:
            raise ValueError(
                f"expected one layer_cost for all layers, got {problem.layer_cost.shape[0]}"
            )
        reserved = _price(problem, train, problem.max_layers, self.num_steps) + problem.max_layers
        _check_budget(budget, self.num_rounds * reserved)
        capacity = self.num_rounds * problem.max_layers if self.capacity is None else self.capacity
        nursery = CloneBank.start(problem.bank, capacity)
        start_key, *round_keys = jax.random.split(key, self.num_rounds + 1)
        problem = problem.with_bank(nursery.bank)
        runs = base.start(start_key[None], search, problem.without_names(), num_finalists)
        parts, update_calls = [], 0
        with Progress(budget, is_shown=progress) as line:
            for i, round_key in enumerate(round_keys):
                tune_key, restart_key = jax.random.split(round_key)
                goal = base.Goal(
                    np.int32(budget * (i + 1) // self.num_rounds - reserved), np.float32(-np.inf)
                )
                runs, steps = base.spend(
                    runs, search, problem.without_names(), goal, line, keeps_state=True
                )
                parts.append(steps)
                spent = int(runs.tally.layer_calls[0])
                if spent + reserved > budget:
                    break
                state, pool = jax.tree.map(lambda leaf: leaf[0], (runs.state, runs.tally.pool))
                chains, chain = nursery.name_parents(pool.chains), None
                if np.isfinite(pool.loss[0]):
                    nursery, chain = nursery.raise_clones(
                        tune_key,
                        lesson,
                        chains[0],
                        num_steps=self.num_steps,
                        optimizer=self.optimizer,
                    )
                if chain is None or (chain == chains[0]).all():
                    runs = _amend(runs, state, pool, 0)
                    continue
                problem = problem.with_bank(nursery.bank)
                cost = _price(problem, train, _count(chain), self.num_steps)
                update_calls += cost
                loss = evaluate(problem.without_names(), chain[None]).loss
                counts = (1, int(not jnp.isfinite(loss[0])))
                pool = base.merge(
                    base.empty_pool(num_finalists, problem), jnp.asarray(chains), pool.loss
                )
                pool = base.merge(pool, jnp.asarray(chain)[None], loss)
                paid, calls = cost + _count(chain), 0
                if i < self.num_rounds - 1:
                    state, calls = _go_on(
                        restart_key, search, state, problem.without_names(), pool.chains
                    )
                is_affordable = spent + paid + int(calls) <= budget
                runs = _amend(runs, state, pool, paid + int(calls) * is_affordable, counts)
                parts.append(_note(runs))
                if not is_affordable:
                    break
        steps = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        with _beside(reserved, budget):
            return Outcome(nursery.bank, base.finish(runs, steps, budget)[0], update_calls)


@pytree_dataclass
class SharedUpdates:
    """During the search: after each of its steps, gradient steps on some of the chains that it scored, layers and heads in place.

    Weights change under the search, so it must be `Refreshable`: what it remembers is scored again after each step, and
    charged. For the last part of the budget the weights stay, and only chains of that part can be found.

    Attributes:
      num_updates: chains trained after each step of the search, a gradient step each, drawn from those that it scored.
      final_share: of the budget, for the last part.
      optimizer: any optax transformation.
    """

    num_updates: int = static(default=8)
    final_share: float = static(default=0.25)
    optimizer: optax.GradientTransformation = static(default=OPTIMIZER)

    def __post_init__(self) -> None:
        _check_sizes(num_updates=self.num_updates)
        if not 0 < self.final_share < 1:
            raise ValueError(f"expected a final_share above 0 and below 1, got {self.final_share}")

    def run(
        self,
        key: Key[Array, ""],
        search: Search,
        problem: Problem,
        train: Batch,
        *,
        budget: int,
        num_finalists: int = 16,
        progress: bool = False,
    ) -> Outcome:
        if not isinstance(search, Refreshable):
            raise ValueError(
                f"expected a search with a method refresh, as ActorCritic, got {type(search).__name__}"
            )
        base.check(search, problem, budget, num_finalists)
        bank = tune.upcast_bank(problem.bank)
        bare, lesson = (
            problem.with_bank(bank).without_names(),
            _make_lesson(problem, train).without_names(),
        )
        key, init_key, run_key = jax.random.split(key, 3)
        tuning = tune.start(
            dataclasses.replace(bare.bank, versions=bare.bank.get_versions()), self.optimizer
        )
        carry = (_init(search, init_key, bare), tuning)
        layer_calls = update_calls = num_free = total = step_calls = 0
        best, counts = np.inf, np.zeros(2, np.int32)
        with Progress(budget, is_shown=progress) as line:
            # As in jc.run, a search that asks for nothing so often has nothing left to ask.
            while num_free < base.MAX_FREE_STEPS:
                key, round_key = jax.random.split(key)
                new, lowest, calls, length, scored = _train_round(
                    self, round_key, carry, search, bare, lesson
                )
                cost = _price(problem, train, np.asarray(length))
                total, step_calls = int(sum(calls)) + cost, max(step_calls, int(calls[0]))
                # A step of the last part must be paid too.
                if layer_calls + total > min((1 - self.final_share) * budget, budget - step_calls):
                    break
                carry, best, counts = new, min(best, float(lowest)), counts + np.asarray(scored)
                layer_calls, update_calls = layer_calls + total, update_calls + cost
                num_free = 0 if total else num_free + 1
                line.update(layer_calls, best)
            if layer_calls == 0 and num_free == 0:
                raise ValueError(
                    f"expected a budget of which {1 - self.final_share:.0%} pay for a step of the search with its gradient "
                    f"steps, {total} layer calls here, and the rest for another, {step_calls}, got {budget}"
                )
            state, tuning = carry
            final = bare.with_bank(tuning.bank)
            runs = base.start(run_key[None], search, final, num_finalists)
            runs = _amend(
                runs,
                state,
                jax.tree.map(lambda leaf: leaf[0], runs.tally.pool),
                layer_calls,
                counts,
            )
            goal = base.Goal(np.int32(budget), np.float32(-np.inf))
            runs, steps = base.spend(runs, search, final, goal, line)
        versions = tuning.bank.get_versions()
        is_trained = np.asarray(versions > problem.bank.get_versions())
        bank = dataclasses.replace(
            bank,
            layers=tuning.bank.layers,
            heads=tuning.bank.heads,
            versions=versions,
            origins=tuple(
                f"trained while searching, from {origin}" if is_new else origin
                for origin, is_new in zip(
                    problem.bank.origins, is_trained.tolist(), strict=bool(problem.bank.origins)
                )
            ),
        )
        return Outcome(bank, base.finish(runs, steps, budget)[0], update_calls)


@jax.jit
def _train_round(
    policy: Any,
    key: Array,
    carry: tuple[Any, tune.State],
    search: Any,
    problem: Problem,
    lesson: Problem,
) -> tuple[tuple[Any, tune.State], Array, tuple[Array, Array], Array, Array]:
    """A step of the search, then gradient steps.

    Returns:
      The carry, the lowest loss, layer calls of the search and of what it remembers, how many layers each chain has that was
      trained, `[U]`, and how many chains were scored, and of them those without a finite loss.
    """
    step_key, draw_key, train_key = jax.random.split(key, 3)
    state, tuning = carry
    state, info = search.step(step_key, state, problem.with_bank(tuning.bank))
    # A loss that is not finite has no gradient to follow.
    is_scored = info.chains[:, 0] != PADDING
    is_there = is_scored & jnp.isfinite(info.loss)
    order = jnp.argsort(jnp.where(is_there, jax.random.uniform(draw_key, is_there.shape), 2.0))
    chains = jnp.where(is_there[:, None], info.chains, PADDING)[order[: policy.num_updates]]
    tuning = tune.train_on(train_key, tuning, lesson, chains, policy.optimizer)
    none = jnp.full_like(info.chains[:1], PADDING)
    state, calls = search.refresh(state, problem.with_bank(tuning.bank), none)
    length = count_layers(chains, problem.bank.num_layers)
    counts = jnp.stack([is_scored.sum(), (is_scored & ~is_there).sum()])
    return (state, tuning), info.loss.min(), (info.layer_calls, calls), length, counts


@jax.jit
def _init(search: Any, key: Array, problem: Problem) -> Any:
    return search.init(key, problem)


@jax.jit
def _refresh(search: Any, state: Any, problem: Problem, chains: Array) -> tuple[Any, Array]:
    return search.refresh(state, problem, chains)


def _go_on(key: Array, search: Any, state: Any, problem: Problem, chains: Array) -> tuple[Any, Any]:
    """The state of a search under new weights, and what it cost."""
    if isinstance(search, Refreshable):
        return _refresh(search, state, problem, chains)
    return _init(search, key, problem), 0


def _amend(
    runs: base.Run, state: Any, pool: base.Pool, layer_calls: int, counts: Any = (0, 0)
) -> base.Run:
    """The one run, ready to go on from another state, with these calls charged and so many chains scored, finite or not."""
    state, pool = jax.tree.map(lambda leaf: leaf[None], (state, pool))
    old = runs.tally
    tally = old._replace(
        pool=pool,
        layer_calls=old.layer_calls + jnp.int32(layer_calls),
        num_chains=old.num_chains + jnp.int32(counts[0]),
        num_nonfinite=old.num_nonfinite + jnp.int32(counts[1]),
        num_free=jnp.zeros_like(old.num_free),
        is_over=jnp.zeros_like(old.is_over),
    )
    return runs._replace(state=state, tally=tally)


def _note(runs: base.Run) -> base.Steps:
    """Where the run stands, as a step of its curve."""
    tally = runs.tally
    return base.Steps(tally.layer_calls[None], tally.pool.loss[None, :, 0], jnp.ones((1, 1), bool))


def _make_lesson(problem: Problem, train: Batch) -> Problem:
    """The same problem on the split that gradients are taken on."""
    if problem.mesh is not None:
        raise ValueError(
            f"expected a problem on one device, got one on a mesh of {problem.mesh.size}"
        )
    return Problem(problem.bank, train, problem.max_layers, problem.loss_fn)


def _count(chain: Int[np.ndarray, "L"]) -> int:
    """Layers of a chain: all tokens but the head."""
    return int((chain != PADDING).sum()) - 1


def _price(problem: Problem, train: Batch, num_layers: Any, num_steps: int = 1) -> int:
    return tune.training_cost(num_layers, train.y.shape[0], problem.data.y.shape[0], num_steps)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} of at least 1, got {size}")


@contextlib.contextmanager
def _beside(reserved: int, budget: int) -> Iterator[None]:
    """Of a budget of which so much is for gradient steps."""
    try:
        yield
    except base.BudgetError as error:
        raise base.BudgetError(
            error.cost, budget, f" beside {reserved:,} of gradient steps"
        ) from None


def _check_budget(budget: int, reserved: int) -> None:
    if budget <= reserved:
        raise ValueError(
            f"expected a budget of more than the {reserved:,} layer calls of gradient steps, got {budget:,}"
        )
