"""When bank weights are updated: four policies with one interface, and gradient steps on one chain."""

from jchain.updates import tune
from jchain.updates.policies import CloneThenTune, Frozen, Outcome, Policy, SharedUpdates, TuneFound

__all__ = ["CloneThenTune", "Frozen", "Outcome", "Policy", "SharedUpdates", "TuneFound", "tune"]
