"""Building blocks of searches that learn: networks, losses, observations, and pretraining."""

from jchain.agent import observations, pretrain, rewards
from jchain.agent.critic import Critic
from jchain.agent.encoding import (
    JointEncoding,
    ObservedEncoding,
    TokenEncoding,
    WeightEncoding,
    entry_features,
)

__all__ = [
    "Critic",
    "JointEncoding",
    "ObservedEncoding",
    "TokenEncoding",
    "WeightEncoding",
    "entry_features",
    "observations",
    "pretrain",
    "rewards",
]
