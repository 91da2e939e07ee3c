"""The nearest pairs of two tables of sketches: all pairs by products, equal ones by sorting, near ones by an index.

Each function takes two tables `[M, S]` and `[Q, S]`, how many pairs are wanted, and how far apart (in each number of a sketch, root
mean square) those that belong together are believed to be; it returns rows of the first, rows of the second, and their squared
distances, nearest first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int, Shaped

# Rows of both tables whose distances are computed together: they stay in the cache.
_ROWS, _COLUMNS = 1024, 2048
# Cells in units of the error: so wide that a pair falls apart in one number in 20 cases or less.
_CELL = 32.0
_MAX_KEYS, _NUM_SHIFTS = 8, 3
_MIN_LIST, _NUM_PROBES = 1024, 8
_BATCH = 2**18
_ROUNDING = 1e-3


class Pairs(NamedTuple):
    """Rows that are near each other."""

    first: Int[np.ndarray, "K"]
    second: Int[np.ndarray, "K"]
    distance: Float[np.ndarray, "K"]  # squared


Match = Callable[[Any, Any, int, float], Pairs]


def match_all(first: Float[Array, "M S"], second: Float[Array, "Q S"], num_pairs: int, error: float) -> Pairs:
    """The nearest of all pairs, whatever the error, for a product of `M Q S` multiplications."""
    del error
    center = jnp.mean(first, axis=0, keepdims=True)
    first, second = first - center, second - center
    by_row, by_column = (np.asarray(nearest) for nearest in _find_nearest(first, second))
    # So many nearest pairs are in no more rows and columns, those whose nearest is nearest.
    rows, columns = (_take_smallest(nearest, num_pairs) for nearest in (by_row, by_column))
    others = second[columns]
    limit = by_row[rows].max() if num_pairs <= len(rows) else np.inf
    found = []
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        distances = np.asarray(_find_distances(first[block], others))
        # A limit by other sums of the same products, which round otherwise.
        row, column = np.nonzero(distances <= limit + _ROUNDING * np.abs(limit))
        found.append((block[row], columns[column], distances[row, column]))
    pairs = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    return _keep_nearest(pairs[0], pairs[1], pairs[2], num_pairs)


def _take_smallest(values: np.ndarray, number: int) -> np.ndarray:
    number = min(number, len(values))
    return np.sort(np.argpartition(values, number - 1)[:number])


@jax.jit
def _find_distances(first: Float[Array, "m S"], second: Float[Array, "q S"]) -> Float[Array, "m q"]:
    rows, columns = _lift(first, second)
    return rows @ columns.T


def _lift(first: Float[Array, "m S"], second: Float[Array, "q S"]) -> tuple[Float[Array, "m _"], Float[Array, "q _"]]:
    """Rows whose products are squared distances: `|f|^2 - 2 f g + |g|^2`."""
    lengths = [jnp.sum(rows**2, axis=1, keepdims=True) for rows in (first, second)]
    ones = [jnp.ones_like(length) for length in lengths]
    return jnp.concatenate([first, lengths[0], ones[0]], axis=1), jnp.concatenate(
        [-2 * second, ones[1], lengths[1]], axis=1
    )


@jax.jit
def _find_nearest(
    first: Float[Array, "M S"], second: Float[Array, "Q S"]
) -> tuple[Float[Array, "M"], Float[Array, "Q"]]:
    """Squared distance of each row to the nearest of the other table."""
    rows, columns = (_block(table, size) for table, size in zip(_lift(first, second), (_ROWS, _COLUMNS), strict=True))

    def visit(by_column: Array, block: Array) -> Any:
        def look(by_row: Array, part: Any) -> Any:
            tile, nearest = part
            distances = block @ tile.T
            return jnp.minimum(by_row, distances.min(axis=1)), jnp.minimum(nearest, distances.min(axis=0))

        by_row, by_column = jax.lax.scan(look, jnp.full(len(block), jnp.inf, block.dtype), (columns, by_column))
        return by_column, by_row

    by_column, by_row = jax.lax.scan(visit, jnp.full(columns.shape[:2], jnp.inf, columns.dtype), rows)
    return by_row.reshape(-1)[: len(first)], by_column.reshape(-1)[: len(second)]


def _block(table: Float[Array, "M S"], size: int) -> Float[Array, "n m S"]:
    """In blocks of so many rows, the last one repeated."""
    size = min(size, len(table))
    return jnp.pad(table, ((0, -len(table) % size), (0, 0)), mode="edge").reshape(-1, size, table.shape[1])


def match_sorted(first: Float[Array, "M S"], second: Float[Array, "Q S"], num_pairs: int, error: float) -> Pairs:
    """Pairs that fall into one cell of a grid whose cells are much wider than the error, found by sorting cells.

    Locality-sensitive hashing (Datar et al. 2004, Symposium on Computational Geometry) with cells so wide that few grids miss
    nothing, for sketches that are equal but for rounding. Where the error is not small beside the spread, cells hold too much:
    `count_false` says how much.
    """
    tables = [np.asarray(table) for table in (first, second)]
    num_keys = choose_keys(tables[0], len(tables[0]) * len(tables[1]), error)
    width = _CELL * max(error, float(np.finfo(tables[0].dtype).tiny))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for shift in range(_NUM_SHIFTS):
        keys = [_hash_cells(table[:, :num_keys], width, shift / _NUM_SHIFTS) for table in tables]
        found.append(_join(*keys))
    rows, columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
    distance = np.concatenate(
        [
            np.sum((tables[0][rows[i : i + _BATCH]] - tables[1][columns[i : i + _BATCH]]) ** 2, axis=1)
            for i in range(0, max(len(rows), 1), _BATCH)
        ]
    )
    _, once = np.unique(rows.astype(np.int64) * len(tables[1]) + columns, return_index=True)
    return _keep_nearest(rows[once], columns[once], distance[once], num_pairs)


def choose_keys(table: Float[np.ndarray, "M S"], num_pairs: int, error: float) -> int:
    """How many numbers of a sketch tell cells apart well enough."""
    for num_keys in range(1, min(_MAX_KEYS, table.shape[1]) + 1):
        if count_false(table, num_pairs, error, num_keys) < 1:
            return num_keys
    return min(_MAX_KEYS, table.shape[1])


def count_false(table: Float[np.ndarray, "M S"], num_pairs: int, error: float, num_keys: int = _MAX_KEYS) -> float:
    """How many of these pairs would share a cell by chance, were the numbers of sketches normal."""
    spread = np.std(table[:: max(1, len(table) // 4096), :num_keys], axis=0)
    # Two normal numbers share a cell of width w with a probability of about w / (2 sqrt(pi) spread).
    share = np.minimum(1.0, _CELL * error / np.maximum(2 * np.sqrt(np.pi) * spread, np.finfo(np.float64).tiny))
    return float(num_pairs * np.prod(share.astype(np.float64)))


def _hash_cells(numbers: Float[np.ndarray, "M q"], width: float, shift: float) -> Shaped[np.ndarray, "M"]:
    """A 64-bit number for the cell of each row (Knuth's multiplicative hashing); different cells share one by chance alone."""
    key = np.zeros(len(numbers), np.uint64)
    for column in numbers.T:
        cell = np.floor(column.astype(np.float64) / width + shift).astype(np.int64).view(np.uint64)
        key = (key ^ cell) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _join(first: Shaped[np.ndarray, "M"], second: Shaped[np.ndarray, "Q"]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of rows with equal keys."""
    orders = [np.argsort(keys) for keys in (first, second)]
    first, second = (keys[order] for keys, order in zip((first, second), orders, strict=True))
    start = np.searchsorted(second, first, side="left")
    has_any = np.flatnonzero((start < len(second)) & (second[np.minimum(start, len(second) - 1)] == first))
    start, end = start[has_any], np.searchsorted(second, first[has_any], side="right")
    count = end - start
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return orders[0][np.repeat(has_any, count)], orders[1][np.repeat(start, count) + place]


def match_approximately(first: Float[Array, "M S"], second: Float[Array, "Q S"], num_pairs: int, error: float) -> Pairs:
    """For each row the nearest of those that an inverted file of faiss looks at (Douze et al. 2024, arXiv:2401.08281).

    Raises:
      ImportError: faiss is not installed.
    """
    del error
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            'matching with noise at this size needs faiss: pip install "jchain[ann]", or pass another match_fn'
        ) from None
    table = np.ascontiguousarray(second, np.float32)
    num_lists = max(1, min(int(4 * len(table) ** 0.5), len(table) // 64))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(table.shape[1]), table.shape[1], num_lists)
    index.cp.seed = 0
    some = np.random.default_rng(0).choice(len(table), min(len(table), 64 * num_lists), replace=False)
    index.train(table[some])
    index.add(table)
    index.nprobe = _NUM_PROBES
    distance, column = np.empty(len(first), np.float32), np.empty(len(first), np.int64)
    for start in range(0, len(first), _BATCH):
        part = slice(start, start + _BATCH)
        found = index.search(np.ascontiguousarray(first[part], np.float32), 1)
        distance[part], column[part] = found[0][:, 0], found[1][:, 0]
    rows = np.flatnonzero(column >= 0)
    return _keep_nearest(rows, column[rows], distance[rows], num_pairs)


def _keep_nearest(first: np.ndarray, second: np.ndarray, distance: np.ndarray, num_pairs: int) -> Pairs:
    order = np.argsort(distance, kind="stable")[:num_pairs]
    return Pairs(first[order], second[order], distance[order])
