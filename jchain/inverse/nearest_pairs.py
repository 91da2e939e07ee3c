"""The nearest pairs of two tables of sketches: of all pairs by products, or of those that share a cell by sorting.

Each function takes two tables `[M, S]` and `[Q, S]`, how many pairs are wanted, and how far apart (in each number of a sketch, root
mean square) those that belong together are believed to be; it returns rows of the first, rows of the second, and their squared
distances, nearest first.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int, Shaped

# Rows of both tables whose distances are computed together: they stay in the cache.
_ROWS, _COLUMNS = 1024, 2048
_ROUNDING, _SLACK = 1e-3, 8
# Widths of cells that are weighed up, in units of the error; the chance to miss a pair; pairs whose distances are computed together.
_WIDTHS, _MAX_MISS, _BATCH = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0), 0.02, 2**18
# Seconds on two cores: of all pairs for each pair, of cells for each row and for each pair that shares one.
_PAIR_SECONDS, _ROW_SECONDS, _MEETING_SECONDS = 5e-10, 1e-6, 1.5e-7
# Seeds the grids. Constant, so that a search finds the same in every process.
_GRID_SEED = 1


class Pairs(NamedTuple):
    """Rows that are near each other."""

    first: Int[np.ndarray, "K"]
    second: Int[np.ndarray, "K"]
    distance: Float[np.ndarray, "K"]  # squared


Match = Callable[[Any, Any, int, float], Pairs]


def match_finite(match_fn: Match, first: Any, second: Any, num_pairs: int, error: float) -> Pairs:
    """What a function says of the rows whose length is finite."""
    places = [
        np.flatnonzero(np.isfinite(np.asarray(jnp.sum(table**2, axis=1))))
        for table in (first, second)
    ]
    if not all(map(len, places)):
        return _no_pairs(np.float32)
    # Whole tables as they are, which need no other program and no copy.
    tables = [
        t if len(rows) == len(t) else t[rows]
        for t, rows in zip((first, second), places, strict=True)
    ]
    pairs = match_fn(tables[0], tables[1], num_pairs, error)
    return Pairs(places[0][pairs.first], places[1][pairs.second], pairs.distance)


def match_all(
    first: Float[Array, "M S"], second: Float[Array, "Q S"], num_pairs: int, error: float
) -> Pairs:
    """The nearest of all pairs, whatever the error, for a product of `M Q S` multiplications."""
    del error
    # Not the mean, which one row that is far from all others would move.
    center = jnp.median(first[:: max(1, len(first) // 4096)], axis=0, keepdims=True)
    first, second = first - center, second - center
    by_row, by_column = (np.asarray(nearest) for nearest in _find_nearest(first, second))
    # So many nearest pairs are in no more rows and columns, those whose nearest is nearest.
    rows, columns = (_take_smallest(nearest, num_pairs) for nearest in (by_row, by_column))
    others = second[columns]
    limits = [near.max() for near in (by_row[rows], by_column[columns]) if num_pairs <= len(near)]
    limit = min(limits, default=np.inf)
    best = _no_pairs(by_row.dtype)
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        distances = np.asarray(_find_distances(first[block], others))
        # A limit by other sums of the same products, which round otherwise.
        row, column = np.nonzero(distances <= limit + _ROUNDING * np.abs(limit))
        new = block[row], columns[column], distances[row, column]
        best = _keep_nearest(
            *(np.concatenate(parts) for parts in zip(best, new, strict=True)), num_pairs=num_pairs
        )
    return best


def _take_smallest(values: np.ndarray, number: int) -> np.ndarray:
    number = min(number, len(values))
    return np.sort(np.argpartition(values, number - 1)[:number])


@jax.jit
def _find_distances(first: Float[Array, "m S"], second: Float[Array, "q S"]) -> Float[Array, "m q"]:
    rows, columns = _lift(first, second)
    return rows @ columns.T


def _lift(
    first: Float[Array, "m S"], second: Float[Array, "q S"]
) -> tuple[Float[Array, "m _"], Float[Array, "q _"]]:
    """Rows whose products are squared distances: `|f|^2 - 2 f g + |g|^2`, and what their sum may lose by rounding.

    Without that long rows, whose distances round to less than 0, would be nearer than short ones that are near each other.
    """
    slack = 1 + _SLACK * float(jnp.finfo(first.dtype).eps)
    lengths = [slack * jnp.sum(rows**2, axis=1, keepdims=True) for rows in (first, second)]
    ones = [jnp.ones_like(length) for length in lengths]
    return jnp.concatenate([first, lengths[0], ones[0]], axis=1), jnp.concatenate(
        [-2 * second, ones[1], lengths[1]], axis=1
    )


@jax.jit
def _find_nearest(
    first: Float[Array, "M S"], second: Float[Array, "Q S"]
) -> tuple[Float[Array, "M"], Float[Array, "Q"]]:
    """Squared distance of each row to the nearest of the other table."""
    rows, columns = (
        _block(table, size)
        for table, size in zip(_lift(first, second), (_ROWS, _COLUMNS), strict=True)
    )

    def visit(by_column: Array, block: Array) -> Any:
        def look(by_row: Array, part: Any) -> Any:
            tile, nearest = part
            distances = block @ tile.T
            return jnp.minimum(by_row, distances.min(axis=1)), jnp.minimum(
                nearest, distances.min(axis=0)
            )

        by_row, by_column = jax.lax.scan(
            look, jnp.full(len(block), jnp.inf, block.dtype), (columns, by_column)
        )
        return by_column, by_row

    by_column, by_row = jax.lax.scan(
        visit, jnp.full(columns.shape[:2], jnp.inf, columns.dtype), rows
    )
    return by_row.reshape(-1)[: len(first)], by_column.reshape(-1)[: len(second)]


def _block(table: Float[Array, "M S"], size: int) -> Float[Array, "n m S"]:
    """In blocks of so many rows, the last one repeated."""
    size = min(size, len(table))
    return jnp.pad(table, ((0, -len(table) % size), (0, 0)), mode="edge").reshape(
        -1, size, table.shape[1]
    )


class Cells(NamedTuple):
    """Grids on random projections of sketches, so that those that belong together share a cell in at least one."""

    width: float
    num_keys: int  # projections of each grid
    num_grids: int
    seconds: float  # what they take, an estimate


def estimate_all(num_pairs: float) -> float:
    """Seconds that `match_all` takes."""
    return num_pairs * _PAIR_SECONDS


def choose_cells(table: Float[np.ndarray, "m S"], sizes: tuple[int, int], error: float) -> Cells:
    """The cheapest grids that miss a pair with a probability of 2% at most, were errors and sketches normal.

    Locality-sensitive hashing (Datar et al. 2004, Symposium on Computational Geometry).

    Args:
      table: some rows of a table, for their spread.
      sizes: rows of both tables.
      error: as above.
    """
    spread = max(
        float(np.sqrt(np.mean(np.var(table, axis=0, dtype=np.float64)))),
        float(np.finfo(np.float32).tiny),
    )
    # Sums of sketches round, so no cell is narrower.
    error = max(
        error,
        float(np.finfo(table.dtype).eps * np.abs(table).max()),
        float(np.finfo(np.float32).tiny),
    )
    found = []
    for width in _WIDTHS:
        # Two numbers at a distance d share a cell with a probability of 1 - |d| / width, and normal ones by chance with
        # width / (2 sqrt(pi) spread).
        share = 1 - math.sqrt(2 / math.pi) / width
        chance = min(1.0, width * error / (2 * math.sqrt(math.pi) * spread))
        for num_keys in range(1, table.shape[1] + 1):
            hit = share**num_keys
            num_grids = (
                1 if hit > 1 - _MAX_MISS else math.ceil(math.log(_MAX_MISS) / math.log1p(-hit))
            )
            meetings = sizes[0] * sizes[1] * chance**num_keys
            seconds = num_grids * (sum(sizes) * _ROW_SECONDS + meetings * _MEETING_SECONDS)
            found.append(Cells(width * error, num_keys, num_grids, seconds))
    return min(found, key=lambda cells: cells.seconds)


def match_cells(
    first: Float[Array, "M S"], second: Float[Array, "Q S"], num_pairs: int, error: float
) -> Pairs:
    """The nearest of the pairs that share a cell of a grid (`choose_cells`): nearly all whose distance is the error."""
    tables = [np.asarray(table) for table in (first, second)]
    sizes = len(tables[0]), len(tables[1])
    cells = choose_cells(tables[0][:: max(1, sizes[0] // 4096)], sizes, error)
    rng = np.random.default_rng(_GRID_SEED)
    best = _no_pairs(tables[0].dtype)
    for _ in range(cells.num_grids):
        directions = np.linalg.qr(rng.standard_normal((tables[0].shape[1], cells.num_keys)))[0]
        shift = rng.random(cells.num_keys)
        for row, column in _join(
            *(_hash_cells(table, directions, cells.width, shift) for table in tables)
        ):
            distance = np.sum((tables[0][row] - tables[1][column]) ** 2, axis=1)
            best = _add(best, Pairs(row, column, distance), num_pairs, sizes[1])
    return best


def _hash_cells(
    table: Float[np.ndarray, "M S"],
    directions: Float[np.ndarray, "S q"],
    width: float,
    shift: Float[np.ndarray, "q"],
) -> Shaped[np.ndarray, "M"]:
    """A 64-bit number for the cell of each row (Knuth's multiplicative hashing); different cells share one by chance alone."""
    key = np.zeros(len(table), np.uint64)
    for direction, offset in zip(directions.T, shift, strict=True):
        place = table @ direction.astype(table.dtype)
        cell = np.floor(place.astype(np.float64) / width + offset).astype(np.int64).view(np.uint64)
        key = (key ^ cell) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _join(
    first: Shaped[np.ndarray, "M"], second: Shaped[np.ndarray, "Q"]
) -> Iterator[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]]:
    """All pairs of rows with equal keys, so many at a time."""
    orders = [np.argsort(keys) for keys in (first, second)]
    first, second = (keys[order] for keys, order in zip((first, second), orders, strict=True))
    start = np.searchsorted(second, first, side="left")
    has_any = np.flatnonzero(second[np.minimum(start, len(second) - 1)] == first)
    start, end = start[has_any], np.searchsorted(second, first[has_any], side="right")
    ends = np.cumsum(end - start)
    total = int(ends[-1]) if len(ends) else 0
    for low in range(0, total, _BATCH):
        place = np.arange(low, min(low + _BATCH, total))
        owner = np.searchsorted(ends, place, side="right")
        yield orders[0][has_any[owner]], orders[1][end[owner] - (ends[owner] - place)]


def _no_pairs(dtype: Any) -> Pairs:
    return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, dtype))


def _add(best: Pairs, new: Pairs, num_pairs: int, num_columns: int) -> Pairs:
    """The nearest of both, each once."""
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
