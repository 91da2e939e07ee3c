"""Nets of other libraries that were trained, cut into layers, and evaluated as chains."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from trained_nets import CHAIN, MODULES, NETS, TRAIN, X

import jchain as jc

# Loads each saved bank, and writes the outputs of its parent.
LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import trained_nets as nets
import jchain as jc

for name, make in nets.MODULES.items():
    bank = jc.Bank.load(f"{sys.argv[2]}/{name}.bank", modules=make())
    np.save(f"{sys.argv[2]}/{name}.npy", jc.apply_chain(bank, bank.parents[0], nets.X))
"""


@pytest.fixture(scope="module")
def nets():
    """The outputs of each trained net in evaluation mode, and its bank."""
    return {name: train() for name, train in NETS.items()}


@pytest.mark.parametrize("name", NETS)
def test_a_trained_net_equals_its_layers_as_a_chain(nets, name):
    expected, bank = nets[name]
    assert (bank.num_layers, bank.num_heads, bank.parents) == (3, 1, (tuple(CHAIN),))
    found = jc.apply_chain(bank, CHAIN, X)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    problem = jc.Problem(bank, jc.Batch(X, TRAIN.y[: len(X)]), 3)
    loss = problem.loss_and_accuracy(expected)[0]
    out = jc.evaluate(problem, jc.chain.pad([CHAIN], 3))
    np.testing.assert_allclose(out.loss[0], loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_training_and_its_statistics_matter(nets, name):
    """The test above would fail without the training, the statistics, or evaluation mode."""
    expected, bank = nets[name]
    values = jax.tree.leaves(bank.layers[0])
    # The statistics of a new batch normalization are means of 0 and variances of 1.
    for start in (0.0, 1.0):
        assert not any(np.all(leaf == start) for leaf in values if leaf.shape == (3, 8))
    np.testing.assert_array_equal(jc.apply_chain(bank, CHAIN, X), jc.apply_chain(bank, CHAIN, X))
    others = [jc.apply_chain(bank, [*order, 3], X) for order in ([0, 1], [1, 0, 2])]
    assert all(np.abs(other - expected).max() > 0.01 for other in others)


@pytest.mark.slow
def test_trained_nets_are_loaded_in_another_process(nets, tmp_path):
    for name, (_, bank) in nets.items():
        bank.save(tmp_path / f"{name}.bank")
        again = jc.Bank.load(tmp_path / f"{name}.bank", modules=MODULES[name]())
        assert jax.tree.structure(again) == jax.tree.structure(bank)
    folder = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", LOAD, folder, str(tmp_path)], check=True)
    for name, (expected, _) in nets.items():
        found = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
