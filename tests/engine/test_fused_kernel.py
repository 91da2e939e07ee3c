import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import make_bank, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tile=st.sampled_from([4, 128]),
    block_size=st.sampled_from([3, 64]),
    dtype=st.sampled_from([None, jnp.bfloat16]),
)
@pytest.mark.parametrize("layer", [jc.layers.ResidualMLP(5, hidden=7), jc.layers.Dense(5)])
def test_the_fused_kernel_matches_a_float64_loop(layer, seed, tile, block_size, dtype):
    problem = jc.Problem(
        make_bank(4, 2, seed=seed, layer=layer), make_batch(seed=seed), 3, layer_cost=0.1
    )
    every = jc.chain.ChainSpace(4, 2, 3).enumerate()
    chains = every[np.random.default_rng(seed).integers(0, len(every), 10)]
    out = jc.evaluate(problem, chains, plan=jc.engine.Fused(tile, block_size), dtype=dtype)
    expected = np.array([reference.chain_loss(problem, chain) for chain in chains])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.05, "atol": 0.1}
    np.testing.assert_allclose(out.loss, expected[:, 0], **tolerance)
    if dtype is None:
        np.testing.assert_allclose(out.accuracy, expected[:, 1], atol=1e-6)
    assert (out.layer_calls, out.head_calls) == reference.count_calls(chains, 4)


def test_fused_kernel_handles_tokens_out_of_order():
    bank = make_bank(4, 2).take([3, 0, 2, 1], [5, 4])
    problem = jc.Problem(bank, make_batch(), 2)
    chains, out = jc.evaluate_all(problem)
    fused = jc.evaluate(problem, chains, plan=jc.engine.Fused(tile=4))
    np.testing.assert_allclose(fused.loss, out.loss, rtol=1e-5)


def test_fused_kernel_is_never_the_default(problem):
    for num in (1, 64):
        chains = jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(0), num)
        assert not isinstance(jc.explain_plan(problem, chains).plan, jc.engine.Fused)
    assert jc.explain_plan(problem, chains, plan=jc.engine.Fused()).num_bytes == 2 * 64 * 9 * 5 * 4


def test_fused_kernel_rejects_unsupported_banks(two_group_problem):
    with pytest.raises(
        ValueError, match=r"expected one group of layers .* got 2 and 1 on \[9, 5\]"
    ):
        jc.evaluate(two_group_problem, [[0, 5, -1, -1]], plan=jc.engine.Fused())
    with pytest.raises(ValueError, match="expected tile to be at least 1, got 0"):
        jc.engine.Fused(tile=0)
