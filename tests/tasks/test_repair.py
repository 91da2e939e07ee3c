import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.tasks import FAULTS, damage, make_repair, repair


def test_repair_splits_are_disjoint_and_have_the_faults():
    task = make_repair(3)
    whole = jc.data.load("digits", 3)
    sizes = [len(getattr(task.data, name).y) for name in jc.data.SPLITS]
    assert sizes == [898 * (1 + len(FAULTS)), 100, 50, 749]
    known = make_repair(3, faults=[])
    digits = [np.asarray(getattr(known.data, name).x) for name in jc.data.SPLITS]
    rows = np.concatenate([digits[0][:898], *digits[1:]])
    assert len(rows) == 1797
    # Each digit is in exactly one split. Some digits of the data set are equal.
    raw = np.asarray(jc.data.LOADERS["digits"]()[0], np.float32) / 16
    assert sorted(map(bytes, rows)) == sorted(map(bytes, raw))
    assert len(whole.train.y) == 898
    faults = task.about.removeprefix("digits that are ").split(", then ")
    assert len(faults) == repair.NUM_FAULTS == len(set(faults))
    images = digits[3].reshape(-1, 8, 8)
    np.testing.assert_array_equal(
        np.asarray(task.data.test.x).reshape(-1, 8, 8), damage(images, faults)
    )
    # Layers may be trained on labeled examples of each single fault.
    first = np.asarray(task.data.train.x).reshape(1 + len(FAULTS), 898, 8, 8)
    for name, block in zip(FAULTS, first[1:], strict=True):
        np.testing.assert_array_equal(block, damage(first[0], [name]))


def test_repair_search_and_select_are_stratified():
    for seed in range(3):
        data = make_repair(seed).data
        assert np.bincount(data.search.y).min() >= 9
        assert np.bincount(data.select.y).min() >= 4


@pytest.mark.slow
def test_repair_bank_has_a_layer_for_each_fault_and_the_net():
    task = make_repair(0, faults=["mirrored", "scrolled"])
    bank = task.make_bank(jax.random.key(0))
    assert bank.names == (*(f"undo {name}" for name in FAULTS), "net/0", "net/1", "net/head")
    assert len(bank.parents) == 1 + len(FAULTS)
    assert bank.describe(bank.parents[2]) == "undo mirrored -> net/0 -> net/1 -> net/head"
    assert bank.num_steps == 1000 + 2000 * len(FAULTS)
    assert bank.describe(task.reference) == (
        "undo scrolled -> undo mirrored -> net/0 -> net/1 -> net/head"
    )
    problem = jc.Problem(bank, task.data.test, task.max_layers)
    out = jc.evaluate(problem, jc.chain.pad([bank.parents[0], task.reference], task.max_layers))
    # Without repairs, the net guesses; with the two repairs, it reads the digits.
    assert out.accuracy[0] < 0.3
    assert out.accuracy[1] > 0.9


@pytest.mark.slow
def test_repair_layers_undo_their_fault_on_unseen_digits():
    task = make_repair(1, faults=[])
    bank = task.make_bank(jax.random.key(1))
    clean = np.asarray(task.data.test.x)
    for token, name in enumerate(FAULTS):
        inputs = damage(clean.reshape(-1, 8, 8), [name]).reshape(clean.shape)
        params = {"params": bank.get_params(token)}
        repaired = bank.layers[0].module.apply(params, jnp.asarray(inputs))
        left = np.mean((repaired - clean) ** 2)
        assert left < 0.1 * np.mean((inputs - clean) ** 2), name


def test_plain_net_has_the_depth_and_data_of_the_task():
    task = make_repair(0, sizes=(40, 20, 10, 10))
    net = task.train_plain_net(jax.random.key(0), 3)
    assert (net.num_layers, net.num_heads, net.num_steps) == (task.plain_depth, 1, 3)
    assert len(task.data.train.y) == 40 * (1 + len(FAULTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faults": ["rotten"]}, "expected names of faults .upside down, .*, got rotten"),
        ({"sizes": (899, 1, 1, 1)}, r"at most \[898, 360, 270, 897\], got \[899, 1, 1, 1\]"),
        ({"sizes": (1, 0, 1, 1)}, "at least 1"),
        ({"sizes": (1, 1, 1)}, "expected sizes of train, search, select, test"),
    ],
)
def test_make_repair_rejects_unknown_faults_and_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        make_repair(0, **options)
