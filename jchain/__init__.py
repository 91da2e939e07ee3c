"""jchain: search over chains of detached (frozen) layers."""
from jchain import chain, data, layers, train, encoding, env
from jchain.bank import Bank
from jchain.evaluate import Evaluation, apply_chain, evaluate, evaluate_all
from jchain.problem import Problem
from jchain.search.base import Info, Result, run
from jchain.search.actor_critic import ActorCritic
from jchain.search.random_search import RandomSearch
