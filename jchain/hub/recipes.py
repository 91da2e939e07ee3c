"""Recipes: standard ways to make a pretrained transformer shallower or deeper.

They yield chains that a search starts from or is compared with. Most functions take the chain of an
original model, which is one of `Bank.parents`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Activations, Array, Bool, Float, Int
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.engine.evaluation import evaluate
from jchain.engine.layer_calls import apply_token, explain_wrong_input
from jchain.hub.losses import read_token_labels
from jchain.hub.padding import find_text
from jchain.hub.wrapping import Within, find_restarts
from jchain.modules.activations import check_one_array, is_one_array
from jchain.problem import Problem

EvaluateFn = Callable[[Problem, Int[np.ndarray, "P L"]], Float[np.ndarray, "P"]]


class RunLosses(NamedTuple):
    """The losses of a model in which one run of consecutive blocks is repeated or dropped.

    Attributes:
      loss: the loss of the unchanged model.
      repeated: `[D, D]`; blocks `i` to `j` are repeated once, right after they were applied. nan
        where `j < i`.
      dropped: `[D, D]`; blocks `i` to `j` are dropped. nan where `j < i`.
    """

    loss: float
    repeated: Float[np.ndarray, "D D"]
    dropped: Float[np.ndarray, "D D"]


@checked
def compute_losses(problem: Problem, chains: Int[np.ndarray, "P L"]) -> Float[np.ndarray, "P"]:
    """Compute the losses of chains, with layer penalties.

    Args:
      problem: the problem that defines the losses.
      chains: the chains.
    """
    return np.asarray(evaluate(problem, chains).loss)


@checked
def find_chains(
    problem: Problem,
    parent: Sequence[int],
    num_layers: int,
    *,
    evaluate_fn: EvaluateFn = compute_losses,
) -> dict[str, list[int]]:
    """Find the best chain of each recipe for a given number of layers.

    If the model has more layers than that, the recipes drop its last blocks, its blocks of least
    influence, or a run of consecutive blocks. If it has fewer, a recipe repeats a run of blocks. If
    it has no more layers than that, the unchanged model is also included, as "nothing dropped". The
    run with the lowest loss is chosen. A layer of embeddings at the start of the chain is kept.

    Args:
      problem: the problem whose split and loss are used to choose blocks; its limits on the number
        of layers are ignored.
      parent: chain of the original model, one of `Bank.parents`.
      num_layers: number of layers of the chains, including a layer of embeddings.
      evaluate_fn: computes the losses; a caller may show its progress.

    Returns:
      A map from the name of each recipe to its chain, without padding. It is empty if no recipe
      applies.
    """
    start, body = _split_start(problem.bank, parent)
    num = len(parent) - 1 - num_layers
    options = {"nothing dropped": np.array([body])} if num <= 0 else {}
    if 0 < -num < len(body):
        options["best run repeated"] = repeat_contiguous(body, -num)
    if 0 < num < len(body):
        influence = compute_influence(
            problem.bank, parent, problem.data.x, y=read_token_labels(problem.data.y).labels
        )
        influence = influence[len(start) :]
        least = drop_least_influential(body, influence, num)
        options["last blocks dropped"] = drop_last(body, num)[None]
        options["blocks of least influence dropped"] = least[None]
        options["best run of blocks dropped"] = drop_contiguous(body, num)
    sized = dataclasses.replace(problem, max_layers=num_layers, min_layers=0)
    found = {}
    for name, chains in options.items():
        rows = [[*start, *map(int, row)] for row in chains]
        found[name] = rows[int(np.argmin(evaluate_fn(sized, chain_lib.pad(rows, num_layers))))]
    return found


@checked
def score_runs(
    problem: Problem, parent: Sequence[int], *, evaluate_fn: EvaluateFn = compute_losses
) -> RunLosses:
    """Score each chain that repeats or drops one run of consecutive blocks of a model.

    There are `D (D + 1)` such chains for `D` blocks. A layer of embeddings at the start of the
    chain is kept.

    Args:
      problem: the problem whose split and loss score the chains; its limits on the number of layers
        are ignored.
      parent: chain of the original model, one of `Bank.parents`.
      evaluate_fn: as for `find_chains`.
    """
    start, body = _split_start(problem.bank, parent)
    blocks, head = body[:-1], body[-1:]
    rows, cols = np.triu_indices(len(blocks))
    runs = [*zip(rows.tolist(), cols.tolist(), strict=True)]
    repeated = [[*start, *blocks[: j + 1], *blocks[i:], *head] for i, j in runs]
    dropped = [[*start, *blocks[:i], *blocks[j + 1 :], *head] for i, j in runs]
    max_layers = len(start) + 2 * len(blocks)
    sized = dataclasses.replace(problem, max_layers=max_layers, min_layers=0)
    losses = evaluate_fn(sized, chain_lib.pad([[*parent], *repeated, *dropped], max_layers))
    maps = np.full((2, len(blocks), len(blocks)), np.nan, np.float32)
    maps[:, rows, cols] = losses[1:].reshape(2, -1)
    return RunLosses(float(losses[0]), *maps)


@checked
def find_starts(bank: Bank, max_layers: int, *, min_layers: int = 0) -> Int[np.ndarray, "C L"]:
    """Find chains for a search to begin at (`jc.run(starts=)`), without using data.

    An original model that has at most `max_layers` layers is a start. If it has fewer, the starts
    also include each chain that repeats a run of its blocks once to reach `max_layers`. If it has
    more, the starts are the chains that drop a run of its blocks to reach `max_layers`.

    Args:
      bank: the bank of one or several models.
      max_layers: maximum number of layers in a chain.
      min_layers: minimum number of layers in a chain; shorter chains are omitted.

    Returns:
      Distinct chains, `[C, max_layers + 1]`. C is 0 if no chain has a suitable length.
    """
    chain_lib.check_min_layers(min_layers, chain_lib.check_max_layers(max_layers))
    rows: list[tuple[int, ...]] = []
    for parent in bank.parents:
        start, body = _split_start(bank, parent)
        num = len(parent) - 1 - max_layers
        if num <= 0:
            rows.append(tuple(parent))
        if 0 < abs(num) < len(body):
            runs = drop_contiguous(body, num) if num > 0 else repeat_contiguous(body, -num)
            rows += [(*start, *map(int, row)) for row in runs]
    rows = [row for row in dict.fromkeys(rows) if len(row) - 1 >= min_layers]
    return chain_lib.pad(rows, max_layers) if rows else np.empty((0, max_layers + 1), np.int32)


def _split_start(bank: Bank, parent: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split a chain into its layers of embeddings, and its blocks with the head."""
    restarts = find_restarts(bank)
    start = [token for token in parent if token in restarts]
    return start, [token for token in parent if token not in restarts]


@checked
def compute_influence(
    bank: Bank,
    chain: Sequence[int] | Int[np.ndarray, "L"],
    x: Activations,
    *,
    y: Int[Array, "..."] | Float[Array, "..."] | Bool[Array, "..."] | None = None,
) -> Float[np.ndarray, "D"]:
    """Measure how much each layer of a chain changes the direction of its input.

    This is the block influence of ShortGPT (Men et al. 2024, arXiv:2403.03853): 1 minus the cosine
    similarity of input and output, averaged over the tokens of all examples. Padding does not
    count, nor does a token whose input or output is zero, which has no direction.

    Args:
      bank: a bank of pretrained blocks.
      chain: tokens of the layers, then of the head, without padding.
      x: examples, as inputs to the stem.
      y: the labels of `x`, which tell the padding if there is one for each token: tokens after the
        last label of a row that is not negative. If None, the tokens 0 at the end of a row of
        questions, `[B, C, T]`, are taken for padding, and text, `[B, T]`, has none.

    Returns:
      float32[D]; the influence of each layer, in the order of the chain.

    Raises:
      ValueError: if `chain` is not a chain of this bank, activations are not one array, or the bank
        does not accept `x`.
    """
    tokens, found = bank.validate(chain), []
    with explain_wrong_input(bank, x):
        hidden = bank.embed(x)
        jax.eval_shape(partial(apply_token, bank.layers), tokens[0], hidden)
    check_one_array(activations=hidden)
    is_text = _find_text(x, y, hidden.shape[:-1])
    # Any features after these are the embeddings of other models.
    features = next(
        (group.module.features for group in bank.layers if isinstance(group.module, Within)), None
    )
    for token in tokens[tokens < bank.num_layers]:
        output = _apply(bank.without_names(), jnp.asarray(token), hidden)
        a, b = (part[..., :features].astype(jnp.float32) for part in (hidden, output))
        lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        is_counted = is_text & (lengths != 0)
        cosines = jnp.sum(a * b, axis=-1) / jnp.where(is_counted, lengths, 1.0)
        total = jnp.sum(jnp.where(is_counted, 1 - cosines, 0.0))
        found.append(float(total / jnp.maximum(jnp.sum(is_counted), 1)))
        hidden = output
    return np.array(found, np.float32)


def _find_text(
    x: Activations, y: Array | None, shape: tuple[int, ...]
) -> Bool[Array, "*B T"] | Bool[Array, ""]:
    """Find the tokens that are not padding; images and the like have none."""
    is_tokens = is_one_array(x) and np.shape(x) == shape and np.issubdtype(x.dtype, np.integer)
    if is_tokens and y is not None and np.shape(y) == shape:
        return find_text(jnp.asarray(y))
    if is_tokens and y is None and len(shape) > 2:
        return find_text(jnp.asarray(x) - 1)
    return jnp.array(True)


@jax.jit
def _apply(bank: Bank, token: Int[Array, ""], hidden: Array) -> Array:
    return apply_token(bank.layers, token, hidden)


@checked
def drop_last(chain: Sequence[int] | Int[np.ndarray, "L"], num: int) -> Int[np.ndarray, "M"]:
    """Drop the last blocks of a chain.

    Args:
      chain: tokens of the blocks, then of the head.
      num: number of blocks to drop.

    Raises:
      ValueError: if the chain has fewer than `num` blocks.
    """
    blocks, head = _split_head(chain, num)
    return np.append(blocks[: len(blocks) - num], head)


@checked
def drop_least_influential(
    chain: Sequence[int] | Int[np.ndarray, "L"], influence: Float[np.ndarray, "D"], num: int
) -> Int[np.ndarray, "M"]:
    """Drop the blocks of least influence from a chain.

    Args:
      chain: tokens of the blocks, then of the head.
      influence: influence of each block, which `compute_influence` returned.
      num: number of blocks to drop.

    Raises:
      ValueError: if the chain has fewer than `num` blocks.
    """
    blocks, head = _split_head(chain, num)
    return np.append(np.delete(blocks, np.argsort(influence, kind="stable")[:num]), head)


@checked
def drop_contiguous(
    chain: Sequence[int] | Int[np.ndarray, "L"], num: int
) -> Int[np.ndarray, "S M"]:
    """Make the chains that drop one run of consecutive blocks of a given length.

    Args:
      chain: tokens of the blocks, then of the head.
      num: number of blocks in a run.

    Returns:
      int32[S, M]; one chain for each run.

    Raises:
      ValueError: if the chain has fewer than `num` blocks.
    """
    blocks, head = _split_head(chain, num)
    starts = range(len(blocks) - num + 1)
    return np.stack([np.append(np.delete(blocks, slice(i, i + num)), head) for i in starts])


@checked
def repeat_contiguous(
    chain: Sequence[int] | Int[np.ndarray, "L"], num: int
) -> Int[np.ndarray, "S M"]:
    """Make the chains that repeat one run of consecutive blocks of a given length.

    The copy of the run directly follows the run.

    Args:
      chain: tokens of the blocks, then of the head.
      num: number of blocks in a run.

    Returns:
      int32[S, M]; one chain for each run.

    Raises:
      ValueError: if the chain has fewer than `num` blocks.
    """
    blocks, head = _split_head(chain, num)
    starts = range(len(blocks) - num + 1)
    return np.stack([np.concatenate([blocks[: i + num], blocks[i:], [head]]) for i in starts])


def _split_head(
    chain: Sequence[int] | Int[np.ndarray, "L"], num: int
) -> tuple[Int[np.ndarray, "D"], int]:
    """Split a chain of at least `num` blocks into its blocks and its head."""
    tokens = np.asarray(chain, np.int32)
    if not 0 <= num < len(tokens):
        raise ValueError(f"expected 0 to {len(tokens) - 1} blocks of this chain, got {num}")
    return tokens[:-1], int(tokens[-1])
