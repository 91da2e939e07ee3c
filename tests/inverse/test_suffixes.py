import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import make_bank, make_batch

import jchain as jc
from jchain.inverse import suffixes
from jchain.inverse.pullback import invert_layers, target_logits


def make_problem(slope=0.5, max_layers=4, num_layers=4, layer=None, **options):
    bank = make_bank(
        num_layers, 2, layer=layer or jc.layers.InvertibleDense(5, negative_slope=slope)
    )
    return jc.Problem(bank, make_batch(), max_layers, **options)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_suffixes_of_affine_layers_predict_the_exact_loss(num_layers):
    problem = make_problem(slope=1.0, num_layers=3)
    near = jax.random.normal(jax.random.key(4), (9, 5))
    found = suffixes.pull_back_suffixes(
        problem, invert_layers(problem.bank), (jnp.arange(3),), near, num_layers
    )
    rows = [tuple(int(token) for token in row if token >= 0) for row in found.tokens]
    assert len(set(rows)) == len(rows) == 2 * sum(3**n for n in range(num_layers + 1))
    prefix = [2, 0]
    hidden = problem.data.x
    for token in prefix:
        hidden = problem.bank.layers[0].apply(token, hidden)
    wanted = [reference.chain_loss(problem, [*prefix, *row])[0] for row in rows]
    np.testing.assert_allclose(
        suffixes.predict_losses(problem, found, hidden[None])[0], wanted, rtol=1e-3, atol=1e-4
    )


def test_a_suffix_is_linearized_where_it_gives_the_target():
    problem = make_problem()
    near = jax.random.normal(jax.random.key(4), (9, 5))
    found = suffixes.pull_back_suffixes(
        problem, invert_layers(problem.bank), (jnp.array([1, 3]),), near, 1
    )
    for row, outputs, derivative in zip(found.tokens, found.outputs, found.rows, strict=True):
        row = [int(token) for token in row if token >= 0]
        goal = target_logits(problem.data.y, 3)
        entry = jc.pull_back(problem.bank, row, goal, near=near).activations
        np.testing.assert_allclose(
            outputs + jnp.einsum("cbf,bf->bc", derivative, entry), goal, atol=2e-3
        )
