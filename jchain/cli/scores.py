"""Loss and accuracy of single chains on each example, with standard errors."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain import chain as chain_lib
from jchain._typing import Activations, Array, Float, Int
from jchain.bank import Bank
from jchain.cli.records import Difference, Scores, finite_or_none
from jchain.cli.setup import Setup
from jchain.data import EVALUATION_SPLITS
from jchain.engine.backend import jit_for_problem
from jchain.engine.head_calls import is_read_in_parts, score_examples
from jchain.engine.layer_calls import apply_token, infer_hidden
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


def score_chain(setup: Setup, bank: Bank, tokens: Sequence[int], max_layers: int) -> ExampleScores:
    """Score one chain on each example of `search`, `select`, and `test`, without layer penalty.

    Args:
      setup: the data and the loss.
      bank: the layers and heads.
      tokens: tokens of the chain's layers, then of its head.
      max_layers: number of layers to pad the chain to. Chains that are padded to the same number
        share compiled programs.
    """
    chain = jnp.asarray(chain_lib.pad([tokens], max_layers)[0])
    loss, accuracy = {}, {}
    for name in EVALUATION_SPLITS:
        problem = setup.make_problem(bank, name, max_layers, is_penalized=False).without_names()
        parts = [_score_examples(part, chain) for part in _cut(problem)]
        num = problem.data.x.shape[0]
        loss[name], accuracy[name] = (
            np.concatenate(rows)[:num] for rows in zip(*parts, strict=True)
        )
    return ExampleScores(loss, accuracy)


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
    hidden, head = _apply_layers(problem, chain)
    return upcast(apply_token(problem.bank.heads, head, hidden))


@jit_for_problem()
def _apply_and_score(
    problem: Problem, chain: Int[Array, "L"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Compute the loss and the accuracy of a chain on each example, without keeping outputs."""
    hidden, head = _apply_layers(problem, chain)
    return score_examples(problem, head, hidden)


def _apply_layers(problem: Problem, chain: Int[Array, "L"]) -> tuple[Activations, Int[Array, ""]]:
    """Apply the layers of a chain, and return the activations and its head."""
    bank = problem.bank
    num_layers = chain_lib.count_layers(chain, bank.num_layers)
    hidden = jax.lax.fori_loop(
        0,
        num_layers,
        lambda slot, hidden: apply_token(bank.layers, chain[slot], hidden),
        bank.embed(problem.data.x),
    )
    return hidden, chain[num_layers]


def _score_examples(
    problem: Problem, chain: Int[Array, "L"]
) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
    """Compute the loss and the accuracy of each example."""
    if is_read_in_parts(problem, infer_hidden(problem)):
        loss, accuracy = _apply_and_score(problem, chain)
        return np.asarray(loss, np.float64), np.asarray(accuracy, np.float64)
    outputs, y = _apply(problem, chain), problem.data.y

    def reduce(values: Array) -> Float[np.ndarray, "B"]:
        return np.asarray(values, np.float64).reshape(values.shape[0], -1).mean(axis=1)

    loss = reduce(problem.loss_fn(outputs, y))
    if problem.accuracy_fn is not None:
        return loss, reduce(problem.accuracy_fn(outputs, y))
    if not has_default_accuracy(y, outputs.shape):
        return loss, np.full(len(loss), np.nan)
    return loss, reduce(jnp.argmax(outputs, axis=-1) == y)
