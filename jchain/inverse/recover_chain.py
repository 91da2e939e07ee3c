"""Which chain of layers turned these inputs into these outputs? Half chains forward and half chains backward meet in the middle.

Of `N^D` chains of `D` layers in a bank of `N`, `N^(D/2)` halves are applied to the inputs and as many, undone, to the outputs
(Diffie and Hellman 1977, Computer 10(6); for layers, exact inverses take the place of decryption). Halves that meet have equal
activations but for noise and rounding, so the nearest pairs are candidates, which are then applied to all examples.
"""

import math
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, Int
from jchain.bank import Bank
from jchain.engine.backend import default_memory_limit
from jchain.groups import LayerGroup, check_keeps_shape
from jchain.inverse.enumerate_halves import (
    Half,
    apply_sequence,
    decode,
    make_projection,
    sketch_half,
)
from jchain.inverse.nearest_pairs import (
    Match,
    Pairs,
    choose_cells,
    estimate_all,
    match_all,
    match_cells,
    match_finite,
)
from jchain.inverse.pullback import invert_layers

# Examples on which halves are compared, and numbers of a sketch: few tell equal halves apart.
_NUM_PROBES, _NUM_SKETCH, _NUM_SKETCH_EXACT = 8, 32, 8
# Noise that is tried where none is given; seconds for which all pairs are compared rather than some noise after another; and up
# to which cells are tried then.
_TOLERANCES, _PATIENCE, _MAX_SECONDS = (0.0, 0.003, 0.01, 0.03, 0.1), 60.0, 1800.0
# How far apart halves that belong together may be, by the spread of all, before they meet nearer to the end; what that is asked
# of where all pairs are compared and no noise is given; and seconds of each sequence of the longer half.
_MAX_GAP, _LIKELY_NOISE, _AHEAD_SECONDS = 0.5, 0.05, 1e-6
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
      num_forward: layers of the half that is applied to the inputs. Noise and rounding grow where they are taken back; when
        None it is half of them, or as many more as leave halves that belong together near each other, up to a minute's work.
      num_probes: examples on which halves are compared, evenly spaced.
      num_sketch: numbers of a sketch of the activations on these, where they are not believed to be equal.
      num_candidates: pairs that are tried on the probes, of which the best 64 are tried on all examples.
      match_fn: finds the nearest pairs (`jchain.inverse.nearest_pairs`); by size and noise when None.
      memory_limit: bytes for the sketches of both halves; half of the memory when not given. Where they do not fit, one
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
    if num_forward is not None and not 0 <= num_forward <= depth:
        raise ValueError(f"expected num_forward in 0..{depth}, got {num_forward}")
    task = _make_task(bank, inputs, outputs)
    inverses = invert_layers(bank)
    num_candidates = max(num_candidates, top_k)
    if bank.num_layers**depth <= num_candidates:
        chains = np.array([*product(range(bank.num_layers), repeat=depth)])
        return _try(task, task, chains, top_k)
    few = task.take(np.linspace(0, len(outputs) - 1, min(num_probes, len(outputs))).astype(int))
    limit = memory_limit if memory_limit is not None else 2 * default_memory_limit()
    search = _Search(
        task, few, inverses, depth, num_forward, num_sketch, _Sizes(top_k, num_candidates, limit)
    )
    if match_fn is not None:
        found = search.match(match_fn, search.plan(num_sketch, tolerance or 0.0))
    elif tolerance is not None:
        found = search.match_cheapest(tolerance)
    else:
        found = search.raise_noise()
    if len(found.chains) < top_k:
        raise ValueError(
            f"found {len(found.chains)} of {top_k} chains whose halves meet: there is no such chain, or noise of the outputs or "
            "condition numbers of the layers are too high; expected a larger tolerance, more probes or fewer layers"
        )
    return found


class _Sizes(NamedTuple):
    top_k: int
    num_candidates: int
    memory_limit: int


def _check_sizes(sizes: dict[str, int], num_layers: int) -> None:
    if min(sizes.values()) < 1:
        raise ValueError(f"expected sizes of at least 1, got {sizes}")
    if sizes["top_k"] > num_layers ** sizes["depth"]:
        raise ValueError(
            f"expected top_k of at most {num_layers ** sizes['depth']} chains, got {sizes['top_k']}"
        )


class _Task(NamedTuple):
    """What chains shall do."""

    layers: tuple[LayerGroup, ...]
    hidden: Float[Array, "B ..."]
    outputs: Float[Array, "B ..."]

    @property
    def num_layers(self) -> int:
        """Layers to choose from."""
        return sum(len(group.tokens) for group in self.layers)

    def take(self, rows: Int[np.ndarray, "b"]) -> "_Task":
        """The same for some of the examples."""
        return self._replace(hidden=self.hidden[rows], outputs=self.outputs[rows])


def _make_task(bank: Bank, inputs: Any, outputs: Any) -> _Task:
    hidden, outputs = bank.embed(jnp.asarray(inputs)), jnp.asarray(outputs)
    if outputs.shape != hidden.shape:
        raise ValueError(
            f"expected outputs of the layers' shape {list(hidden.shape)}, got {list(outputs.shape)}"
        )
    for group in bank.layers:
        check_keeps_shape(group, hidden)
    for name, values in (("inputs", hidden), ("outputs", outputs)):
        if not bool(jnp.isfinite(values).all()):
            raise ValueError(f"expected finite {name}, got nan or infinity")
    return _Task(bank.layers, hidden, outputs)


class _Plan(NamedTuple):
    """How halves are compared."""

    halves: tuple[Half, Half]
    projection: Float[Array, "F S"]
    error: float  # of a number of a sketch, root mean square, of halves that belong together
    some: Float[np.ndarray, "64 S"]  # sketches of the first half


class _Search(NamedTuple):
    """What is searched for, and how much may be spent."""

    task: _Task
    few: _Task  # on the probes
    inverses: tuple[LayerGroup, ...]
    depth: int
    num_forward: int | None
    num_sketch: int
    sizes: _Sizes

    def match_cheapest(self, tolerance: float) -> Meeting:
        """By cells, or by all pairs where that takes less time."""
        plan, seconds = self.plan_cells(tolerance)
        if self.estimate_all() < seconds:
            return self.match(match_all, self.plan(self.num_sketch, tolerance))
        return self.match(match_cells, plan)

    def raise_noise(self) -> Meeting:
        """The best of what is found for more and more noise, until chains are as near as it lets them be."""
        best = Meeting(np.zeros((0, self.depth), np.int64), np.zeros(0))
        for noise in _TOLERANCES:
            plan, seconds = self.plan_cells(noise)
            if self.estimate_all() < (_PATIENCE if noise > 0 else seconds):
                found = self.match(match_all, self.plan(self.num_sketch, max(noise, _LIKELY_NOISE)))
                return _merge(best, found, self.sizes.top_k)
            if noise > 0 and seconds > _MAX_SECONDS:
                break
            best = _merge(best, self.match(match_cells, plan), self.sizes.top_k)
            near = max(2 * noise, float(jnp.finfo(plan.projection.dtype).eps) ** 0.5)
            if len(best.chains) == self.sizes.top_k and best.residuals[0] <= near:
                break
        return best

    def estimate_all(self) -> float:
        """Seconds that `match_all` takes."""
        return estimate_all(float(self.few.num_layers) ** self.depth)

    def plan_cells(self, tolerance: float) -> tuple[_Plan, float]:
        """And seconds that `match_cells` takes."""
        plan = self.plan(_NUM_SKETCH_EXACT if tolerance == 0 else self.num_sketch, tolerance)
        ahead, back = plan.halves
        return plan, choose_cells(plan.some, (ahead.size, back.size), plan.error).seconds

    def plan(self, num_sketch: int, tolerance: float) -> _Plan:
        """Halves that meet where those that belong together are near each other, as far as that is to be had."""
        half = self.depth - self.depth // 2
        if self.num_forward is not None:
            return self._plan_at(self.num_forward, num_sketch, tolerance)
        plans = []
        for num_forward in range(half, max(half + 1, self.depth)):
            if plans and self.few.num_layers**num_forward * _AHEAD_SECONDS > _PATIENCE:
                break
            plan = self._plan_at(num_forward, num_sketch, tolerance)
            spread = float(np.sqrt(np.mean(np.var(plan.some, axis=0, dtype=np.float64))))
            gap = plan.error / spread if 0 < spread < math.inf else math.inf
            plans.append((gap, num_forward, plan))
            if plans[-1][0] <= _MAX_GAP:
                break
        return min(plans, key=lambda found: found[:2])[2]

    def _plan_at(self, num_forward: int, num_sketch: int, tolerance: float) -> _Plan:
        ahead = Half(self.few.layers, self.few.hidden, num_forward)
        back = Half(self.inverses, self.few.outputs, self.depth - num_forward)
        projection = make_projection(ahead.hidden.size, num_sketch, ahead.hidden.dtype)
        some = np.asarray(_draw(ahead, 64).reshape(64, -1) @ projection)
        return _Plan(
            (ahead, back), projection, _measure_error((ahead, back), projection, tolerance), some
        )

    def match(self, match_fn: Match, plan: _Plan) -> Meeting:
        """The best of the candidates that a function finds."""
        projection = plan.projection
        # Copies for products; keys and orders of cells.
        num_copies = 1 if match_fn is match_cells else 4
        row_bytes = num_copies * projection.shape[1] * projection.dtype.itemsize + 64
        parts = _split(plan.halves, row_bytes, self.sizes.memory_limit)
        num_candidates = self.sizes.num_candidates
        chains, distances = [], []
        for last, back in parts[1]:
            table = sketch_half(back, projection)
            for first, ahead in parts[0]:
                pairs = match_finite(
                    match_fn, sketch_half(ahead, projection), table, num_candidates, plan.error
                )
                chains.append(_join(pairs, first, ahead, back, last))
                distances.append(pairs.distance)
        nearest = np.argsort(np.concatenate(distances), kind="stable")[:num_candidates]
        return _try(self.task, self.few, np.concatenate(chains)[nearest], self.sizes.top_k)


def _join(
    pairs: Pairs, first: tuple[int, ...], ahead: Half, back: Half, last: tuple[int, ...]
) -> Int[np.ndarray, "K D"]:
    """The chains of these pairs. The half that is undone goes from the chain's end to its middle."""
    num_pairs = len(pairs.first)
    ends = (
        np.broadcast_to(np.array(part, np.int64), (num_pairs, len(part)))
        for part in (first, last[::-1])
    )
    start, end = ends
    return np.concatenate(
        [start, decode(ahead, pairs.first), decode(back, pairs.second)[:, ::-1], end], axis=1
    )


def _split(
    halves: tuple[Half, Half], row_bytes: int, limit: int
) -> tuple[list[tuple[tuple[int, ...], Half]], list[tuple[tuple[int, ...], Half]]]:
    """Parts of both halves, with the layers that each begins with, of which one of each fits."""
    depths = [0, 0]

    def sizes() -> list[int]:
        return [
            half.num_tokens ** (half.num_layers - depth)
            for half, depth in zip(halves, depths, strict=True)
        ]

    while sum(sizes()) * row_bytes > limit:
        larger = int(np.argmax(sizes()))
        depths[larger] += 1
        if (
            halves[0].num_tokens ** sum(depths) > _MAX_PASSES
            or depths[larger] > halves[larger].num_layers
        ):
            whole = sum(half.size for half in halves) * row_bytes
            raise ValueError(
                f"expected halves that fit in memory_limit in at most {_MAX_PASSES} passes: their sketches need {whole:,} bytes, "
                f"and {limit:,} are allowed"
            )

    def cut(half: Half, depth: int) -> list[tuple[tuple[int, ...], Half]]:
        parts: list[tuple[tuple[int, ...], Half]] = [((), half)]
        for _ in range(depth):
            parts = [
                ((*first, n), part.advance(n))
                for first, part in parts
                for n in range(half.num_tokens)
            ]
        return parts

    return cut(halves[0], depths[0]), cut(halves[1], depths[1])


def _measure_error(
    halves: tuple[Half, Half], projection: Float[Array, "F S"], tolerance: float
) -> float:
    """How far apart the sketches of halves that belong together are: random chains there and back, with noise on the way."""
    ahead, back = halves
    rng = np.random.default_rng(0)
    worst = 0.0
    for middle in _draw(ahead, _NUM_TRIALS):
        tokens = rng.integers(0, back.num_tokens, back.num_layers)
        there = apply_sequence(ahead.layers, jnp.asarray(tokens[::-1].copy()), middle)
        noise = tolerance * float(jnp.std(there)) * rng.standard_normal(there.shape)
        again = apply_sequence(
            back.layers, jnp.asarray(tokens), there + jnp.asarray(noise, there.dtype)
        )
        gap = (again - middle).reshape(1, -1) @ projection
        floor = float(jnp.finfo(gap.dtype).eps) * float(jnp.abs(middle).max())
        worst = max(worst, float(jnp.sqrt(jnp.mean(gap**2))), floor)
    return worst if math.isfinite(worst) else math.inf


def _draw(half: Half, num: int) -> Float[Array, "n B ..."]:
    """What random sequences make of the batch."""
    tokens = np.random.default_rng(1).integers(0, half.num_tokens, (num, half.num_layers))
    return jax.lax.map(
        lambda row: apply_sequence(half.layers, row, half.hidden), jnp.asarray(tokens)
    )


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
