"""Losses and accuracies of next tokens and of choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import TEXT, make_checkpoint, write_file
from scipy.special import log_softmax as scipy_log_softmax

import jchain as jc
from jchain.engine import layer_calls as calls


def log_softmax(outputs):
    return scipy_log_softmax(np.asarray(outputs, np.float64), axis=-1)


def test_labels_below_zero_do_not_count():
    rng = np.random.default_rng(0)
    outputs, y = rng.normal(size=(3, 4, 5)), rng.integers(0, 5, (3, 4))
    y[0, 1:], y[2] = -1, -1
    logits = log_softmax(outputs)
    expected = [
        -np.mean([logits[i, t, y[i, t]] for t in range(4) if y[i, t] >= 0])
        if (y[i] >= 0).any()
        else 0.0
        for i in range(3)
    ]
    outputs, y = jnp.asarray(outputs, jnp.float32), jnp.asarray(y)
    np.testing.assert_allclose(jc.hub.next_token_loss(outputs, y), expected, rtol=1e-5)
    hits = [
        np.mean([outputs[i, t].argmax() == y[i, t] for t in range(4) if y[i, t] >= 0] or [0.0])
        for i in range(3)
    ]
    np.testing.assert_allclose(jc.hub.next_token_accuracy(outputs, y), hits)


def make_questions(seed):
    """Make outputs and labels of questions of 1 to 4 choices, padded at random."""
    rng = np.random.default_rng(seed)
    outputs, y = rng.normal(size=(8, 4, 5, 7)), np.full((8, 4, 5), -1)
    nums = rng.integers(1, 5, 8)
    for i, num in enumerate(nums):
        for j in range(num):
            start, end = np.sort(rng.choice(6, 2, replace=False))
            y[i, j, start:end] = rng.integers(0, 7, end - start)
    return outputs, y, nums


@pytest.mark.parametrize("seed", range(5))
def test_choices_that_are_padding_never_count_and_never_win(seed):
    outputs, y, nums = make_questions(seed)
    logits = log_softmax(outputs)
    losses, hits = [], []
    for i, num in enumerate(nums):
        means = np.array(
            [
                np.mean([logits[i, j, t, y[i, j, t]] for t in range(5) if y[i, j, t] >= 0])
                for j in range(num)
            ]
        )
        losses.append(-log_softmax(means)[0])
        hits.append(float((means[0] > means[1:]).all()))
    arrays = jnp.asarray(outputs, jnp.float32), jnp.asarray(y)
    np.testing.assert_allclose(jc.hub.choice_loss(*arrays), losses, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(jc.hub.choice_accuracy(*arrays), hits)
    # What is predicted for padding changes nothing, not even the gradient.
    changed = jnp.where((arrays[1] >= 0)[..., None], arrays[0], 1e4)
    np.testing.assert_allclose(jc.hub.choice_loss(changed, arrays[1]), losses, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda outputs: jc.hub.choice_loss(outputs, arrays[1]).sum())(arrays[0])
    assert np.isfinite(gradient).all()
    assert not gradient[arrays[1] < 0].any()


def test_a_question_without_labels_has_no_loss():
    y = jnp.full((1, 3, 4), -1)
    assert jc.hub.choice_loss(jnp.ones((1, 3, 4, 5)), y).tolist() == [0.0]


@pytest.mark.parametrize(
    "plan", [jc.engine.DepthFirst(), jc.engine.Blocks(4, (1, 2), head_widths=(1, 4))]
)
def test_large_outputs_are_computed_in_parts(tmp_path, monkeypatch, plan):
    pytest.importorskip("tokenizers")
    checkpoint = make_checkpoint(tmp_path / "model")
    bank = jc.hub.load(checkpoint)
    data = jc.hub.load_text(checkpoint, write_file(tmp_path, TEXT), length=9)
    problem = jc.Problem(bank, jc.Batch(data.search.x[:11], data.search.y[:11]), 2)
    chains = jc.chain.ChainSpace(2, 1, 2).enumerate()
    whole = jc.evaluate(problem, chains, plan=plan)
    jax.clear_caches()
    # 5 examples fit, so the parts have 4, 4 and 3.
    monkeypatch.setattr(calls, "_OUTPUT_LIMIT", 4 * 9 * 256 * 5)
    parts = jc.evaluate(problem, chains, plan=plan)
    assert (
        plan.count_bytes(problem, jax.eval_shape(bank.embed, problem.data.x)) < 4 * 9 * 256 * 11 * 4
    )
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(parts.accuracy, whole.accuracy, rtol=1e-5)
    jax.clear_caches()
