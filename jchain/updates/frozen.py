"""The policy that never updates weights."""

from jchain.pytree import pytree_dataclass
from jchain.runs import driver
from jchain.updates.policies import Outcome, RunArguments, UpdatePolicy


@pytree_dataclass
class Frozen(UpdatePolicy):
    """A policy that never updates weights: it returns exactly the bank that it was given."""

    def apply(self, args: RunArguments) -> Outcome:
        result = driver.run(
            args.key,
            args.search,
            args.problem,
            budget=args.budget,
            num_finalists=args.num_finalists,
            progress=args.progress,
            starts=args.starts,
        )
        return Outcome(args.problem.bank, result, 0)
