"""The policy that never updates weights."""

from jchain.pytree import pytree_dataclass
from jchain.search import base
from jchain.updates.policies import Outcome, Policy, RunArguments


@pytree_dataclass
class Frozen(Policy):
    """Never update weights: the bank is returned unchanged, to the bit."""

    def _run(self, args: RunArguments) -> Outcome:
        result = base.run(
            args.key,
            args.search,
            args.problem,
            budget=args.budget,
            num_finalists=args.num_finalists,
            progress=args.progress,
        )
        return Outcome(args.problem.bank, result, 0)
