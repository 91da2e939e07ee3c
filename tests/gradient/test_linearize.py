import numpy as np
import pytest
from edit_references import (
    CHAIN,
    Rounded,
    mixed_problem,
)

import jchain as jc
from jchain.gradient.slot_scores import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_slots_before_a_layer_without_gradient_have_no_scores(kind):
    problem = mixed_problem(Rounded())
    swap = np.asarray(jc.swap_scores(problem, np.array([1, 3, 2, 4]), kind))
    assert np.isnan(np.delete(swap[0], 1)).all()
    assert np.isfinite(swap[2, :3]).all()
    assert np.isfinite(swap[1, :3]).all() == (kind in ("linearized", "activations"))


def test_layers_of_one_group_alone_are_scored(two_group_problem):
    problem, chain = two_group_problem, jc.chain.pad([[0, 4, 5]], 3)[0]
    first, second = (group.tokens for group in problem.bank.layers)
    scores, _ = jc.gradient.score_moves(problem, chain, tokens=first, num_best=1)
    whole = jc.gradient.score_edits(problem, chain)
    np.testing.assert_allclose(
        scores.swap[0, np.array(first)], whole.swap[0, np.array(first)], rtol=1e-5
    )
    assert np.isnan(scores.swap[0, np.array(second)]).all()


def test_layers_that_are_not_members_have_no_scores(problem):
    scores, joint = jc.gradient.score_moves(problem, CHAIN, tokens=[3, 1], num_best=1)
    whole = jc.gradient.score_edits(problem, CHAIN)
    np.testing.assert_allclose(scores.swap[:3, 1], whole.swap[:3, 1], rtol=1e-5)
    assert np.isnan(scores.swap[0, 0])
    assert np.isin(joint.token[:3], [1, 3]).all()
    assert scores.layer_calls == 3 * 2 + (2 + 2) * 3
