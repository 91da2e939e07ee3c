"""Copies of layers that join a bank in places that it holds ready for them."""

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
    """A bank that holds places ready for copies of its layers, so that all rounds of copying are one program.

    Until they are taken, these hold copies of other layers, which chains may use.
    """

    bank: Bank
    free: tuple[
        tuple[int, ...], ...
    ]  # for each group of layers its tokens that are places still free
    parent: (
        np.ndarray
    )  # [N + K], of a free place the token of which it holds a copy; of all others itself

    @staticmethod
    def start(bank: Bank, capacity: int) -> "CloneBank":
        """With so many places for each module."""
        grown = bank.reserve(capacity)
        parent = np.arange(grown.num_layers + grown.num_heads)
        for old, group in zip(bank.layers, grown.layers, strict=True):
            parent[list(group.tokens[len(old.tokens) :])] = np.resize(old.tokens, capacity)
        free = tuple(
            new.tokens[len(old.tokens) :]
            for old, new in zip(bank.layers, grown.layers, strict=True)
        )
        return CloneBank(dataclasses.replace(grown, versions=grown.get_versions()), free, parent)

    def name_parents(self, chains: Int[Array, "Q L"]) -> Int[np.ndarray, "Q L"]:
        """The same chains without free places."""
        tokens = np.asarray(chains)
        return np.where(tokens == PADDING, PADDING, self.parent[tokens]).astype(np.int32)

    def raise_clones(
        self,
        key: Key[Array, ""],
        lesson: Problem,
        chain: Int[np.ndarray, "L"],
        *,
        num_steps: int,
        optimizer: optax.GradientTransformation,
    ) -> tuple["CloneBank", Int[np.ndarray, "L"]]:
        """The chain of tuned copies of its layers, as far as there are places; the chain itself where there is none."""
        clones, free, bank = chain.copy(), [list(places) for places in self.free], self.bank
        for slot, token in enumerate(chain):
            places = next(
                (
                    places
                    for group, places in zip(bank.layers, free, strict=True)
                    if token in group.tokens
                ),
                [],
            )
            if places:
                clones[slot] = places.pop(0)
        is_cloned = clones != chain
        if not is_cloned.any():
            return self, chain
        tokens = clones[is_cloned].tolist()
        sources = [bank.names[token] for token in chain[is_cloned]] if bank.names else None
        bank = bank.replace(
            tokens,
            [bank.get_params(int(token)) for token in chain[is_cloned]],
            names=sources
            and [f"{name}+{token}" for name, token in zip(sources, tokens, strict=True)],
            origins=sources and [f"a copy of {name}" for name in sources],
        )
        bank = tune.tune_chain(
            key,
            lesson.with_bank(bank),
            clones,
            num_steps=num_steps,
            optimizer=optimizer,
            tokens=tokens,
        )
        parent = self.parent.copy()
        parent[tokens] = tokens
        return CloneBank(bank, tuple(map(tuple, free)), parent), clones
