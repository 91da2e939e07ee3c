"""The setup of a search: the data, the loss, and how the bank is made."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from jchain import layers, tasks, train
from jchain._typing import Array, Float, Key, PyTree
from jchain.bank import Bank
from jchain.chain import check_max_layers, check_min_layers
from jchain.cli import checkpoints, own_files
from jchain.cli.checkpoints import LossFn
from jchain.cli.choices import CHANNELS, LAYERS
from jchain.cli.config import DEFAULT_DEPTH, SearchConfig, require
from jchain.data import Dataset
from jchain.hub.wrapping import Restart
from jchain.problem import Problem

# Numbers of convolutions in a block, which layers cycle through: the first layer has 1, the second
# 2, the third 3, and the fourth 1 again.
CONV_DEPTHS = (1, 2, 3)
# The stem pools images whose longer side is at least twice this number of pixels.
CONV_SIDE = 16
# The optimum is computed only if there are at most this many chains, because it takes the losses
# of all of them.
MAX_OPTIMUM_CHAINS = 200_000
# Number of random chains to compare with; smaller for checkpoints, whose layers are expensive.
NUM_RANDOM_CHAINS, NUM_RANDOM_CHECKPOINT_CHAINS = 200, 4


class Modules(NamedTuple):
    """The modules of a bank that is trained."""

    layer: nn.Module | Sequence[nn.Module]
    head: nn.Module | Sequence[nn.Module]
    stem: nn.Module | None = None
    stem_params: PyTree = None


class Setup(NamedTuple):
    """The data, the loss, and the bank of a search, and the controls that it is compared with."""

    data: Dataset
    make_bank: Callable[[Key[Array, ""]], Bank]
    progress_label: str  # describes what `make_bank` does, for the progress line
    # Trains a plain net, given a key and a number of gradient steps; None for a bank that is read.
    make_plain_net: Callable[[Key[Array, ""], int], Bank] | None
    plain_depth: int = 0  # number of layers of the plain net
    about: str = ""  # describes the data of this seed
    # The hand-built chain, given knowledge of how the data was generated; empty if there is none.
    reference: tuple[int, ...] = ()
    loss_fn: LossFn = optax.softmax_cross_entropy_with_integer_labels
    accuracy_fn: LossFn | None = None
    layer_cost: float = 0.0
    max_optimum_chains: int = MAX_OPTIMUM_CHAINS
    num_random_chains: int = NUM_RANDOM_CHAINS
    # The splits whose joint loss decides which finalist is picked.
    deciding_splits: tuple[str, ...] = ("select",)
    # Whether to score the controls that take long: other searches with the same budget, edits of
    # the best parent, ensembles, and the plain net after further training on `search`.
    has_slow_controls: bool = True

    def make_problem(
        self,
        bank: Bank,
        split: str,
        max_layers: int,
        *,
        min_layers: int = 0,
        is_penalized: bool = True,
        space: str = "chains",
    ) -> Problem:
        """Make the problem on one split.

        Args:
          bank: the layers and heads.
          split: name of the split: `search`, `select`, or `test`.
          max_layers: maximum number of layers in a chain.
          min_layers: minimum number of layers in a chain.
          is_penalized: whether the loss includes the layer penalty, as it does for the search.
          space: the chains that a search may make; see `jchain.Problem`.
        """
        return Problem(
            bank,
            getattr(self.data, split),
            max_layers,
            loss_fn=self.loss_fn,
            layer_cost=make_layer_costs(bank, self.layer_cost) if is_penalized else 0.0,
            min_layers=min_layers,
            accuracy_fn=self.accuracy_fn,
            space=space,
        )


def make_layer_costs(bank: Bank, cost: float) -> float | Float[np.ndarray, "N"]:
    """Make the penalty of each layer: `cost` for blocks, and 0 for layers of embeddings."""
    embeddings = [group for group in bank.layers if isinstance(group.module, Restart)]
    if cost == 0 or not embeddings:
        return cost
    costs = np.full(bank.num_layers, cost, np.float32)
    for group in embeddings:
        costs[list(group.tokens)] = 0.0
    return costs


def choose_modules(config: SearchConfig, data: Dataset) -> tuple[SearchConfig, Modules]:
    """Choose layers, heads, and a stem that suit the data, and record the choice in the options.

    Args:
      config: the resolved options.
      data: the splits.

    Returns:
      The options with `layer`, `num_heads`, and, for images, `channels` filled in; and the modules.

    Raises:
      ValueError: if the layer does not fit the data.
    """
    shape = data.train.x.shape[1:]
    is_image = len(shape) == 3
    layer = config.layer or ("conv" if is_image else "residual")
    if is_image != (layer == "conv"):
        raise ValueError(
            "expected --layer conv for images and only for images, got "
            f"{layer} for data of shape {list(shape)}"
        )
    has_nets = config.bank in ("independent", "snapshots")
    num_heads = config.num_heads
    if num_heads is None:
        num_heads = 2 if is_image and not has_nets else 1
    if not is_image:
        if config.channels is not None:
            raise ValueError(
                f"expected --channels only for images, got data of shape {list(shape)}"
            )
        modules = Modules(LAYERS[layer](shape[-1]), layers.DenseHead(data.num_classes))
        return replace(config, layer=layer, num_heads=num_heads), modules
    channels = CHANNELS if config.channels is None else config.channels
    stem = layers.ConvStem(channels, pool=max(1, max(shape[:2]) // CONV_SIDE))
    modules = Modules(
        [layers.ConvBlock(channels, depth) for depth in CONV_DEPTHS],
        [layers.PoolHead(data.num_classes), layers.ConvHead(data.num_classes)],
        stem,
        stem.init(jax.random.key(config.seed), data.train.x[:1])["params"],
    )
    return replace(config, layer=layer, num_heads=num_heads, channels=channels), modules


def set_up_task(config: SearchConfig) -> tuple[SearchConfig, Setup]:
    """Set up the search of a task.

    Args:
      config: the resolved options; their seed is also the seed of the task.

    Returns:
      The options with `max_layers` filled in, and the setup.

    Raises:
      ValueError: if the name is unknown or there are fewer examples than `sizes` asks for.
    """
    task = tasks.make(require(config.task), config.seed, sizes=config.sizes)
    setup = Setup(
        task.data,
        task.make_bank,
        "Training the layers of the bank",
        task.train_plain_net,
        plain_depth=task.plain_depth,
        about=task.about,
        reference=task.reference,
        layer_cost=config.layer_cost,
        # `select` is small, so `search` takes part in the decision.
        deciding_splits=("search", "select"),
        has_slow_controls=not config.quick,
    )
    max_layers = task.max_layers if config.max_layers is None else config.max_layers
    check_min_layers(config.min_layers, check_max_layers(max_layers))
    return replace(config, max_layers=max_layers), setup


def set_up_trained(config: SearchConfig, data: Dataset, modules: Modules) -> Setup:
    """Set up the search of a bank that is trained.

    Args:
      config: the options that `choose_modules` returned.
      data: the splits.
      modules: the modules that `choose_modules` returned.
    """
    num_layers, depth = require(config.num_layers), require(config.depth)

    def make_plain_net(key: Key[Array, ""], num_steps: int) -> Bank:
        return train.independent(
            key,
            data.train,
            num_nets=1,
            depth=depth,
            num_steps=num_steps,
            **modules._asdict(),
        )

    def make_bank(key: Key[Array, ""]) -> Bank:
        return train.make_bank(
            key,
            data.train,
            require(config.bank),
            num_layers=num_layers,
            depth=depth,
            num_heads=require(config.num_heads),
            num_steps=require(config.num_steps),
            **modules._asdict(),
        )

    progress_label = f"Making a bank of {num_layers} layers ({config.bank}) on {data.name}"
    return Setup(
        data,
        make_bank,
        progress_label,
        make_plain_net,
        plain_depth=depth,
        about=data.name,
        layer_cost=config.layer_cost,
        has_slow_controls=not config.quick,
    )


def set_up_bank_file(config: SearchConfig) -> tuple[SearchConfig, Setup]:
    """Set up the search of a bank that is read from a file.

    Args:
      config: the resolved options.

    Returns:
      The options with `max_layers` filled in, by default the length of the longest parent, and the
      setup.

    Raises:
      ValueError, OSError, ImportError: if the bank or the data cannot be read.
    """
    bank = own_files.load_bank(config)
    data = own_files.load_data(config)
    longest = max((len(parent) - 1 for parent in bank.parents), default=DEFAULT_DEPTH)
    max_layers = longest if config.max_layers is None else config.max_layers
    check_min_layers(config.min_layers, max_layers)

    def make_bank(key: Key[Array, ""]) -> Bank:
        return bank

    setup = Setup(
        data,
        make_bank,
        f"Reading {require(config.bank_file).name}",
        make_plain_net=None,
        about=data.name,
        layer_cost=config.layer_cost,
        has_slow_controls=not config.quick,
    )
    return replace(config, max_layers=max_layers), setup


def set_up_checkpoints(config: SearchConfig) -> Setup:
    """Set up the search of a bank of pretrained blocks.

    Args:
      config: the resolved options.

    Raises:
      ValueError, OSError, ImportError: if `jchain.cli.checkpoints.load_data` raises it.
    """
    eval_data = checkpoints.load_data(config)

    def make_bank(key: Key[Array, ""]) -> Bank:
        return checkpoints.load_bank(config)

    return Setup(
        eval_data.data,
        make_bank,
        f"Reading {', '.join(require(config.checkpoint))}",
        None,
        about=eval_data.data.name,
        loss_fn=eval_data.loss_fn,
        accuracy_fn=eval_data.accuracy_fn,
        layer_cost=config.layer_cost,
        # Computing the optimum must not cost more than the search, so it is limited by the budget.
        max_optimum_chains=require(config.budget),
        num_random_chains=NUM_RANDOM_CHECKPOINT_CHAINS,
        has_slow_controls=False,
    )
