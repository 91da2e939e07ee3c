import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import init_params

import jchain as jc
from jchain.modules import describe_module


def test_layers_of_several_modules_are_groups():
    modules = [jc.layers.ResidualMLP(5), jc.layers.Dense(5), jc.layers.ResidualMLP(5)]
    params = [
        init_params(module, jax.random.key(i), 1, (5,))[0] for i, module in enumerate(modules)
    ]
    head = jc.layers.DenseHead(3)
    heads = init_params(head, jax.random.key(9), 2, (5,))
    bank = jc.Bank.stack(modules, params, head, heads)
    assert [(group.module, group.tokens) for group in bank.layers] == [
        (modules[0], (0, 2)),
        (modules[1], (1,)),
    ]
    x = jax.random.normal(jax.random.key(1), (4, 5))
    hidden = x
    for i in (2, 1, 0):
        hidden = modules[i].apply({"params": params[i]}, hidden)
    wanted = head.apply({"params": heads[1]}, hidden)
    np.testing.assert_allclose(jc.apply_chain(bank, np.array([2, 1, 0, 4]), x), wanted, rtol=1e-5)
    with pytest.raises(ValueError, match=r"one layer module or 3 \(one per set of params\), got 2"):
        jc.Bank.stack(modules[:2], params, head, heads)


def test_bank_replace_rejects_bad_tokens_and_weights(bank):
    params = bank.get_params(0)
    with pytest.raises(ValueError, match=r"different tokens in 0..5, got \[1, 1\]"):
        bank.replace([1, 1], [params, params])
    with pytest.raises(ValueError, match="different tokens in 0..5"):
        bank.replace([6], [params])
    with pytest.raises(ValueError, match="names for 1 tokens, got 2"):
        bank.replace([1], [params], names=["a", "b"])
    with pytest.raises(ValueError, match="params for 1 tokens, got 0"):
        bank.replace([1], [])
    with pytest.raises(
        ValueError,
        match=r"do not fit token 1: expected float32\[7\] .* as in the bank, got float32\[2, 7\]",
    ):
        bank.replace([1], [jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)])
    with pytest.raises(ValueError, match="more than once"):
        bank.replace([1], [params], names=["layer0"])
    with pytest.raises(ValueError, match="token in 0..5, got 6"):
        bank.get_params(6)


def test_groups_and_modules_print_in_one_line(two_group_bank):
    assert repr(two_group_bank.layers[1]) == "LayerGroup(2 Dense(5), tokens (3, 4))"
    assert describe_module(jc.layers.Dense(5, activation=jnp.tanh)) == "Dense(5, activation=tanh)"
    wide = jc.layers.TransformerBlock(64, num_heads=4, is_causal=True)
    assert describe_module(wide) == "TransformerBlock(64, 4, is_causal=True)"
