"""Layers of every kind: what a chain computes, what is saved, and what is refused."""

import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kinds import (
    KINDS,
    BridgedBlock,
    D,
    K,
    LinenBlock,
    NnxBlock,
    X,
    Y,
    make_bank,
    make_bridged,
    make_head,
    make_linen,
    make_mixed,
    make_nnx,
    make_templates,
)

import jchain as jc


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_equals_the_composition_of_its_layers(kind):
    layers = [KINDS[kind](seed) for seed in range(3)]
    bank = make_bank(layers)
    assert len(bank.layers) == 1
    head, head_params = make_head()
    hidden = layers[0][2](layers[2][2](X))
    expected = head.apply({"params": head_params}, hidden)
    found = jc.apply_chain(bank, [2, 0, 3], X)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    problem = jc.Problem(bank, jc.Batch(X, Y), 2)
    out = jc.evaluate(problem, jc.chain.pad([[2, 0, 3], [1, 3], [3]], 2))
    loss = problem.loss_and_accuracy(expected)[0]
    np.testing.assert_allclose(out.loss[0], loss, rtol=1e-6)


def test_modules_of_all_kinds_share_a_bank():
    layers = make_mixed()
    bank = make_bank(layers)
    assert len(bank.layers) == 4
    hidden = X
    for _, _, apply_fn in layers:
        hidden = apply_fn(hidden)
    head, head_params = make_head()
    expected = head.apply({"params": head_params}, hidden)
    found = jc.apply_chain(bank, [0, 1, 2, 3, 4, 5], X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert "NnxBlock" in repr(bank)
    assert "apply_affine" in repr(bank)


def test_all_plans_compute_the_same(monkeypatch):
    problem = jc.Problem(make_bank(make_mixed()), jc.Batch(X, Y), 3)
    chains = problem.space.sample(jax.random.key(1), 40)
    expected = jc.evaluate(problem, chains, plan=jc.engine.DepthFirst()).loss
    for plan in (jc.engine.Blocks(8),):
        np.testing.assert_allclose(jc.evaluate(problem, chains, plan=plan).loss, expected, 1e-5)


def test_banks_of_all_kinds_are_joined_taken_and_replaced():
    layers = make_mixed()
    whole = make_bank(layers)
    parts = jc.Bank.concat([make_bank(layers[:2]), make_bank(layers[2:])])
    expected = jc.apply_chain(whole, [4, 1, 0, 5], X)
    np.testing.assert_array_equal(jc.apply_chain(parts, [4, 1, 0, 5], X), expected)
    taken = whole.take([4, 0, 1])
    np.testing.assert_array_equal(jc.apply_chain(taken, [0, 2, 1, 3], X), expected)
    spare = whole.reserve(1)
    assert spare.num_layers == 5 + 4
    for token in range(5):
        again = whole.replace([token], [whole.get_params(token)])
        np.testing.assert_array_equal(jc.apply_chain(again, [4, 1, 0, 5], X), expected)
    # What get_params returns has the statistics too.
    swapped = whole.replace([1], [whole.get_params(4)])
    np.testing.assert_array_equal(
        jc.apply_chain(swapped, [1, 5], X), jc.apply_chain(whole, [4, 5], X)
    )


SEARCHES = {
    "LocalSearch": jc.LocalSearch(num_chains=4),
    "CriticSearch": jc.CriticSearch(width=8),
    "LinearizedSearch": jc.LinearizedSearch(),
    "ActorCritic": jc.ActorCritic(encoding=jc.WeightEncoding(features=8), num_chains=4),
}


@pytest.mark.parametrize(
    "name",
    [
        "LocalSearch",
        "CriticSearch",
        pytest.param("LinearizedSearch", marks=pytest.mark.slow),
        pytest.param("ActorCritic", marks=pytest.mark.slow),
    ],
)
def test_searches_run_on_modules_of_all_kinds(name):
    problem = jc.Problem(make_bank(make_mixed()), jc.Batch(X, Y), 2)
    result = jc.run(jax.random.key(0), SEARCHES[name], problem, budget=150)
    loss = jc.evaluate(problem, result.best_chain[None]).loss[0]
    np.testing.assert_allclose(result.best_loss, loss, rtol=1e-5)


def test_gradients_of_weights_leave_statistics_alone():
    problem = jc.Problem(make_bank([make_linen(seed) for seed in range(3)]), jc.Batch(X, Y), 3)
    chain = jnp.array([0, 1, 2, 3])
    scores = jc.swap_scores(problem, chain, kind="weights")
    assert np.isfinite(np.asarray(scores)).any()
    for gradient in jax.tree.leaves(jc.gradient.weight_gradients(problem, chain)):
        assert jnp.issubdtype(gradient.dtype, jnp.floating)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: (LinenBlock(), LinenBlock().init(jax.random.key(0), X)["params"]),
            r"layer0 \(LinenBlock.*needs the collection 'batch_stats': pass all of module.init",
        ),
        (
            lambda: (
                nnx.bridge.ToLinen(BridgedBlock, args=(D,)),
                make_bridged(0)[1]["params"],
            ),
            r"layer0 \(ToLinen.*needs the collection 'batch_stats'",
        ),
        (lambda: (LinenBlock, {}), "expected an instance of a Flax .* got the class LinenBlock"),
        (lambda: (NnxBlock, {}), "expected an instance of a Flax .* got the class NnxBlock"),
        (lambda: (3, {}), "expected an instance of a Flax .* got int"),
        (lambda: (make_nnx(0)[0], {}), "expected no params for layer 0, an nnx module"),
        (
            lambda: (jc.layers.Dense(D), None),
            r"layer0 \(Dense\(12\)\), token 0, does not take an input.*collection is empty",
        ),
        (
            lambda: (lambda params, x: (x, 0.0), {}),
            r"layer0 \(<lambda>\).*must return an array, got tuple of 2",
        ),
        (
            lambda: (lambda params, x: x[:, :5], {}),
            r"layer0 \(<lambda>\), token 0, must keep the shape.*expected float32\[9, 12\], "
            r"got float32\[9, 5\].*stem",
        ),
        (
            lambda: (lambda params, x: x.astype(jnp.bfloat16), {}),
            r"layer0 \(<lambda>\), token 0, must keep the dtype.*expected float32, got bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    module, params = make()
    head, head_params = make_head()
    with pytest.raises(ValueError, match=message):
        jc.Problem(jc.Bank.stack(module, [params], head, [head_params]), jc.Batch(X, Y), 1)


class Scale(nn.Module):
    """Its weights fit many shapes, so that they do not tell which one it keeps."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("s", nn.initializers.ones, (1, 16, 1))


def test_the_shape_is_that_of_the_data_and_not_a_guess():
    x = jax.random.normal(jax.random.key(1), (9, 16, 12))
    params = Scale().init(jax.random.key(0), x)["params"]
    head = jc.layers.DenseHead(K)
    head_params = head.init(jax.random.key(0), x)["params"]
    bank = jc.Bank.stack(Scale(), [params] * 2, head, [head_params], input_shape=(16, 12))
    problem = jc.Problem(bank, jc.Batch(x, Y), 2)
    assert np.isfinite(jc.evaluate_all(problem)[1].loss).all()
    with pytest.raises(ValueError, match=r"layer0 .*does not take an input of shape \[2, 5, 12\]"):
        jc.Bank.stack(Scale(), [params], head, [head_params], input_shape=(5, 12))


LOAD = """
import sys
import jax, numpy as np
import jchain as jc
sys.path.insert(0, sys.argv[1])
import kinds
bank = jc.Bank.load(sys.argv[2], modules=kinds.make_templates())
np.save(sys.argv[3], jc.apply_chain(bank, [0, 1, 2, 3, 4, 5], kinds.X))
"""


def test_a_bank_of_all_kinds_is_loaded_in_another_process(tmp_path):
    layers = [layer for i, layer in enumerate(make_mixed()) if i != 2]  # the bridge holds a class
    bank = make_bank(layers)
    bank.save(tmp_path / "bank")
    code = LOAD.replace("[0, 1, 2, 3, 4, 5]", "[0, 1, 2, 3, 4]")
    folder = str(Path(__file__).parent)
    arguments = [folder, str(tmp_path / "bank"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    found = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(
        found, jc.apply_chain(bank, [0, 1, 2, 3, 4], X), rtol=1e-3, atol=1e-6
    )
    again = jc.Bank.load(tmp_path / "bank", modules=make_templates())
    assert jax.tree.structure(again) == jax.tree.structure(bank)
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(bank), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (lambda params, x: x, {}), "<lambda> cannot be saved: expected a function that"),
        (
            lambda: (keep, {"a": {1.5: np.ones(2)}}),
            "the params of keep cannot be saved: .* got dict",
        ),
    ],
)
def test_what_has_no_name_is_refused_when_it_is_saved(tmp_path, make, message):
    module, params = make()
    bank = jc.Bank.stack(module, [params], *(lambda head: (head[0], [head[1]]))(make_head()))
    jc.evaluate_all(jc.Problem(bank, jc.Batch(X, Y), 1))
    with pytest.raises(ValueError, match=message):
        bank.save(tmp_path / "bank")
    assert not [*tmp_path.iterdir()]


def keep(params, x):
    return x


class Other(nnx.Module):
    def __init__(self, size, *, rngs):
        self.linear = nnx.Linear(D, size, rngs=rngs)

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], r"unknown nnx module 'Other': pass an instance.*modules=\[Other\(...\)\]"),
        ([Other], r"unknown nnx module 'Other': pass an instance"),
        ([lambda: Other(D + 1, rngs=nnx.Rngs(0))], "Other of the saved structure, got another one"),
    ],
)
def test_what_a_saved_bank_needs_is_named(tmp_path, modules, message):
    head, head_params = make_head()
    bank = jc.Bank.stack([Other(D, rngs=nnx.Rngs(0))], head=head, head_params=[head_params])
    bank.save(tmp_path / "bank")
    given = [module if isinstance(module, type) else module() for module in modules]
    with pytest.raises(ValueError, match=message):
        jc.Bank.load(tmp_path / "bank", modules=given)
    function = jc.Bank.stack(keep, [None], head, [head_params])
    function.save(tmp_path / "function")
    with pytest.raises(ValueError, match=r"unknown function 'keep': pass it.*modules=\[keep\]"):
        jc.Bank.load(tmp_path / "function", modules=given)
    assert jc.Bank.load(tmp_path / "function", modules=[keep]).num_layers == 1


class Sowing(nn.Module):
    """It needs only its params; what it sows is for whoever watches it."""

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "mean", x.mean())
        self.sow("losses", "square", (x**2).mean())
        return nn.Dense(D)(x)


def test_collections_that_are_only_sown_need_not_be_given():
    head, head_params = make_head()
    params = Sowing().init(jax.random.key(0), X)["params"]
    bank = jc.Bank.stack(Sowing(), [params], head, [head_params])
    expected = head.apply({"params": head_params}, Sowing().apply({"params": params}, X))
    jc.Problem(bank, jc.Batch(X, Y), 1)
    np.testing.assert_allclose(jc.apply_chain(bank, [0, 1], X), expected, rtol=1e-6)


class Failing(nn.Module):
    @nn.compact
    def __call__(self, x):
        raise AssertionError


def test_a_module_that_fails_without_a_text_is_named():
    head, head_params = make_head()
    bank = jc.Bank.stack(Failing(), [{}], head, [head_params])
    with pytest.raises(ValueError, match=r"layer0 \(Failing\(\)\), .*: AssertionError"):
        jc.Problem(bank, jc.Batch(X, Y), 1)
