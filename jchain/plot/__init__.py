"""Figures of runs, chains, and scores, by matplotlib. Each function takes and returns an `Axes`.

Without `ax`, a function makes a figure of its own, which is not shown: `jc.plot.curve(result)
.figure.savefig("curve.png")`.
"""

from jchain.plot.drawing import chains
from jchain.plot.maps import block_runs, policy, swap_scores
from jchain.plot.runs import curve, front

__all__ = ["block_runs", "chains", "curve", "front", "policy", "swap_scores"]
