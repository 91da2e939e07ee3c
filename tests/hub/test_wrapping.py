"""Layers of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc


@pytest.mark.slow
def test_trained_chains_keep_their_choice_of_embeddings(tmp_path):
    """Weight decay changes the choice although its gradient is zero."""
    folders = {f"m{i}": write(tmp_path / f"m{i}", tensors=make_tensors(seed=i)) for i in range(2)}
    bank, ids = jc.hub.load_many([*folders.values()]), jnp.array([[1, 2, 3, 4]])
    chain = np.array(bank.parents[1])
    problem = jc.Problem(bank, jc.Batch(ids, ids), max_layers=len(chain) - 1)
    bank = jc.updates.tune.tune_chain(jax.random.key(0), problem, chain, num_steps=30)
    np.testing.assert_array_equal(bank.get_params(int(chain[0]))["shares"], [1.0])
    assert not np.array_equal(
        bank.get_params(2)["block"]["ln_1"]["weight"],
        make_tensors(seed=1)["transformer.h.0.ln_1.weight"],
    )
    out = jc.hub.export(bank, chain, folders, tmp_path / "out")
    assert "Embeddings of `m1`" in (out / "README.md").read_text()
    again = jc.hub.load(out)
    expected = jc.apply_chain(bank, chain, ids)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array(again.parents[0]), ids), expected, rtol=1e-5, atol=1e-5
    )
