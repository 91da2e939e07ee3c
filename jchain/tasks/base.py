"""What a task is."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from jchain import train
from jchain._typing import Array, Key
from jchain.bank import Bank
from jchain.data import Dataset


class Task(NamedTuple):
    """Data, and how to make the bank that is searched.

    Attributes:
      name: name of the task.
      about: a few words that say what the data of this seed is.
      data: the splits. `train` holds every labeled example that layers of the bank were trained on;
        `search`, `select`, and `test` are what chains are wanted for.
      make_bank: trains the layers, from a key. The bank has parents.
      max_layers: most layers in a chain.
      layer: module of the layers of the plain net.
      head: module of its head.
      plain_depth: number of its layers.
      reference: the chain that someone would build who knows how the data was made.
    """

    name: str
    about: str
    data: Dataset
    make_bank: Callable[[Key[Array, ""]], Bank]
    max_layers: int
    layer: nn.Module
    head: nn.Module
    plain_depth: int
    reference: tuple[int, ...]

    def train_plain_net(self, key: Key[Array, ""], num_steps: int) -> Bank:
        """Train one net on `train`, to compare chains with.

        Args:
          key: consumed.
          num_steps: gradient steps; `Bank.num_steps` of the bank for as many as it took.
        """
        return train.independent(
            key,
            self.data.train,
            layer=self.layer,
            head=self.head,
            num_nets=1,
            depth=self.plain_depth,
            num_steps=num_steps,
        )
