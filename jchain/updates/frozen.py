"""The policy that never updates weights."""

from jchain.arguments import checked
from jchain.pytree import pytree_dataclass
from jchain.runs import driver
from jchain.updates.policies import Outcome, RunArguments, UpdatePolicy


@pytree_dataclass
class Frozen(UpdatePolicy):
    """A policy that never updates weights: it returns exactly the bank that it was given."""

    @checked
    def apply(self, args: RunArguments) -> Outcome:
        result = driver.run(
            args.key,
            args.search,
            args.problem,
            budget=args.budget,
            num_finalists=args.num_finalists,
            progress=args.progress,
            starts=args.starts,
            checkpoint_dir=args.saving.checkpoint_dir,
            save_every=args.saving.save_every,
            max_seconds=args.saving.max_seconds,
        )
        return Outcome(args.problem.bank, result, 0)
