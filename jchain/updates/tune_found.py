"""The policy that tunes the best chain that the search found."""

import jax
import numpy as np
import optax

from jchain.arguments import check_at_least_one, check_instances, checked
from jchain.engine.evaluation import evaluate
from jchain.pytree import pytree_dataclass, static
from jchain.runs import driver
from jchain.runs.front import Front
from jchain.runs.interruption import Interruption
from jchain.runs.result import Curve
from jchain.train import OPTIMIZER
from jchain.updates import tune
from jchain.updates.policies import (
    Outcome,
    RunArguments,
    UpdatePolicy,
    check_budget,
    check_search_budget,
    count_chain_layers,
    make_training_problem,
    mention_reserved_calls,
    reserve_for_tuning,
    tuning_cost,
)


@pytree_dataclass
class TuneFound(UpdatePolicy):
    """A policy that searches, then tunes the layers and the head of the best chain in place.

    If the gradient steps do not lower the chain's loss on the problem's split, or the search was
    stopped, the bank is returned unchanged. Otherwise, the chain is the only finalist, because
    the losses of other chains that share its layers have changed too.

    Attributes:
      num_steps: number of gradient steps.
      optimizer: the optax optimizer; AdamW by default.
    """

    num_steps: int = static(default=100)
    optimizer: optax.GradientTransformation = static(default=OPTIMIZER)

    def __post_init__(self) -> None:
        check_instances(optax.GradientTransformation, "optax.adam(1e-3)", optimizer=self.optimizer)
        check_at_least_one(num_steps=self.num_steps)

    @checked
    def check(self, args: RunArguments) -> None:
        reserved = self._reserve(args)
        with mention_reserved_calls(reserved, args.budget):
            check_search_budget(args, jax.random.split(args.key)[0], args.budget - reserved)

    def _reserve(self, args: RunArguments) -> int:
        """Return the layer calls that are kept for gradient steps."""
        reserved = reserve_for_tuning(args.problem, args.train, self.num_steps)
        check_budget(args.budget, reserved)
        return reserved

    @checked
    def apply(self, args: RunArguments) -> Outcome:
        problem, train = args.problem, args.train
        training = make_training_problem(problem, train)
        reserved = self._reserve(args)
        search_key, tune_key = jax.random.split(args.key)
        with mention_reserved_calls(reserved, args.budget):
            result = driver.run(
                search_key,
                args.search,
                problem,
                budget=args.budget - reserved,
                num_finalists=args.num_finalists,
                progress=args.progress,
                starts=args.starts,
                checkpoint_dir=args.saving.checkpoint_dir,
                save_every=args.saving.save_every,
                max_seconds=args.saving.max_seconds,
            )
        if not np.isfinite(result.best_loss) or result.stopped_by is not None:
            return Outcome(problem.bank, result, 0)
        chain = result.best_chain
        with Interruption() as interruption:
            bank = tune.tune_chain(
                tune_key, training, chain, num_steps=self.num_steps, optimizer=self.optimizer
            )
            loss = float(evaluate(problem.with_bank(bank), chain[None]).loss[0])
        length = count_chain_layers(chain)
        update_calls = tuning_cost(problem, train, length, self.num_steps)
        layer_calls = result.layer_calls + update_calls + length
        curve = Curve(
            np.append(result.curve.layer_calls, layer_calls),
            np.append(result.curve.best_loss, min(loss, result.best_loss)),
        )
        result = result._replace(
            layer_calls=layer_calls,
            curve=curve,
            num_scored=result.num_scored + 1,
            stopped_by=interruption.name,
        )
        if loss >= result.best_loss:
            return Outcome(problem.bank, result, update_calls)
        # The losses of other chains are those of the old weights.
        losses, costs = (np.array([own], np.float32) for own in (loss, result.best_cost))
        result = result._replace(
            best_loss=loss,
            finalists=chain[None],
            finalist_losses=losses,
            finalist_costs=costs,
            front=Front(chain[None], costs, losses),
        )
        return Outcome(bank, result, update_calls)
