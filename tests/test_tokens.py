import numpy as np
from conftest import make_bank

import jchain as jc


def test_versions_go_where_their_tokens_go(tmp_path):
    bank = make_bank(names=["a", "b", "c", "d", "h", "i"])
    bank = bank.replace([1, 4], [bank.get_params(1), bank.get_params(4)])
    np.testing.assert_array_equal(bank.take([2, 1], [5, 4]).versions, [0, 1, 0, 1])
    joined = jc.Bank.concat([make_bank(3, 1), bank])
    np.testing.assert_array_equal(joined.versions, [0, 0, 0, 0, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(bank.reserve(2).versions, [0, 1, 0, 0, 0, 1, 1, 0])
    bank.save(tmp_path / "bank")
    np.testing.assert_array_equal(jc.Bank.load(tmp_path / "bank").versions, bank.versions)
    make_bank().save(tmp_path / "bank")
    assert jc.Bank.load(tmp_path / "bank").versions is None


def test_parents_keep_their_heads_when_places_are_reserved():
    bank = make_bank(parents=[(0, 1, 4), (2, 5)]).reserve(3)
    assert bank.parents == ((0, 1, 7), (2, 8))
    assert bank.describe([2, 8]) == "layer2 -> head1"
