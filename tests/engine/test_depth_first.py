import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    num=st.sampled_from([1, 13]),
)
def test_depth_first_matches_apply_chain(problem, seed, num):
    reference.assert_plan_matches_apply_chain(problem, jc.engine.DepthFirst(), seed, num)
