import jax.numpy as jnp
import numpy as np
import pytest

from jchain.inverse import nearest_pairs as match


def make_tables(num_rows, num_columns, error, seed=0, size=6):
    """Make tables whose first rows match each other up to the error."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((num_rows, size))
    second = rng.standard_normal((num_columns, size))
    both = min(num_rows, num_columns) // 4
    second[:both] = first[:both] + error * rng.standard_normal((both, size))
    return jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32), both


def brute_force(first, second, num_pairs):
    distance = np.sum(
        (np.asarray(first, np.float64)[:, None] - np.asarray(second, np.float64)[None]) ** 2, axis=2
    )
    place = np.argsort(distance, axis=None, kind="stable")[:num_pairs]
    return {
        *zip(*(index.tolist() for index in np.unravel_index(place, distance.shape)), strict=True)
    }, np.sort(distance, axis=None)[:num_pairs]


@pytest.mark.parametrize(("num_rows", "num_columns"), [(60, 90), (1100, 30), (1, 2100), (2100, 2)])
@pytest.mark.parametrize("num_pairs", [1, 20, 2000])
def test_match_all_finds_the_nearest_pairs(num_rows, num_columns, num_pairs):
    first, second, _ = make_tables(num_rows, num_columns, 0.1)
    pairs = match.match_all(first, second, num_pairs, 0.1)
    wanted, distance = brute_force(first, second, num_pairs)
    np.testing.assert_allclose(pairs.distance, distance, rtol=1e-3, atol=1e-4)
    found = {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}
    assert len(found) == len(wanted)
    assert len(found & wanted) >= len(wanted) - 2  # ties may round either way


def test_long_rows_whose_distances_round_away_hide_no_short_ones():
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((300, 6)) for _ in range(2))
    second[:5] = first[:5] + 1e-4
    # In the last third of both tables, differences are lost in the squared lengths.
    first[200:] += 1e6
    second[200:] += 1e6
    pairs = match.match_all(
        jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32), 5, 1e-4
    )
    assert {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)} == {
        (i, i) for i in range(5)
    }


@pytest.mark.parametrize("error", [1e-6, 1e-3, 0.05])
def test_cells_find_nearly_every_matching_pair_once(error):
    first, second, both = make_tables(4000, 3000, error)
    pairs = match.match_cells(first, second, 3 * both, error)
    found = [*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)]
    assert len(set(found)) == len(found)
    assert len({(i, i) for i in range(both)} & {*found}) > 0.95 * both
    distance = np.sum(
        (np.asarray(first)[pairs.first] - np.asarray(second)[pairs.second]) ** 2, axis=1
    )
    np.testing.assert_allclose(pairs.distance, distance, rtol=1e-5)
    assert (np.diff(pairs.distance) >= 0).all()


def test_equal_rows_all_meet_and_unequal_ones_do_not(monkeypatch):
    monkeypatch.setattr(match, "_BATCH", 2)
    table = jnp.array([[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]])
    pairs = match.match_cells(table, table, 10, 1e-6)
    assert {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 2),
    }
    assert len(match.match_cells(table, table + 1.5, 10, 1e-6).first) == 0


@pytest.mark.parametrize("match_fn", [match.match_all, match.match_cells])
def test_rows_that_are_not_finite_are_left_out(match_fn):
    first, second, both = make_tables(40, 30, 1e-5)
    spoiled = first.at[0, 0].set(jnp.nan).at[3, 1].set(jnp.inf), second.at[5, 2].set(jnp.nan)
    pairs = match.match_finite(match_fn, *spoiled, 100, 1e-5)
    assert np.isfinite(pairs.distance).all()
    found = {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}
    assert {(i, i) for i in range(both) if i not in (0, 3, 5)} <= found
    assert not {0, 3} & {*pairs.first.tolist()}
    assert 5 not in pairs.second
    assert (
        len(match.match_finite(match_fn, jnp.full((3, 2), jnp.nan), second[:, :2], 5, 0.1).first)
        == 0
    )


def test_cells_are_no_narrower_than_rounding():
    table = jnp.array([[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]])
    pairs = match.match_cells(table, table, 10, 0.0)
    assert {*zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 2),
    }


def test_grids_are_chosen_by_what_they_miss_and_cost():
    spread = np.random.default_rng(0).standard_normal((500, 16))
    exact = match.choose_grids(spread, (2**20, 2**20), 1e-7)
    noisy = match.choose_grids(spread, (2**20, 2**20), 0.05)
    assert exact.num_projections < noisy.num_projections
    assert exact.num_grids < noisy.num_grids
    assert exact.seconds < noisy.seconds < match.estimate_match_all(2.0**40)
    # Distant numbers, with cells so much wider than the error that one grid misses nothing.
    assert match.choose_grids(np.array([[0.0], [1e12]]), (10, 10), 1.0)[1:3] == (1, 1)
    for cells in (exact, noisy):
        share = 1 - np.sqrt(2 / np.pi) * (1e-7 if cells is exact else 0.05) / cells.width
        assert (1 - share**cells.num_projections) ** cells.num_grids <= 0.0201
