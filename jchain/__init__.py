"""jchain: search over chains of frozen layers.

To keep `import jchain` fast, rlax, matplotlib, and the checkpoint reader (`jc.hub`) are imported on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jchain import (
    agent,
    align,
    chain,
    chainbench,
    data,
    engine,
    env,
    gradient,
    images,
    inverse,
    invertible,
    layers,
    plot,
    tasks,
    train,
    updates,
)
from jchain.agent.critic import Critic
from jchain.agent.encoding import JointEncoding, ObservedEncoding, TokenEncoding, WeightEncoding
from jchain.agent.pretrain import pretrain_agent, pretrain_critic
from jchain.bank import Bank
from jchain.data import Batch, Dataset
from jchain.engine.backend import clear_caches
from jchain.engine.costs import Cost, cost, token_costs
from jchain.engine.evaluation import (
    Evaluation,
    Explanation,
    apply_chain,
    evaluate,
    evaluate_all,
    evaluate_prefixes,
    explain_plan,
    pick_best,
    predict,
)
from jchain.engine.successive_halving import StagedEvaluation, evaluate_staged
from jchain.gradient.edit_scores import swap_scores
from jchain.groups import LayerGroup
from jchain.inverse.pullback import pull_back
from jchain.inverse.recover_chain import meet_in_the_middle
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.runs.checking import check_search
from jchain.runs.driver import run, run_many
from jchain.runs.front import Front
from jchain.runs.progress import Progress
from jchain.runs.result import BudgetError, Curve, Result, front
from jchain.runs.scored_chains import ScoredChains
from jchain.search.actor_critic import ActorCritic
from jchain.search.beam_search import BeamSearch
from jchain.search.critic_search import CriticSearch
from jchain.search.evolution import Evolution
from jchain.search.linearized import LinearizedSearch
from jchain.search.local_search import LocalSearch
from jchain.search.mcts import MCTS
from jchain.search.protocol import Info, Search
from jchain.search.q_learning import QLearning
from jchain.search.random_search import RandomSearch
from jchain.search.removal import RemovalSearch
from jchain.search.staged import Staged
from jchain.search.suffix_beam_search import SuffixBeamSearch
from jchain.search.target_propagation import TargetPropagation

if TYPE_CHECKING:
    from jchain import hub

__version__ = "0.2.0.dev0"

__all__ = [
    "MCTS",
    "ActorCritic",
    "Bank",
    "Batch",
    "BeamSearch",
    "BudgetError",
    "Cost",
    "Critic",
    "CriticSearch",
    "Curve",
    "Dataset",
    "Evaluation",
    "Evolution",
    "Explanation",
    "Front",
    "Info",
    "JointEncoding",
    "LayerGroup",
    "LinearizedSearch",
    "LocalSearch",
    "ObservedEncoding",
    "Problem",
    "Progress",
    "QLearning",
    "RandomSearch",
    "RemovalSearch",
    "Result",
    "ScoredChains",
    "Search",
    "Staged",
    "StagedEvaluation",
    "SuffixBeamSearch",
    "TargetPropagation",
    "TokenEncoding",
    "WeightEncoding",
    "agent",
    "align",
    "apply_chain",
    "chain",
    "chainbench",
    "check_search",
    "clear_caches",
    "cost",
    "data",
    "engine",
    "env",
    "evaluate",
    "evaluate_all",
    "evaluate_prefixes",
    "evaluate_staged",
    "explain_plan",
    "front",
    "gradient",
    "hub",
    "images",
    "inverse",
    "invertible",
    "layers",
    "meet_in_the_middle",
    "pick_best",
    "plot",
    "predict",
    "pretrain_agent",
    "pretrain_critic",
    "pull_back",
    "pytree_dataclass",
    "run",
    "run_many",
    "static",
    "swap_scores",
    "tasks",
    "token_costs",
    "train",
    "updates",
]


def __getattr__(name: str) -> object:
    """Import `jc.hub` on first use."""
    if name == "hub":
        return import_module("jchain.hub")
    raise AttributeError(f"module 'jchain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "hub"]
