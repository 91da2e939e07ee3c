"""The definition of a task."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from jchain import train
from jchain._typing import Array, Key
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.data import Dataset


class Task(NamedTuple):
    """A data set and a bank of layers to solve it with, both made from one seed.

    Attributes:
      name: the name of the task.
      about: a short description of this seed's data.
      data: the four splits. `train` holds all labeled examples that the layers are trained on.
        `search`, `select`, and `test` hold the new data that chains should solve.
      make_bank: a function that takes a PRNG key, trains the layers, and returns the bank. The bank
        has parents.
      max_layers: the maximum number of layers in a chain.
      layer: the module of the layers of the plain net, the baseline that is trained end to end.
      head: the module of the head of the plain net.
      plain_depth: the number of layers of the plain net.
      reference: the chain, as tokens, that one would build by hand, knowing how the data was made.
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

    @checked
    def train_plain_net(self, key: Key[Array, ""], num_steps: int) -> Bank:
        """Train the plain net: one net, trained end to end on `train`, as a baseline for chains.

        Args:
          key: the PRNG key.
          num_steps: the number of gradient steps. Pass the `num_steps` of the bank to train for as
            many steps as all layers of the bank together.

        Returns:
          A bank that holds the layers and the head of the net.
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
