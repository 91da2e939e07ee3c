"""jchain: search over chains of detached (frozen) layers.

`import jchain` stays light: rlax, matplotlib and the like are imported by the function that needs them.
"""

from jchain import (
    align,
    chain,
    chainbench,
    data,
    distributed,
    encoding,
    env,
    features,
    gradient,
    hub,
    ideal,
    inverse,
    layer_report,
    layers,
    lookup,
    pretrain,
    rewards,
    stats,
    train,
    trends,
    tune,
    updates,
)
from jchain.backend import compiler_options
from jchain.bank import Bank
from jchain.critic import Critic
from jchain.data import Batch, Dataset
from jchain.encoding import JointEncoding, ObservedEncoding, TokenEncoding, WeightEncoding
from jchain.engine import Blocks, Share, Walk
from jchain.evaluate import Evaluation, Explanation, apply_chain, evaluate, evaluate_all, evaluate_prefixes, explain
from jchain.gradient import swap_scores
from jchain.groups import LayerGroup
from jchain.inverse import pull_back
from jchain.kernels import Fused
from jchain.meet import meet_in_the_middle
from jchain.pretrain import pretrain_controller
from jchain.problem import Problem
from jchain.search.actor_critic import ActorCritic
from jchain.search.base import Curve, Info, Result, Search, run, run_many
from jchain.search.beam_search import BeamSearch
from jchain.search.critic_search import CriticSearch
from jchain.search.evolution import Evolution
from jchain.search.linearized import LinearizedSearch
from jchain.search.local_search import LocalSearch
from jchain.search.mcts import MCTS
from jchain.search.meet_in_the_middle import MeetInTheMiddle
from jchain.search.q_learning import QLearning
from jchain.search.random_search import RandomSearch
from jchain.search.target_propagation import TargetPropagation

__version__ = "0.1.0"

__all__ = [
    "MCTS",
    "ActorCritic",
    "Bank",
    "Batch",
    "BeamSearch",
    "Blocks",
    "Critic",
    "CriticSearch",
    "Curve",
    "Dataset",
    "Evaluation",
    "Evolution",
    "Explanation",
    "Fused",
    "Info",
    "JointEncoding",
    "LayerGroup",
    "LinearizedSearch",
    "LocalSearch",
    "MeetInTheMiddle",
    "ObservedEncoding",
    "Problem",
    "QLearning",
    "RandomSearch",
    "Result",
    "Search",
    "Share",
    "TargetPropagation",
    "TokenEncoding",
    "Walk",
    "WeightEncoding",
    "align",
    "apply_chain",
    "chain",
    "chainbench",
    "compiler_options",
    "data",
    "distributed",
    "encoding",
    "env",
    "evaluate",
    "evaluate_all",
    "evaluate_prefixes",
    "explain",
    "features",
    "gradient",
    "hub",
    "ideal",
    "inverse",
    "layer_report",
    "layers",
    "lookup",
    "meet_in_the_middle",
    "pretrain",
    "pretrain_controller",
    "pull_back",
    "rewards",
    "run",
    "run_many",
    "stats",
    "swap_scores",
    "train",
    "trends",
    "tune",
    "updates",
]
