import jax.numpy as jnp
import numpy as np

import jchain as jc
from jchain.engine import prefix_rules

COSTS = np.array([1.0, 2.0, 4.0, 8.0, 0.5, 0.25], np.float32)


def test_costs_before_each_token(problem):
    chain = jnp.array([2, 0, 4, -1])
    limited = jc.Problem(problem.bank, problem.data, 3, token_costs=COSTS, max_cost=9.0)
    assert prefix_rules.prefix_costs(limited, chain).tolist() == [0, 4, 5, 5.5]
    assert prefix_rules.prefix_costs(problem, chain).tolist() == [0, 0, 0, 0]


def test_tokens_step_by_step_are_those_of_the_prefix(problem):
    limited = jc.Problem(problem.bank, problem.data, 3, token_costs=COSTS, max_cost=5.5)
    prefix, cost = np.full(4, -1), jnp.zeros(())
    for length, token in enumerate([0, 1, 4]):
        found = prefix_rules.legal_actions(limited, jnp.array(length), cost, None)
        expected = jc.env.legal_actions(limited, jnp.asarray(prefix))
        np.testing.assert_array_equal(found, expected)
        prefix[length] = token
        cost = prefix_rules.add_cost(limited, cost, jnp.array(token))
