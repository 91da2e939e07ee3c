"""Losses that read the outputs of a head in parts, so that the outputs are never kept.

A head of a large vocabulary makes more numbers than all layers together: for SmolLM2-135M, the
logits of 8 sequences of 128 tokens take 201 MB. A `TokenLoss` says how a loss follows from the
logits of each token, a part of the vocabulary at a time; `score_tokens` computes it and its
gradient. `find_token_loss` finds the one of a loss function.
"""

from jchain.losses.checks import check_split
from jchain.losses.folding import PartSizes, compute_at_once, score_tokens
from jchain.losses.labels import TokenLabels
from jchain.losses.scoring import (
    find_token_losses,
    has_default_accuracy,
    score_output_map,
    score_outputs,
)
from jchain.losses.softmax import CrossEntropy, IsLargest
from jchain.losses.token_loss import (
    ReadTokens,
    TokenLoss,
    computed_by,
    count_tokens,
    find_token_loss,
)

__all__ = [
    "CrossEntropy",
    "IsLargest",
    "PartSizes",
    "ReadTokens",
    "TokenLabels",
    "TokenLoss",
    "check_split",
    "compute_at_once",
    "computed_by",
    "count_tokens",
    "find_token_loss",
    "find_token_losses",
    "has_default_accuracy",
    "score_output_map",
    "score_outputs",
    "score_tokens",
]
