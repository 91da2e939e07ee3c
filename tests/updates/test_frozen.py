import jax
from policy_cases import BUDGET, POLICIES, SEARCH, run

import jchain as jc


def test_frozen_changes_no_byte_of_the_bank(two_group_problem, tmp_path):
    problem = two_group_problem
    problem.bank.save(tmp_path / "before")
    outcome = run(POLICIES["Frozen"], problem)
    outcome.bank.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    alone = jc.run(jax.random.key(0), SEARCH, problem, budget=BUDGET)
    assert alone.best_loss == outcome.result.best_loss
