import jax
import numpy as np
import pytest
from scripted_search import make_scripted

import jchain as jc


def test_a_result_holds_curve_best_chain_finalists_and_counts(problem):
    search = make_scripted([[(0, 3.0), (1, 4.0)], [(2, 2.0), (0, 3.0)], [(3, 9.0), (3, 9.0)]])
    result = jc.run(jax.random.key(0), search, problem, budget=15, num_finalists=3)
    assert result.curve.layer_calls.tolist() == [5, 10, 15]
    assert result.curve.best_loss.tolist() == [3, 2, 2]
    assert result.curve.at([4, 5, 9, 10, 99]).tolist() == [np.inf, 3, 3, 2, 2]
    assert result.best_chain.tolist() == [2, 4, -1, -1]
    assert result.best_loss == 2
    assert result.finalists[:, 0].tolist() == [2, 0, 1]
    assert result.finalist_losses.tolist() == [2, 3, 4]
    assert (result.layer_calls, result.num_scored, result.num_nonfinite) == (15, 6, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_result_without_a_finite_loss_holds_no_chain(problem, bad):
    nothing = jc.run(jax.random.key(0), make_scripted([[(0, bad)]]), problem, budget=5)
    assert nothing.best_loss == np.inf
    assert nothing.best_chain.tolist() == [-1] * 4
    assert len(nothing.finalists) == 0


def test_a_budget_below_one_step_raises(problem):
    with pytest.raises(
        ValueError, match="at least one step, which costs 5 layer calls here, got 4"
    ):
        jc.run(jax.random.key(0), make_scripted([[(0, 3.0)]]), problem, budget=4)
