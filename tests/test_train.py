import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_batch

import jchain as jc

LAYER, HEAD = jc.layers.ResidualMLP(5), jc.layers.DenseHead(3)
DATA = make_batch(60)
KINDS = {
    "independent": {"num_nets": 2, "depth": 3},
    "snapshots": {"num_snapshots": 2, "depth": 3},
    "routed": {"num_layers": 6, "depth": 3, "num_heads": 2},
    "random": {"num_layers": 6, "depth": 3, "num_heads": 2},
}


@functools.cache
def make(kind, seed=0, **kwargs):
    settings = {"layer": LAYER, "head": HEAD, "num_steps": 20} | KINDS[kind] | kwargs
    return getattr(jc.train, kind)(jax.random.key(seed), DATA, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_banks_have_the_asked_sizes_and_are_seeded(kind):
    bank, same, other = make(kind), make.__wrapped__(kind), make(kind, seed=1)
    assert (bank.num_layers, bank.num_heads) == (6, 2)
    # Independent nets train for 20 steps each.
    assert bank.num_steps == (40 if kind == "independent" else 20)
    jax.tree.map(np.testing.assert_array_equal, bank, same)
    assert not np.allclose(jax.tree.leaves(bank.layers)[1], jax.tree.leaves(other.layers)[1])
    assert len(bank.parents) == (2 if kind in ("independent", "snapshots") else 0)


def test_names_and_parents():
    bank = make("independent")
    assert bank.names == (
        "net0/0",
        "net0/1",
        "net0/2",
        "net1/0",
        "net1/1",
        "net1/2",
        "net0/head",
        "net1/head",
    )
    assert bank.parents == ((0, 1, 2, 6), (3, 4, 5, 7))
    assert [bank.describe(parent) for parent in bank.parents][
        1
    ] == "net1/0 -> net1/1 -> net1/2 -> net1/head"
    assert bank.origins[0] == "nets trained apart: net0/0"
    assert make("snapshots", num_steps=19).names[:4] == (
        "step10/0",
        "step10/1",
        "step10/2",
        "step20/0",
    )
    assert make("routed").names[5:] == ("routed/5", "routed/head0", "routed/head1")


def loss_of(bank, chain):
    return float(jc.evaluate(jc.Problem(bank, DATA, 3), jc.chain.pad([chain], 3)).loss[0])


def test_parents_are_trained_nets():
    trained, start = make("independent", num_steps=300), make("independent", num_steps=0)
    for parent in trained.parents:
        assert loss_of(trained, parent) < 0.7 * loss_of(start, parent)


@pytest.mark.slow
def test_snapshots_share_one_run():
    bank = make("snapshots", num_snapshots=3, num_steps=300)
    losses = [loss_of(bank, parent) for parent in bank.parents]
    assert losses[0] > losses[1] > losses[2]
    alone = make("snapshots", num_snapshots=1, num_steps=300)
    last = bank.take(bank.parents[2][:-1], bank.parents[2][-1:])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        last.layers,
        alone.layers,
    )


def test_one_step_of_a_net_by_hand():
    """Compare the loop with a written-out gradient step on the whole split as minibatch."""
    rate, data = 0.1, make_batch(7)
    settings = {
        "layer": LAYER,
        "head": HEAD,
        "num_nets": 1,
        "depth": 2,
        "optimizer": optax.sgd(rate),
    }
    start, after = (
        jc.train.independent(jax.random.key(0), data, num_steps=num, **settings) for num in (0, 1)
    )

    def loss_fn(params):
        layers, head = params
        x = data.x
        for i in range(2):
            x = LAYER.apply({"params": jax.tree.map(lambda leaf, i=i: leaf[i], layers)}, x)
        logits = HEAD.apply({"params": jax.tree.map(lambda leaf: leaf[0], head)}, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(7), data.y])

    params = (start.layers[0].params, start.heads[0].params)
    expected = jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss_fn)(params))
    found = (after.layers[0].params, after.heads[0].params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def test_routes_reach_every_layer_and_random_layers_stay():
    start, routed = make("routed", num_steps=0), make("routed", num_steps=40)
    moved = np.abs(
        start.layers[0].params["Dense_0"]["kernel"] - routed.layers[0].params["Dense_0"]["kernel"]
    )
    assert np.all(moved.max(axis=(1, 2)) > 0)
    start, random = make("random", num_steps=0), make("random", num_steps=40)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), start.layers, random.layers
    )
    heads = np.abs(
        start.heads[0].params["Dense_0"]["kernel"] - random.heads[0].params["Dense_0"]["kernel"]
    )
    assert np.all(heads.max(axis=(1, 2)) > 0)


def test_a_fixed_stem_comes_first():
    stem = nn.Dense(5)
    data = jc.Batch(jnp.ones((20, 2)) * jnp.arange(20.0)[:, None], jnp.arange(20) % 3)
    params = stem.init(jax.random.key(0), data.x)["params"]
    bank = jc.train.routed(
        jax.random.key(0),
        data,
        layer=LAYER,
        head=HEAD,
        num_layers=3,
        depth=2,
        num_steps=5,
        stem=stem,
        stem_params=params,
    )
    jax.tree.map(np.testing.assert_array_equal, bank.stem_params, params)
    assert jc.apply_chain(bank, [0, 1, 3], data.x).shape == (20, 3)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("independent", {"num_nets": 0}, "expected num_nets to be at least 1, got 0"),
        ("independent", {"depth": 0}, "expected num_layers to be at least 1, got 0"),
        ("snapshots", {"num_snapshots": 0}, "expected num_snapshots to be at least 1, got 0"),
        ("routed", {"num_heads": 0}, "expected num_heads to be at least 1, got 0"),
        ("routed", {"num_steps": -1}, "expected num_steps to be at least 0, got -1"),
        (
            "routed",
            {"layer": nn.Dense(6)},
            r"Dense\(6\) must keep the shape .* expected float32\[60, 5\], got float32\[60, 6\]",
        ),
        (
            "random",
            {"head": jc.layers.DenseHead(2)},
            "expected labels in 0..1, the head's classes, got 0..2",
        ),
    ],
)
def test_training_rejects_bad_settings(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **kwargs)


@pytest.mark.slow
def test_several_modules_take_turns():
    layers, heads = (
        [jc.layers.ResidualMLP(5), jc.layers.Dense(5)],
        [HEAD, jc.layers.DenseHead(3), TanhHead(3)],
    )
    bank = make("routed", layer=tuple(layers), head=tuple(heads), num_layers=5, num_heads=3)
    assert [(group.module, group.tokens) for group in bank.layers] == [
        (layers[0], (0, 2, 4)),
        (layers[1], (1, 3)),
    ]
    # Equal modules are one group.
    assert [(group.module, group.tokens) for group in bank.heads] == [
        (HEAD, (5, 6)),
        (heads[2], (7,)),
    ]
    assert bank.names[:2] == ("routed/0", "routed/1")
    nets = make("independent", layer=tuple(layers), num_steps=300)
    start = make("independent", layer=tuple(layers), num_steps=0)
    assert [group.tokens for group in nets.layers] == [(0, 2, 3, 5), (1, 4)]
    for parent in nets.parents:
        assert loss_of(nets, parent) < 0.7 * loss_of(start, parent)
    # All modules are trained.
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b, axis=tuple(range(1, a.ndim))).all()),
        nets.layers,
        start.layers,
    )
    assert all(jax.tree.leaves(moved))


def test_modules_that_disagree_are_refused():
    with pytest.raises(
        ValueError, match=r"layer Dense\(4\) must keep the shape .* got float32\[60, 4\]"
    ):
        make("routed", layer=(LAYER, jc.layers.Dense(4)))
    with pytest.raises(
        ValueError, match=r"heads of one output shape, got \[\[60, 3\], \[60, 4\]\]"
    ):
        make("routed", head=(HEAD, jc.layers.DenseHead(4)))
    with pytest.raises(
        ValueError, match="at least one layer module and one head module, got 0 and 1"
    ):
        make("routed", layer=())


class TanhHead(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(jnp.tanh(x))


def test_examples_and_labels_of_different_lengths_are_refused():
    data = jc.data.load("wine")
    modules = {"layer": jc.layers.Dense(13), "head": jc.layers.DenseHead(3), "num_steps": 1}
    with pytest.raises(
        ValueError,
        match="expected at least one example and one label per example, got x .* and y .*",
    ):
        jc.train.independent(
            jax.random.key(0), jc.Batch(data.train.x[:9], data.train.y), num_nets=1, **modules
        )
    with pytest.raises(ValueError, match="expected num_steps to be at least 1, got 0"):
        jc.train.snapshots(jax.random.key(0), data.train, **(modules | {"num_steps": 0}))


@pytest.mark.parametrize("kind", [*KINDS, "make_bank"])
@pytest.mark.parametrize("name", ["is_routed", "batchsize", "num_step"])
def test_unknown_arguments_are_named(kind, name):
    required = {"layer": LAYER, "head": HEAD} | ({"kind": "routed"} if kind == "make_bank" else {})
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        getattr(jc.train, kind)(jax.random.key(0), DATA, **required, **{name: 1})


def test_every_setting_is_documented():
    for kind in [*KINDS, "make_bank"]:
        make_fn = getattr(jc.train, kind)
        for name in inspect.signature(make_fn).parameters:
            assert f"\n      {name}: " in make_fn.__doc__, (kind, name)


@pytest.mark.parametrize("kind", KINDS)
def test_make_bank_calls_the_function_of_its_kind(kind):
    sizes = {"num_heads": 2} if kind in ("routed", "random") else {}
    settings = {"depth": 3, "num_steps": 20, "optimizer": optax.sgd(0.1)}
    bank = jc.train.make_bank(
        jax.random.key(0), DATA, kind, layer=LAYER, head=HEAD, num_layers=6, **settings, **sizes
    )
    jax.tree.map(np.testing.assert_array_equal, bank, make(kind, **settings))
