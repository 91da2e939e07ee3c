"""Copies of layers that join a bank under tokens that the bank has reserved for them."""

import dataclasses
from typing import NamedTuple

import numpy as np
import optax

from jchain._typing import Array, Int, Key
from jchain.bank import Bank
from jchain.chain import PADDING
from jchain.problem import Problem
from jchain.updates import tune


class CloneBank(NamedTuple):
    """A bank with tokens reserved for copies of its layers, so that all rounds share one program.

    A reserved token is free until a tuned copy takes it. A free token holds a copy of another
    layer, and chains may contain it.
    """

    bank: Bank
    free_tokens: tuple[tuple[int, ...], ...]  # for each group of layers
    source_tokens: np.ndarray  # [N + K], the layer that a free token copies, or the token

    @staticmethod
    def reserve(bank: Bank, capacity: int) -> "CloneBank":
        """Reserve tokens for copies in a bank.

        Args:
          bank: the bank to extend.
          capacity: number of tokens to reserve per module.
        """
        grown = bank.reserve(capacity)
        sources = np.arange(grown.num_layers + grown.num_heads)
        free = []
        for old, new in zip(bank.layers, grown.layers, strict=True):
            reserved = new.tokens[len(old.tokens) :]
            sources[list(reserved)] = np.resize(old.tokens, capacity)
            free.append(reserved)
        grown = dataclasses.replace(grown, versions=grown.get_versions())
        return CloneBank(grown, tuple(free), sources)

    def replace_free_tokens(self, chains: Int[Array, "Q L"]) -> Int[np.ndarray, "Q L"]:
        """Replace each free token in chains by the layer that it copies.

        Args:
          chains: int32 `[Q, L]`; the tokens of each chain.
        """
        tokens = np.asarray(chains)
        return np.where(tokens == PADDING, PADDING, self.source_tokens[tokens]).astype(np.int32)

    def tune_clones(
        self,
        key: Key[Array, ""],
        training: Problem,
        chain: Int[np.ndarray, "L"],
        *,
        num_steps: int,
        optimizer: optax.GradientTransformation,
    ) -> tuple["CloneBank", Int[np.ndarray, "L"]]:
        """Copy the layers of a chain into free tokens and tune the copies.

        Args:
          key: the PRNG key of the minibatches; consumed by this call.
          training: a problem with the split to train on; its bank is not used.
          chain: int32 `[L]`; the chain whose layers are copied.
          num_steps: number of gradient steps.
          optimizer: the optax optimizer, which is applied to each copy separately.

        Returns:
          The new bank and the chain of copies. Layers of a module without free tokens are not
          copied. If no layer is copied, the bank and the chain are returned unchanged.
        """
        bank, (clones, free_tokens) = self.bank, self._assign_tokens(chain)
        is_cloned = clones != chain
        if not is_cloned.any():
            return self, chain
        tokens = clones[is_cloned].tolist()
        sources = [bank.names[token] for token in chain[is_cloned]] if bank.names else None
        names = sources and [f"{name}+{token}" for name, token in zip(sources, tokens, strict=True)]
        bank = bank.replace(
            tokens,
            [bank.get_params(int(token)) for token in chain[is_cloned]],
            names=names,
            origins=sources and [f"a copy of {name}" for name in sources],
        )
        bank = tune.tune_chain(
            key,
            training.with_bank(bank),
            clones,
            num_steps=num_steps,
            optimizer=optimizer,
            tokens=tokens,
        )
        source_tokens = self.source_tokens.copy()
        source_tokens[tokens] = tokens
        return CloneBank(bank, free_tokens, source_tokens), clones

    def _assign_tokens(
        self, chain: Int[np.ndarray, "L"]
    ) -> tuple[Int[np.ndarray, "L"], tuple[tuple[int, ...], ...]]:
        """Return the chain with free tokens in place of its layers, and the tokens still free."""
        clones, free = chain.copy(), [list(tokens) for tokens in self.free_tokens]
        for slot, token in enumerate(chain):
            for group, unused in zip(self.bank.layers, free, strict=True):
                if token in group.tokens and unused:
                    clones[slot] = unused.pop(0)
        return clones, tuple(map(tuple, free))
