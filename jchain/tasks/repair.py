"""The repair task: digits with several faults at once, and layers that each undo one fault.

The bank holds the layers of a net that classifies undamaged digits and, for each fault in
`jchain.tasks.faults`, one layer that was trained to undo that fault alone. The new digits have four
faults, applied one after another. No layer was trained on two faults at once, and only 150 of the
new digits have labels. Which layers undo the faults, and in which order?

Related work: Mason, Sarkar, Sasaki, and Boix (2023), arXiv:2306.09005, compose modules for known
elemental corruptions.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain import data as data_lib
from jchain import train
from jchain._typing import Array, Float, Key, PyTree
from jchain.arguments import checked
from jchain.bank import Bank
from jchain.data import Batch, Dataset
from jchain.datasets.splitting import check_sizes, take_stratified
from jchain.layers import DenseHead, ResidualMLP
from jchain.pytree import pick
from jchain.tasks.base import Task
from jchain.tasks.faults import FAULTS, check_faults, damage
from jchain.training_loop import TrainingConfig, train_weights

NUM_FAULTS = 4
# Number of layers of the net for undamaged digits, and of the plain net.
NET_DEPTH, PLAIN_DEPTH = 2, 4
NET_STEPS, REPAIR_STEPS = 1000, 2000
# Numbers of labeled digits with the new faults. `test` gets all others.
NUM_SEARCH, NUM_SELECT = 100, 50
# Number of images of random dots per digit that repair layers are trained on.
DOT_IMAGES_PER_DIGIT = 2
_SIDE, _CLASSES, _MAX_VALUE = 8, 10, 16.0
_LAYER, _HEAD = ResidualMLP(_SIDE**2), DenseHead(_CLASSES)
# Adam without weight decay: decay would bias the layers that repair brightness. The learning rate
# drops after four fifths of the steps.
_OPTIMIZER = optax.adam(optax.piecewise_constant_schedule(2e-3, {REPAIR_STEPS * 4 // 5: 0.15}))


class _Identity(nn.Module):
    """The head used to train repair layers, whose targets are images instead of classes."""

    @nn.compact
    def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B F"]:
        return x


@checked
def make_repair(
    seed: int = 0,
    *,
    faults: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Task:
    """Make the repair task: digits with several faults at once.

    The bank has one layer per fault (for example `undo skewed`), the two layers of the net for
    undamaged digits (`net/0` and `net/1`), and the head of that net. Its parents are the net alone,
    and the net after each single repair layer.

    Args:
      seed: the seed of the splits and of the faults.
      faults: the faults of `search`, `select`, and `test`, in the order in which they are applied.
        If None, the seed draws four different ones.
      sizes: the number of examples in train, search, select, and test. If None, 898, 100, 50, and
        749.

    Raises:
      ValueError: if a fault is unknown, or `sizes` asks for more examples than there are.
    """
    if faults is None:
        rng = np.random.default_rng(seed)
        faults = [str(name) for name in rng.choice([*FAULTS], NUM_FAULTS, replace=False)]
    check_faults(faults)
    clean = _split(seed, sizes)
    parts = {name: _damage(getattr(clean, name), faults) for name in data_lib.EVALUATION_SPLITS}
    seen = [clean.train, *(_damage(clean.train, [name]) for name in FAULTS)]
    labeled = Batch(*(jnp.concatenate(leaves) for leaves in zip(*seen, strict=True)))

    def make_bank(key: Key[Array, ""]) -> Bank:
        return _make_bank(key, clean.train, seed)

    about = f"digits that are {', then '.join(faults) or 'without faults'}"
    max_layers = len(faults) + NET_DEPTH + 1
    return Task(
        name="repair",
        about=about,
        data=clean._replace(train=labeled, name="repair", **parts),
        make_bank=make_bank,
        max_layers=max_layers,
        layer=_LAYER,
        head=_HEAD,
        plain_depth=PLAIN_DEPTH,
        reference=_undo(faults),
    )


def _undo(faults: Sequence[str]) -> tuple[int, ...]:
    """Build the chain that undoes known faults in reverse order."""
    names, first = [*FAULTS], len(FAULTS)
    return (*(names.index(name) for name in reversed(faults)), *range(first, first + NET_DEPTH + 1))


def _split(seed: int, sizes: Sequence[int] | None) -> Dataset:
    """Split the undamaged digits. `test` also gets the examples unused by `search` and `select`."""
    x, y = data_lib.LOADERS["digits"]()
    whole = data_lib.split(x, y, seed=seed, name="digits", statistics=(0.0, _MAX_VALUE))
    train, *held_out = (len(getattr(whole, name).y) for name in data_lib.SPLITS)
    if sizes is None:
        sizes = (train, NUM_SEARCH, NUM_SELECT, sum(held_out) - NUM_SEARCH - NUM_SELECT)
    rest = sum(held_out) - sum(min(pair) for pair in zip(sizes[1:3], held_out, strict=False))
    most = (train, held_out[0], held_out[1], rest)
    check_sizes(sizes, most)
    rng = np.random.default_rng(seed)
    taken, left = {}, []
    for name, size in zip(data_lib.SPLITS[:3], sizes, strict=False):
        batch = getattr(whole, name)
        rows = np.arange(len(batch.y))
        chosen = take_stratified(np.asarray(batch.y), rows, size, rng)
        taken[name] = Batch(batch.x[chosen], batch.y[chosen])
        if name != "train":
            others = np.setdiff1d(rows, chosen)
            left.append(Batch(batch.x[others], batch.y[others]))
    joined = zip(whole.test, *left, strict=True)
    test = Batch(*(jnp.concatenate(leaves)[: sizes[3]] for leaves in joined))
    return whole._replace(test=test, **taken)


def _damage(batch: Batch, faults: Sequence[str]) -> Batch:
    images = np.asarray(batch.x).reshape(-1, _SIDE, _SIDE)
    return Batch(jnp.asarray(damage(images, faults).reshape(batch.x.shape)), batch.y)


def _draw_dot_images(num: int, rng: np.random.Generator) -> Float[np.ndarray, "B F"]:
    """Draw images of random dots, with densities from sparse to full."""
    shape = (num, _SIDE**2)
    is_dot = rng.uniform(size=shape) < rng.uniform(size=(num, 1))
    return (rng.uniform(size=shape) * is_dot).astype(np.float32)


def _make_bank(key: Key[Array, ""], clean: Batch, seed: int) -> Bank:
    net_key, repair_key = jax.random.split(key)
    net = train.independent(
        net_key, clean, layer=_LAYER, head=_HEAD, num_nets=1, depth=NET_DEPTH, num_steps=NET_STEPS
    )
    # Digits have blank borders, but other faults move ink there. Random dots cover these inputs.
    dots = _draw_dot_images(DOT_IMAGES_PER_DIGIT * len(clean.y), np.random.default_rng(seed))
    targets = np.concatenate([np.asarray(clean.x), dots])
    repairs = [
        _train_repair(key, targets, name)
        for key, name in zip(jax.random.split(repair_key, len(FAULTS)), FAULTS, strict=True)
    ]
    num_repairs = len(repairs)
    layers = [net.get_params(i) for i in range(NET_DEPTH)]
    own = [*range(num_repairs, num_repairs + NET_DEPTH + 1)]
    return Bank.stack(
        _LAYER,
        [*repairs, *layers],
        _HEAD,
        [net.get_params(NET_DEPTH)],
        names=[
            *(f"undo {name}" for name in FAULTS),
            *(f"net/{i}" for i in range(NET_DEPTH)),
            "net/head",
        ],
        origins=[
            *("trained to undo one fault" for _ in FAULTS),
            *("net for digits without faults" for _ in own),
        ],
        parents=[own, *([i, *own] for i in range(num_repairs))],
        num_steps=NET_STEPS + num_repairs * REPAIR_STEPS,
    )


def _train_repair(key: Array, targets: np.ndarray, fault: str) -> PyTree:
    """Train a layer that maps images with one fault to the same images without it."""
    labels = jnp.asarray(targets)
    inputs = _damage(Batch(targets, labels), [fault]).x
    config = TrainingConfig(
        (_LAYER,),
        (_Identity(),),
        num_layers=1,
        num_heads=1,
        depth=1,
        num_steps=REPAIR_STEPS,
        optimizer=_OPTIMIZER,
        loss_fn=optax.squared_error,
    )
    weights = train_weights(key[None], Batch(inputs, labels), config)
    return pick(weights.layers[0], (0, 0, 0))
