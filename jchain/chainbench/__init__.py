"""ChainBench: solved problems, and statistics that compare searches on them."""

from jchain.chainbench import stats, tabular
from jchain.chainbench.problems import (
    DATA,
    KINDS,
    MAX_LAYERS,
    NAMES,
    NUM_LAYERS,
    NUM_SEEDS,
    SolvedProblem,
    build,
    describe,
    find_local_optima,
    load,
    make_bank,
)

__all__ = [
    "DATA",
    "KINDS",
    "MAX_LAYERS",
    "NAMES",
    "NUM_LAYERS",
    "NUM_SEEDS",
    "SolvedProblem",
    "build",
    "describe",
    "find_local_optima",
    "load",
    "make_bank",
    "stats",
    "tabular",
]
