import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import init_params
from reference import apply_layers, make_invertible_bank

import jchain as jc
from jchain.inverse import nearest_pairs as match
from jchain.inverse import recover_chain

FEATURES = 4


def make_task(bank, depth, noise=0.0, seed=1, num_examples=12):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (num_examples, FEATURES))
    chain = np.asarray(jax.random.randint(keys[1], (depth,), 0, bank.num_layers))
    y = apply_layers(bank, chain, x)
    return (
        x,
        jnp.asarray(
            y + noise * y.std() * np.asarray(jax.random.normal(keys[2], y.shape)), jnp.float32
        ),
        chain,
    )


def brute_force(bank, x, y, depth):
    """List all chains with their residuals, best first."""
    chains = np.array([*product(range(bank.num_layers), repeat=depth)])
    y = np.asarray(y, np.float64)
    residuals = np.array(
        [np.linalg.norm(apply_layers(bank, chain, x) - y) / np.linalg.norm(y) for chain in chains]
    )
    order = np.argsort(residuals, kind="stable")
    return chains[order], residuals[order]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("depth", range(1, 6))
def test_meet_in_the_middle_equals_brute_force(depth, seed):
    bank = make_invertible_bank(seed=seed)
    x, y, chain = make_task(bank, depth, noise=0.05 * seed, seed=seed)
    found = jc.meet_in_the_middle(bank, x, y, depth, top_k=3)
    chains, residuals = brute_force(bank, x, y, depth)
    np.testing.assert_array_equal(found.layers[0], chains[0])
    np.testing.assert_allclose(found.residuals, residuals[:3], rtol=1e-4, atol=1e-6)
    if seed == 0:
        np.testing.assert_array_equal(found.layers[0], chain)


@pytest.mark.parametrize("match_fn", [match.match_all, match.match_cells])
@pytest.mark.parametrize("num_forward", [None, 0, 4])
def test_few_candidates_hold_an_exact_chain_wherever_halves_meet(num_forward, match_fn):
    """`match_cells` may miss one of 50 (`choose_grids`)."""
    layers = [jc.layers.InvertibleDense(FEATURES), jc.layers.AdditiveCoupling(FEATURES)]
    options = {"num_candidates": 2, "match_fn": match_fn, "num_forward": num_forward}
    num_missed = 0
    for seed in range(3):
        bank = make_invertible_bank(num_layers=2, layers=layers, seed=seed)
        x, y, chain = make_task(bank, 5)
        try:
            found = jc.meet_in_the_middle(bank, x, y, 5, **options)
        except ValueError as error:
            assert "found 0 of 1 chains" in str(error)  # noqa: PT017
            num_missed += 1
            continue
        np.testing.assert_array_equal(found.layers, chain[None])
        assert found.residuals < 1e-5
    assert num_missed <= (match_fn is match.match_cells)


def test_fixed_point_inverses_and_stems_meet_too():
    layer = jc.layers.InvertibleResidual(FEATURES, bound=0.6)
    bank = make_invertible_bank(num_layers=4, layers=[layer])
    stem = jc.layers.Dense(FEATURES)
    stem_params = stem.init(jax.random.key(3), jnp.ones((1, FEATURES)))["params"]
    bank = dataclasses.replace(bank, stem=stem, stem_params=stem_params)
    x, _, chain = make_task(bank, 4)
    y = jnp.asarray(apply_layers(bank, chain, bank.embed(x)), jnp.float32)
    found = jc.meet_in_the_middle(bank, x, y, 4, num_candidates=2)
    np.testing.assert_array_equal(found.layers, chain[None])


@pytest.mark.slow
def test_noise_is_answered_with_the_nearest_chain():
    bank = make_invertible_bank(num_layers=4)
    x, y, _ = make_task(bank, 4, noise=0.1, num_examples=40)
    chains, residuals = brute_force(bank, x, y, 4)
    for tolerance in (None, 0.1):
        found = jc.meet_in_the_middle(bank, x, y, 4, num_candidates=50, tolerance=tolerance)
        np.testing.assert_array_equal(found.layers, chains[:1])
        np.testing.assert_allclose(found.residuals, residuals[:1], rtol=1e-4)


def test_unreachable_outputs_have_a_large_residual():
    bank = make_invertible_bank(num_layers=4)
    x, _, _ = make_task(bank, 4)
    y = jax.random.normal(jax.random.key(9), x.shape)
    found = jc.meet_in_the_middle(bank, x, y, 4, num_candidates=50)
    wanted = np.linalg.norm(
        apply_layers(bank, found.layers[0], x) - np.asarray(y)
    ) / np.linalg.norm(np.asarray(y))
    np.testing.assert_allclose(found.residuals, [wanted], rtol=1e-4)
    assert wanted > 0.5


def test_a_layer_that_overflows_hides_no_chain():
    bank = make_invertible_bank(num_layers=4)
    group = bank.layers[0]
    kernel = group.params["kernel"].at[0].multiply(1e25)
    bank = dataclasses.replace(
        bank, layers=(dataclasses.replace(group, params={**group.params, "kernel": kernel}),)
    )
    x = jax.random.normal(jax.random.key(1), (12, FEATURES))
    chain = np.array([1, 3, 2, 1])
    found = jc.meet_in_the_middle(
        bank, x, jnp.asarray(apply_layers(bank, chain, x), jnp.float32), 4, num_candidates=4
    )
    np.testing.assert_array_equal(found.layers, chain[None])


def test_halves_that_do_not_meet_raise():
    bank = make_invertible_bank(num_layers=4)
    x, _, _ = make_task(bank, 4)
    y = jax.random.normal(jax.random.key(9), x.shape)
    with pytest.raises(ValueError, match="found 0 of 1 chains whose halves meet"):
        jc.meet_in_the_middle(bank, x, y, 4, num_candidates=50, match_fn=match.match_cells)


def test_one_layer_is_found_by_its_outputs():
    bank = make_invertible_bank(num_layers=4)
    x, y, chain = make_task(bank, 1)
    np.testing.assert_array_equal(
        jc.meet_in_the_middle(bank, x, y, 1, num_candidates=2).layers, chain[None]
    )


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_noise_levels_are_raised_if_there_are_too_many_pairs(monkeypatch, noise):
    monkeypatch.setattr(recover_chain, "estimate_match_all", lambda num_pairs: 1e9)
    bank = make_invertible_bank(num_layers=4)
    x, y, _ = make_task(bank, 4, noise=noise, num_examples=40)
    chains, residuals = brute_force(bank, x, y, 4)
    for tolerance in (None, noise):
        found = jc.meet_in_the_middle(bank, x, y, 4, num_candidates=50, tolerance=tolerance)
        np.testing.assert_array_equal(found.layers, chains[:1])
        np.testing.assert_allclose(found.residuals, residuals[:1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_halves_meet_nearer_to_the_end_if_inverses_amplify_noise():
    bank = make_invertible_bank(
        num_layers=4, layers=[jc.layers.InvertibleDense(FEATURES, negative_slope=0.03)]
    )
    options = {"num_candidates": 4, "tolerance": 0.03}
    is_found = []
    for seed in range(3):
        x, y, chain = make_task(bank, 6, noise=0.03, seed=seed, num_examples=40)
        found = [
            jc.meet_in_the_middle(bank, x, y, 6, num_forward=n, **options).layers[0]
            for n in (None, 3)
        ]
        is_found.append([np.array_equal(best, chain) for best in found])
    assert np.all(is_found, axis=0).tolist() == [True, False]


def test_an_ill_conditioned_layer_is_never_taken_for_an_exact_answer():
    layer = jc.layers.InvertibleDense(FEATURES)
    params = init_params(layer, jax.random.key(0), 6, (FEATURES,))
    scale = jnp.array([1e3, 1.0, 1e-2, 1e-3])[None]
    params = [{**p, "kernel": p["kernel"] * scale} for p in params]
    head = jc.layers.DenseHead(2)
    bank = jc.Bank.stack(layer, params, head, init_params(head, jax.random.key(1), 1, (FEATURES,)))
    x, y, _ = make_task(bank, 4)
    found = jc.meet_in_the_middle(bank, x, y, 4, num_candidates=3)
    made = apply_layers(bank, found.layers[0], x)
    np.testing.assert_allclose(
        found.residuals,
        [np.linalg.norm(made - np.asarray(y)) / np.linalg.norm(np.asarray(y))],
        rtol=1e-3,
        atol=1e-6,
    )


def test_meet_in_the_middle_searches_large_halves_in_parts():
    bank = make_invertible_bank(num_layers=4)
    x, y, chain = make_task(bank, 6)
    row_bytes = 4 * 32 * 4 + 64
    for limit in (2 * 64 * row_bytes, 2 * 16 * row_bytes):
        found = jc.meet_in_the_middle(bank, x, y, 6, num_candidates=8, memory_limit=limit)
        np.testing.assert_array_equal(found.layers, chain[None])
    with pytest.raises(ValueError, match=r"need 73,728 bytes, and 100 are allowed"):
        jc.meet_in_the_middle(bank, x, y, 6, num_candidates=8, memory_limit=100)


@pytest.mark.slow
def test_float64_weights_are_searched_in_float64():
    with jax.enable_x64(True):
        bank = make_invertible_bank(num_layers=5)
        params = [
            jax.tree.map(lambda leaf, i=i: leaf[i].astype(jnp.float64), bank.layers[0].params)
            for i in range(5)
        ]
        head = jax.tree.map(lambda leaf: leaf[0], bank.heads[0].params)
        bank = jc.Bank.stack(bank.layers[0].module, params, bank.heads[0].module, [head])
        x, _, chain = make_task(bank, 4)
        x = x.astype(jnp.float64)
        found = jc.meet_in_the_middle(
            bank, x, jnp.asarray(apply_layers(bank, chain, x)), 4, num_candidates=3
        )
        np.testing.assert_array_equal(found.layers, chain[None])
        assert found.residuals < 1e-13


def test_meet_in_the_middle_rejects_bad_input_before_work():
    bank = make_invertible_bank()
    x, y, _ = make_task(bank, 2)
    plain = jc.Bank.concat([bank, make_invertible_bank(layers=[jc.layers.ResidualMLP(FEATURES)])])
    singular = jax.tree.map(jnp.zeros_like, bank)
    for args, options, expected in (
        ((plain, x, y, 2), {}, "layer bank1/layer0: ResidualMLP has no inverse"),
        ((singular, x, y, 2), {}, "layer layer0: singular layer"),
        ((bank, x, y[:, :2], 2), {}, r"outputs of shape \[12, 4\], like the inputs, got \[12, 2\]"),
        ((bank, x, y.at[0, 0].set(jnp.nan), 2), {}, "finite outputs"),
        ((bank, x, y, 0), {}, "expected depth to be at least 1"),
        ((bank, x, y, 2, 10), {}, "top_k of at most 9 chains, got 10"),
        ((bank, x, y, 2), {"num_forward": 3}, r"num_forward in 0\.\.2, got 3"),
        ((bank, x, y, 2), {"tolerance": -0.1}, "a tolerance of at least 0, got -0.1"),
    ):
        with pytest.raises(ValueError, match=expected):
            jc.meet_in_the_middle(*args, **options)
