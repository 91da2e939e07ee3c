"""The tokens of a bank: which are valid, how they are renumbered, their names and origins."""

from collections.abc import Sequence

import numpy as np

from jchain._typing import Int


def check_tokens(tokens: Sequence[int], allowed: range, kind: str) -> None:
    """Check that there is at least one token, and that all are different and in range.

    Args:
      tokens: the tokens.
      allowed: the valid tokens.
      kind: "layer" or "head", for the error.

    Raises:
      ValueError: there is no token, or one repeats or is out of range.
    """
    is_allowed = all(token in allowed for token in tokens)
    if len(tokens) == 0 or len(set(tokens)) != len(tokens) or not is_allowed:
        raise ValueError(
            f"expected different {kind} tokens in {allowed[0]}..{allowed[-1]}, at least one, "
            f"got {[*tokens]}"
        )


def renumber(num_layers: Sequence[int], num_heads: Sequence[int]) -> list[Int[np.ndarray, "E"]]:
    """Number the tokens of joined banks: all layers come before all heads.

    Args:
      num_layers: layers of each bank.
      num_heads: heads of each bank.

    Returns:
      For each bank an array `new`: `new[token]` is the token's number in the joined bank.
    """
    layer_starts = np.cumsum([0, *num_layers])
    head_starts = sum(num_layers) + np.cumsum([0, *num_heads])
    return [
        np.concatenate([layer_starts[i] + np.arange(n), head_starts[i] + np.arange(k)])
        for i, (n, k) in enumerate(zip(num_layers, num_heads, strict=True))
    ]


def move_chains(
    chains: Sequence[Sequence[int]], new: Int[np.ndarray, "E"]
) -> tuple[tuple[int, ...], ...]:
    """Renumber the tokens of chains. A chain is dropped if one of its tokens is dropped.

    Args:
      chains: layer tokens, then a head.
      new: `new[token]` is the new token, or -1 if it is dropped.
    """
    return tuple(
        tuple(int(new[token]) for token in chain)
        for chain in chains
        if all(new[token] >= 0 for token in chain)
    )


def complete_names(names: Sequence[str] | None, num_layers: int, num_heads: int) -> tuple[str, ...]:
    """Complete the names of layers and heads with the defaults `layer0`, ..., `head0`, ...

    Args:
      names: names of the layers, of the layers and heads, or None.
      num_layers: N, layers in the bank.
      num_heads: K, heads in the bank.

    Raises:
      ValueError: there are neither N nor N + K names.
    """
    heads = tuple(f"head{i}" for i in range(num_heads))
    names = tuple(f"layer{i}" for i in range(num_layers)) if names is None else tuple(names)
    if len(names) not in (num_layers, num_layers + num_heads):
        raise ValueError(
            f"expected {num_layers} names (layers) or {num_layers + num_heads} "
            f"(layers, then heads), got {len(names)}"
        )
    return names + heads if len(names) == num_layers else names


def concat_names(names: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names of joined banks, with the prefix `bank{i}/` if any name would repeat.

    Args:
      names: the names of each bank.
    """
    all_names = [name for own in names for name in own]
    is_unique = len(set(all_names)) == len(all_names)
    return [
        [name if is_unique else f"bank{i}/{name}" for name in own] for i, own in enumerate(names)
    ]


def layers_then_heads(words: Sequence[Sequence[str]], num_layers: Sequence[int]) -> tuple[str, ...]:
    """Join the names (or origins) of banks in token order: all layers come before all heads.

    Args:
      words: the names or origins of each bank.
      num_layers: layers of each bank.
    """
    pairs = list(zip(words, num_layers, strict=True))
    layers = [word for own, num in pairs for word in own[:num]]
    return (*layers, *(word for own, num in pairs for word in own[num:]))


def replace_words(
    words: Sequence[str], tokens: Sequence[int], new: Sequence[str] | None
) -> tuple[str, ...]:
    """Replace the names (or origins) of some tokens.

    Args:
      words: the names or origins of all tokens.
      tokens: the tokens to change.
      new: new names or origins of these tokens; None to change nothing.
    """
    if new is None:
        return tuple(words)
    replaced = dict(zip(tokens, new, strict=True))
    return tuple(replaced.get(token, word) for token, word in enumerate(words))
