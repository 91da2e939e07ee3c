"""Evaluation of chains: plans, compiler options, devices, and the score cache.

`jc.evaluate` and the other functions that score chains are in `jchain` itself.

A loss takes this path: `evaluate` (`evaluation.py`) checks the chains and calls `population.py`,
which sorts them, runs a plan (`plans.py` chooses `blocks.py` or `depth_first.py`), and adds the
layer penalty. The plan applies layers through `layer_calls.py` and heads through `head_calls.py`,
which turns outputs into losses by `Problem.loss_and_accuracy` or, for large vocabularies, by
`jchain.losses`. `apply_chain` is the simple reference implementation. Inside
`jc.Staged`, `successive_halving.py` calls `population.py` for one part of the examples after the
other.
"""

from jchain.engine import distributed, score_cache
from jchain.engine.backend import compiler_options
from jchain.engine.blocks import Blocks, Share
from jchain.engine.depth_first import DepthFirst
from jchain.engine.fused_kernel import Fused
from jchain.engine.plans import choose_plan

__all__ = [
    "Blocks",
    "DepthFirst",
    "Fused",
    "Share",
    "choose_plan",
    "compiler_options",
    "distributed",
    "score_cache",
]
