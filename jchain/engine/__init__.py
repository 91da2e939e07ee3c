"""Evaluation of chains: plans, compiler options, devices, and the score cache.

A loss takes this path: `evaluate` (`evaluate.py`) checks the chains and calls `population.py`,
which sorts them, runs a plan (`plans.py` chooses `blocks.py` or `depth_first.py`), and adds the
layer penalty. The plan applies layers and heads through `layer_calls.py`, and
`Problem.loss_and_accuracy` turns the outputs into losses. `apply_chain` is the simple reference
implementation.
"""

from jchain.engine import distributed, score_cache
from jchain.engine.backend import compiler_options
from jchain.engine.blocks import Blocks, Share
from jchain.engine.depth_first import DepthFirst
from jchain.engine.evaluate import (
    Evaluation,
    Explanation,
    apply_chain,
    evaluate,
    evaluate_all,
    evaluate_prefixes,
    explain,
    predict,
)
from jchain.engine.fused_kernel import Fused
from jchain.engine.plans import choose_plan

__all__ = [
    "Blocks",
    "DepthFirst",
    "Evaluation",
    "Explanation",
    "Fused",
    "Share",
    "apply_chain",
    "choose_plan",
    "compiler_options",
    "distributed",
    "evaluate",
    "evaluate_all",
    "evaluate_prefixes",
    "explain",
    "predict",
    "score_cache",
]
