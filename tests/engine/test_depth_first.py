import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc


@jax.jit
def plain_loss(problem, chain):
    return problem.loss_and_accuracy(jc.apply_chain(problem.bank, chain, problem.data.x))[0]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    num=st.sampled_from([1, 13]),
)
def test_any_population_matches_apply_chain(problem, seed, num):
    rng = np.random.default_rng(seed)
    tokens = [
        [*rng.integers(0, 4, rng.integers(0, 4)).tolist(), int(rng.integers(4, 6))]
        for _ in range(num)
    ]
    chains = jc.chain.pad(tokens, 3)
    out = jc.evaluate(problem, chains, plan=jc.engine.DepthFirst())
    expected = [plain_loss(problem, chain) for chain in jnp.asarray(chains)]
    np.testing.assert_allclose(out.loss, expected, rtol=2e-6)
    assert (out.layer_calls, out.head_calls) == reference.count_calls(chains, 4)
