"""Edit scores against exact losses."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import init_params, make_batch
from edit_references import (
    CHAIN,
    Looped,
    exact_changes,
    mixed_problem,
    to_float64,
    use_float64,
    wide_problem,
)

import jchain as jc
from jchain.gradient.slot_scores import KINDS

x64 = pytest.fixture(use_float64)


@pytest.fixture(scope="module")
def affine():
    """Affine layers without a residual, so that all layers after a slot are affine together."""
    layer, head = nn.Dense(5), jc.layers.DenseHead(3)
    keys = jax.random.split(jax.random.key(0))
    bank = jc.Bank.stack(
        layer, init_params(layer, keys[0], 4, (5,)), head, init_params(head, keys[1], 2, (5,))
    )
    return jc.Problem(bank, make_batch(), max_layers=3, layer_cost=jnp.array([0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize("chain", [CHAIN, np.array([1, 4, -1, -1]), np.array([5, -1, -1, -1])])
def test_linearized_scores_are_exact_for_affine_layers(affine, chain, x64):
    problem = to_float64(affine)
    change, is_neighbor = exact_changes(problem, chain)
    scores = jc.gradient.score_edits(problem, chain)
    np.testing.assert_allclose(np.asarray(scores.flat)[is_neighbor], change[is_neighbor], atol=1e-5)
    assert scores.loss == pytest.approx(float(jc.evaluate(problem, chain[None]).loss[0]), abs=1e-6)


def test_chains_of_min_layers_have_no_deletions(affine):
    problem = jc.Problem(affine.bank, affine.data, 3, min_layers=2)
    short, long = (jc.gradient.score_edits(problem, row) for row in ([1, 0, 4, -1], [1, 0, 2, 4]))
    assert np.isnan(short.delete).all()
    assert not np.isnan(long.delete[:3]).any()


@pytest.fixture(scope="module")
def deep(affine):
    """Orthogonal layers, so that activations keep their norm along the chain."""
    params = affine.bank.layers[0].params
    kernels = jnp.linalg.qr(params["kernel"])[0]
    layers = [
        {"kernel": kernel, "bias": bias}
        for kernel, bias in zip(kernels, params["bias"], strict=True)
    ]
    heads = [jax.tree.map(lambda leaf, i=i: leaf[i], affine.bank.heads[0].params) for i in range(2)]
    return jc.Problem(
        jc.Bank.stack(nn.Dense(5), layers, jc.layers.DenseHead(3), heads),
        affine.data,
        max_layers=64,
    )


def test_chains_of_64_affine_layers_are_scored_exactly(deep, x64):
    deep = to_float64(deep)
    chain = np.append(np.random.default_rng(0).integers(0, 4, 64), 5)
    change, is_neighbor = exact_changes(deep, chain)
    scores = jc.gradient.score_edits(deep, chain)
    np.testing.assert_allclose(np.asarray(scores.flat)[is_neighbor], change[is_neighbor], atol=1e-5)
    assert scores.layer_calls == (2 + 2) * 64 + 4 * 64
    assert np.ptp(change[is_neighbor]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_bfloat16_activations_are_float32(problem, kind):
    """Activations are rounded to bfloat16, but scores are not. Joint moves work too."""
    low = jax.tree.map(
        lambda leaf: (
            leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        ),
        problem,
    )
    found, expected = jc.swap_scores(low, CHAIN, kind), jc.swap_scores(problem, CHAIN, kind)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found[:3], expected[:3], atol=0.05 * float(jnp.abs(expected[:3]).max())
    )
    if kind == "linearized":
        scores, joint = jc.gradient.score_moves(low, CHAIN)
        assert scores.swap.dtype == joint.pair_score.dtype == jnp.float32
        exact = jc.gradient.score_moves(problem, CHAIN)[1].pair_score
        np.testing.assert_allclose(
            joint.pair_score[0], exact[0], atol=0.05 * float(jnp.abs(exact[0]))
        )


def test_cost_of_scores(problem):
    """Two forward passes, products for 2 of 3 classes, and 4 candidates at each of 3 slots.

    A chain that is not full has an additional slot for insertions.
    """
    assert jc.gradient.score_edits(problem, CHAIN).layer_calls == (2 + 2) * 3 + 4 * 3
    assert jc.gradient.score_edits(problem, CHAIN, "activations").layer_calls == (2 + 1) * 3 + 4 * 3
    assert jc.gradient.score_edits(problem, CHAIN, "weights").layer_calls == 4 * 3
    assert (
        jc.gradient.score_edits(problem, np.array([1, 4, -1, -1])).layer_calls
        == (2 + 2) * 1 + 4 * 2
    )


@pytest.mark.parametrize("kind", KINDS)
def test_own_layers_score_zero_and_jit_of_vmap_equals_a_loop(kind, two_group_problem):
    problem = two_group_problem
    chains = np.array([[1, 4, 2, 6], [3, 5, -1, -1], [0, 0, 4, 5]])
    score = partial(jc.gradient.score_edits, kind=kind)
    alone = [score(problem, chain) for chain in chains]
    for scores, chain in zip(alone, chains, strict=True):
        length = int((chain >= 0).sum()) - 1
        assert (np.asarray(scores.swap)[np.arange(length), chain[:length]] == 0).all()
        assert np.isnan(scores.swap[length:]).all()
        assert scores.head[chain[length] - 5] == 0
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    mapped = jax.jit(jax.vmap(score, (None, 0)))(problem, jnp.asarray(chains))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mapped, stacked
    )


def test_score_edits_rejects_bad_input(problem):
    with pytest.raises(
        ValueError,
        match="expected a kind of linearized, activations, weights, nearest, got 'hessian'",
    ):
        jc.swap_scores(problem, CHAIN, "hessian")
    with pytest.raises(ValueError, match="token 9 at slot 1 is out of range"):
        jc.swap_scores(problem, np.array([2, 9, 3, 5]))
    with pytest.raises(ValueError, match=r"expected one chain of shape \[4\], got \[2, 4\]"):
        jc.swap_scores(problem, np.stack([CHAIN, CHAIN]))
    with pytest.raises(ValueError, match="expected a positive learning_rate, got 0.0"):
        jc.gradient.score_edits(problem, CHAIN, learning_rate=0.0)
    message = r"expected different layer tokens in 0..3, at least one, got \[1, 4\]"
    with pytest.raises(ValueError, match=message):
        jc.gradient.score_moves(problem, CHAIN, tokens=[1, 4], num_best=1)
    with pytest.raises(ValueError, match="expected num_products to be at least 1, got 0"):
        jc.gradient.score_edits(problem, CHAIN, num_products=0)
    squares = wide_problem(optax.squared_error, jnp.zeros((40, 100)))
    with pytest.raises(
        ValueError, match="expected num_products to be at least 3 for outputs like these, got 2"
    ):
        jc.gradient.score_edits(squares, np.array([2, 0, 3, 4]), num_products=2)
    with pytest.raises(ValueError, match="Looped cannot be differentiated: Reverse-mode"):
        jc.swap_scores(mixed_problem(Looped()), np.array([1, 0, 2, 4]))
    table = jc.chainbench.tabular.make_problem(
        problem.bank, np.asarray(jc.evaluate_all(problem)[1].loss), 3
    )
    with pytest.raises(
        ValueError, match="expected floating-point activations, which have a gradient, got int32"
    ):
        jc.swap_scores(table, CHAIN)
