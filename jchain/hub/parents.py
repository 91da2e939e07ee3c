"""The Kullback-Leibler divergence of a chain's next token from that of the original model.

Losses on labels see one token of text; this loss sees everything that the model would have said, so
few tokens tell chains apart (EvoPress, Sieberling et al. 2024, arXiv:2410.14649). The output of the
original model is computed once and is part of the labels, so that it follows the examples wherever
they go: into parts, into minibatches, to other devices.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Bool, Float, Int, PyTree
from jchain.arguments import check_integers, checked
from jchain.bank import Bank
from jchain.data import SPLITS, Batch, Dataset, read_batch
from jchain.engine.evaluation import apply_chain
from jchain.hub.losses import average_tokens, find_counted, read_token_labels
from jchain.losses import TokenLabels, compute_at_once, computed_by
from jchain.losses.softmax import LogSumExp, pick_logits
from jchain.modules.activations import count_examples
from jchain.pytree import describe_type, pick

# The most bytes that all probabilities may take. If they take more, only the largest are kept.
_MOST_BYTES = 2**30
_DEFAULT_TOP_K = 128
# The bytes of logits that are computed at a time.
_PART_BYTES = 2**26


class AllProbabilities(NamedTuple):
    """The distribution of a parent over all next tokens.

    Attributes:
      log_probs: the log-probabilities in bfloat16, whose rounding errors are smallest for the
        likeliest tokens, `[*B, T, V]`.
      log_sum: the log of the sum of the rounded probabilities, `[*B, T]`.
    """

    log_probs: Float[Array, "*B T V"]
    log_sum: Float[Array, "*B T"]


class TopProbabilities(NamedTuple):
    """The distribution of a parent over the likeliest next tokens and, as one, all others.

    Attributes:
      indices: the likeliest tokens, `[*B, T, k]`.
      log_probs: their log-probabilities, `[*B, T, k]`.
      rest: the probability of all other tokens, `[*B, T]`.
    """

    indices: Int[Array, "*B T k"]
    log_probs: Float[Array, "*B T k"]
    rest: Float[Array, "*B T"]


@checked
def add_parent(
    bank: Bank,
    data: Dataset | Batch,
    *,
    parent: Sequence[int] | None = None,
    top_k: int | None = None,
) -> Dataset | Batch:
    """Add the next-token distribution of the original model to the labels, for `kl_to_parent`.

    The model is applied to each example once; at most 64 MiB of logits exist at a time, or those of
    one example. The distribution takes `2 V + 4` bytes per token for V tokens in the vocabulary, or
    `8 k + 4` with `top_k=k`.

    Args:
      bank: the bank with the blocks of the model.
      data: a data set or one of its splits, such as from `load_text`.
      parent: the chain of the original model, without padding; None for the only one of
        `bank.parents`.
      top_k: how many of the likeliest tokens to keep. All others count as one token, so the
        divergence is a lower bound. None for all tokens if they take at most 1 GiB, else 128.

    Returns:
      The data, with `TokenLabels` as labels.

    Raises:
      ValueError: if the parent is not a chain of the bank, or is not given and the bank has several
        or none, the model does not take the examples, or `top_k` is not in 1..V.
    """
    tokens = _read_parent(bank, parent)
    names = SPLITS if isinstance(data, Dataset) else ()
    splits = [getattr(data, name) for name in names] or [read_batch(data)]
    sample = jax.eval_shape(partial(apply_chain, bank, tokens), pick(splits[0].x, slice(1)))
    size = sample.shape[-1]
    num_tokens = sum(int(np.prod(read_token_labels(split.y).labels.shape)) for split in splits)
    if top_k is None:
        top_k = None if num_tokens * (2 * size + 4) <= _MOST_BYTES else min(_DEFAULT_TOP_K, size)
    else:
        check_integers(at_least=1, at_most=size, top_k=top_k)
    chunk = max(1, _PART_BYTES // (4 * sample.size))
    found = [_add_to_split(bank, tokens, split, top_k, chunk) for split in splits]
    if isinstance(data, Dataset):
        return data._replace(**dict(zip(names, found, strict=True)))
    return found[0]


def _read_parent(bank: Bank, parent: Sequence[int] | None) -> Int[Array, "L"]:
    if parent is None:
        if len(bank.parents) != 1:
            raise ValueError(
                f"expected parent, one of the {len(bank.parents)} chains in bank.parents, got None"
            )
        parent = bank.parents[0]
    return jnp.asarray(bank.validate(np.asarray(parent)))


def _add_to_split(
    bank: Bank, tokens: Int[Array, "L"], split: Batch, top_k: int | None, chunk: int
) -> Batch:
    num, bare = count_examples(split.x), bank.without_names()
    parts = [
        _compute_distribution(bare, tokens, pick(split.x, slice(i, i + chunk)), top_k)
        for i in range(0, num, chunk)
    ]
    parent = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return Batch(split.x, read_token_labels(split.y)._replace(parent=parent))


@partial(jax.jit, static_argnames="top_k")
def _compute_distribution(
    bank: Bank, tokens: Int[Array, "L"], x: PyTree, top_k: int | None
) -> AllProbabilities | TopProbabilities:
    logits = apply_chain(bank, tokens, x).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    if top_k is None:
        rounded = log_probs.astype(jnp.bfloat16)
        return AllProbabilities(rounded, jax.nn.logsumexp(rounded.astype(jnp.float32), axis=-1))
    top, indices = jax.lax.top_k(log_probs, top_k)
    # What is left of 1 would be lost to rounding, so the others are added up.
    others = jnp.put_along_axis(log_probs, indices, -jnp.inf, axis=-1, inplace=False)
    return TopProbabilities(indices, top, jnp.exp(others).sum(axis=-1))


def _read_distribution(y: PyTree) -> AllProbabilities | TopProbabilities:
    parent = y.parent if isinstance(y, TokenLabels) else None
    if not isinstance(parent, AllProbabilities | TopProbabilities):
        raise ValueError(
            "expected labels with the output of the original model, from jc.hub.add_parent(bank, "
            f"data), got {describe_type(y)} without it"
        )
    return parent


class _Divergence:
    """Computes `kl_to_parent`."""

    def read_labels(self, y: PyTree) -> tuple[PyTree, Bool[Array, "*B T"]]:
        return _read_distribution(y), find_counted(y)

    def start(self, targets: Any, dtype: np.dtype) -> tuple[LogSumExp, Array]:
        num = targets.log_probs.shape[0]
        if isinstance(targets, TopProbabilities):
            return LogSumExp.start(num, dtype), jnp.full(targets.log_probs.shape, jnp.nan, dtype)
        return LogSumExp.start(num, dtype), jnp.zeros(num, dtype)

    def add(
        self, carry: tuple[LogSumExp, Array], logits: Array, first: Array | int, targets: Any
    ) -> tuple[LogSumExp, Array]:
        total, own = carry
        if isinstance(targets, TopProbabilities):
            return total.add(logits), pick_logits(own, logits, first, targets.indices)
        part = jax.lax.dynamic_slice_in_dim(targets.log_probs, first, logits.shape[1], axis=1)
        log_probs = part.astype(logits.dtype) - targets.log_sum[:, None].astype(logits.dtype)
        gaps = _weigh(jnp.exp(log_probs), log_probs - logits)
        return total.add(logits), own + gaps.sum(axis=1)

    def finish(self, carry: tuple[LogSumExp, Array], targets: Any) -> Float[Array, "n"]:
        total, own = carry
        if isinstance(targets, AllProbabilities):
            return own + total.finish()
        log_shares = own - total.finish()[:, None]
        gaps = _weigh(jnp.exp(targets.log_probs), targets.log_probs - log_shares).sum(axis=1)
        # The rest is a difference of nearly equal numbers, so it is not known below this.
        least = jnp.finfo(own.dtype).eps
        share = jnp.maximum(1 - jnp.exp(log_shares).sum(axis=1), least)
        rest = jnp.maximum(targets.rest, jnp.finfo(targets.rest.dtype).tiny)
        return gaps + _weigh(targets.rest, jnp.log(rest) - jnp.log(share))

    def reduce(self, values: Float[Array, "*B T"], y: PyTree) -> Float[Array, "*B"]:
        return average_tokens(values, y)


def _weigh(probability: Array, gap: Array) -> Array:
    """Multiply a gap by a probability; 0 if the probability is 0, where the gap may be infinite."""
    return jnp.where(probability > 0, probability * jnp.where(probability > 0, gap, 0), 0)


@checked
@computed_by(_Divergence())
def kl_to_parent(outputs: Float[Array, "*B T V"], y: PyTree) -> Float[Array, "*B"]:
    """Compute how far a chain's next-token distribution is from that of the original model.

    This is the Kullback-Leibler divergence KL(parent || chain) in nats, averaged over the tokens of
    a sequence. The parent's probabilities are those that `add_parent` kept, so the divergence of
    the parent itself is 0 up to their rounding, about 1e-4 in bfloat16.

    Args:
      outputs: logits of the next token.
      y: labels from `add_parent`. Tokens of negative labels are ignored, and weights are used, as
        in `next_token_loss`.

    Returns:
      The divergence of each sequence; 0 if all labels of a sequence are ignored.

    Raises:
      ValueError: if the labels have no parent, or one of another vocabulary.
    """
    parent = _read_distribution(y)
    if isinstance(parent, AllProbabilities) and parent.log_probs.shape != outputs.shape:
        raise ValueError(
            f"expected a parent of as many outputs as the head, {list(outputs.shape)}, got "
            f"{list(parent.log_probs.shape)}"
        )
    return compute_at_once(_Divergence(), outputs, y)
