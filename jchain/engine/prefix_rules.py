"""What decides which tokens may follow a prefix, for code that builds chains token by token.

Such code carries the length, the cost, and the stage of its prefix. `jchain.env.legal_actions`
derives them from the prefix itself.
"""

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int
from jchain.problem import Problem
from jchain.stages.legal_chains import cheapest_rest, find_open
from jchain.stages.table import StageTable


def legal_actions(
    problem: Problem,
    length: Int[Array, ""],
    cost: Float[Array, ""],
    stage: Int[Array, ""] | None,
) -> Bool[Array, "E"]:
    """Return the mask `[N + K]` of tokens that may follow a prefix; see `env.legal_actions`.

    Args:
      problem: the problem, which defines the tokens and the allowed chains.
      length: number of layers in the prefix.
      cost: cost of the prefix; ignored if the problem has no `max_cost`.
      stage: the stage that the prefix has reached; None without stages.
    """
    if (stages := problem.space.stages) is not None:
        assert stage is not None  # from `first_stage`, `next_stage`, or `prefix_stages`
        return _legal_actions_in_stages(problem, stages, length, cost, stage)
    num_layers = problem.bank.num_layers
    tokens = jnp.arange(num_layers + problem.bank.num_heads)
    is_legal = jnp.where(
        tokens < num_layers, length < problem.max_layers, length >= problem.min_layers
    )
    if problem.max_cost is None:
        return is_legal
    layers, heads = problem.token_costs[:num_layers], problem.token_costs[num_layers:]
    num_missing = jnp.maximum(problem.min_layers - length - 1, 0)
    rest = jnp.where(tokens < num_layers, num_missing * layers.min() + heads.min(), 0.0)
    total = jnp.where(is_legal, cost + problem.token_costs + rest, jnp.inf)
    return is_legal & (~problem.exceeds_limit(total) | (total == total.min()))


def _legal_actions_in_stages(
    problem: Problem, stages: StageTable, length: Array, cost: Array, stage: Array
) -> Bool[Array, "E"]:
    num_layers = problem.bank.num_layers
    reads, writes = jnp.asarray(stages.reads), jnp.asarray(stages.writes)
    is_layer = jnp.arange(reads.size) < num_layers
    is_read = stages.fits(reads, stage) & (is_layer | (length >= problem.min_layers))
    after = jnp.minimum(length + 1, problem.max_layers + 1)
    is_open = jnp.asarray(find_open(stages, problem.min_layers, problem.max_layers))
    is_legal = is_read & (~is_layer | is_open[after, writes])
    if problem.max_cost is not None:
        costs = cheapest_rest(stages, problem.min_layers, problem.max_layers, problem.token_costs)
        rest = jnp.where(is_layer, costs[after, writes], 0.0)
        total = jnp.where(is_legal, cost + problem.token_costs + rest, jnp.inf)
        is_legal &= ~problem.exceeds_limit(total) | (total == total.min())
    # A prefix that cannot be completed has no legal token, so allow every token there.
    return is_legal | ~is_legal.any()


def first_stage(problem: Problem) -> Int[Array, ""] | None:
    """Return the stage of the empty prefix, which is 0; None if there are no stages.

    Args:
      problem: the problem, whose space may have stages.
    """
    return None if problem.space.stages is None else jnp.zeros((), jnp.int32)


def next_stage(
    problem: Problem, stage: Int[Array, ""] | None, token: Int[Array, ""]
) -> Int[Array, ""] | None:
    """Return the stage that a prefix has reached after one more token.

    Args:
      problem: the problem, whose space may have stages.
      stage: the stage before the token; None if there are no stages.
      token: the token. A head or padding leaves the stage unchanged.
    """
    if (stages := problem.space.stages) is None or stage is None:
        return None
    is_layer = (token >= 0) & (token < problem.bank.num_layers)
    written = jnp.asarray(stages.writes, jnp.int32)[jnp.maximum(token, 0)]
    return jnp.where(is_layer, written, stage)


def prefix_stages(problem: Problem, chain: Int[Array, "L"]) -> Int[Array, "L"] | None:
    """Return the stage before each token of a chain; None if there are no stages.

    Args:
      problem: the problem, whose space may have stages.
      chain: int32 `[L]`; the tokens of the chain. Entries after the head are undefined.
    """
    stages = problem.space.stages
    return None if stages is None else stages.follow(chain)


def prefix_costs(problem: Problem, chain: Int[Array, "L"]) -> Float[Array, "L"]:
    """Compute the cost of the prefix before each token of a chain, in the unit of `token_costs`.

    Costs are added one by one, so that a sampler that adds costs gets the same bits.

    Args:
      problem: the problem, which gives the costs; all costs are 0 if it has no `max_cost`.
      chain: int32 `[L]`; the tokens of the chain.
    """
    if problem.max_cost is None:
        return jnp.zeros(chain.shape[0], jnp.float32)

    def add(cost: Array, token: Array) -> tuple[Array, Array]:
        return add_cost(problem, cost, token), cost

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chain)[1]


def add_cost(problem: Problem, cost: Float[Array, ""], token: Int[Array, ""]) -> Float[Array, ""]:
    """Add the cost of a token to that of a prefix. Without a `max_cost`, the cost stays 0.

    Args:
      problem: the problem, which gives the costs.
      cost: the cost of the prefix.
      token: the token that extends the prefix; -1 costs nothing.
    """
    if problem.max_cost is None:
        return cost
    return cost + jnp.where(token >= 0, problem.token_costs[jnp.maximum(token, 0)], 0.0)
