"""Find the nearest pairs of rows of two tables of sketches.

`match_all` compares all pairs by matrix products; `match_cells` compares only pairs that share a
cell of a random grid (locality-sensitive hashing). Both take two tables `[M, S]` and `[Q, S]`, the
number of pairs to return, and the error: the root mean square difference, per number of a sketch,
between rows that belong together. Both return `Pairs`, nearest first.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jchain._typing import Array, Float, Int, Shaped

# The numbers of rows of the two tables whose distances are computed together. Such a tile fits in
# the processor's cache.
_ROWS, _COLUMNS = 1024, 2048
# The relative tolerance of a distance limit, and the slack of squared lengths in units of machine
# epsilon.
_ROUNDING, _SLACK = 1e-3, 8
# The cell widths to choose from, in units of the error; the largest probability of missing a pair;
# and the number of pairs that are compared at once.
_WIDTHS, _MAX_MISS, _BATCH = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0), 0.02, 2**18
# Times in seconds, measured on two cores: of `match_all` per pair, and of `match_cells` per row and
# per pair that shares a cell.
_PAIR_SECONDS, _ROW_SECONDS, _COLLISION_SECONDS = 5e-10, 1e-6, 1.5e-7
# The seed of the grids. It is constant, so that a search finds the same chains in every process.
_GRID_SEED = 1


class Pairs(NamedTuple):
    """Pairs of nearby rows, nearest first."""

    first: Int[np.ndarray, "K"]  # index of the row in the first table
    second: Int[np.ndarray, "K"]  # index of the row in the second table
    distance: Float[np.ndarray, "K"]  # squared Euclidean distance


# The arguments are the first table, the second table, the number of pairs, and the error.
MatchFn = Callable[[Float[Array, "M S"], Float[Array, "Q S"], int, float], Pairs]


def match_finite(
    match_fn: MatchFn,
    first: Float[Array, "M S"],
    second: Float[Array, "Q S"],
    num_pairs: int,
    error: float,
) -> Pairs:
    """Apply a matching function to the rows whose squared length is finite.

    This takes additional time `O((M + Q) S)`.

    Args:
      match_fn: `match_all`, `match_cells`, or a function with the same signature.
      first: the first table of sketches, `[M, S]`.
      second: the second table of sketches, `[Q, S]`.
      num_pairs: the number of pairs to return.
      error: the error, as defined in the docstring of this module.

    Returns:
      Pairs of rows of the given tables; empty if a table has no finite row.
    """
    kept = [
        np.flatnonzero(np.isfinite(np.asarray(jnp.sum(table**2, axis=1))))
        for table in (first, second)
    ]
    if not all(map(len, kept)):
        return _no_pairs(np.float32)
    # A whole table is passed without indexing, which would copy it and compile another program.
    tables = [
        table if len(rows) == len(table) else table[rows]
        for table, rows in zip((first, second), kept, strict=True)
    ]
    pairs = match_fn(tables[0], tables[1], num_pairs, error)
    return Pairs(kept[0][pairs.first], kept[1][pairs.second], pairs.distance)


def match_all(
    first: Float[Array, "M S"], second: Float[Array, "Q S"], num_pairs: int, error: float
) -> Pairs:
    """Find the nearest of all pairs, exactly up to rounding.

    This takes time `O(M Q S)`, for one blocked pass over all distances and a second pass over the
    rows and columns that can hold a result, and memory `O((M + Q) S + num_pairs)`.

    Args:
      first: the first table of finite sketches, `[M, S]`.
      second: the second table of finite sketches, `[Q, S]`.
      num_pairs: the number of pairs to return.
      error: unused.
    """
    del error
    # Center at the median, because a single distant row would move the mean.
    center = jnp.median(first[:: max(1, len(first) // 4096)], axis=0, keepdims=True)
    first, second = first - center, second - center
    by_row, by_column = (
        np.asarray(nearest) for nearest in _compute_nearest_distances(first, second)
    )
    # The nearest `num_pairs` pairs are in at most `num_pairs` rows and columns: the rows and the
    # columns with the smallest nearest distances.
    rows, columns = (_take_smallest(nearest, num_pairs) for nearest in (by_row, by_column))
    candidates = second[columns]
    limits = [near.max() for near in (by_row[rows], by_column[columns]) if num_pairs <= len(near)]
    limit = min(limits, default=np.inf)
    best = _no_pairs(by_row.dtype)
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        distances = np.asarray(_compute_distances(first[block], candidates))
        # The limit comes from the same products, but summed in another order, so it is rounded
        # differently.
        row, column = np.nonzero(distances <= limit + _ROUNDING * np.abs(limit))
        new = block[row], columns[column], distances[row, column]
        best = _keep_nearest(
            *(np.concatenate(parts) for parts in zip(best, new, strict=True)), num_pairs=num_pairs
        )
    return best


def _take_smallest(values: np.ndarray, number: int) -> np.ndarray:
    """Return the indices of the smallest values, in ascending order of index."""
    number = min(number, len(values))
    return np.sort(np.argpartition(values, number - 1)[:number])


@jax.jit
def _compute_distances(
    first: Float[Array, "m S"], second: Float[Array, "q S"]
) -> Float[Array, "m q"]:
    """Compute the squared distances of all pairs."""
    rows, columns = _augment(first, second)
    return rows @ columns.T


def _augment(
    first: Float[Array, "m S"], second: Float[Array, "q S"]
) -> tuple[Float[Array, "m _"], Float[Array, "q _"]]:
    """Append columns that turn products of rows into squared distances, `|f|^2 - 2 f g + |g|^2`.

    A bound on rounding errors is added. Without it, distances of long rows could round below 0, and
    pairs of long rows would rank before pairs of short rows that are near each other.
    """
    slack = 1 + _SLACK * float(jnp.finfo(first.dtype).eps)
    lengths = [slack * jnp.sum(rows**2, axis=1, keepdims=True) for rows in (first, second)]
    ones = [jnp.ones_like(length) for length in lengths]
    return jnp.concatenate([first, lengths[0], ones[0]], axis=1), jnp.concatenate(
        [-2 * second, ones[1], lengths[1]], axis=1
    )


@jax.jit
def _compute_nearest_distances(
    first: Float[Array, "M S"], second: Float[Array, "Q S"]
) -> tuple[Float[Array, "M"], Float[Array, "Q"]]:
    """Compute the squared distance of each row to the nearest row of the other table."""
    rows, columns = (
        _split_rows(table, size)
        for table, size in zip(_augment(first, second), (_ROWS, _COLUMNS), strict=True)
    )

    def scan_rows(by_column: Array, block: Array) -> tuple[Array, Array]:
        def scan_columns(by_row: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
            tile, nearest = part
            distances = block @ tile.T
            by_row = jnp.minimum(by_row, distances.min(axis=1))
            return by_row, jnp.minimum(nearest, distances.min(axis=0))

        by_row, by_column = jax.lax.scan(
            scan_columns, jnp.full(len(block), jnp.inf, block.dtype), (columns, by_column)
        )
        return by_column, by_row

    by_column, by_row = jax.lax.scan(
        scan_rows, jnp.full(columns.shape[:2], jnp.inf, columns.dtype), rows
    )
    return by_row.reshape(-1)[: len(first)], by_column.reshape(-1)[: len(second)]


def _split_rows(table: Float[Array, "M S"], size: int) -> Float[Array, "n m S"]:
    """Split a table into blocks of `size` rows; the last row is repeated to fill the last block."""
    size = min(size, len(table))
    return jnp.pad(table, ((0, -len(table) % size), (0, 0)), mode="edge").reshape(
        -1, size, table.shape[1]
    )


class Grids(NamedTuple):
    """Random grids whose cells are likely to hold both rows of a matching pair."""

    width: float  # width of a cell along each projection
    num_projections: int  # number of random projections of each grid
    num_grids: int
    seconds: float  # estimated time of `match_cells`


def estimate_match_all(num_pairs: float) -> float:
    """Estimate the time that `match_all` takes for `num_pairs` pairs, in seconds."""
    return num_pairs * _PAIR_SECONDS


def choose_grids(table: Float[np.ndarray, "m S"], sizes: tuple[int, int], error: float) -> Grids:
    """Choose the cheapest grids that miss a pair with a probability of at most 2%.

    The probability assumes that errors and sketches are normally distributed. For
    locality-sensitive hashing, see Datar et al. 2004, Symposium on Computational Geometry.

    Args:
      table: some rows of a table, used to estimate the spread of sketches, `[m, S]`.
      sizes: the number of rows of each table.
      error: the error, as defined in the docstring of this module.
    """
    spread = max(
        float(np.sqrt(np.mean(np.var(table, axis=0, dtype=np.float64)))),
        float(np.finfo(np.float32).tiny),
    )
    # Sketches are rounded, so cells narrower than the rounding error would be useless.
    error = max(
        error,
        float(np.finfo(table.dtype).eps * np.abs(table).max()),
        float(np.finfo(np.float32).tiny),
    )
    found = []
    for width in _WIDTHS:
        # Two numbers at distance d share a cell with probability 1 - |d| / width. Two unrelated
        # normal numbers share a cell with probability width / (2 sqrt(pi) spread).
        share = 1 - math.sqrt(2 / math.pi) / width
        chance = min(1.0, width * error / (2 * math.sqrt(math.pi) * spread))
        for num_projections in range(1, table.shape[1] + 1):
            hit = share**num_projections
            num_grids = (
                1 if hit > 1 - _MAX_MISS else math.ceil(math.log(_MAX_MISS) / math.log1p(-hit))
            )
            collisions = sizes[0] * sizes[1] * chance**num_projections
            seconds = num_grids * (sum(sizes) * _ROW_SECONDS + collisions * _COLLISION_SECONDS)
            found.append(Grids(width * error, num_projections, num_grids, seconds))
    return min(found, key=lambda grids: grids.seconds)


def match_cells(
    first: Float[Array, "M S"], second: Float[Array, "Q S"], num_pairs: int, error: float
) -> Pairs:
    """Find the nearest of the pairs that share a cell of a random grid (`choose_grids`).

    It misses few pairs of rows that differ by the error, but most pairs that are farther apart.
    Each of G grids with q projections takes time `O((M + Q) (S q + log(M + Q)) + C S)` for C pairs
    that share a cell. The memory is `O((M + Q) S + num_pairs)`.

    Args:
      first: the first table of finite sketches, `[M, S]`.
      second: the second table of finite sketches, `[Q, S]`.
      num_pairs: the number of pairs to return; fewer are returned if fewer share a cell.
      error: the error, as defined in the docstring of this module.
    """
    tables = [np.asarray(table) for table in (first, second)]
    sizes = len(tables[0]), len(tables[1])
    grids = choose_grids(tables[0][:: max(1, sizes[0] // 4096)], sizes, error)
    rng = np.random.default_rng(_GRID_SEED)
    best = _no_pairs(tables[0].dtype)
    for _ in range(grids.num_grids):
        noise = rng.standard_normal((tables[0].shape[1], grids.num_projections))
        directions = np.linalg.qr(noise)[0]
        shift = rng.random(grids.num_projections)
        first_cells, second_cells = (
            _hash_cells(table, directions, grids.width, shift) for table in tables
        )
        for row, column in _find_collisions(first_cells, second_cells):
            distance = np.sum((tables[0][row] - tables[1][column]) ** 2, axis=1)
            best = _merge_pairs(best, Pairs(row, column, distance), num_pairs, sizes[1])
    return best


def _hash_cells(
    table: Float[np.ndarray, "M S"],
    directions: Float[np.ndarray, "S q"],
    width: float,
    shift: Float[np.ndarray, "q"],
) -> Shaped[np.ndarray, "M"]:
    """Compute a 64-bit hash of each row's cell (Knuth's multiplicative hashing)."""
    key = np.zeros(len(table), np.uint64)
    for direction, offset in zip(directions.T, shift, strict=True):
        projected = table @ direction.astype(table.dtype)
        cell = (
            np.floor(projected.astype(np.float64) / width + offset).astype(np.int64).view(np.uint64)
        )
        key = (key ^ cell) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _find_collisions(
    first: Shaped[np.ndarray, "M"], second: Shaped[np.ndarray, "Q"]
) -> Iterator[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]]:
    """Yield all pairs of rows with equal hashes, `_BATCH` pairs at a time."""
    orders = [np.argsort(keys) for keys in (first, second)]
    first, second = (keys[order] for keys, order in zip((first, second), orders, strict=True))
    start = np.searchsorted(second, first, side="left")
    has_any = np.flatnonzero(second[np.minimum(start, len(second) - 1)] == first)
    start, end = start[has_any], np.searchsorted(second, first[has_any], side="right")
    ends = np.cumsum(end - start)
    total = int(ends[-1]) if len(ends) else 0
    for low in range(0, total, _BATCH):
        pair = np.arange(low, min(low + _BATCH, total))
        owner = np.searchsorted(ends, pair, side="right")
        yield orders[0][has_any[owner]], orders[1][end[owner] - (ends[owner] - pair)]


def _no_pairs(dtype: DTypeLike) -> Pairs:
    return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, dtype))


def _merge_pairs(best: Pairs, new: Pairs, num_pairs: int, num_columns: int) -> Pairs:
    """Merge two sets of pairs into the nearest pairs of both, without duplicates."""
    if len(best.first) == num_pairs:
        is_near = new.distance < best.distance[-1]
        new = Pairs(*(part[is_near] for part in new))
    first, second, distance = (np.concatenate(parts) for parts in zip(best, new, strict=True))
    _, once = np.unique(first.astype(np.int64) * num_columns + second, return_index=True)
    return _keep_nearest(first[once], second[once], distance[once], num_pairs)


def _keep_nearest(
    first: np.ndarray, second: np.ndarray, distance: np.ndarray, num_pairs: int
) -> Pairs:
    order = np.argsort(distance, kind="stable")[:num_pairs]
    return Pairs(first[order], second[order], distance[order])
