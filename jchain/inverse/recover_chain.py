"""Recover the chain of layers that turned given inputs into given outputs.

A bank of `N` layers has `N^D` chains of `D` layers. Meeting in the middle (Diffie and Hellman 1977,
Computer 10(6)) applies only the `N^(D/2)` first halves to the inputs, and the inverses of the
`N^(D/2)` second halves to the outputs:

1. Enumerate both halves and sketch their activations (`jchain.inverse.enumerate_halves`).
2. Match: the two halves of the right chain have equal activations, up to noise and rounding, so the
   nearest pairs of sketches are the candidates (`jchain.inverse.nearest_pairs`).
3. Verify: apply the candidates to all examples and keep the ones with the smallest residuals.

If the number of layers in the first half is not given, it is chosen so that noise does not hide the
right pair (`_HalfSearch.plan`).
"""

import math
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Activations, Array, Float, Int
from jchain.arguments import check_at_least_one, check_integers, checked
from jchain.bank import Bank
from jchain.data import read_batch
from jchain.engine.backend import default_memory_limit
from jchain.groups import LayerGroup, check_keeps_shape
from jchain.inverse.enumerate_halves import (
    Half,
    apply_sequence,
    decode_sequences,
    make_projection,
    sketch_half,
)
from jchain.inverse.nearest_pairs import (
    MatchFn,
    Pairs,
    choose_grids,
    estimate_match_all,
    match_all,
    match_cells,
    match_finite,
)
from jchain.inverse.pullback import check_no_stages, invert_layers
from jchain.modules.activations import check_one_array, to_one_array

# The number of examples on which halves are compared, the size of a sketch, and the size of a
# sketch if no noise is assumed, when a few numbers are enough to tell halves apart.
_NUM_PROBES, _NUM_SKETCH, _NUM_SKETCH_EXACT = 8, 32, 8
# The noise levels to try with `match_cells` if no tolerance is given. All pairs are compared
# instead if that takes less than `_PATIENCE` seconds. Levels above `_MAX_SECONDS` are not tried.
_NOISE_LEVELS, _PATIENCE, _MAX_SECONDS = (0.0, 0.003, 0.01, 0.03, 0.1), 60.0, 1800.0
# The error of a matching pair, in units of the spread of all sketches, above which the first half
# is made longer; the least noise that is assumed if all pairs are compared without a tolerance; and
# the seconds that each sequence of the longer half takes.
_MAX_GAP, _LIKELY_NOISE, _SEQUENCE_SECONDS = 0.5, 0.05, 1e-6
_MAX_PASSES, _NUM_FINALISTS, _NUM_TRIALS, _MAX_DEPTH = 2**12, 64, 8, 1000


class RecoveredChains(NamedTuple):
    """Sequences of layers whose outputs are nearest to the given outputs, best first.

    Attributes:
      layers: the tokens of each sequence, `[Q, D]`, without a head.
      residuals: `|sequence(inputs) - outputs| / |outputs|` over all examples, `[Q]`.
    """

    layers: Int[np.ndarray, "Q D"]
    residuals: Float[np.ndarray, "Q"]


@checked
def meet_in_the_middle(
    bank: Bank,
    inputs: Activations,
    outputs: Float[Array, "B ..."],
    depth: int,
    top_k: int = 1,
    *,
    tolerance: float | None = None,
    num_forward: int | None = None,
    num_probes: int = _NUM_PROBES,
    num_sketch: int = _NUM_SKETCH,
    num_candidates: int = 4096,
    match_fn: MatchFn | None = None,
    memory_limit: int | None = None,
) -> RecoveredChains:
    """Find the chains of `depth` layers whose outputs are nearest to the given outputs.

    Residuals are computed from the chains themselves, not from sketches, so the residual of a wrong
    chain is large. All chains are tried if there are at most `num_candidates` of them.

    Args:
      bank: the bank, whose layers must all be invertible.
      inputs: the raw input, `[B, ...]`.
      outputs: the outputs of the last layer, `[B, ...F]`, exact or noisy.
      depth: the number of layers in a chain, D.
      top_k: the number of chains to return.
      tolerance: the ratio of the standard deviations of the outputs' noise and of the outputs. If
        None, the search first assumes no noise beyond rounding, and then more and more noise, until
        a chain fits as well as the assumed noise allows.
      num_forward: the number of layers in the half that is applied to the inputs. The inverses of
        the other layers amplify noise and rounding. None for half of the layers, or for more of
        them if noise would hide the right pair and they take at most a minute.
      num_probes: the number of evenly spaced examples on which halves are compared.
      num_sketch: the size of a sketch of the activations; smaller if no noise is assumed.
      num_candidates: the number of nearest pairs that are verified on the probes. The best 64 of
        them are then verified on all examples.
      match_fn: the function that finds the nearest pairs (`jchain.inverse.nearest_pairs`). If None,
        it is chosen by estimated time.
      memory_limit: the number of bytes for the sketches of both halves; None for half of the
        memory. Halves that do not fit are split into parts, and all pairs of parts are matched.

    Returns:
      The chains `[top_k, D]`, as layer tokens, and their residuals `[top_k]`.

    Raises:
      ValueError: if a layer has no inverse or is singular, activations are not one array, shapes do
        not fit, values are not finite, a size is out of range, the sketches of one part exceed the
        memory limit, or fewer than `top_k` chains are found.
    """
    sizes = {"depth": depth, "top_k": top_k, "num_probes": num_probes, "num_sketch": num_sketch}
    _check_sizes({**sizes, "num_candidates": num_candidates}, bank.num_layers)
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"expected a tolerance of at least 0, got {tolerance}")
    if num_forward is not None and not 0 <= num_forward <= depth:
        raise ValueError(f"expected num_forward in 0..{depth}, got {num_forward}")
    check_no_stages(bank.layers, "jc.meet_in_the_middle")
    examples = _embed_examples(bank, inputs, outputs)
    inverses = invert_layers(bank)
    num_candidates = max(num_candidates, top_k)
    if bank.num_layers**depth <= num_candidates:
        chains = np.array([*product(range(bank.num_layers), repeat=depth)])
        return _verify(examples, examples, chains, top_k)
    rows = np.linspace(0, len(outputs) - 1, min(num_probes, len(outputs))).astype(int)
    limit = memory_limit if memory_limit is not None else 2 * default_memory_limit()
    search = _HalfSearch(
        examples,
        examples.take(rows),
        inverses,
        depth,
        num_forward,
        num_sketch,
        top_k,
        num_candidates,
        limit,
    )
    if match_fn is not None:
        found = search.match(match_fn, search.plan(num_sketch, tolerance or 0.0))
    elif tolerance is not None:
        found = search.match_at_noise(tolerance)
    else:
        found = search.match_at_rising_noise()
    if len(found.layers) < top_k:
        raise ValueError(
            f"found {len(found.layers)} of {top_k} chains whose halves meet: no chain gives these "
            "outputs, or the noise of the outputs or the condition numbers of the layers are too "
            "high; try a larger tolerance, more probes, or fewer layers"
        )
    return found


def _check_sizes(sizes: dict[str, int], num_layers: int) -> None:
    check_at_least_one(**sizes)
    check_integers(at_least=1, at_most=_MAX_DEPTH, depth=sizes["depth"])
    if sizes["top_k"] > (num := num_layers ** sizes["depth"]):
        raise ValueError(f"expected top_k of at most {num} chains, got {sizes['top_k']}")


class _Examples(NamedTuple):
    """Examples whose inputs a chain of these layers should map to the outputs."""

    layers: tuple[LayerGroup, ...]
    hidden: Float[Array, "B ..."]  # embedded inputs
    outputs: Float[Array, "B ..."]

    @property
    def num_layers(self) -> int:
        """The number of layers to choose from, N."""
        return sum(len(group.tokens) for group in self.layers)

    def take(self, rows: Int[np.ndarray, "b"]) -> "_Examples":
        """Return some of the examples."""
        return self._replace(hidden=self.hidden[rows], outputs=self.outputs[rows])


def _embed_examples(bank: Bank, inputs: Activations, outputs: Array) -> _Examples:
    x, outputs = read_batch((inputs, to_one_array(outputs, "outputs")))
    hidden = bank.embed(x)
    check_one_array(activations=hidden)
    if outputs.shape != hidden.shape:
        shapes = f"{list(hidden.shape)}, like the inputs, got {list(outputs.shape)}"
        raise ValueError(f"expected outputs of shape {shapes}")
    for group in bank.layers:
        check_keeps_shape(group, hidden)
    for name, values in (("inputs", hidden), ("outputs", outputs)):
        if not bool(jnp.isfinite(values).all()):
            raise ValueError(f"expected finite {name}, got nan or infinity")
    return _Examples(bank.layers, hidden, outputs)


class _MatchPlan(NamedTuple):
    """The halves and how they are compared."""

    halves: tuple[Half, Half]  # layers that start from the inputs, inverses from the outputs
    projection: Float[Array, "F S"]
    # root mean square difference, per number of a sketch, between halves that belong together
    error: float
    sample: Float[np.ndarray, "64 S"]  # sketches of random first halves


class _HalfSearch(NamedTuple):
    """A meet-in-the-middle search, with its limits."""

    examples: _Examples
    probes: _Examples
    inverses: tuple[LayerGroup, ...]
    depth: int
    num_forward: int | None
    num_sketch: int
    top_k: int
    num_candidates: int
    memory_limit: int

    def match_at_noise(self, tolerance: float) -> RecoveredChains:
        """Match at a given noise level, by the method with the smaller estimated time."""
        plan, seconds = self.plan_cells(tolerance)
        if self.estimate_all() < seconds:
            return self.match(match_all, self.plan(self.num_sketch, tolerance))
        return self.match(match_cells, plan)

    def match_at_rising_noise(self) -> RecoveredChains:
        """Assume more and more noise until a chain fits as well as that noise allows."""
        best = RecoveredChains(np.zeros((0, self.depth), np.int64), np.zeros(0))
        for noise in _NOISE_LEVELS:
            plan, seconds = self.plan_cells(noise)
            if self.estimate_all() < (_PATIENCE if noise > 0 else seconds):
                found = self.match(match_all, self.plan(self.num_sketch, max(noise, _LIKELY_NOISE)))
                return _merge(best, found, self.top_k)
            if noise > 0 and seconds > _MAX_SECONDS:
                break
            best = _merge(best, self.match(match_cells, plan), self.top_k)
            limit = max(2 * noise, float(jnp.finfo(plan.projection.dtype).eps) ** 0.5)
            if len(best.layers) == self.top_k and best.residuals[0] <= limit:
                break
        return best

    def estimate_all(self) -> float:
        """Estimate the time of `match_all`, in seconds."""
        return estimate_match_all(float(self.probes.num_layers) ** self.depth)

    def plan_cells(self, tolerance: float) -> tuple[_MatchPlan, float]:
        """Return a plan for `match_cells`, and its estimated time in seconds."""
        plan = self.plan(_NUM_SKETCH_EXACT if tolerance == 0 else self.num_sketch, tolerance)
        sizes = plan.halves[0].num_sequences, plan.halves[1].num_sequences
        return plan, choose_grids(plan.sample, sizes, plan.error).seconds

    def plan(self, num_sketch: int, tolerance: float) -> _MatchPlan:
        """Choose the first split whose sketch error is small enough.

        If no error is small enough, choose the affordable split with the smallest error.
        """
        half = self.depth - self.depth // 2
        if self.num_forward is not None:
            return self._plan_at(self.num_forward, num_sketch, tolerance)
        plans = []
        for num_forward in range(half, max(half + 1, self.depth)):
            if plans and self.probes.num_layers**num_forward * _SEQUENCE_SECONDS > _PATIENCE:
                break
            plan = self._plan_at(num_forward, num_sketch, tolerance)
            spread = float(np.sqrt(np.mean(np.var(plan.sample, axis=0, dtype=np.float64))))
            gap = plan.error / spread if 0 < spread < math.inf else math.inf
            plans.append((gap, num_forward, plan))
            if plans[-1][0] <= _MAX_GAP:
                break
        return min(plans, key=lambda found: found[:2])[2]

    def _plan_at(self, num_forward: int, num_sketch: int, tolerance: float) -> _MatchPlan:
        forward_half = Half(self.probes.layers, self.probes.hidden, num_forward)
        backward_half = Half(self.inverses, self.probes.outputs, self.depth - num_forward)
        projection = make_projection(
            forward_half.hidden.size, num_sketch, forward_half.hidden.dtype
        )
        sample = np.asarray(_apply_random_sequences(forward_half, 64).reshape(64, -1) @ projection)
        error = _estimate_error((forward_half, backward_half), projection, tolerance)
        return _MatchPlan((forward_half, backward_half), projection, error, sample)

    def match(self, match_fn: MatchFn, plan: _MatchPlan) -> RecoveredChains:
        """Sketch both halves, find the nearest pairs, and verify these candidates."""
        projection = plan.projection
        # `match_all` makes copies for its matrix products. The 64 bytes are for the hashes and sort
        # orders of `match_cells`.
        num_copies = 1 if match_fn is match_cells else 4
        row_bytes = num_copies * projection.shape[1] * projection.dtype.itemsize + 64
        parts = _split(plan.halves, row_bytes, self.memory_limit)
        chains, distances = [], []
        for last, backward_half in parts[1]:
            table = sketch_half(backward_half, projection)
            for first, forward_half in parts[0]:
                pairs = match_finite(
                    match_fn,
                    sketch_half(forward_half, projection),
                    table,
                    self.num_candidates,
                    plan.error,
                )
                chains.append(_join_halves(pairs, first, forward_half, backward_half, last))
                distances.append(pairs.distance)
        nearest = np.argsort(np.concatenate(distances), kind="stable")[: self.num_candidates]
        return _verify(self.examples, self.probes, np.concatenate(chains)[nearest], self.top_k)


def _join_halves(
    pairs: Pairs,
    first: tuple[int, ...],
    forward_half: Half,
    backward_half: Half,
    last: tuple[int, ...],
) -> Int[np.ndarray, "K D"]:
    """Join the halves of each pair into a chain.

    Sequences of inverses run from the end of a chain to its middle, so they are reversed.
    """
    num_pairs = len(pairs.first)
    start, end = (
        np.broadcast_to(np.array(part, np.int64), (num_pairs, len(part)))
        for part in (first, last[::-1])
    )
    return np.concatenate(
        [
            start,
            decode_sequences(forward_half, pairs.first),
            decode_sequences(backward_half, pairs.second)[:, ::-1],
            end,
        ],
        axis=1,
    )


def _split(
    halves: tuple[Half, Half], row_bytes: int, limit: int
) -> tuple[list[tuple[tuple[int, ...], Half]], list[tuple[tuple[int, ...], Half]]]:
    """Split both halves by their first layers until one part of each fits in memory.

    Each part is returned with its first layers.
    """
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
            whole = sum(half.num_sequences for half in halves) * row_bytes
            raise ValueError(
                f"expected halves that fit in memory_limit in at most {_MAX_PASSES} passes: "
                f"their sketches need {whole:,} bytes, and {limit:,} are allowed"
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


def _estimate_error(
    halves: tuple[Half, Half], projection: Float[Array, "F S"], tolerance: float
) -> float:
    """Estimate the sketch error of halves that belong together.

    To do so, apply random layers, add the noise, and apply the inverses of the layers.
    """
    forward_half, backward_half = halves
    rng, worst = np.random.default_rng(0), 0.0
    for middle in _apply_random_sequences(forward_half, _NUM_TRIALS):
        tokens = rng.integers(0, backward_half.num_tokens, backward_half.num_layers)
        outputs = apply_sequence(forward_half.layers, jnp.asarray(tokens[::-1].copy()), middle)
        noise = tolerance * float(jnp.std(outputs)) * rng.standard_normal(outputs.shape)
        recovered = apply_sequence(
            backward_half.layers, jnp.asarray(tokens), outputs + jnp.asarray(noise, outputs.dtype)
        )
        gap = (recovered - middle).reshape(1, -1) @ projection
        floor = float(jnp.finfo(gap.dtype).eps) * float(jnp.abs(middle).max())
        worst = max(worst, float(jnp.sqrt(jnp.mean(gap**2))), floor)
    return worst if math.isfinite(worst) else math.inf


def _apply_random_sequences(half: Half, num: int) -> Float[Array, "n B ..."]:
    """Compute the activations after random sequences of a half."""
    tokens = np.random.default_rng(1).integers(0, half.num_tokens, (num, half.num_layers))
    layers, hidden = half.layers, half.hidden
    return jax.lax.map(lambda row: apply_sequence(layers, row, hidden), jnp.asarray(tokens))


def _verify(
    examples: _Examples, probes: _Examples, chains: Int[np.ndarray, "K D"], top_k: int
) -> RecoveredChains:
    """Rank candidates by residuals on the probes, and then the best of them on all examples."""
    num_finalists = max(top_k, _NUM_FINALISTS)
    if len(chains) > num_finalists:
        order = np.argsort(_compute_residuals(probes, chains), kind="stable")
        chains = chains[order[:num_finalists]]
    residuals = _compute_residuals(examples, chains)
    best = np.argsort(residuals, kind="stable")[:top_k]
    return RecoveredChains(chains[best], residuals[best])


@jax.jit
def _map_residuals(examples: _Examples, chains: Int[Array, "K D"]) -> Float[Array, "K"]:
    size = jnp.linalg.norm(examples.outputs)

    def compute_residual(chain: Array) -> Array:
        outputs = apply_sequence(examples.layers, chain, examples.hidden)
        gap = jnp.linalg.norm(outputs - examples.outputs)
        return jnp.where(jnp.isfinite(gap), gap, jnp.inf) / jnp.where(size > 0, size, 1.0)

    return jax.lax.map(compute_residual, chains)


def _compute_residuals(data: _Examples, chains: Int[np.ndarray, "K D"]) -> Float[np.ndarray, "K"]:
    # Pad to one of a few sizes, because each size compiles another program.
    step = _NUM_FINALISTS if len(chains) <= _NUM_FINALISTS else 4096
    padded = np.pad(chains, ((0, -len(chains) % step), (0, 0)))
    return np.asarray(_map_residuals(data, jnp.asarray(padded)))[: len(chains)]


def _merge(first: RecoveredChains, second: RecoveredChains, top_k: int) -> RecoveredChains:
    chains = np.concatenate([first.layers, second.layers])
    residuals = np.concatenate([first.residuals, second.residuals])
    _, once = np.unique(chains, axis=0, return_index=True)
    best = once[np.argsort(residuals[once], kind="stable")][:top_k]
    return RecoveredChains(chains[best], residuals[best])
