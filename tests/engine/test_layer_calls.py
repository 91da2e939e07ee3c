from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jchain as jc
from jchain.engine.layer_calls import apply_all, apply_token


def test_all_member_outputs_equal_single_layer_calls():
    """This holds for blocks of several convolutions, called one by one, and under `jax.vmap`."""
    shape = (4, 4, 3)
    modules = [jc.layers.ConvBlock(3, depth) for depth in (2, 1, 2, 2)]
    params = [
        m.init(jax.random.key(i), jnp.ones((1, *shape)))["params"] for i, m in enumerate(modules)
    ]
    head = jc.layers.PoolHead(2)
    bank = jc.Bank.stack(
        modules, params, head, [head.init(jax.random.key(9), jnp.ones((1, *shape)))["params"]]
    )
    x = jax.random.normal(jax.random.key(1), (3, 5, *shape))
    made = jax.jit(jax.vmap(partial(apply_all, bank.layers)))(x)
    for token in range(4):
        expected = jnp.stack([apply_token(bank.layers, jnp.asarray(token), each) for each in x])
        np.testing.assert_allclose(made[:, token], expected, atol=1e-6)
