import jax
import numpy as np
import pytest

import jchain as jc
from jchain import align


def weights(bank):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(bank.layers[0].params)]


def test_align_inverts_a_shuffle_and_keeps_the_outputs(problem):
    """Copies of one layer, each with its units in another order, are equal after alignment."""
    bank = problem.bank
    same = jc.Bank.stack(
        bank.layers[0].module,
        [jax.tree.map(lambda leaf: leaf[2], bank.layers[0].params)] * 3,
        bank.heads[0].module,
        [jax.tree.map(lambda leaf: leaf[0], bank.heads[0].params)],
    )
    shuffled = align.shuffle(jax.random.key(0), same)
    chains = np.array([[0, 1, 2, 3], [2, 2, 3, -1]])
    expected = jc.evaluate(jc.Problem(same, problem.data, 3), chains).loss
    np.testing.assert_allclose(
        jc.evaluate(jc.Problem(shuffled, problem.data, 3), chains).loss, expected, rtol=1e-5
    )
    assert not np.allclose(weights(shuffled)[1][0], weights(shuffled)[1][1])
    for token in range(3):
        for leaf, own in zip(
            weights(align.match_units(shuffled, token)), weights(shuffled), strict=True
        ):
            np.testing.assert_array_equal(leaf, np.broadcast_to(own[token], leaf.shape))


def test_aligned_layers_are_as_close_as_any_order_makes_them(problem):
    aligned, bank = align.match_units(problem.bank, 1), problem.bank
    chains = jc.chain.ChainSpace(4, 2, 2).enumerate()
    small = [jc.evaluate(jc.Problem(b, problem.data, 2), chains).loss for b in (bank, aligned)]
    np.testing.assert_allclose(*small, rtol=1e-5)

    def distance(a, b):
        return sum(np.sum((x[3] - y[1]) ** 2) for x, y in zip(weights(a), weights(b), strict=True))

    least = distance(aligned, bank)
    for seed in range(20):
        assert least <= distance(align.shuffle(jax.random.key(seed), bank), bank)


def test_align_rejects_bad_input(problem, two_group_bank):
    with pytest.raises(ValueError, match=r"expected a layer token in 0..3, got 4"):
        align.match_units(problem.bank, 4)
    with pytest.raises(
        ValueError, match="expected a layer whose hidden units are known, ResidualMLP, got Dense"
    ):
        align.match_units(two_group_bank, 3)
    assert align.match_units(two_group_bank, 0).layers[1] is two_group_bank.layers[1]
