import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jchain import match


def make_tables(num_rows, num_columns, error, seed=0, size=6):
    """Tables of which the first rows belong together but for the error."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((num_rows, size))
    second = rng.standard_normal((num_columns, size))
    both = min(num_rows, num_columns) // 4
    second[:both] = first[:both] + error * rng.standard_normal((both, size))
    return jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32), both


def brute_force(first, second, num_pairs):
    distance = np.sum((np.asarray(first, np.float64)[:, None] - np.asarray(second, np.float64)[None]) ** 2, axis=2)
    place = np.argsort(distance, axis=None, kind="stable")[:num_pairs]
    return {*zip(*(index.tolist() for index in np.unravel_index(place, distance.shape)), strict=True)}, np.sort(
        distance, axis=None
    )[:num_pairs]


@pytest.mark.parametrize(("num_rows", "num_columns"), [(60, 90), (1100, 30), (1, 2100), (2100, 2)])
@pytest.mark.parametrize("num_pairs", [1, 20, 2000])
def test_all_pairs_hold_the_nearest(num_rows, num_columns, num_pairs):
    first, second, _ = make_tables(num_rows, num_columns, 0.1)
    pairs = match.match_all(first, second, num_pairs, 0.1)
    wanted, distance = brute_force(first, second, num_pairs)
    np.testing.assert_allclose(pairs.distance, distance, rtol=1e-3, atol=1e-4)
    found = {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}
    assert len(found) == len(wanted)
    assert len(found & wanted) >= len(wanted) - 2  # ties may round either way


def test_sorted_cells_hold_every_pair_that_is_equal_but_for_the_error_once():
    first, second, both = make_tables(4000, 3000, 1e-5)
    pairs = match.match_sorted(first, second, 10_000, 1e-5)
    found = [*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)]
    assert len(set(found)) == len(found)
    assert {(i, i) for i in range(both)} <= {*found}
    distance = np.sum((np.asarray(first)[pairs.first] - np.asarray(second)[pairs.second]) ** 2, axis=1)
    np.testing.assert_allclose(pairs.distance, distance, rtol=1e-5)
    assert (np.diff(pairs.distance) >= 0).all()


def test_equal_rows_all_meet_and_unequal_ones_do_not():
    table = jnp.array([[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]])
    pairs = match.match_sorted(table, table, 10, 1e-6)
    assert {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)} == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)}
    assert len(match.match_sorted(table, table + 1.5, 10, 1e-6).first) == 0


def test_chance_meetings_are_foretold():
    first, second, _ = make_tables(2000, 2000, 0.0, size=2)
    second = jax.random.normal(jax.random.key(5), second.shape)
    error = 2e-4
    wanted = match.count_false(np.asarray(first), 2000 * 2000, error, 2)
    found = len(match.match_sorted(first, second, 10**6, error).first)
    # Three grids, of which each has other chance pairs for the most part.
    assert wanted < found < 4 * wanted


def test_an_index_finds_most_of_the_near_pairs():
    first, second, both = make_tables(3000, 5000, 0.05)
    pairs = match.match_approximately(first, second, both, 0.05)
    found = {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}
    assert len(found & {(i, i) for i in range(both)}) > 0.9 * both


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    first, second, _ = make_tables(10, 10, 0.1)
    with pytest.raises(ImportError, match=r'needs faiss: pip install "jchain\[ann\]"'):
        match.match_approximately(first, second, 1, 0.1)
