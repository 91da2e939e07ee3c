from functools import partial

import jax
import jax.numpy as jnp
from conftest import init_params

import jchain as jc
from jchain.engine.plans import choose_plan


def test_plans_by_backend_and_shape(problem):
    wide = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    small = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    choose = partial(choose_plan, num_chains=512, memory_limit=2**34)
    mlp, big = (
        jc.Problem(make_wide_bank(size), jc.Batch(jnp.zeros((512, size)), jnp.zeros(512, int)), 3)
        for size in (64, 512)
    )
    assert choose(mlp, small, backend="cpu") == jc.engine.Blocks(
        64, (1, 2, 8), head_widths=(1, 4, 16)
    )
    assert choose(big, wide, backend="cpu") == jc.engine.DepthFirst()
    wide_ladder = (1, 4, 16, 64, 256)
    assert choose(mlp, small, backend="gpu") == jc.engine.Blocks(
        512, wide_ladder, jc.engine.Share.NOTHING, wide_ladder
    )
    images = jc.Batch(jnp.zeros((4, 6, 6, 2)), jnp.zeros(4, int))
    problem = jc.Problem(make_image_bank(jc.layers.ConvBlock(2, depth=2)), images, 3)
    assert choose(problem, images.x, backend="gpu") == jc.engine.Blocks(
        512, wide_ladder, jc.engine.Share.LAYER, wide_ladder
    )
    # Siblings share only the input of their first convolution.
    assert choose(problem, images.x, backend="cpu") == jc.engine.DepthFirst()
    problem = jc.Problem(make_image_bank(jc.layers.ConvBlock(2)), images, 3)
    assert choose(problem, images.x, backend="cpu") == jc.engine.Blocks(
        64, (1, 2, 8), jc.engine.Share.INPUT, (1, 4, 16)
    )
    large = jax.ShapeDtypeStruct((8192, 6, 6, 2), jnp.float32)
    assert choose(problem, large, backend="cpu") == jc.engine.DepthFirst()


def make_image_bank(layer):
    head, shape = jc.layers.DenseHead(3), (6, 6, 2)
    return jc.Bank.stack(
        layer,
        init_params(layer, jax.random.key(0), 2, shape),
        head,
        init_params(head, jax.random.key(0), 1, shape),
    )


def make_wide_bank(size):
    layer, head = jc.layers.ResidualMLP(size), jc.layers.DenseHead(3)
    return jc.Bank.stack(
        layer,
        init_params(layer, jax.random.key(0), 2, (size,)),
        head,
        init_params(head, jax.random.key(0), 1, (size,)),
    )
