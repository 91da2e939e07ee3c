import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_batch

import jchain as jc
from jchain import training_loop

LAYER, HEAD = jc.layers.ResidualMLP(5), jc.layers.DenseHead(3)
DATA = make_batch(60)


@pytest.mark.parametrize(
    ("layers", "heads", "options"),
    [
        ((jc.layers.ConvBlock(2),), (HEAD,), {}),
        # The route chooses the program of each call, and a layer can occur twice on it.
        (
            (jc.layers.ConvBlock(2), jc.layers.ConvBlock(2, 2)),
            (HEAD, jc.layers.PoolHead(3)),
            {"is_routed": True},
        ),
        (
            (jc.layers.ConvBlock(2),),
            (HEAD, jc.layers.PoolHead(3)),
            {"is_routed": True, "is_layer_trained": False},
        ),
        # A route that is always the same has no branches.
        ((jc.layers.ConvBlock(2), jc.layers.ConvBlock(2, 2)), (HEAD,), {"num_heads": 1}),
    ],
    ids=["one module", "routed", "random", "several modules, one route"],
)
def test_steps_of_convolutions_one_by_one_are_those_of_the_loop(layers, heads, options):
    images = jc.data.Batch(jax.random.normal(jax.random.key(1), (30, 3, 3, 2)), DATA.y[:30])
    sizes = {
        "num_layers": 3,
        "num_heads": len(heads),
        "depth": 3,
        "num_steps": 4,
        "num_snapshots": 2,
    }
    config = training_loop.TrainingConfig(layers, heads, **sizes | options)
    keys = jax.random.split(jax.random.key(0), 1)
    alone, together = (
        training_loop.train_weights(keys, images, config),
        training_loop.train_in_one_program(keys, images, config, 1),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), alone, together
    )
    first, last = (np.asarray(alone.heads[0]["Dense_0"]["kernel"][0, i]) for i in range(2))
    assert not np.allclose(first, last)


class Counting(nn.Module):
    """A layer of a convolution, beside a count that has no gradient."""

    scale: float

    @nn.compact
    def __call__(self, x):
        made = nn.Conv(2, (3, 3))(x["image"]) * jnp.cos(x["count"])[:, None, None, None]
        return {"image": x["image"] + self.scale * jnp.tanh(made), "count": x["count"] + 1}


class ReadCount(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x["image"].reshape(-1, 8)) * jnp.sin(x["count"])[:, None]


@pytest.mark.slow
def test_steps_on_several_inputs_one_by_one_are_those_of_the_loop():
    x = {"image": jax.random.normal(jax.random.key(1), (20, 2, 2, 2)), "count": jnp.arange(20)}
    layers = (Counting(0.5), Counting(1.0))
    config = training_loop.TrainingConfig(
        layers, (ReadCount(),), num_layers=3, num_heads=1, depth=2, is_routed=True, num_steps=3
    )
    keys, data = jax.random.split(jax.random.key(0), 1), jc.data.Batch(x, DATA.y[:20])
    alone = training_loop.train_weights(keys, data, config)
    together = training_loop.train_in_one_program(keys, data, config, 1)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), alone, together
    )


@pytest.mark.parametrize(
    ("layer", "head", "words"),
    [
        (lambda x: (x["image"],), lambda x: x["image"][:, 0, 0], "must keep the structure"),
        (lambda x: x, lambda x: (x["image"], x["count"]), "must return an array, got tuple of 2"),
    ],
)
def test_modules_that_do_not_fit_several_inputs_are_named(layer, head, words):
    x = {"image": jnp.zeros((20, 2, 2, 2)), "count": jnp.arange(20)}
    modules = {"layer": Apply(layer), "head": Apply(head)}
    with pytest.raises(ValueError, match=rf"Apply\(.*\) {words}"):
        jc.train.random(jax.random.key(0), jc.Batch(x, DATA.y[:20]), num_steps=0, **modules)


class Apply(nn.Module):
    fn: Callable

    @nn.compact
    def __call__(self, x):
        return self.fn(x)


def test_one_program_for_each_module_whatever_the_routes():
    images = jc.data.Batch(jax.random.normal(jax.random.key(1), (30, 3, 3, 2)), DATA.y[:30])
    # No other test uses these modules.
    layers = (
        jc.layers.ConvBlock(2, activation=jnp.tanh),
        jc.layers.ConvBlock(2, 2, activation=jnp.tanh),
    )
    heads = jc.layers.ConvHead(3), jc.layers.PoolHead(3, activation=jnp.tanh)
    before = (
        training_loop._call._cache_size(),
        training_loop._call_head._cache_size(),
        training_loop._pull._cache_size(),
    )
    for num_steps in (4, 20):
        jc.train.routed(
            jax.random.key(0), images, layer=layers, head=heads, num_heads=2, num_steps=num_steps
        )
    after = (
        training_loop._call._cache_size(),
        training_loop._call_head._cache_size(),
        training_loop._pull._cache_size(),
    )
    assert np.subtract(after, before).tolist() == [2, 2, 2]


def test_training_loop_compiles_once_per_recipe():
    before = training_loop.train_in_one_program._cache_size()
    for seed in range(3):
        jc.train.routed(
            jax.random.key(seed), DATA, layer=LAYER, head=HEAD, num_layers=6, depth=3, num_steps=7
        )
    assert training_loop.train_in_one_program._cache_size() == before + 1


@pytest.mark.parametrize("num_examples", [100, 1024, 1025])
def test_minibatches_have_distinct_examples_unless_the_split_is_large(num_examples):
    data = jc.data.Batch(jnp.arange(num_examples)[:, None], jnp.zeros(num_examples, jnp.int32))
    config = training_loop.TrainingConfig((LAYER,), (HEAD,), 1, 1, 1)
    draws = [
        np.asarray(training_loop._draw(jax.random.key(seed), data, config).x) for seed in range(20)
    ]
    assert {draw.shape[0] for draw in draws} == {min(128, num_examples)}
    distinct = [len(np.unique(draw)) == len(draw) for draw in draws]
    assert all(distinct) == (num_examples <= 1024)


@pytest.mark.parametrize("layer", [LAYER, jc.layers.ConvBlock(2)])
def test_the_loss_function_is_used_in_the_loop_and_step_by_step(layer):
    """With a loss that pulls all outputs to 3, layers and heads learn to return 3."""
    x = DATA.x if layer is LAYER else jax.random.normal(jax.random.key(1), (60, 3, 3, 2))
    config = training_loop.TrainingConfig(
        (layer,),
        (HEAD,),
        1,
        1,
        1,
        num_steps=300,
        optimizer=optax.adam(1e-2),
        loss_fn=lambda outputs, y: jnp.sum((outputs - 3.0) ** 2, axis=-1),
    )
    data = jc.data.Batch(x, DATA.y)
    weights = training_loop.train_weights(jax.random.key(0)[None], data, config)
    params = [jax.tree.map(lambda leaf: leaf[0, 0, 0], own[0]) for own in weights]
    outputs = HEAD.apply({"params": params[1]}, layer.apply({"params": params[0]}, x))
    assert np.abs(outputs - 3.0).mean() < 0.3
