"""Gradient-based predictions of the edits of a chain, and statistics of layer gradients."""

from jchain.gradient import layer_report, trends
from jchain.gradient.edit_scores import (
    EditScores,
    score_edits,
    score_moves,
    swap_scores,
    weight_gradients,
)
from jchain.gradient.joint_moves import JointMoves

__all__ = [
    "EditScores",
    "JointMoves",
    "layer_report",
    "score_edits",
    "score_moves",
    "swap_scores",
    "trends",
    "weight_gradients",
]
