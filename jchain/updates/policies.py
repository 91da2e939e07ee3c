"""The interface of all update policies and the functions that they share.

A policy decides when the weights of a bank are updated during a search. `Frozen` never updates
them. `TuneFound` tunes the chain that the search found. `CloneThenTune` tunes copies of layers,
which join the bank between rounds of the search. `SharedUpdates` trains the sampled chains during
the search, as ENAS does (Pham et al. 2018, arXiv:1802.03268).

The search scores chains on the split of the problem, and gradients are taken on `train`. Both are
charged in layer calls on the problem's split (see `jchain.updates.tune.training_cost`).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Int, Key, PyTree
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.chain import PADDING, ChainsLike
from jchain.data import Batch
from jchain.modules.activations import count_examples
from jchain.problem import Problem
from jchain.runs import driver
from jchain.runs.processes import is_shared
from jchain.runs.result import BudgetError, Result, RunState, StopRule
from jchain.runs.starts import list_starts
from jchain.runs.stepping import RunSpec
from jchain.search.pool import Pool
from jchain.search.protocol import Search
from jchain.updates import tune
from jchain.updates.saving import Checkpoints, Saving


class Outcome(NamedTuple):
    """The result of a search and the bank that its chains belong to."""

    bank: Bank  # with the weights that gave the losses of `result`
    result: Result  # its layer calls include the cost of gradient steps
    update_calls: int  # the cost of gradient steps, in layer calls


class RunArguments(NamedTuple):
    """The arguments of `UpdatePolicy.run`, packed for `UpdatePolicy.apply`."""

    key: Key[Array, ""]
    search: Search
    problem: Problem
    train: Batch
    budget: int
    num_finalists: int
    progress: bool
    starts: Int[np.ndarray, "C L"]
    saving: Saving = Saving()


class UpdatePolicy:
    """The base class of update policies, which are frozen dataclasses that define `apply`."""

    @checked
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
        starts: ChainsLike | Literal["parents"] | None = "parents",
        checkpoint_dir: str | os.PathLike[str] | None = None,
        save_every: float = 30.0,
        max_seconds: float | None = None,
    ) -> Outcome:
        """Search and update weights until the budget is used up.

        Ctrl-C and SIGTERM stop the run after the steps that the device is taking, or after the
        gradient steps of a round, and the outcome so far is returned (`Result.stopped_by`). That of
        `SharedUpdates` has no chain before the last part of its budget.

        Args:
          key: the PRNG key; consumed by this call.
          search: the search and its hyperparameters.
          problem: the problem to solve.
          train: the split that gradients are taken on.
          budget: number of layer calls on the problem's split that the search and the gradient
            steps may cost together; never exceeded.
          num_finalists: number of finalists to keep; see `jchain.run`.
          progress: whether to show a progress line; see `jchain.run`.
          starts: chains to score before the first step; see `jchain.run`. Where weights change
            during the search, a start may not stay as good as it was.
          checkpoint_dir: the folder to save the run to, from which the same call continues to the
            same bits; see `jchain.run`. A run with another budget is another run, except for
            `Frozen`. None to save nothing.
          save_every: the seconds between two checkpoints.
          max_seconds: the seconds of this call after which the run stops, up to a few steps or the
            gradient steps of a round; None for no limit.

        Returns:
          The result, the bank with its final weights, and the cost of the gradient steps.

        Raises:
          BudgetError: if the budget is smaller than the cost of one step of the search.
          ValueError: if `train` does not fit the bank, the budget leaves no layer calls for the
            search, the folder holds something else, or another argument is invalid; see
            `jchain.run`.
        """
        driver.check_saving(save_every, max_seconds)
        if checkpoint_dir is not None and is_shared(problem):
            raise ValueError("expected checkpoint_dir=None with a mesh of several processes")
        rows = list_starts(problem, starts)
        saving = Saving(checkpoint_dir, save_every, max_seconds)
        return self.apply(
            RunArguments(key, search, problem, train, budget, num_finalists, progress, rows, saving)
        )

    @checked
    def check_budget(
        self,
        key: Key[Array, ""],
        search: Search,
        problem: Problem,
        train: Batch,
        *,
        budget: int,
        num_finalists: int = 16,
        starts: ChainsLike | Literal["parents"] | None = "parents",
    ) -> None:
        """Check that a budget pays for the first step of `run`.

        The bank may have any weights, so this can be checked before it is trained.

        Args:
          key: the PRNG key that `run` will be given.
          search: the search and its hyperparameters.
          problem: the problem to solve.
          train: the split that gradients are taken on.
          budget: as for `run`.
          num_finalists: as for `run`.
          starts: as for `run`.

        Raises:
          ValueError: as for `run`.
        """
        rows = list_starts(problem, starts)
        self.check(RunArguments(key, search, problem, train, budget, num_finalists, False, rows))

    @checked
    def check(self, args: RunArguments) -> None:
        """Check the budget; `check_budget` calls this method.

        Args:
          args: the arguments of `check_budget`, under the same names.
        """
        check_search_budget(args, args.key, args.budget)

    @checked
    def apply(self, args: RunArguments) -> Outcome:
        """Search and update weights; `run` calls this method, which each policy defines.

        Args:
          args: the arguments of `run`, under the same names.
        """
        raise NotImplementedError


def open_checkpoints(policy: UpdatePolicy, args: RunArguments) -> Checkpoints:
    """Make the context manager that saves the run of a policy.

    Args:
      policy: the policy.
      args: the arguments of its run.
    """
    stop = StopRule(np.int32(args.budget), np.float32(-np.inf))
    spec = RunSpec(args.key[None], args.search, args.problem, args.starts, args.num_finalists, stop)
    train = {f"{i}": leaf for i, leaf in enumerate(jax.tree.leaves(args.train))}
    details = {"policy": policy, "budget": int(args.budget), "train": train}
    return Checkpoints(args.saving, spec, details)


def check_search_budget(args: RunArguments, key: Key[Array, ""], budget: int) -> None:
    """Check that a budget pays for the first step of a search without updates.

    Args:
      args: the arguments of the policy.
      key: the PRNG key of the search.
      budget: number of layer calls that the search may cost.
    """
    driver.check_budget(
        key,
        args.search,
        args.problem,
        budget=budget,
        num_finalists=args.num_finalists,
        starts=args.starts,
    )


def make_training_problem(problem: Problem, train: Batch) -> Problem:
    """Make the problem on the split that gradients are taken on.

    Args:
      problem: the problem of the search.
      train: the split to train on.

    Raises:
      ValueError: if the problem is on a mesh of devices, or `train` does not fit the bank.
    """
    if problem.mesh is not None:
        raise ValueError(
            f"expected a problem on one device, got one on a mesh of {problem.mesh.size}"
        )
    return Problem(problem.bank, train, problem.max_layers, loss_fn=problem.loss_fn)


def tuning_cost(
    problem: Problem, train: Batch, num_layers: int | Int[np.ndarray, "*U"], num_steps: int = 1
) -> int:
    """Compute the cost of gradient steps, in layer calls on the problem's split.

    Args:
      problem: the problem of the search.
      train: the split to train on.
      num_layers: number of layers of the chain, or of each of several chains.
      num_steps: number of gradient steps on each chain.
    """
    return tune.training_cost(num_layers, count_examples(train.x), problem.num_examples, num_steps)


def reserve_for_tuning(problem: Problem, train: Batch, num_steps: int) -> int:
    """Return the maximum cost, in layer calls, of tuning one chain and scoring it again.

    Args:
      problem: the problem of the search.
      train: the split to train on.
      num_steps: number of gradient steps.
    """
    return tuning_cost(problem, train, problem.max_layers, num_steps) + problem.max_layers


def count_chain_layers(chain: Int[np.ndarray, "L"]) -> int:
    """Count the layers of a chain, which are all its tokens except the head.

    Args:
      chain: the tokens of one chain, `[L]`.
    """
    return int((chain != PADDING).sum()) - 1


def check_budget(budget: int, reserved: int) -> None:
    """Check that a budget leaves layer calls for the search.

    Args:
      budget: total number of layer calls.
      reserved: number of layer calls that are reserved for gradient steps.

    Raises:
      ValueError: if the reserved calls use up the budget.
    """
    if budget <= reserved:
        raise ValueError(
            f"expected a budget of more than the {reserved:,} layer calls of gradient steps, "
            f"got {budget:,}"
        )


@contextlib.contextmanager
def mention_reserved_calls(reserved: int, budget: int) -> Iterator[None]:
    """Re-raise a `BudgetError` so that it mentions the calls reserved for gradient steps.

    Args:
      reserved: number of layer calls that are reserved for gradient steps.
      budget: total number of layer calls.
    """
    try:
        yield
    except BudgetError as error:
        purpose = "gradient steps and the starts" if error.reserved else "gradient steps"
        raise BudgetError(error.cost, budget, reserved + error.reserved, purpose) from None


def resume_run(
    runs: RunState,
    state: PyTree,
    pool: Pool,
    layer_calls: int,
    num_scored: int = 0,
    num_nonfinite: int = 0,
) -> RunState:
    """Return a run that continues from another state and pool.

    Args:
      runs: the state of a single run, whose leaves have a leading axis of size 1.
      state: the new state of the search.
      pool: the best chains so far.
      layer_calls: number of layer calls to add to the run's total.
      num_scored: number of chains that were scored outside of the run.
      num_nonfinite: number of those chains whose loss is not finite.
    """
    state, pool = jax.tree.map(lambda leaf: leaf[None], (state, pool))
    old = runs.stats
    stats = old._replace(
        pool=pool,
        layer_calls=old.layer_calls + jnp.int32(layer_calls),
        num_scored=old.num_scored + jnp.int32(num_scored),
        num_nonfinite=old.num_nonfinite + jnp.int32(num_nonfinite),
        num_free=jnp.zeros_like(old.num_free),
        is_over=jnp.zeros_like(old.is_over),
    )
    return runs._replace(state=state, stats=stats)


@jax.jit
def init_search(search: Search, key: Array, problem: Problem) -> PyTree:
    """Return the first state of a search, compiled once for all problems of the same shapes.

    Args:
      search: the search to start.
      key: the PRNG key; consumed by this call.
      problem: the problem to solve, without names (see `Problem.without_names`).
    """
    return search.init(key, problem)
