"""How searches run on a split that is read in parts (`Problem(batch_size=)`).

A search that reads activations sees the first part alone, as it would have to keep activations of
all examples. The driver then scores the chains that it reports on the whole split, so that results
are exact.
"""

import jax.numpy as jnp

from jchain.engine.evaluation import evaluate_filled
from jchain.problem import Problem
from jchain.search.protocol import Info, Search, reads_activations


def get_seen_problem(search: Search, problem: Problem) -> Problem:
    """Return the problem that a search is given: the whole problem, or its first part.

    Args:
      search: the search.
      problem: the problem of the run.
    """
    return problem.first_part() if reads_activations(search) else problem


def rescore(info: Info, problem: Problem) -> Info:
    """Score the chains of a step on the whole split.

    Args:
      info: what the search reported for the first part of the split.
      problem: the problem of the run.

    Returns:
      The same chains with their losses on the whole split, and the cost of both in layer calls on
      the whole split, rounded up.
    """
    is_chain = problem.space.contains(info.chains)
    chains = jnp.where(is_chain[:, None], info.chains, problem.space.head_alone[None])
    out = evaluate_filled(problem, chains.astype(jnp.int32))
    loss = jnp.where(is_chain, out.loss, jnp.inf)
    size = min(problem.batch_size or problem.num_examples, problem.num_examples)
    on_part = jnp.ceil(info.layer_calls * (size / problem.num_examples)).astype(jnp.int32)
    return Info(info.chains, loss.astype(info.loss.dtype), on_part + out.layer_calls)
