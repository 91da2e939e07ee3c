import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    num=st.sampled_from([1, 13]),
)
def test_blocks_match_apply_chain(problem, seed, num):
    reference.assert_plan_matches_apply_chain(problem, jc.engine.Blocks(4, (1, 2)), seed, num)


@pytest.mark.parametrize("widths", [(), (2, 4), (1, 4, 2), (1, 2, 5)])
def test_blocks_rejects_bad_sizes(widths):
    with pytest.raises(ValueError, match="expected block_size to be at least 1, got 0"):
        jc.engine.Blocks(0)
    for name in ("widths", "head_widths"):
        with pytest.raises(ValueError, match="expected widths that ascend from 1"):
            jc.engine.Blocks(4, **{name: widths})
