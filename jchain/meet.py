"""Which chain of layers turned these inputs into these outputs? Half chains forward and half chains backward meet in the middle.

Of `N^D` chains of `D` layers in a bank of `N`, `N^(D/2)` halves are applied to the inputs and as many, undone, to the outputs
(Diffie and Hellman 1977, Computer 10(6); for layers, exact inverses take the place of decryption). Halves that meet have equal
activations but for noise and rounding, so the nearest pairs are candidates, which are then applied to all examples.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int
from jchain.bank import Bank, LayerGroup, check_keeps_shape
from jchain.engine import default_memory_limit
from jchain.halves import Half, apply_sequence, decode, make_projection, sketch_half
from jchain.inverse import invert_layers
from jchain.match import Match, Pairs, choose_cells, estimate_all, match_all, match_cells, match_finite

# Examples on which halves are compared, and numbers of a sketch: few tell equal halves apart.
_NUM_PROBES, _NUM_SKETCH, _NUM_SKETCH_EXACT = 8, 32, 8
# Noise that is tried where none is given; seconds for which all pairs are compared rather than some noise after another; and up
# to which cells are tried then.
_TOLERANCES, _PATIENCE, _MAX_SECONDS = (0.0, 0.003, 0.01, 0.03, 0.1), 60.0, 1800.0
_MAX_PASSES = 2**12
_NUM_FINALISTS = 64
_NUM_TRIALS = 8


class Meeting(NamedTuple):
    """Chains of layers, best first."""

    chains: Int[np.ndarray, "K D"]
    residuals: Float[np.ndarray, "K"]  # `|made - outputs| / |outputs|` over all examples


def meet_in_the_middle(
    bank: Bank,
    inputs: Float[Array, "B ..."],
    outputs: Float[Array, "B ..."],
    depth: int,
    top_k: int = 1,
    *,
    tolerance: float | None = None,
    num_forward: int | None = None,
    num_probes: int = _NUM_PROBES,
    num_sketch: int = _NUM_SKETCH,
    num_candidates: int = 4096,
    match_fn: Match | None = None,
    memory_limit: int | None = None,
) -> Meeting:
    """The chains of `depth` layers whose outputs come nearest to those given.

    Candidates are the pairs of halves whose sketches are nearest; those are then applied to all examples, so residuals are what
    the chains really do: a chain that is not the one has a large one. Where there are no more chains than candidates, all
    chains are tried.

    Args:
      bank: layers, all of which can be undone.
      inputs: raw input, `[B, ...]`.
      outputs: what the last layer gives, `[B, ...F]`, with or without noise.
      depth: layers of a chain, D.
      top_k: how many chains.
      tolerance: standard deviation of the noise of the outputs, by theirs. When None, halves are taken to be equal but for
        rounding, and where no chain comes so near, to be apart by more and more noise.
      num_forward: layers of the half that is applied to the inputs; half of them when None. Noise grows where it is taken
        back, so with much of it more than half may find more.
      num_probes: examples on which halves are compared, evenly spaced.
      num_sketch: numbers of a sketch of the activations on these, where they are not believed to be equal.
      num_candidates: pairs that are tried on the probes, of which the best 64 are tried on all examples.
      match_fn: finds the nearest pairs (`jchain.match`); by size and noise when None.
      memory_limit: bytes for the sketches of both halves; a quarter of the memory when not given. Where they do not fit, one
        half is gone through once for each part of the other.

    Returns:
      Chains `[top_k, D]` of layer tokens and residuals `[top_k]`.

    Raises:
      ValueError: a layer has no inverse or is singular, shapes do not fit, values are not finite, a size is not positive or
        more than there is, the sketches of one part do not fit in memory (it says how much they need), or fewer pairs of halves
        meet than chains are asked for.
    """
    sizes = {"depth": depth, "top_k": top_k, "num_probes": num_probes, "num_sketch": num_sketch}
    _check_sizes({**sizes, "num_candidates": num_candidates}, bank.num_layers)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"expected a tolerance of at least 0, got {tolerance}")
    num_forward = depth - depth // 2 if num_forward is None else num_forward
    if not 0 <= num_forward <= depth:
        raise ValueError(f"expected num_forward in 0..{depth}, got {num_forward}")
    task = _make_task(bank, inputs, outputs)
    inverses = invert_layers(bank)
    few = task.take(np.linspace(0, len(outputs) - 1, min(num_probes, len(outputs))).astype(int))
    halves = (Half(bank.layers, few.hidden, num_forward), Half(inverses, few.outputs, depth - num_forward))
    num_candidates = max(num_candidates, top_k)
    if bank.num_layers**depth <= num_candidates:
        chains = np.array([*product(range(bank.num_layers), repeat=depth)])
        return _try(task, few, chains, top_k)
    limit = memory_limit if memory_limit is not None else default_memory_limit()
    search = partial(_search, task, few, halves, _Sizes(top_k, num_candidates, limit))
    if match_fn is not None:
        found = search(match_fn, num_sketch, tolerance or 0.0)
    elif tolerance is not None:
        width, seconds = _plan(halves, num_sketch, tolerance)
        is_few = _estimate_all(halves) < seconds
        found = search(match_all if is_few else match_cells, num_sketch if is_few else width, tolerance)
    else:
        found = _raise_noise(halves, search, num_sketch, top_k)
    if len(found.chains) < top_k:
        raise ValueError(
            f"found {len(found.chains)} of {top_k} chains whose halves meet: there is no such chain, or noise of the outputs or "
            "condition numbers of the layers are too high; expected a larger tolerance, more probes or fewer layers"
        )
    return found


def _raise_noise(halves: tuple[Half, Half], search: Callable[..., Meeting], num_sketch: int, top_k: int) -> Meeting:
    """The best of what is found for more and more noise, until chains are as near as it lets them be."""
    dtype = halves[0].hidden.dtype
    best = Meeting(np.zeros((0, sum(half.num_layers for half in halves)), np.int64), np.zeros(0))
    for noise in _TOLERANCES:
        width, seconds = _plan(halves, num_sketch, noise)
        if _estimate_all(halves) < (_PATIENCE if noise > 0 else seconds):
            return _merge(best, search(match_all, num_sketch, noise), top_k)
        if noise > 0 and seconds > _MAX_SECONDS:
            break
        best = _merge(best, search(match_cells, width, noise), top_k)
        near = max(2 * noise, float(jnp.finfo(dtype).eps) ** 0.5)
        if len(best.chains) == top_k and best.residuals[0] <= near:
            break
    return best


class _Sizes(NamedTuple):
    top_k: int
    num_candidates: int
    memory_limit: int


def _plan(halves: tuple[Half, Half], num_sketch: int, tolerance: float) -> tuple[int, float]:
    """Numbers of a sketch and seconds that `match_cells` takes."""
    ahead, back = halves
    width = _NUM_SKETCH_EXACT if tolerance == 0 else num_sketch
    projection = make_projection(ahead.hidden.size, width, ahead.hidden.dtype)
    some = np.asarray(_draw(ahead, 64).reshape(64, -1) @ projection)
    return width, choose_cells(some, (ahead.size, back.size), _measure_error(halves, projection, tolerance)).seconds


def _estimate_all(halves: tuple[Half, Half]) -> float:
    """Seconds that `match_all` takes."""
    return estimate_all(float(halves[0].size) * float(halves[1].size))


def _check_sizes(sizes: dict[str, int], num_layers: int) -> None:
    if min(sizes.values()) < 1:
        raise ValueError(f"expected sizes of at least 1, got {sizes}")
    if sizes["top_k"] > num_layers ** sizes["depth"]:
        raise ValueError(f"expected top_k of at most {num_layers ** sizes['depth']} chains, got {sizes['top_k']}")


class _Task(NamedTuple):
    """What chains shall do."""

    layers: tuple[LayerGroup, ...]
    hidden: Float[Array, "B ..."]
    outputs: Float[Array, "B ..."]

    def take(self, rows: Int[np.ndarray, "b"]) -> "_Task":
        """The same for some of the examples."""
        return self._replace(hidden=self.hidden[rows], outputs=self.outputs[rows])


def _make_task(bank: Bank, inputs: Any, outputs: Any) -> _Task:
    hidden, outputs = bank.embed(jnp.asarray(inputs)), jnp.asarray(outputs)
    if outputs.shape != hidden.shape:
        raise ValueError(f"expected outputs of the layers' shape {list(hidden.shape)}, got {list(outputs.shape)}")
    for group in bank.layers:
        check_keeps_shape(group, hidden)
    for name, values in (("inputs", hidden), ("outputs", outputs)):
        if not bool(jnp.isfinite(values).all()):
            raise ValueError(f"expected finite {name}, got nan or infinity")
    return _Task(bank.layers, hidden, outputs)


def _search(
    task: _Task,
    few: _Task,
    halves: tuple[Half, Half],
    sizes: _Sizes,
    match_fn: Match,
    num_sketch: int,
    tolerance: float,
) -> Meeting:
    hidden = halves[0].hidden
    projection = make_projection(hidden.size, num_sketch, hidden.dtype)
    error = _measure_error(halves, projection, tolerance)
    # Copies for products, or keys and orders of cells.
    row_bytes = 4 * projection.shape[1] * hidden.dtype.itemsize + 64
    parts = _split(halves, row_bytes, sizes.memory_limit)
    chains, distances = [], []
    for last, back in parts[1]:
        table = sketch_half(back, projection)
        for first, ahead in parts[0]:
            pairs = match_finite(match_fn, sketch_half(ahead, projection), table, sizes.num_candidates, error)
            chains.append(_join(pairs, first, ahead, back, last))
            distances.append(pairs.distance)
    nearest = np.argsort(np.concatenate(distances), kind="stable")[: sizes.num_candidates]
    return _try(task, few, np.concatenate(chains)[nearest], sizes.top_k)


def _join(
    pairs: Pairs, first: tuple[int, ...], ahead: Half, back: Half, last: tuple[int, ...]
) -> Int[np.ndarray, "K D"]:
    """The chains of these pairs. The half that is undone goes from the chain's end to its middle."""
    num_pairs = len(pairs.first)
    ends = (np.broadcast_to(np.array(part, np.int64), (num_pairs, len(part))) for part in (first, last[::-1]))
    start, end = ends
    return np.concatenate([start, decode(ahead, pairs.first), decode(back, pairs.second)[:, ::-1], end], axis=1)


def _split(
    halves: tuple[Half, Half], row_bytes: int, limit: int
) -> tuple[list[tuple[tuple[int, ...], Half]], list[tuple[tuple[int, ...], Half]]]:
    """Parts of both halves, with the layers that each begins with, of which one of each fits."""
    depths = [0, 0]

    def sizes() -> list[int]:
        return [half.num_tokens ** (half.num_layers - depth) for half, depth in zip(halves, depths, strict=True)]

    while sum(sizes()) * row_bytes > limit:
        larger = int(np.argmax(sizes()))
        depths[larger] += 1
        if halves[0].num_tokens ** sum(depths) > _MAX_PASSES or depths[larger] > halves[larger].num_layers:
            whole = sum(half.size for half in halves) * row_bytes
            raise ValueError(
                f"expected halves that fit in memory_limit in at most {_MAX_PASSES} passes: their sketches need {whole:,} bytes, "
                f"and {limit:,} are allowed"
            )

    def cut(half: Half, depth: int) -> list[tuple[tuple[int, ...], Half]]:
        parts: list[tuple[tuple[int, ...], Half]] = [((), half)]
        for _ in range(depth):
            parts = [((*first, n), part.advance(n)) for first, part in parts for n in range(half.num_tokens)]
        return parts

    return cut(halves[0], depths[0]), cut(halves[1], depths[1])


def _measure_error(halves: tuple[Half, Half], projection: Float[Array, "F S"], tolerance: float) -> float:
    """How far apart the sketches of halves that belong together are: random chains there and back, with noise on the way."""
    ahead, back = halves
    rng = np.random.default_rng(0)
    worst = 0.0
    for middle in _draw(ahead, _NUM_TRIALS):
        tokens = rng.integers(0, back.num_tokens, back.num_layers)
        there = apply_sequence(ahead.layers, jnp.asarray(tokens[::-1].copy()), middle)
        noise = tolerance * float(jnp.std(there)) * rng.standard_normal(there.shape)
        again = apply_sequence(back.layers, jnp.asarray(tokens), there + jnp.asarray(noise, there.dtype))
        gap = (again - middle).reshape(1, -1) @ projection
        floor = float(jnp.finfo(gap.dtype).eps) * float(jnp.abs(middle).max())
        worst = max(worst, float(jnp.sqrt(jnp.mean(gap**2))), floor)
    return worst if math.isfinite(worst) else math.inf


def _draw(half: Half, num: int) -> Float[Array, "n B ..."]:
    """What random sequences make of the batch."""
    tokens = np.random.default_rng(1).integers(0, half.num_tokens, (num, half.num_layers))
    return jax.lax.map(lambda row: apply_sequence(half.layers, row, half.hidden), jnp.asarray(tokens))


def _try(task: _Task, few: _Task, chains: Int[np.ndarray, "K D"], top_k: int) -> Meeting:
    """The best of them: by all examples, of those that are best by few."""
    num_finalists = max(top_k, _NUM_FINALISTS)
    if len(chains) > num_finalists:
        chains = chains[np.argsort(_measure(few, chains), kind="stable")[:num_finalists]]
    residuals = _measure(task, chains)
    best = np.argsort(residuals, kind="stable")[:top_k]
    return Meeting(chains[best], residuals[best])


@jax.jit
def _measure_all(task: _Task, chains: Int[Array, "K D"]) -> Float[Array, "K"]:
    size = jnp.linalg.norm(task.outputs)

    def measure(chain: Array) -> Array:
        gap = jnp.linalg.norm(apply_sequence(task.layers, chain, task.hidden) - task.outputs)
        return jnp.where(jnp.isfinite(gap), gap, jnp.inf) / jnp.where(size > 0, size, 1.0)

    return jax.lax.map(measure, chains)


def _measure(task: _Task, chains: Int[np.ndarray, "K D"]) -> Float[np.ndarray, "K"]:
    # Few sizes, so few programs.
    step = _NUM_FINALISTS if len(chains) <= _NUM_FINALISTS else 4096
    size = -(-len(chains) // step) * step
    padded = np.pad(chains, ((0, size - len(chains)), (0, 0)))
    return np.asarray(_measure_all(task, jnp.asarray(padded)))[: len(chains)]


def _merge(first: Meeting, second: Meeting, top_k: int) -> Meeting:
    chains = np.concatenate([first.chains, second.chains])
    residuals = np.concatenate([first.residuals, second.residuals])
    _, once = np.unique(chains, axis=0, return_index=True)
    best = once[np.argsort(residuals[once], kind="stable")][:top_k]
    return Meeting(chains[best], residuals[best])
