"""What people do by hand to make a pretrained transformer shallower or deeper: chains to compare with, of a model as it was.

Each takes the model's own chain, one of `Bank.parents`, blocks and then the head.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jchain import chain as chain_lib
from jchain._typing import Array, Float, Int, Shaped
from jchain.bank import Bank
from jchain.engine.evaluate import evaluate
from jchain.engine.layer_calls import apply_token
from jchain.hub.wrapping import Within, find_restarts
from jchain.problem import Problem


def find_chains(problem: Problem, parent: Sequence[int], num_layers: int) -> dict[str, list[int]]:
    """What people do by hand to bring a model to so many layers: one chain of each recipe, by its name.

    With fewer layers: the last blocks dropped, those of the least influence, and a run of blocks; with more: a run of blocks
    repeated; with as many or more: nothing dropped. Which run, the loss says. The embeddings of a model, where they are a
    layer, stay.

    Args:
      problem: on whose split blocks are chosen; its lengths do not matter.
      parent: the model as it was, one of `Bank.parents`.
      num_layers: of the chains, embeddings included.

    Returns:
      Nothing where no recipe reaches so few layers.
    """
    start, body = _split(problem.bank, parent)
    num = len(parent) - 1 - num_layers
    options = {"nothing dropped": np.array([body])} if num <= 0 else {}
    if 0 < -num < len(body):
        options["best run repeated"] = repeat_contiguous(body, -num)
    if 0 < num < len(body):
        influence = find_influence(problem.bank, parent, problem.data.x)[len(start) :]
        options["last blocks dropped"] = drop_last(body, num)[None]
        options["blocks of least influence dropped"] = drop_least_influential(body, influence, num)[
            None
        ]
        options["best run of blocks dropped"] = drop_contiguous(body, num)
    posed = dataclasses.replace(problem, max_layers=num_layers, min_layers=0)
    found = {}
    for name, chains in options.items():
        rows = [[*start, *map(int, row)] for row in chains]
        found[name] = rows[int(np.argmin(evaluate(posed, chain_lib.pad(rows, num_layers)).loss))]
    return found


def find_starts(bank: Bank, max_layers: int, *, min_layers: int = 0) -> Int[np.ndarray, "S L"]:
    """Where a search of a model's blocks may begin (`jc.LocalSearch(starts=)`): each model as it was, or without each run of blocks
    that is too many, or with each run twice for which there is room. No data is looked at.

    Args:
      bank: of one model or several.
      max_layers: of a chain.
      min_layers: likewise.

    Returns:
      Chains `[S, max_layers + 1]`, each once; none where no model comes near.
    """
    rows: list[tuple[int, ...]] = []
    for parent in bank.parents:
        start, body = _split(bank, parent)
        num = len(parent) - 1 - max_layers
        if num <= 0:
            rows.append(tuple(parent))
        if 0 < abs(num) < len(body):
            runs = drop_contiguous(body, num) if num > 0 else repeat_contiguous(body, -num)
            rows += [(*start, *map(int, row)) for row in runs]
    rows = [row for row in dict.fromkeys(rows) if len(row) - 1 >= min_layers]
    return chain_lib.pad(rows, max_layers) if rows else np.empty((0, max_layers + 1), np.int32)


def _split(bank: Bank, parent: Sequence[int]) -> tuple[list[int], list[int]]:
    """The embeddings of a model, where they are a layer, and its blocks with the head."""
    restarts = find_restarts(bank)
    return [token for token in parent if token in restarts], [
        token for token in parent if token not in restarts
    ]


def find_influence(
    bank: Bank, chain: Sequence[int] | Int[np.ndarray, "L"], x: Shaped[Array, "B ..."]
) -> Float[np.ndarray, "D"]:
    """How much each block of a chain turns what it reads: 1 less the mean cosine of input and output, over examples and tokens.

    Block influence of ShortGPT (Men et al. 2024, arXiv:2403.03853).
    """
    hidden, found = bank.embed(x), []
    # Behind these stand the embeddings of other models.
    features = next(
        (group.module.features for group in bank.layers if isinstance(group.module, Within)), None
    )
    for token in chain[:-1]:
        made = _apply(bank.without_names(), jnp.asarray(token), hidden)
        a, b = (part[..., :features].astype(jnp.float32) for part in (hidden, made))
        lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        found.append(1 - float(jnp.mean(jnp.sum(a * b, axis=-1) / lengths)))
        hidden = made
    return np.array(found, np.float32)


@jax.jit
def _apply(bank: Bank, token: Int[Array, ""], hidden: Array) -> Array:
    return apply_token(bank.layers, token, hidden)


def drop_last(chain: Sequence[int] | Int[np.ndarray, "L"], num: int) -> Int[np.ndarray, "M"]:
    """Without the last blocks.

    Raises:
      ValueError: there are not so many blocks.
    """
    kept, head = _cut(chain, num)
    return np.append(kept[: len(kept) - num], head)


def drop_least_influential(
    chain: Sequence[int] | Int[np.ndarray, "L"], influence: Float[np.ndarray, "D"], num: int
) -> Int[np.ndarray, "M"]:
    """Without the blocks of the least influence, of `find_influence`.

    Raises:
      ValueError: there are not so many blocks.
    """
    blocks, head = _cut(chain, num)
    return np.append(np.delete(blocks, np.argsort(influence, kind="stable")[:num]), head)


def drop_contiguous(
    chain: Sequence[int] | Int[np.ndarray, "L"], num: int
) -> Int[np.ndarray, "S M"]:
    """Without each run of so many blocks.

    Raises:
      ValueError: there are not so many blocks.
    """
    blocks, head = _cut(chain, num)
    return np.stack(
        [
            np.append(np.delete(blocks, slice(i, i + num)), head)
            for i in range(len(blocks) - num + 1)
        ]
    )


def repeat_contiguous(
    chain: Sequence[int] | Int[np.ndarray, "L"], num: int
) -> Int[np.ndarray, "S M"]:
    """With each run of so many blocks twice, one behind the other.

    Raises:
      ValueError: there are not so many blocks.
    """
    blocks, head = _cut(chain, num)
    starts = range(len(blocks) - num + 1)
    return np.stack([np.concatenate([blocks[: i + num], blocks[i:], [head]]) for i in starts])


def _cut(chain: Sequence[int] | Int[np.ndarray, "L"], num: int) -> tuple[np.ndarray, int]:
    tokens = np.asarray(chain, np.int32)
    if not 0 <= num < len(tokens):
        raise ValueError(f"expected 0 to {len(tokens) - 1} blocks of this chain, got {num}")
    return tokens[:-1], int(tokens[-1])
