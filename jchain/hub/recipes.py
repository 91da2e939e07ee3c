"""Standard ways to make a pretrained transformer shallower or deeper, as chains to compare with.

Each function takes the chain of an original model, one of `Bank.parents`: blocks, then the head.
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
    """Find the best chain of each recipe that gives a model a certain number of layers.

    With fewer layers than the model: the last blocks dropped, the blocks of least influence
    dropped, and a run of blocks dropped. With more: a run of blocks repeated. With as many or more:
    nothing dropped. A run is chosen by its loss. If the chain begins with a layer of embeddings,
    that layer is kept.

    Args:
      problem: its split and loss are used to choose blocks; its limits on layers are ignored.
      parent: chain of the original model, one of `Bank.parents`.
      num_layers: layers of the chains, including a layer of embeddings.

    Returns:
      From the name of each recipe to its chain, without padding. Empty if no recipe can reach
      `num_layers`.
    """
    start, body = _split_start(problem.bank, parent)
    num = len(parent) - 1 - num_layers
    options = {"nothing dropped": np.array([body])} if num <= 0 else {}
    if 0 < -num < len(body):
        options["best run repeated"] = repeat_contiguous(body, -num)
    if 0 < num < len(body):
        influence = find_influence(problem.bank, parent, problem.data.x)[len(start) :]
        least = drop_least_influential(body, influence, num)
        options["last blocks dropped"] = drop_last(body, num)[None]
        options["blocks of least influence dropped"] = least[None]
        options["best run of blocks dropped"] = drop_contiguous(body, num)
    sized = dataclasses.replace(problem, max_layers=num_layers, min_layers=0)
    found = {}
    for name, chains in options.items():
        rows = [[*start, *map(int, row)] for row in chains]
        found[name] = rows[int(np.argmin(evaluate(sized, chain_lib.pad(rows, num_layers)).loss))]
    return found


def find_starts(bank: Bank, max_layers: int, *, min_layers: int = 0) -> Int[np.ndarray, "S L"]:
    """Find chains for a search to start from (`jc.LocalSearch(starts=)`), without using data.

    For each original model these are: the model itself if it fits; if it has too many blocks, the
    model without each run of the surplus length; if there is room, the model with each run repeated
    that fills the room.

    Args:
      bank: of one or several models.
      max_layers: most layers in a chain.
      min_layers: fewest layers in a chain; shorter chains are left out.

    Returns:
      Different chains, `[S, max_layers + 1]`. S is 0 if no chain has a suitable length.
    """
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
    """Split a chain into layers of embeddings, and blocks with the head."""
    restarts = find_restarts(bank)
    start = [token for token in parent if token in restarts]
    return start, [token for token in parent if token not in restarts]


def find_influence(
    bank: Bank, chain: Sequence[int] | Int[np.ndarray, "L"], x: Shaped[Array, "B ..."]
) -> Float[np.ndarray, "D"]:
    """Measure how much each layer of a chain changes the direction of its input.

    This is the block influence of ShortGPT (Men et al. 2024, arXiv:2403.03853): 1 minus the cosine
    of input and output, averaged over examples and tokens.

    Args:
      bank: of pretrained blocks.
      chain: layers, then a head, without padding.
      x: inputs of the stem.

    Returns:
      The influence of each layer in the order of the chain, `[D]`.
    """
    hidden, found = bank.embed(x), []
    # The features after these are the embeddings of other models.
    features = next(
        (group.module.features for group in bank.layers if isinstance(group.module, Within)), None
    )
    for token in chain[:-1]:
        output = _apply(bank.without_names(), jnp.asarray(token), hidden)
        a, b = (part[..., :features].astype(jnp.float32) for part in (hidden, output))
        lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        found.append(1 - float(jnp.mean(jnp.sum(a * b, axis=-1) / lengths)))
        hidden = output
    return np.array(found, np.float32)


@jax.jit
def _apply(bank: Bank, token: Int[Array, ""], hidden: Array) -> Array:
    return apply_token(bank.layers, token, hidden)


def drop_last(chain: Sequence[int] | Int[np.ndarray, "L"], num: int) -> Int[np.ndarray, "M"]:
    """Drop the last blocks of a chain.

    Args:
      chain: blocks, then a head.
      num: how many blocks to drop.

    Raises:
      ValueError: the chain has fewer than `num` blocks.
    """
    blocks, head = _split_head(chain, num)
    return np.append(blocks[: len(blocks) - num], head)


def drop_least_influential(
    chain: Sequence[int] | Int[np.ndarray, "L"], influence: Float[np.ndarray, "D"], num: int
) -> Int[np.ndarray, "M"]:
    """Drop the blocks of least influence from a chain.

    Args:
      chain: blocks, then a head.
      influence: of each block, from `find_influence`.
      num: how many blocks to drop.

    Raises:
      ValueError: the chain has fewer than `num` blocks.
    """
    blocks, head = _split_head(chain, num)
    return np.append(np.delete(blocks, np.argsort(influence, kind="stable")[:num]), head)


def drop_contiguous(
    chain: Sequence[int] | Int[np.ndarray, "L"], num: int
) -> Int[np.ndarray, "S M"]:
    """Drop each run of consecutive blocks of a given length from a chain.

    Args:
      chain: blocks, then a head.
      num: length of the runs.

    Returns:
      One chain for each run, `[S, M]`.

    Raises:
      ValueError: the chain has fewer than `num` blocks.
    """
    blocks, head = _split_head(chain, num)
    starts = range(len(blocks) - num + 1)
    return np.stack([np.append(np.delete(blocks, slice(i, i + num)), head) for i in starts])


def repeat_contiguous(
    chain: Sequence[int] | Int[np.ndarray, "L"], num: int
) -> Int[np.ndarray, "S M"]:
    """Repeat each run of consecutive blocks of a given length once, directly after the run.

    Args:
      chain: blocks, then a head.
      num: length of the runs.

    Returns:
      One chain for each run, `[S, M]`.

    Raises:
      ValueError: the chain has fewer than `num` blocks.
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
