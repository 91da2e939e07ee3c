"""Whole nets with batch normalization and dropout: made and trained in Flax nnx, linen, equinox.

Each `train_*` returns the trained net's own outputs in evaluation mode, and the arguments of
`jc.Bank.stack` for the net cut into layers.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jchain as jc

DEPTH, D, K, STEPS = 3, 8, 3, 5
_rng = np.random.default_rng(0)
TRAIN = jc.Batch(jnp.asarray(_rng.normal(size=(60, D)), jnp.float32), jnp.arange(60) % K)
X = jnp.asarray(_rng.normal(size=(9, D)), jnp.float32)
OPTIMIZER = optax.adam(0.01)
CHAIN = [*range(DEPTH), DEPTH]


def compute_loss(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, TRAIN.y).mean()


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.norm(self.linear(x))))


class NnxNet(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.List([NnxBlock(rngs=rngs) for _ in range(DEPTH)])
        self.head = nnx.Linear(D, K, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train_nnx():
    net = NnxNet(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(lambda net: compute_loss(net(TRAIN.x)))(net))

    for _ in range(STEPS):
        step(net, optimizer)
    # The net is still in training mode; the bank evaluates all the same.
    bank = jc.Bank.stack(list(net.blocks), head=[net.head], parents=[CHAIN])
    net.eval()
    return net(X), bank


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, is_training=False):
        h = nn.BatchNorm(use_running_average=not is_training, momentum=0.5)(nn.Dense(D)(x))
        return x + nn.Dropout(0.3, deterministic=not is_training)(nn.relu(h))


class LinenHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(x)


class LinenNet(nn.Module):
    def setup(self):
        self.blocks = [LinenBlock() for _ in range(DEPTH)]
        self.head = LinenHead()

    def __call__(self, x, is_training=False):
        for block in self.blocks:
            x = block(x, is_training)
        return self.head(x)


def train_linen():
    net = LinenNet()
    variables = net.init(jax.random.key(0), X)
    params, statistics = variables["params"], variables["batch_stats"]
    state = OPTIMIZER.init(params)

    @jax.jit
    def step(params, statistics, state, key):
        def loss_fn(params):
            logits, changed = net.apply(
                {"params": params, "batch_stats": statistics},
                TRAIN.x,
                is_training=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return compute_loss(logits), changed["batch_stats"]

        gradient, statistics_ = jax.grad(loss_fn, has_aux=True)(params)
        updates, state_ = OPTIMIZER.update(gradient, state, params)
        return optax.apply_updates(params, updates), statistics_, state_

    for i in range(STEPS):
        params, statistics, state = step(params, statistics, state, jax.random.key(i))
    names = [f"blocks_{i}" for i in range(DEPTH)]
    layers = [{"params": params[name], "batch_stats": statistics[name]} for name in names]
    bank = jc.Bank.stack(LinenBlock(), layers, LinenHead(), [params["head"]], parents=[CHAIN])
    return net.apply({"params": params, "batch_stats": statistics}, X), bank


class EquinoxBlock(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.linear = eqx.nn.Linear(D, D, key=key)
        self.norm = eqx.nn.BatchNorm(D, axis_name="batch", mode="ema", momentum=0.5)
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, x, state, key=None):
        h, state = self.norm(self.linear(x), state)
        return x + self.dropout(jax.nn.relu(h), key=key), state


class EquinoxNet(eqx.Module):
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, key):
        *keys, head_key = jax.random.split(key, DEPTH + 1)
        self.blocks = [EquinoxBlock(key) for key in keys]
        self.head = eqx.nn.Linear(D, K, key=head_key)

    def __call__(self, x, state, key=None):
        for i, block in enumerate(self.blocks):
            x, state = block(x, state, None if key is None else jax.random.fold_in(key, i))
        return self.head(x), state


# A new block and head in evaluation mode: the structure into which the leaves of others are put.
BLOCK = eqx.nn.inference_mode(eqx.nn.make_with_state(EquinoxBlock)(jax.random.key(0)))
HEAD = eqx.nn.Linear(D, K, key=jax.random.key(0))


def take_arrays(module):
    return jax.tree.leaves(eqx.filter(module, eqx.is_array))


def put_arrays(template, leaves):
    arrays, static = eqx.partition(template, eqx.is_array)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), static)


def apply_equinox_block(leaves, x):
    """The statistics of batch normalization are leaves like the weights."""
    block, state = put_arrays(BLOCK, leaves)
    return jax.vmap(lambda x: block(x, state)[0], axis_name="batch")(x)


def apply_equinox_head(leaves, x):
    return jax.vmap(put_arrays(HEAD, leaves))(x)


def train_equinox():
    net, statistics = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0))
    opt_state = OPTIMIZER.init(eqx.filter(net, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(net, statistics, opt_state, key):
        def loss_fn(net):
            keys = jax.random.split(key, len(TRAIN.x))
            call = jax.vmap(net, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
            logits, changed = call(TRAIN.x, statistics, keys)
            return compute_loss(logits), changed

        gradient, changed = eqx.filter_grad(loss_fn, has_aux=True)(net)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, net)
        return eqx.apply_updates(net, updates), changed, opt_state

    for i in range(STEPS):
        net, statistics, opt_state = step(net, statistics, opt_state, jax.random.key(i))
    net = eqx.nn.inference_mode(net)
    layers = [take_arrays((block, statistics.substate(block))) for block in net.blocks]
    bank = jc.Bank.stack(
        apply_equinox_block, layers, apply_equinox_head, [take_arrays(net.head)], parents=[CHAIN]
    )
    return jax.vmap(lambda x: net(x, statistics)[0], axis_name="batch")(X), bank


NETS = {"nnx": train_nnx, "linen": train_linen, "equinox": train_equinox}
# What `jc.Bank.load` needs to find the modules again.
MODULES = {
    "nnx": lambda: [NnxBlock(rngs=nnx.Rngs(1)), nnx.Linear(D, K, rngs=nnx.Rngs(1))],
    "linen": lambda: [LinenBlock, LinenHead],
    "equinox": lambda: [apply_equinox_block, apply_equinox_head],
}
