"""Functions that check and renumber the tokens of a bank and their names and origins."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from jchain._typing import Int
from jchain.pytree import shorten


def check_is_tokens(tokens: Sequence[int]) -> None:
    """Check the tokens of a group.

    Args:
      tokens: the tokens.

    Raises:
      ValueError: if there is no token, or they are not different integers of at least 0.
    """
    is_token = [isinstance(token, Integral) and token >= 0 for token in tokens]
    if not is_token or not all(is_token) or len(set(tokens)) < len(tokens):
        raise ValueError(
            f"expected different tokens of at least 0, one or more, got {shorten(tokens)}"
        )


def check_numbering(layers: Sequence[int], heads: Sequence[int], names: Sequence[str]) -> None:
    """Check that the layers of a bank are its first tokens, and its heads the next ones.

    Args:
      layers: the tokens of the layers, in any order.
      heads: the tokens of the heads, in any order.
      names: the name of each token; empty if they have no names.

    Raises:
      ValueError: if a token is missing, repeats, or is that of the other kind, or there are names
        for another number of tokens.
    """
    first = 0
    for kind, tokens in (("layers", layers), ("heads", heads)):
        last = first + len(tokens) - 1
        if not tokens or sorted(tokens) != list(range(first, last + 1)):
            raise ValueError(
                f"expected {kind} with the tokens {first}, {first + 1}, ..., at least one, got "
                f"{shorten([*tokens])}"
            )
        first = last + 1
    if names and len(names) != first:
        raise ValueError(f"expected {first} names, one per layer and head, got {len(names)}")


def check_tokens(tokens: Sequence[int], allowed: range, kind: str) -> None:
    """Check that there is at least one token and that all tokens are different and in range.

    Args:
      tokens: the tokens to check.
      allowed: the range of valid tokens.
      kind: "layer" or "head", for the error message.

    Raises:
      ValueError: if there is no token, or a token repeats or is out of range.
    """
    is_allowed = all(token in allowed for token in tokens)
    if len(tokens) == 0 or len(set(tokens)) != len(tokens) or not is_allowed:
        raise ValueError(
            f"expected different {kind} tokens in {allowed[0]}..{allowed[-1]}, at least one, "
            f"got {[*tokens]}"
        )


def renumber(num_layers: Sequence[int], num_heads: Sequence[int]) -> list[Int[np.ndarray, "E"]]:
    """Number the tokens of joined banks, with all layers before all heads.

    Args:
      num_layers: number of layers in each bank.
      num_heads: number of heads in each bank.

    Returns:
      An array `new` for each bank, where `new[token]` is the token in the joined bank.
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
    """Renumber the tokens of chains, and drop each chain that has a dropped token.

    Args:
      chains: the tokens of each chain: its layers, then its head.
      new: array `[E]` that maps each token to its new token, or to -1 if the token is dropped.
    """
    return tuple(
        tuple(int(new[token]) for token in chain)
        for chain in chains
        if all(new[token] >= 0 for token in chain)
    )


def complete_names(names: Sequence[str] | None, num_layers: int, num_heads: int) -> tuple[str, ...]:
    """Complete the names of layers and heads with the defaults `layer0`, ..., `head0`, ...

    Args:
      names: names of the layers, or of the layers and heads; None to use only defaults.
      num_layers: number of layers in the bank, N.
      num_heads: number of heads in the bank, K.

    Raises:
      ValueError: if the number of names is neither N nor N + K.
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
    """Return the names of joined banks, with the prefix `bank{i}/` if any name would repeat.

    Args:
      names: for each bank, the names of its tokens.
    """
    all_names = [name for own in names for name in own]
    is_unique = len(set(all_names)) == len(all_names)
    return [
        [name if is_unique else f"bank{i}/{name}" for name in own] for i, own in enumerate(names)
    ]


def layers_then_heads(words: Sequence[Sequence[str]], num_layers: Sequence[int]) -> tuple[str, ...]:
    """Join the names (or origins) of banks in token order, with all layers before all heads.

    Args:
      words: for each bank, the names or origins of its tokens.
      num_layers: number of layers in each bank.
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
      tokens: the tokens whose names or origins change.
      new: the new names or origins of these tokens; None to change nothing.
    """
    if new is None:
        return tuple(words)
    replaced = dict(zip(tokens, new, strict=True))
    return tuple(replaced.get(token, word) for token, word in enumerate(words))


def check_names(names: Sequence[str], origins: Sequence[str]) -> None:
    """Check that names are unique, and that there are as many origins.

    Args:
      names: the names of layers and heads.
      origins: where their weights come from.

    Raises:
      ValueError: if a name repeats, or the numbers differ.
    """
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"expected a different name for each layer and head, got {repeated} more than once"
        )
    if len(origins) != len(names):
        raise ValueError(
            f"expected {len(names)} origins, one per layer and head, got {len(origins)}"
        )


def spare_words(
    names: tuple[str, ...], origins: tuple[str, ...], num_layers: int, copied: Sequence[int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names and origins of a bank that gets spare layers, which are copies of others.

    Args:
      names: the names of all tokens; empty if there are none.
      origins: the origins of all tokens.
      num_layers: the number of layers before the spare ones.
      copied: for each spare layer, the token of the layer that it is a copy of.
    """
    if not names:
        return names, origins
    new_names = [f"spare{num_layers + i}" for i in range(len(copied))]
    new_origins = [f"free, a copy of {names[token]}" for token in copied]
    return (
        (*names[:num_layers], *new_names, *names[num_layers:]),
        (*origins[:num_layers], *new_origins, *origins[num_layers:]),
    )


def check_replacement(
    tokens: Sequence[int],
    num_tokens: int,
    params: Sequence[object],
    names: Sequence[str] | None,
    origins: Sequence[str] | None,
) -> None:
    """Check which tokens get new weights, and that there are as many weights, names, and origins.

    Args:
      tokens: the tokens to replace.
      num_tokens: the number of tokens of the bank, N + K.
      params: the new weights of each token.
      names: their new names; None to keep them.
      origins: their new origins; None to keep them.

    Raises:
      ValueError: if a token is out of range or repeats, or numbers differ.
    """
    if len(set(tokens)) != len(tokens) or not all(0 <= token < num_tokens for token in tokens):
        raise ValueError(f"expected different tokens in 0..{num_tokens - 1}, got {[*tokens]}")
    for given, kind in ((params, "params"), (names, "names"), (origins, "origins")):
        if given is not None and len(given) != len(tokens):
            raise ValueError(f"expected {kind} for {len(tokens)} tokens, got {len(given)}")
