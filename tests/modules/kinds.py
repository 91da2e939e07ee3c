"""Blocks of every kind, with what each of them computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jchain as jc

D, K = 12, 3
X = jax.random.normal(jax.random.key(0), (9, D))
Y = jnp.arange(9) % K


class LinenBlock(nn.Module):
    """A block with statistics and with dropout."""

    @nn.compact
    def __call__(self, x, is_training=False):
        h = nn.Dense(D)(x)
        h = nn.BatchNorm(use_running_average=not is_training)(h)
        h = nn.Dropout(0.5, deterministic=not is_training)(nn.relu(h))
        return x + h


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.norm(self.linear(x))))


class BridgedBlock(nnx.Module):
    """Without dropout, as the bridge does not switch to evaluation."""

    def __init__(self, num_features, rngs):
        self.linear = nnx.Linear(num_features, num_features, rngs=rngs)
        self.norm = nnx.BatchNorm(num_features, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.linear(x)))


def draw_statistics(tree, seed):
    """Other statistics than those of a new module."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        0.5 + jax.random.uniform(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def make_linen(seed):
    block = LinenBlock()
    variables = block.init(jax.random.key(seed), X)
    variables["batch_stats"] = draw_statistics(variables["batch_stats"], seed)
    return block, variables, lambda x: block.apply(variables, x)


def make_nnx(seed):
    block = NnxBlock(rngs=nnx.Rngs(seed))
    statistics = nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))
    nnx.update(block, draw_statistics(nnx.state(block, nnx.BatchStat), seed))
    assert set(statistics) == {"norm"}
    evaluated = nnx.clone(block)
    evaluated.eval()
    return block, None, evaluated


def make_bridged(seed):
    block = nnx.bridge.ToLinen(BridgedBlock, args=(D,))
    variables = block.init(jax.random.key(seed), X)
    variables["batch_stats"] = draw_statistics(variables["batch_stats"], seed)
    return block, variables, lambda x: block.apply(variables, x)


def apply_affine(params, x):
    """A pure function; its params are a list with a tuple inside."""
    (kernel, bias), scale = params
    return x + scale * jnp.tanh(x @ kernel + bias)


def make_function(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = [
        (jax.random.normal(keys[0], (D, D)), jax.random.normal(keys[1], (1, D))),
        jax.random.uniform(keys[2]),
    ]
    return apply_affine, params, lambda x: apply_affine(params, x)


KINDS = {
    "linen": make_linen,
    "nnx": make_nnx,
    "bridge": make_bridged,
    "function": make_function,
}


def make_head(seed=9):
    head = jc.layers.DenseHead(K)
    return head, head.init(jax.random.key(seed), X)["params"]


def make_bank(layers, **options):
    head, head_params = make_head()
    modules, params = zip(*(layer[:2] for layer in layers), strict=True)
    return jc.Bank.stack([*modules], [*params], head, [head_params], **options)


def make_mixed():
    return [make(seed) for seed, make in enumerate(KINDS.values())] + [make_nnx(7)]


def make_templates():
    """What `Bank.load` needs to read a mixed bank."""
    return [LinenBlock, nnx.bridge.ToLinen, BridgedBlock, NnxBlock(rngs=nnx.Rngs(99)), apply_affine]
