import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.cli.scores import ExampleScores, Scorer, find_standard_error, score_ensemble
from jchain.cli.setup import Setup

CHAINS = [[0, 2, 4], [1, 5], [4], [3, 3, 0, 5]]


def make_setup(**options):
    sizes = {"train": 9, "search": 70, "select": 7, "test": 1_030}
    splits = {name: make_batch(size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    data = jc.data.Dataset(**splits, name="own", num_classes=3)
    return Setup(data, lambda key: make_bank(), "", None, **options)


@pytest.fixture(scope="module")
def bank():
    return make_bank(4, 2)


@pytest.mark.parametrize("tokens", CHAINS)
def test_chains_are_scored_by_example(bank, tokens):
    setup = make_setup()
    scores = Scorer(setup).score(bank, [tokens])[0]
    summary = scores.summarize()
    for split in ("search", "select", "test"):
        x, y = getattr(setup.data, split)
        logits = jc.apply_chain(bank, jc.chain.pad([tokens])[0], x)
        loss = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, y), np.float64)
        np.testing.assert_allclose(scores.loss[split], loss, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(scores.accuracy[split], logits.argmax(axis=1) == y)
        assert summary["loss"][split] == pytest.approx(loss.mean(), rel=1e-5)
        error = loss.std(ddof=1) / np.sqrt(len(loss))
        assert summary["standard_error"][split] == pytest.approx(error, rel=1e-4)


def test_an_ensemble_averages_probabilities(bank):
    setup = make_setup()
    scores = score_ensemble(setup, bank, CHAINS, max_layers=4)
    x, y = setup.data.test
    each = [jc.apply_chain(bank, jc.chain.pad([tokens])[0], x) for tokens in CHAINS]
    mean = np.mean(
        [
            np.exp(optax.losses.safe_softmax_cross_entropy(logits, jnp.eye(3)[y]) * -1)
            for logits in each
        ],
        axis=0,
    )
    np.testing.assert_allclose(scores.loss["test"], -np.log(mean), rtol=1e-4, atol=1e-6)
    one = score_ensemble(setup, bank, CHAINS[:1], max_layers=4)
    alone = Scorer(setup).score(bank, [CHAINS[0]])[0]
    np.testing.assert_allclose(one.loss["test"], alone.loss["test"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(one.accuracy["test"], alone.accuracy["test"])


def test_other_losses_have_no_ensemble_but_their_own_mean(bank):
    def loss_fn(outputs, y):
        return jnp.abs(outputs - y[:, None])

    setup = make_setup(loss_fn=loss_fn, accuracy_fn=lambda outputs, y: outputs * 0 + 0.25)
    assert score_ensemble(setup, bank, CHAINS, max_layers=4) is None
    scores = Scorer(setup).score(bank, [CHAINS[0]])[0]
    x, y = setup.data.test
    expected = loss_fn(jc.apply_chain(bank, jc.chain.pad([CHAINS[0]])[0], x), y).mean(axis=1)
    np.testing.assert_allclose(scores.loss["test"], expected, rtol=1e-4)
    assert scores.summarize()["accuracy"]["test"] == 0.25


def test_differences_are_paired_by_example():
    rows = np.array([1.0, 2.0, 4.0])
    first, second = ({"test": rows + shift} for shift in (np.array([1.0, 1.5, 2.0]), 0.0))
    found = ExampleScores(first, first).subtract(ExampleScores(second, second))
    assert found == {"mean": 1.5, "standard_error": pytest.approx(0.5 / np.sqrt(3))}
    infinite = {"test": np.array([np.inf, 1.0, 2.0])}
    lost = ExampleScores(infinite, first).subtract(ExampleScores(second, second))
    assert lost == {"mean": None, "standard_error": None}
    assert np.isnan(find_standard_error(rows[:1]))
