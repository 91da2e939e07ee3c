import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc
from jchain.engine.prefix_sharing import batch_rows, count_calls, sort_chains


def test_sorted_chains_by_hand():
    chains = jnp.array([[2, 5, -1], [0, 1, 5], [5, -1, -1], [0, 1, 5], [0, 2, 6]])
    (rows, length, first_new), source = sort_chains(chains, 5)
    np.testing.assert_array_equal(rows, [[0, 1, 5], [0, 1, 5], [0, 2, 6], [2, 5, -1], [5, -1, -1]])
    np.testing.assert_array_equal(length, [2, 2, 2, 1, 0])
    np.testing.assert_array_equal(first_new, [0, 3, 1, 0, 0])
    np.testing.assert_array_equal(source, [3, 0, 4, 0, 2])


def test_batches_by_hand():
    # Member 7 is called five times, member 3 once, and row 2 calls nothing.
    is_call = jnp.array([True, True, False, True, True, True, True])
    member = jnp.array([7, 7, 7, 3, 7, 7, 7])
    out = batch_rows(is_call, jnp.zeros(7, int), member, 1, (1, 2, 4))
    np.testing.assert_array_equal(out.order, [3, 0, 1, 4, 5, 6, 2])
    np.testing.assert_array_equal(out.position, [1, 2, 6, 0, 3, 4, 5])
    assert [[int(count) for count in counts] for counts in out.counts] == [[2, 0, 1]]
    ones, _, fours = out.starts[0]
    # Single calls are left for member 3, and for the fifth call of member 7.
    assert (ones[:2].tolist(), fours[:1].tolist()) == ([0, 5], [1])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 3)), min_size=20, max_size=20
    ),
    st.sampled_from([(1,), (1, 2), (1, 4), (1, 3, 6), (1, 2, 8)]),
)
def test_batches_hold_each_call_once_and_share_what_they_call(rows, widths):
    is_call, group, member = (np.array(column) for column in zip(*rows, strict=True))
    out = batch_rows(jnp.asarray(is_call), jnp.asarray(group), jnp.asarray(member), 3, widths)
    np.testing.assert_array_equal(out.order[out.position], np.arange(len(rows)))
    seen = []
    for g in range(3):
        for width, starts, count in zip(widths, out.starts[g], out.counts[g], strict=True):
            for start in starts[: int(count)]:
                batch = np.asarray(out.order)[int(start) : int(start) + width]
                assert len(batch) == width
                assert set(group[batch]) == {g}
                assert len(set(member[batch])) == 1
                seen.extend(batch.tolist())
    assert sorted(seen) == np.flatnonzero(is_call).tolist()


@pytest.mark.parametrize(
    ("num_calls", "expected"), [(1, [1, 0]), (4, [0, 1]), (7, [3, 1]), (9, [1, 2])]
)
def test_the_widest_batches_come_first(num_calls, expected):
    out = batch_rows(
        jnp.ones(num_calls, bool), jnp.zeros(num_calls, int), jnp.zeros(num_calls, int), 1, (1, 4)
    )
    assert [int(count) for count in out.counts[0]] == expected


def test_count_calls_needs_no_evaluation():
    chains = np.asarray(jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(0), 300))
    assert tuple(map(int, count_calls(jnp.asarray(chains), 4))) == reference.count_calls(chains, 4)
