"""Targets of every kind: split, trained on, searched; and what is refused, in one line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_diabetes, make_multilabel_classification

import jchain as jc

# Without the checks of types that the tests add, as users call them.
load, split = inspect.unwrap(jc.data.load), inspect.unwrap(jc.data.split)
routed = inspect.unwrap(jc.train.routed)
HEAD = jc.layers.DenseHead(1)


def squared_error(outputs, y):
    return (outputs[:, 0] - y) ** 2


def make_bank(kind, data, head, loss_fn, **options):
    return jc.train.make_bank(
        jax.random.key(0),
        data.train,
        kind,
        layer=jc.layers.ResidualMLP(data.train.x.shape[1]),
        head=head,
        num_layers=4,
        depth=2,
        loss_fn=loss_fn,
        **options,
    )


@pytest.mark.parametrize(
    "kind",
    [
        "routed",
        "random",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("independent", "snapshots")),
    ],
)
def test_regression_is_trained_and_searched(kind):
    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    data = jc.data.split(x, y, seed=0)
    assert (data.num_classes, data.train.y.dtype) == (0, jnp.float32)
    assert [len(batch.y) for batch in data[:4]] == [221, 88, 67, 66]
    bank = make_bank(kind, data, HEAD, squared_error, num_steps=300, batch_size=32)
    problem = jc.Problem(bank, data.search, 2, loss_fn=squared_error)
    result = jc.run(jax.random.key(1), jc.CriticSearch(width=8), problem, budget=60)
    # The variance of the targets is the loss of the best constant.
    assert result.best_loss < 0.85 * float(data.search.y.var())
    assert np.isnan(jc.evaluate(problem, result.best_chain[None]).accuracy[0])


def test_several_labels_per_example():
    x, y = make_multilabel_classification(200, n_features=10, n_classes=4, random_state=0)
    data = jc.data.split(x, y, seed=1)
    assert (data.train.y.shape, data.train.y.dtype) == ((100, 4), jnp.float32)
    loss_fn = optax.sigmoid_binary_cross_entropy
    bank = make_bank("routed", data, jc.layers.DenseHead(4), loss_fn, num_steps=300)
    problem = jc.Problem(bank, data.search, 2, loss_fn=loss_fn)
    assert jc.evaluate_all(problem)[1].loss.min() < 0.6


def test_the_examples_of_a_group_stay_together():
    rng = np.random.default_rng(0)
    groups = np.repeat([f"patient {i}" for i in range(40)], rng.integers(1, 12, 40))
    x = np.arange(len(groups), dtype=np.float32)[:, None]
    data = jc.data.split(x, np.zeros(len(groups)), seed=0, groups=groups, statistics=(0.0, 1.0))
    parts = [np.asarray(batch.x)[:, 0].astype(int) for batch in data[:4]]
    assert sorted(np.concatenate(parts)) == list(range(len(groups)))
    names = [set(groups[rows]) for rows in parts]
    assert sum(map(len, names)) == len(set().union(*names)) == 40
    shares = np.array([len(rows) for rows in parts]) / len(groups)
    np.testing.assert_allclose(shares, jc.data.SHARES, atol=0.03)


def test_the_splits_of_labels_are_those_of_before():
    x = np.random.default_rng(0).normal(size=(80, 3))
    y = np.arange(80) % 4
    data = jc.data.split(x, y, seed=0)
    assert data.num_classes == 4
    for batch in data[:4]:
        assert set(np.asarray(batch.y).tolist()) == {0, 1, 2, 3}


def test_batches_have_the_given_size():
    """With all examples in each batch, the order in which they are drawn does not matter."""
    data = jc.data.load("wine")
    few = jc.Batch(data.train.x[:20], data.train.y[:20])
    head = jc.layers.DenseHead(3)
    layer = jc.layers.ResidualMLP(13)
    make = lambda batch, size: jc.train.routed(  # noqa: E731
        jax.random.key(0), batch, layer=layer, head=head, num_steps=3, batch_size=size
    )
    reversed_rows = jc.Batch(few.x[::-1], few.y[::-1])
    for leaf, other in zip(
        jax.tree.leaves(make(few, 20)), jax.tree.leaves(make(reversed_rows, 64)), strict=True
    ):
        np.testing.assert_allclose(leaf, other, atol=1e-5)
    weights = [make(few, size).get_params(0)["Dense_0"]["kernel"] for size in (4, 20)]
    assert not np.allclose(*weights)


DATA = jc.data.load("wine")
ARRAYS = np.asarray(DATA.train.x), np.asarray(DATA.train.y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("Digits"), r"got 'Digits'; did you mean 'digits'\?"),
        (lambda: load("/data/my.csv"), "got the file '/data/my.csv': read it"),
        (lambda: load("iris"), "digits, digits_8x8, wine, breast_cancer need no prep"),
        (lambda: load(None), "expected the name of a data set .* got NoneType"),
        (
            lambda: split(ARRAYS[0], np.array(["a"] * len(ARRAYS[1]))),
            "expected integer labels 0..C-1, or targets that are numbers, got <U1: number",
        ),
        (lambda: split(ARRAYS[0].astype(str), ARRAYS[1]), "examples that are numbers"),
        (
            lambda: split(ARRAYS[0], ARRAYS[1] * np.nan),
            "expected finite examples and targets",
        ),
        (lambda: split(*ARRAYS, groups=[1, 2]), r"expected groups of shape \[90\]"),
        (
            lambda: split(*ARRAYS, groups=np.arange(90) % 3),
            "expected at least 4 groups, got 3",
        ),
        (
            lambda: split(*ARRAYS, groups=np.arange(90), sizes=(9, 9, 9, 9)),
            "expected sizes or groups, got both",
        ),
        (
            lambda: split(ARRAYS[0], np.arange(90)),
            "at least 8 examples of each class.*if y is not a class label, pass it as float",
        ),
        (
            lambda: routed(
                jax.random.key(0),
                jc.Batch(DATA.train.x, DATA.train.x[:, 0]),
                layer=jc.layers.Dense(13),
                head=HEAD,
            ),
            "expected integer labels for the default loss, got float32: pass loss_fn=",
        ),
        (
            lambda: make_bank("routed", DATA, HEAD, lambda outputs, y: outputs @ y),
            "loss_fn does not take outputs",
        ),
        (
            lambda: routed(jax.random.key(0), DATA, layer=jc.layers.Dense(13), head=HEAD),
            "expected one split of data, such as data.search or jc.Batch.* got Dataset of 7",
        ),
        (
            lambda: routed(jax.random.key(0), DATA.train, layer=jc.layers.Dense, head=HEAD),
            "expected instances of Flax linen modules to train, got the class Dense",
        ),
        (
            lambda: routed(
                jax.random.key(0), DATA.train, layer=jc.layers.Dense(13), head=HEAD, batch_size=0
            ),
            "expected batch_size to be at least 1, got 0",
        ),
    ],
)
def test_bad_data_is_named(call, message):
    with pytest.raises((ValueError, ImportError, OSError), match=message):
        call()
