"""Loss and accuracy of chains on each example, with standard errors."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise, takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain import chain as chain_lib
from jchain._typing import Activations, Array, Float, Int
from jchain.bank import Bank
from jchain.cli.progress import show_parts
from jchain.cli.records import Difference, Scores, finite_or_none
from jchain.cli.setup import Setup
from jchain.data import EVALUATION_SPLITS
from jchain.engine.backend import jit_for_problem
from jchain.engine.head_calls import is_read_in_parts, score_examples
from jchain.engine.layer_calls import apply_token
from jchain.losses import has_default_accuracy
from jchain.problem import Problem
from jchain.pytree import upcast

# The number of examples that a chain is applied to at a time, the number for large splits, and the
# size above which a split is large.
_CHUNK, _LARGE_CHUNK, _LARGE = 64, 512, 1024


class ExampleScores(NamedTuple):
    """Loss and accuracy of one chain or one ensemble on each example of each split."""

    loss: dict[str, Float[np.ndarray, "B"]]
    accuracy: dict[str, Float[np.ndarray, "B"]]

    def summarize(self) -> Scores:
        """Compute the means over each split, and the standard error of the loss."""
        return {
            "loss": {name: finite_or_none(rows.mean()) for name, rows in self.loss.items()},
            "accuracy": {name: float(rows.mean()) for name, rows in self.accuracy.items()},
            "standard_error": {
                name: finite_or_none(find_standard_error(rows)) for name, rows in self.loss.items()
            },
        }

    def subtract(self, other: "ExampleScores") -> Difference:
        """Compute the difference between the losses on `test`, paired by example.

        Args:
          other: the scores to subtract.
        """
        rows = self.loss["test"] - other.loss["test"]
        return {
            "mean": finite_or_none(rows.mean()),
            "standard_error": finite_or_none(find_standard_error(rows)),
        }


def find_standard_error(rows: Float[np.ndarray, "B"]) -> float:
    """Compute the standard error of a mean; it is nan for one value, or if a value is not finite.

    Args:
      rows: the values, one per example.
    """
    if len(rows) < 2 or not np.isfinite(rows).all():
        return float("nan")
    return float(rows.std(ddof=1) / np.sqrt(len(rows)))


class _Rows(NamedTuple):
    """Loss and accuracy of one chain on each example of one split."""

    loss: Float[np.ndarray, "B"]
    accuracy: Float[np.ndarray, "B"]


class Scorer:
    """Scores chains on each example of a split, and each chain once per split.

    Chains that are scored together share the layers that they begin with.

    Args:
      setup: the data and the loss.
      shows_progress: whether scoring takes long enough to show how much of it is left.
    """

    def __init__(self, setup: Setup, *, shows_progress: bool = False) -> None:
        self._setup, self._shows_progress = setup, shows_progress
        self._banks: list[Bank] = []  # kept alive, so that a bank is known by its place
        self._known: dict[tuple[int, str, tuple[int, ...]], _Rows] = {}

    def score(
        self,
        bank: Bank,
        chains: Sequence[Sequence[int]],
        splits: Sequence[str] = EVALUATION_SPLITS,
    ) -> list[ExampleScores]:
        """Score chains without layer penalty.

        Args:
          bank: the layers and heads.
          chains: for each chain, the tokens of its layers, then of its head.
          splits: the names of the splits.
        """
        place = self._find(bank)
        rows = [tuple(map(int, tokens)) for tokens in chains]
        for name in splits:
            new = [row for row in dict.fromkeys(rows) if (place, name, row) not in self._known]
            if new:
                found = self._score_new(bank, new, name)
                self._known |= {(place, name, row): own for row, own in found.items()}
        scored = [{name: self._known[place, name, row] for name in splits} for row in rows]
        return [
            ExampleScores(*({name: own[i] for name, own in one.items()} for i in (0, 1)))
            for one in scored
        ]

    def _find(self, bank: Bank) -> int:
        for place, known in enumerate(self._banks):
            if known is bank:
                return place
        self._banks.append(bank)
        return len(self._banks) - 1

    def _score_new(
        self, bank: Bank, chains: list[tuple[int, ...]], split: str
    ) -> dict[tuple[int, ...], _Rows]:
        longest = max(1, *(len(tokens) - 1 for tokens in chains))
        problem = self._setup.make_problem(bank, split, longest, is_penalized=False)
        parts = _cut(problem.without_names())
        num_calls = len(parts) * _count_calls(chains)
        title = f"Scoring {len(chains)} chain{'s' if len(chains) > 1 else ''} on {split}"
        found: dict[tuple[int, ...], list[_Rows]] = {tokens: [] for tokens in chains}
        with contextlib.ExitStack() as stack:
            advance = _ignore
            if self._shows_progress:
                advance = stack.enter_context(show_parts(title, num_calls))
            for part in parts:
                for tokens, rows in _score_together(part, chains, advance):
                    found[tokens].append(rows)
        num = problem.num_examples
        return {
            tokens: _Rows(*(np.concatenate(leaf)[:num] for leaf in zip(*rows, strict=True)))
            for tokens, rows in found.items()
        }


def _ignore(num_parts: int) -> None:
    del num_parts


def _count_calls(chains: Sequence[tuple[int, ...]]) -> int:
    """Count the distinct prefixes: each takes one call of a layer or head."""
    return len({tokens[:size] for tokens in chains for size in range(1, len(tokens) + 1)})


def _score_together(
    problem: Problem, chains: Sequence[tuple[int, ...]], advance: Callable[[int], None]
) -> Iterator[tuple[tuple[int, ...], _Rows]]:
    """Score chains in lexical order, and keep the activations that the next ones go on from."""
    rows = sorted(chains)
    kept = {0: _embed(problem)}  # by the number of layers
    shared = [count_common(a[:-1], b[:-1]) for a, b in pairwise(rows)]
    start = 0
    for i, tokens in enumerate(rows):
        # A later chain goes on from the longest prefix that it shares with all those before it.
        later = set(accumulate(shared[i:], min))
        hidden, num_layers = kept[start], len(tokens) - 1
        for size in range(start + 1, num_layers + 1):
            hidden = _apply_layer(problem, jnp.asarray(tokens[size - 1]), hidden)
            if size in later:
                kept[size] = hidden
        yield tokens, _score_examples(problem, jnp.asarray(tokens[-1]), hidden)
        advance(num_layers - start + 1)
        start = shared[i] if i < len(shared) else 0
        kept = {size: kept[size] for size in kept if size == 0 or size in later}


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common at their start.

    Args:
      first: a sequence of tokens.
      second: another one.
    """
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in same)


def score_ensemble(
    setup: Setup, bank: Bank, chains: Sequence[Sequence[int]], max_layers: int
) -> ExampleScores | None:
    """Score the ensemble of several chains: the mean of their class probabilities.

    Args:
      setup: the data and the loss.
      bank: the layers and heads.
      chains: the tokens of each chain.
      max_layers: number of layers to pad the chains to, as in `score_chain`.

    Returns:
      The scores, or None if the loss is not cross-entropy or an example has more than one label.
    """
    is_classes = setup.loss_fn is optax.softmax_cross_entropy_with_integer_labels
    if not is_classes or setup.data.test.y.ndim != 1:
        return None
    rows = [jnp.asarray(row) for row in chain_lib.pad(chains, max_layers)]
    loss, accuracy = {}, {}
    for name in EVALUATION_SPLITS:
        problem = setup.make_problem(bank, name, max_layers).without_names()
        num, labels = problem.data.x.shape[0], np.asarray(problem.data.y)
        parts = _cut(problem)
        outputs = [
            np.concatenate([np.asarray(_apply(part, row), np.float64) for part in parts])[:num]
            for row in rows
        ]
        mean = np.mean([np.exp(_log_softmax(own)) for own in outputs], axis=0)
        loss[name] = -np.log(np.maximum(mean[np.arange(num), labels], np.finfo(np.float32).tiny))
        accuracy[name] = (mean.argmax(axis=-1) == labels).astype(np.float64)
    return ExampleScores(loss, accuracy)


def _log_softmax(outputs: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B C"]:
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _cut(problem: Problem) -> list[Problem]:
    """Cut the problem into parts of equal size; copies of the last example fill the last part."""
    num = problem.data.x.shape[0]
    # Splits use the same few part sizes, so that they share a program. A split with far fewer
    # examples is one part, which avoids needless work.
    size = _LARGE_CHUNK if num > _LARGE else _CHUNK if num > _CHUNK // 2 else num
    rows = np.minimum(np.arange(-(-num // size) * size), num - 1)
    return [problem.take(part) for part in rows.reshape(-1, size)]


@jit_for_problem()
def _apply(problem: Problem, chain: Int[Array, "L"]) -> Float[Array, "B ..."]:
    """Compute the outputs of a chain."""
    bank = problem.bank
    num_layers = chain_lib.count_layers(chain, bank.num_layers)
    hidden = jax.lax.fori_loop(
        0,
        num_layers,
        lambda slot, hidden: apply_token(bank.layers, chain[slot], hidden),
        bank.embed(problem.data.x),
    )
    return upcast(apply_token(bank.heads, chain[num_layers], hidden))


@jit_for_problem()
def _embed(problem: Problem) -> Activations:
    return problem.bank.embed(problem.data.x)


@jit_for_problem()
def _apply_layer(problem: Problem, token: Int[Array, ""], hidden: Activations) -> Activations:
    return apply_token(problem.bank.layers, token, hidden)


@jit_for_problem()
def _apply_head(problem: Problem, head: Int[Array, ""], hidden: Activations) -> Array:
    return upcast(apply_token(problem.bank.heads, head, hidden))


@jit_for_problem()
def _read_in_parts(
    problem: Problem, head: Int[Array, ""], hidden: Activations
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Compute the loss and the accuracy of each example without keeping outputs."""
    return score_examples(problem, head, hidden)


def _score_examples(problem: Problem, head: Int[Array, ""], hidden: Activations) -> _Rows:
    """Compute the loss and the accuracy of each example."""
    if is_read_in_parts(problem, hidden):
        loss, accuracy = _read_in_parts(problem, head, hidden)
        return _Rows(np.asarray(loss, np.float64), np.asarray(accuracy, np.float64))
    outputs, y = _apply_head(problem, head, hidden), problem.data.y

    def reduce(values: Array) -> Float[np.ndarray, "B"]:
        return np.asarray(values, np.float64).reshape(values.shape[0], -1).mean(axis=1)

    loss = reduce(problem.loss_fn(outputs, y))
    if problem.accuracy_fn is not None:
        return _Rows(loss, reduce(problem.accuracy_fn(outputs, y)))
    if not has_default_accuracy(y, outputs.shape):
        return _Rows(loss, np.full(len(loss), np.nan))
    return _Rows(loss, reduce(jnp.argmax(outputs, axis=-1) == y))
