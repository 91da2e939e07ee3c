"""Layers that are mixed from others, or scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.merging.blending import merge_signs, slerp


def make_bank(num=3, features=4, layer=None):
    layer = jc.layers.ResidualMLP(features) if layer is None else layer
    head, x = jc.layers.DenseHead(3), jnp.ones((2, features))
    keys = jax.random.split(jax.random.key(0), num + 1)
    params = [layer.init(key, x)["params"] for key in keys[:num]]
    # Biases start at zero.
    params = [jax.tree.map(lambda leaf, i=i: leaf + 0.1 * i, p) for i, p in enumerate(params)]
    return jc.Bank.stack(layer, params, head, [head.init(keys[num], x)["params"]], parents=[[0, 3]])


def get(bank, token):
    """Weights of a token in float64, in the order of the leaves."""
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(bank.get_params(token))]


def reference_slerp(a, b, weight):
    # The first layer's biases are zero, and have no direction.
    cosine = (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)
    if abs(cosine) > 0.9995:
        return (1 - weight) * a + weight * b
    angle = np.arccos(cosine)
    parts = np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b
    return parts / np.sin(angle)


def reference_ties(changes, density):
    """TIES, entry by entry."""
    trimmed = []
    for change in changes:
        flat = change.ravel()
        count = max(1, round(density * flat.size))
        kept = np.abs(flat) >= np.sort(np.abs(flat))[-count]  # all of equal size stay
        row = np.zeros_like(flat)
        row[kept] = flat[kept]
        trimmed.append(row)
    merged = np.zeros_like(trimmed[0])
    for i in range(merged.size):
        entries = [row[i] for row in trimmed]
        sign = np.sign(sum(entries))
        agreeing = [entry for entry in entries if entry and np.sign(entry) == sign]
        merged[i] = np.mean(agreeing) if agreeing else 0.0
    return merged.reshape(changes[0].shape)


def reference_task(a, b, base, weight):
    return base + weight * (a - base + b - base)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_mixed_weights_are_those_of_a_plain_loop(method, weight):
    bank = make_bank()
    base = 2 if method in ("task_arithmetic", "ties") else None
    mixed = bank.blend([(0, 1, weight)], method=method, base=base, density=0.4)
    assert (mixed.num_layers, mixed.parents) == (4, ((0, 4),))
    assert mixed.names[3] == f"layer0 ~ layer1 ({method} {weight:g})"
    for a, b, c, found in zip(get(bank, 0), get(bank, 1), get(bank, 2), get(mixed, 3), strict=True):
        if method == "linear":
            expected = (1 - weight) * a + weight * b
        elif method == "slerp":
            expected = reference_slerp(a, b, weight)
        elif method == "task_arithmetic":
            expected = reference_task(a, b, c, weight)
        else:
            expected = c + weight * reference_ties([a - c, b - c], 0.4)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    for token in range(3):
        assert all(map(np.array_equal, get(bank, token), get(mixed, token)))


def test_signs_are_resolved_by_hand():
    changes = jnp.array([[3.0, -1.0, 0.5, 2.0], [1.0, 2.0, -0.2, -2.0]])
    # Of each row, the two entries of largest absolute value stay: 3, 2 and 2, -2.
    np.testing.assert_allclose(merge_signs(changes, 0.5), [3.0, 2.0, 0.0, 0.0])
    np.testing.assert_allclose(merge_signs(changes, 1.0), [2.0, 2.0, 0.5, 0.0])


def test_the_middle_of_the_arc_between_unit_vectors_is_a_unit_vector():
    found = slerp(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 0.5)
    np.testing.assert_allclose(found, [0.5**0.5, 0.5**0.5], rtol=1e-6)
    same = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(slerp(same, 3 * same, 0.5), 2 * same)
    np.testing.assert_allclose(slerp(jnp.zeros(2), jnp.zeros(2), 0.5), jnp.zeros(2))


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
@pytest.mark.parametrize(
    "layer",
    [jc.layers.ResidualMLP(4), jc.layers.InvertibleResidual(4), jc.layers.ConvBlock(2, 2)],
)
def test_a_scaled_layer_adds_a_multiple_of_its_branch(layer, factor):
    x = jax.random.normal(jax.random.key(1), (2, 3, 3, 2) if "Conv" in repr(layer) else (5, 4))
    params = layer.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    scaled = layer.scale_branch(params, factor)
    branch = layer.apply({"params": params}, x) - x
    np.testing.assert_allclose(
        layer.apply({"params": scaled}, x), x + factor * branch, rtol=1e-5, atol=1e-5
    )


def test_scaled_layers_join_the_bank_and_are_searched():
    bank = make_bank().scale([(1, 0.5), (2, 0.0)])
    assert bank.names == (
        *("layer0", "layer1", "layer2", "layer1 x 0.5", "layer2 x 0"),
        "head0",
    )
    x, y = jax.random.normal(jax.random.key(1), (6, 4)), jnp.arange(6) % 3
    problem = jc.Problem(bank, jc.Batch(x, y), max_layers=2)
    loss = jc.evaluate(problem, jc.chain.pad([[4, 5], [5]], 2)).loss
    assert loss[0] == loss[1]  # a branch of factor 0 adds nothing
    result = jc.run(jax.random.key(0), jc.LocalSearch(4), problem, budget=100)
    assert np.isfinite(result.best_loss)


def test_mixes_keep_dtype_versions_and_are_saved(tmp_path):
    bank = make_bank()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), bank)
    mixed = half.blend([(0, 1, 0.5), (1, 2, 0.25)])
    assert {leaf.dtype for leaf in jax.tree.leaves(mixed.layers)} == {jnp.dtype("bfloat16")}
    replaced = bank.replace([1, 3], [bank.get_params(0), bank.get_params(3)]).blend([(0, 1, 0.5)])
    assert replaced.get_versions().tolist() == [0, 1, 0, 0, 1]
    mixed.save(tmp_path / "bank.safetensors")
    again = jc.Bank.load(tmp_path / "bank.safetensors")
    assert again.names == mixed.names
    assert all(map(np.array_equal, get(again, 4), get(mixed, 4)))


def test_mixes_join_their_group_and_other_collections_are_those_of_the_first_layer():
    import flax.linen as nn

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x)

    module, x = Norm(), jnp.ones((2, 4))
    variables = [
        jax.tree.map(lambda leaf, i=i: leaf + i, module.init(jax.random.key(0), x))
        for i in range(2)
    ]
    layers = [jc.layers.Dense(4), module, module]
    dense = layers[0].init(jax.random.key(0), x)["params"]
    head = jc.layers.DenseHead(3)
    bank = jc.Bank.stack(
        layers, [dense, *variables], head, [head.init(jax.random.key(0), x)["params"]]
    )
    mixed = bank.blend([(2, 1, 0.5)])
    assert [group.tokens for group in mixed.layers] == [(0,), (1, 2, 3)]
    found = mixed.get_params(3)
    np.testing.assert_array_equal(found["params"]["BatchNorm_0"]["scale"], np.full(4, 1.5))
    np.testing.assert_array_equal(found["batch_stats"]["BatchNorm_0"]["mean"], np.full(4, 1.0))
    with pytest.raises(ValueError, match=r"expected layers of one module and one shape to blend"):
        bank.blend([(0, 1, 0.5)])
    with pytest.raises(
        ValueError, match=r"has the method scale_branch\(params, factor\), got Dense"
    ):
        bank.scale([(0, 0.5)])


def test_mixes_that_do_not_fit_into_memory_are_refused(monkeypatch):
    class Memory:
        available = 100

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(ValueError, match="expected blended layers that fit into memory"):
        make_bank().blend([(0, 1, 0.5)])
