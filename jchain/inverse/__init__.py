"""Methods that work backward from outputs: pullbacks, target scores, and recovery of chains."""

from jchain.inverse import target_scores
from jchain.inverse.pullback import (
    PullBack,
    condition_numbers,
    invert_layers,
    pull_back,
    reach_target,
    target_logits,
    target_outputs,
)
from jchain.inverse.recover_chain import RecoveredChains, meet_in_the_middle

__all__ = [
    "PullBack",
    "RecoveredChains",
    "condition_numbers",
    "invert_layers",
    "meet_in_the_middle",
    "pull_back",
    "reach_target",
    "target_logits",
    "target_outputs",
    "target_scores",
]
