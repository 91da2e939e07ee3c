"""The values of options that name classes."""

from collections.abc import Callable
from dataclasses import replace

import jchain as jc
from jchain.cli.config import SearchConfig, require
from jchain.search.moves import read_kinds

BANKS = ("independent", "routed", "snapshots", "random")
# The default number of channels of convolutions.
CHANNELS = 16
LAYERS = {
    "residual": jc.layers.ResidualMLP,
    "dense": jc.layers.Dense,
    "invertible-dense": jc.layers.InvertibleDense,
    "invertible-coupling": jc.layers.AdditiveCoupling,
    "invertible-residual": jc.layers.InvertibleResidual,
}
ENCODINGS = {"tokens": jc.TokenEncoding, "weights": jc.WeightEncoding}
SEARCHES: dict[str, Callable[[], jc.Search]] = {
    "actor-critic": jc.ActorCritic,
    "beam": jc.BeamSearch,
    "critic": jc.CriticSearch,
    "evolution": jc.Evolution,
    "linearized": jc.LinearizedSearch,
    "local": jc.LocalSearch,
    "mcts": jc.MCTS,
    "suffix-beam": jc.SuffixBeamSearch,
    "q-learning": jc.QLearning,
    "random": jc.RandomSearch,
    "removal": jc.RemovalSearch,
    "target-propagation": jc.TargetPropagation,
}
UPDATES: dict[str, Callable[[], jc.updates.UpdatePolicy]] = {
    "frozen": jc.updates.Frozen,
    "tune-found": jc.updates.TuneFound,
    "clone-then-tune": jc.updates.CloneThenTune,
    "shared-updates": jc.updates.SharedUpdates,
}


def make_search(config: SearchConfig) -> jc.Search:
    """Make the search that the configuration names.

    Args:
      config: the resolved configuration.
    """
    search = SEARCHES[require(config.search)]()
    if config.search == "actor-critic":
        search = jc.ActorCritic(encoding=ENCODINGS[config.encoding or "tokens"]())
    if config.moves is not None and isinstance(search, jc.LocalSearch | jc.Evolution):
        search = replace(search, moves=read_kinds(config.moves))
    if config.fractions is None:
        return search
    return jc.Staged(search, tuple(config.fractions))
