import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edit_references import (
    CHAIN,
    to_float64,
    use_float64,
    walk,
)

import jchain as jc

x64 = pytest.fixture(use_float64)


def test_changes_of_joint_moves_sum_to_a_joint_jvp(problem, x64):
    cost = np.array([0.1, 0.5, 0.9, 1.3])
    problem = to_float64(jc.Problem(problem.bank, problem.data, 3, layer_cost=jnp.asarray(cost)))
    scores, joint = jc.gradient.score_moves(problem, CHAIN, num_best=2, num_pairs=5)
    hidden, _ = walk(problem, CHAIN)
    layers = problem.bank.layers[0]
    steps = [layers.apply(int(joint.token[t, 0]), hidden[t]) - hidden[t + 1] for t in range(3)]

    def outputs(pushes):
        activation = hidden[0]
        for token, push in zip(CHAIN[:3], pushes, strict=True):
            activation = layers.apply(int(token), activation) + push
        return problem.bank.heads[0].apply(1, activation)

    plain, expected = jax.jvp(outputs, ([jnp.zeros_like(step) for step in steps],), (steps,))
    # A softmax depends on the margins between the label and the other classes, likeliest first.
    rivals = [
        [c for c in np.argsort(-z) if c != y] for z, y in zip(plain, problem.data.y, strict=True)
    ]
    margins = [
        moved[c] - moved[y]
        for moved, c, y in zip(np.asarray(expected), rivals, problem.data.y, strict=True)
    ]
    np.testing.assert_allclose(joint.change[:3, 0].sum(axis=0), margins, atol=1e-6)
    predicted = problem.loss_and_accuracy(plain + expected)[0] - problem.loss_and_accuracy(plain)[0]
    # Each slot has its best swaps except its own layer. The first greedy move is the best swap.
    others = np.where(np.arange(4) == CHAIN[:3, None], np.inf, scores.swap[:3])
    np.testing.assert_array_equal(joint.token[:3], np.argsort(others, axis=1)[:, :2])
    np.testing.assert_allclose(joint.greedy_score[0], others.min(), atol=1e-6)
    np.testing.assert_array_equal(
        joint.greedy[0] != CHAIN, np.arange(4) == others.min(axis=1).argmin()
    )
    assert np.isnan(joint.greedy_score[3])
    # All pairs by hand: those with the lowest loss of the sum of both changes.
    changes = np.asarray(joint.change)
    padded = np.zeros((*changes.shape[:3], 3))
    np.put_along_axis(padded, np.broadcast_to(rivals, changes.shape), changes, axis=3)
    found = {
        (s, i, t, j): float(
            problem.loss_and_accuracy(plain + padded[s, i] + padded[t, j])[0]
            - problem.loss_and_accuracy(plain)[0]
        )
        + sum(cost[joint.token[slot, k]] - cost[CHAIN[slot]] for slot, k in ((s, i), (t, j)))
        for s in range(3)
        for t in range(s + 1, 3)
        for i in range(2)
        for j in range(2)
    }
    best = sorted(found, key=found.__getitem__)[:5]
    np.testing.assert_allclose(joint.pair_score, [found[pair] for pair in best], atol=1e-6)
    for row, (s, i, t, j) in zip(joint.pairs, best, strict=True):
        swapped = CHAIN.copy()
        swapped[[s, t]] = joint.token[s, i], joint.token[t, j]
        np.testing.assert_array_equal(row, swapped)
    assert predicted == pytest.approx(
        float(
            problem.loss_and_accuracy(plain + padded[:3, 0].sum(axis=0))[0]
            - problem.loss_and_accuracy(plain)[0]
        ),
        abs=1e-6,
    )


@pytest.mark.slow
def test_joint_moves_use_at_most_128_examples(problem):
    """From 300 examples, every third is used."""
    x = jax.random.normal(jax.random.key(4), (300, 5))
    y = jax.random.randint(jax.random.key(5), (300,), 0, 3)
    whole, some = (
        jc.Problem(problem.bank, jc.Batch(x, y), 3),
        jc.Problem(problem.bank, jc.Batch(x[::3], y[::3]), 3),
    )
    scores, joint = jc.gradient.score_moves(whole, CHAIN, num_best=3, num_pairs=27)
    np.testing.assert_allclose(scores.swap, jc.swap_scores(whole, CHAIN), rtol=1e-4, atol=1e-6)
    # With all swaps of each slot, the pairs do not depend on which of them are best.
    expected = jc.gradient.score_moves(some, CHAIN, num_best=3, num_pairs=27)[1]
    found, wanted = (
        dict(zip(map(tuple, np.asarray(j.pairs).tolist()), np.asarray(j.pair_score), strict=True))
        for j in (joint, expected)
    )
    assert len(found) == 27
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
