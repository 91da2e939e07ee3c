"""Checks of what the tokens of a problem cost."""

import jax.numpy as jnp

from jchain._typing import Array, Float
from jchain.arguments import read_numbers
from jchain.pytree import is_concrete
from jchain.stages.legal_chains import cheapest_rest
from jchain.stages.table import StageTable


def read_token_costs(given: object, num_layers: int, num_heads: int) -> Float[Array, "E"]:
    """Read `Problem.token_costs`.

    Args:
      given: the costs, one number for each layer and head.
      num_layers: the number of layers of the bank.
      num_heads: the number of its heads.

    Raises:
      ValueError: if their number is another one, or a cost is negative or not finite.
    """
    costs = read_numbers("token_costs", given)
    num_tokens = num_layers + num_heads
    if costs.shape != (num_tokens,):
        raise ValueError(
            f"expected token_costs of shape [{num_tokens}], one number for each of {num_layers} "
            f"layers and {num_heads} heads, got shape {list(costs.shape)}"
        )
    if is_concrete(costs) and not bool((jnp.isfinite(costs) & (costs >= 0)).all()):
        raise ValueError(
            f"expected token_costs that are finite and at least 0, got {float(costs.min())} to "
            f"{float(costs.max())}"
        )
    return costs


def read_limit(given: object) -> Float[Array, ""]:
    """Read `Problem.max_cost`.

    Args:
      given: the limit of the cost of a chain.

    Raises:
      ValueError: if it is not one number.
    """
    limit = read_numbers("max_cost", given)
    if limit.shape != ():
        raise ValueError(f"expected max_cost to be a scalar, got shape {list(limit.shape)}")
    return limit


def find_cheapest(
    costs: Float[Array, "E"], num_layers: int, stages: StageTable | None, lengths: tuple[int, int]
) -> Float[Array, ""]:
    """Find the lowest cost of a chain.

    Args:
      costs: the costs of the layers and heads.
      num_layers: the number of layers of the bank.
      stages: the stages of the bank, or None.
      lengths: the smallest and the largest number of layers of a chain.
    """
    if stages is None:
        return lengths[0] * costs[:num_layers].min() + costs[num_layers:].min()
    return cheapest_rest(stages, *lengths, costs)[0, 0]
