import jax
import numpy as np
import pytest
import reference
from conftest import make_bank, make_batch

import jchain as jc
from jchain.search.descent import allocate_candidates, sample_start


@pytest.mark.slow
def test_a_start_is_the_best_prefix_of_its_random_layers():
    roomy = jc.Problem(make_bank(6, 2), make_batch(), max_layers=5)
    costly = jc.Problem(roomy.bank, roomy.data, 5, layer_cost=0.3)
    long = jc.Problem(roomy.bank, roomy.data, 5, layer_cost=0.3, min_layers=3)
    for problem in (roomy, costly, long):
        for seed in range(4):
            key = jax.random.key(seed)
            chain = np.asarray(sample_start(key, problem))
            layers = [int(token) for token in jax.random.randint(key, (6,), 0, 6)[:5]]
            prefixes = [
                [*layers[:length], 6 + k]
                for length in range(problem.min_layers, 6)
                for k in range(2)
            ]
            best = min(prefixes, key=lambda prefix: reference.chain_loss(problem, prefix)[0])
            assert [int(token) for token in chain if token >= 0] == best


def test_candidates_are_allocated_to_each_group(two_group_problem):
    assert allocate_candidates(two_group_problem, 2) == [1, 1]
    assert allocate_candidates(two_group_problem, 16) == [3, 2]
