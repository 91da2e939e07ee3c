import numpy as np
import pytest

from jchain.datasets import splitting


def test_every_row_goes_to_one_split_in_the_same_proportions():
    y = np.repeat([0, 1, 2], [40, 80, 20])
    parts = splitting.split_stratified(y, splitting.SHARES, np.random.default_rng(0))
    assert sorted(np.concatenate(parts)) == list(range(140))
    for part, share in zip(parts, splitting.SHARES, strict=True):
        np.testing.assert_array_equal(np.bincount(y[part]), np.array([40, 80, 20]) * share)


def test_groups_stay_together():
    groups = np.random.default_rng(0).integers(0, 30, 300)
    rng = np.random.default_rng(1)
    parts = splitting.split_groups(groups, 300, splitting.SHARES, rng)
    assert sorted(np.concatenate(parts)) == list(range(300))
    owners = [set(groups[part]) for part in parts]
    assert sum(map(len, owners)) == len(set(groups))


def test_sizes_out_of_range_are_named():
    splitting.check_sizes([1, 2, 3, 4], [4, 4, 4, 4])
    for sizes in ([1, 2, 3], [0, 1, 1, 1], [1, 1, 1, 5]):
        with pytest.raises(ValueError, match="train, search, select, test of at least 1 and at"):
            splitting.check_sizes(sizes, [4, 4, 4, 4])
