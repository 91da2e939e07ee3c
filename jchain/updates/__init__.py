"""Policies that update the weights of a bank during a search, and gradient steps on one chain."""

from jchain.updates import tune
from jchain.updates.clone_then_tune import CloneThenTune
from jchain.updates.frozen import Frozen
from jchain.updates.policies import Outcome, RunArguments, UpdatePolicy
from jchain.updates.shared_updates import SharedUpdates
from jchain.updates.tune_found import TuneFound

__all__ = [
    "CloneThenTune",
    "Frozen",
    "Outcome",
    "RunArguments",
    "SharedUpdates",
    "TuneFound",
    "UpdatePolicy",
    "tune",
]
