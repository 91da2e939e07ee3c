import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import init_params, make_bank, make_batch

import jchain as jc


def make_problem(slope=0.5, max_layers=4, num_layers=4, layer=None, **options):
    bank = make_bank(
        num_layers, 2, layer=layer or jc.layers.InvertibleDense(5, negative_slope=slope)
    )
    return jc.Problem(bank, make_batch(), max_layers, **options)


def test_the_beam_pays_for_probes_by_their_share():
    problem = make_problem()
    search = jc.SuffixBeamSearch(width=3, num_probes=3, num_candidates=2, num_chains=4)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    seen, width = set(), [1, 3, 3, 3]
    for depth in range(4):
        length = int((state.best < 4).sum() - (state.best < 0).sum())
        state, info = step(jax.random.key(depth), state, problem)
        rows = [tuple(int(token) for token in chain if token >= 0) for chain in info.chains]
        # On 3 of 9 examples: the best chain up to its head, and two heads with two layers before
        # each, with one product for each of the three outputs.
        applied = 4 * width[depth] + (length + 2 * 2 * (2 + 3) if depth == 0 else 0)
        expected = reference.count_calls([row for row in rows if row not in seen], 4)[0] + -(
            -applied // 3
        )
        seen.update(rows)
        assert info.layer_calls == expected
    assert int(state.length) == 0


def test_a_beam_needs_invertible_layers(problem):
    with pytest.raises(ValueError, match=r"invertible layers, .* got \['ResidualMLP'\]"):
        jc.SuffixBeamSearch().check(problem)
    with pytest.raises(ValueError, match="invertible layers"):
        jc.SuffixBeamSearch().init(jax.random.key(0), problem)


def test_a_copy_is_found_from_its_outputs():
    """With a chain's outputs as targets, predictions of prefixes with suffixes identify it."""
    layer, head = jc.layers.InvertibleDense(5), jc.layers.DenseHead(5)
    keys = jax.random.split(jax.random.key(3), 7)
    params = [layer.init(key, jnp.ones((1, 5)))["params"] for key in keys[:6]]
    bank = jc.Bank.stack(layer, params, head, init_params(head, keys[6], 1, (5,)))
    x = jax.random.normal(jax.random.key(1), (40, 5))
    secret = np.array([4, 0, 5, 2, 6])
    problem = jc.Problem(
        bank, jc.Batch(x, jc.apply_chain(bank, secret, x)), 4, loss_fn=optax.squared_error
    )
    result = jc.run(
        jax.random.key(0),
        jc.SuffixBeamSearch(max_suffix_layers=2, width=8, num_probes=16),
        problem,
        budget=1500,
    )
    np.testing.assert_array_equal(result.best_chain, secret)
    assert result.best_loss < 1e-8
