"""The interface of all update policies, and what they share.

A policy says when weights of the bank are updated during a search. `Frozen` never updates them.
`TuneFound` tunes the chain that the search found. `CloneThenTune` tunes copies of layers, which
join the bank between rounds of the search. `SharedUpdates` trains the sampled chains during the
search, as ENAS does (Pham et al. 2018, arXiv:1802.03268).

The search scores chains on the split of the problem; gradients are taken on `train`. Both are
charged in layer calls on the problem's split (`jchain.updates.tune.training_cost`).
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, Key, PyTree
from jchain.bank import Bank
from jchain.chain import PADDING
from jchain.data import Batch
from jchain.problem import Problem
from jchain.search import base
from jchain.search.base import Result, Search
from jchain.updates import tune


class Outcome(NamedTuple):
    """What a search found, and the bank that its chains belong to."""

    bank: Bank  # with the weights that the losses of `result` belong to
    result: Result  # its layer calls include those of gradient steps
    update_calls: int  # layer calls of gradient steps


class RunArguments(NamedTuple):
    """The arguments of `UpdatePolicy.run`."""

    key: Key[Array, ""]
    search: Search
    problem: Problem
    train: Batch
    budget: int
    num_finalists: int
    progress: bool


class UpdatePolicy:
    """Base class of the update policies: frozen dataclasses that define `apply`."""

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
        """Search and update weights until the budget is used.

        Args:
          key: consumed.
          search: the search and its hyperparameters.
          problem: what to minimize over.
          train: the split that gradients are taken on.
          budget: layer calls on the problem's split, for the search and the gradient steps
            together; never exceeded.
          num_finalists: as for `jchain.run`.
          progress: as for `jchain.run`.

        Raises:
          ValueError: `train` does not fit the bank, the budget leaves nothing to search with, or as
            for `jchain.run`.
        """
        return self.apply(
            RunArguments(key, search, problem, train, budget, num_finalists, progress)
        )

    def apply(self, args: RunArguments) -> Outcome:
        """Do the work of `run`. A policy of your own defines this method.

        Args:
          args: the arguments of `run`.
        """
        raise NotImplementedError


def make_training_problem(problem: Problem, train: Batch) -> Problem:
    """Return the same problem on the split that gradients are taken on.

    Args:
      problem: the problem of the search.
      train: the split to train on.

    Raises:
      ValueError: the problem lies on a mesh, or `train` does not fit the bank.
    """
    if problem.mesh is not None:
        raise ValueError(
            f"expected a problem on one device, got one on a mesh of {problem.mesh.size}"
        )
    return Problem(problem.bank, train, problem.max_layers, problem.loss_fn)


def tuning_cost(
    problem: Problem, train: Batch, num_layers: int | Int[np.ndarray, "*U"], num_steps: int = 1
) -> int:
    """Return the cost of gradient steps, in layer calls on the problem's split.

    Args:
      problem: the problem of the search.
      train: the split to train on.
      num_layers: layers of the chain, or of each of several chains.
      num_steps: gradient steps on each chain.
    """
    return tune.training_cost(num_layers, train.y.shape[0], problem.data.y.shape[0], num_steps)


def reserve_for_tuning(problem: Problem, train: Batch, num_steps: int) -> int:
    """Return the most layer calls that tuning one chain and scoring it again can cost.

    Args:
      problem: the problem of the search.
      train: the split to train on.
      num_steps: gradient steps.
    """
    return tuning_cost(problem, train, problem.max_layers, num_steps) + problem.max_layers


def count_chain_layers(chain: Int[np.ndarray, "L"]) -> int:
    """Return the number of layers of a chain: all tokens except the head.

    Args:
      chain: tokens, `[L]`.
    """
    return int((chain != PADDING).sum()) - 1


def check_sizes(**sizes: int) -> None:
    """Check that sizes are at least 1.

    Args:
      **sizes: the sizes, by the names that the error message shows.

    Raises:
      ValueError: a size is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} of at least 1, got {size}")


def check_budget(budget: int, reserved: int) -> None:
    """Check that a budget leaves layer calls for the search.

    Args:
      budget: layer calls in total.
      reserved: layer calls reserved for gradient steps.

    Raises:
      ValueError: the reserved calls use up the budget.
    """
    if budget <= reserved:
        raise ValueError(
            f"expected a budget of more than the {reserved:,} layer calls of gradient steps, "
            f"got {budget:,}"
        )


@contextlib.contextmanager
def mention_reserved_calls(reserved: int, budget: int) -> Iterator[None]:
    """Re-raise BudgetError, mentioning the calls reserved for gradient steps.

    Args:
      reserved: layer calls reserved for gradient steps.
      budget: layer calls in total.
    """
    try:
        yield
    except base.BudgetError as error:
        raise base.BudgetError(error.cost, budget, reserved) from None


def resume_run(
    runs: base.RunState,
    state: PyTree,
    pool: base.Pool,
    layer_calls: int,
    num_chains: int = 0,
    num_nonfinite: int = 0,
) -> base.RunState:
    """Return a run that continues from another state and pool.

    Args:
      runs: a single run; leaves have a leading axis of 1.
      state: the state of the search.
      pool: the best chains so far.
      layer_calls: layer calls to add to those of the run.
      num_chains: chains that were scored outside of the run.
      num_nonfinite: those of `num_chains` whose loss is not finite.
    """
    state, pool = jax.tree.map(lambda leaf: leaf[None], (state, pool))
    old = runs.stats
    stats = old._replace(
        pool=pool,
        layer_calls=old.layer_calls + jnp.int32(layer_calls),
        num_chains=old.num_chains + jnp.int32(num_chains),
        num_nonfinite=old.num_nonfinite + jnp.int32(num_nonfinite),
        num_free=jnp.zeros_like(old.num_free),
        is_over=jnp.zeros_like(old.is_over),
    )
    return runs._replace(state=state, stats=stats)


@jax.jit
def init_search(search: Search, key: Array, problem: Problem) -> PyTree:
    """Return the first state of a search; compiled once for all problems of the same shapes.

    Args:
      search: the search.
      key: consumed.
      problem: what to minimize over, without names (`Problem.without_names`).
    """
    return search.init(key, problem)
