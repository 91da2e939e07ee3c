"""A small ResNet of three stages, whose layers are written as plain NumPy as well."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jchain as jc


class Block(nn.Module):
    """A residual block that keeps the shape; the number of channels comes from the input."""

    @nn.compact
    def __call__(self, x):
        y = nn.BatchNorm(use_running_average=True)(x)
        return x + nn.Conv(x.shape[-1], (3, 3))(nn.relu(y))


class Down(nn.Module):
    """A block that halves the image and changes the number of channels."""

    channels: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(self.channels, (2, 2), strides=(2, 2), padding="VALID")(x))


class Head(nn.Module):
    """Global average pooling, and a linear classifier."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean(axis=(1, 2)))


STEM = nn.Conv(3, (3, 3))
SHAPES = [(8, 8, 3), (4, 4, 4), (2, 2, 6)]
# For each layer, its module, the stage it reads, and the stage that it writes.
LAYERS = [
    (Block(), 0, 0),
    (Block(), 0, 0),
    (Down(4), 0, 1),
    (Block(), 1, 1),
    (Down(6), 1, 2),
    (Block(), 2, 2),
    (Down(6), 1, 2),
]
STAGES = [(read, write) for _, read, write in LAYERS]


def init(module, key, shape):
    """Make random variables of a module; statistics of batch norms are random as well."""
    variables = module.init(key, np.ones((1, *shape), np.float32))
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.uniform(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def make_variables(seed=0):
    """Make the variables of the stem, of each layer, and of two heads of the last stage."""
    keys = jax.random.split(jax.random.key(seed), len(LAYERS) + 3)
    layers = [
        init(module, key, SHAPES[read])
        for (module, read, _), key in zip(LAYERS, keys, strict=False)
    ]
    heads = [init(Head(), key, SHAPES[2]) for key in keys[-2:]]
    return init(STEM, keys[-3], (8, 8, 1)), layers, heads


def make_bank(seed=0, **kwargs):
    """Make the bank."""
    stem, layers, heads = make_variables(seed)
    modules = [module for module, _, _ in LAYERS]
    return jc.Bank.stack(
        modules,
        layers,
        Head(),
        heads,
        stem=STEM,
        stem_params=stem,
        stages=STAGES,
        names=["a", "b", "down1", "c", "down2", "d", "down3"],
        **kwargs,
    )


def make_batch(num_examples=6, seed=1):
    """Make images and labels."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(num_examples, 8, 8, 1)), jnp.float32)
    return jc.Batch(x, jnp.asarray(rng.integers(0, 3, num_examples)))
