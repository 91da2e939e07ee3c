import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAD, LAYER, assert_same_bits, init_params, make_bank, make_batch

import jchain as jc

LAYERS = init_params(LAYER, jax.random.key(0), 3, (5,))
HEADS = init_params(HEAD, jax.random.key(1), 2, (5,))


def test_stack_keeps_every_layer():
    bank = jc.Bank.stack(LAYER, LAYERS, HEAD, HEADS)
    assert (bank.num_layers, bank.num_heads) == (3, 2)
    (group,) = bank.layers
    for i, params in enumerate(LAYERS):
        assert_same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], group.params), params)
    assert bank.names == ("layer0", "layer1", "layer2", "head0", "head1")


def test_names_and_describe():
    bank = jc.Bank.stack(LAYER, LAYERS, HEAD, HEADS, names=["net0/0", "net0/1", "net1/0"])
    assert bank.describe([2, 0, 3, -1]) == "net1/0 -> net0/0 -> head0"
    assert bank.describe(jnp.array([4])) == "head1"
    with pytest.raises(ValueError, match="token 999 at slot 0 is out of range"):
        bank.describe([999, 3])
    with pytest.raises(ValueError, match="one chain of shape"):
        bank.describe([[0, 3]])


class Widen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2 * x.shape[-1])(x)


@pytest.mark.parametrize(
    ("layer", "layers", "head", "heads", "kwargs", "message"),
    [
        (
            LAYER,
            [],
            HEAD,
            HEADS,
            {},
            "empty bank: expected at least one layer, got none",
        ),
        (
            LAYER,
            LAYERS,
            HEAD,
            [],
            {},
            "empty bank: expected at least one head, got none",
        ),
        (
            LAYER,
            [
                *LAYERS,
                init_params(jc.layers.ResidualMLP(5, hidden=6), jax.random.key(0), 1, (5,))[0],
            ],
            HEAD,
            HEADS,
            {},
            r"params of layer 3 do not stack: expected float32\[7\] at \['Dense_0'\]\['bias'\] "
            r"as in layer 0, got float32\[6\]",
        ),
        (
            LAYER,
            [*LAYERS, {"Dense_0": LAYERS[0]["Dense_0"]}],
            HEAD,
            HEADS,
            {},
            "params of layer 3 do not stack: expected the structure",
        ),
        (
            [jc.layers.Dense(5), LAYER, LAYER],
            [
                init_params(jc.layers.Dense(5), jax.random.key(0), 1, (5,))[0],
                LAYERS[0],
                {"Dense_0": LAYERS[0]["Dense_0"]},
            ],
            HEAD,
            HEADS,
            {},
            "params of layer 2 do not stack: expected the structure",
        ),
        (
            Widen(),
            init_params(Widen(), jax.random.key(0), 2, (5,)),
            HEAD,
            HEADS,
            {"input_shape": (5,)},
            r"layer0 \(Widen\(\)\), token 0, must keep the shape of its input: "
            r"expected float32\[2, 5\], got float32\[2, 10\]",
        ),
        (
            nn.Conv(4, (3, 3)),
            init_params(nn.Conv(4, (3, 3)), jax.random.key(0), 2, (8, 8, 2)),
            HEAD,
            HEADS,
            {"input_shape": (8, 8, 2)},
            r"layer0 \(Conv\(.*\), token 0, must keep the shape",
        ),
        (
            LAYER,
            LAYERS,
            HEAD,
            HEADS,
            {"names": ["a", "b"]},
            r"expected 3 names \(layers\) or 5 .* got 2",
        ),
        (
            LAYER,
            LAYERS,
            HEAD,
            HEADS,
            {"names": ["a", "b", "a"]},
            r"different name for each layer and head, got \['a'\]",
        ),
        (LAYER, LAYERS, HEAD, HEADS, {"parents": [[0, 1]]}, "has no head token"),
        (LAYER, LAYERS, HEAD, HEADS, {"origins": ["x"]}, "expected 5 origins"),
    ],
)
def test_stack_rejects_bad_input(layer, layers, head, heads, kwargs, message):
    with pytest.raises(ValueError, match=message):
        jc.Bank.stack(layer, layers, head, heads, **kwargs)


def test_concat_has_one_group_per_module_and_tokens_in_order():
    a, b, c = (
        make_bank(2, 1),
        make_bank(3, 1, seed=1, layer=jc.layers.Dense(5)),
        make_bank(1, 2, seed=2),
    )
    bank = jc.Bank.concat([a, b, c])
    assert [group.tokens for group in bank.layers] == [(0, 1, 5), (2, 3, 4)]
    assert [group.tokens for group in bank.heads] == [(6, 7, 8, 9)]
    assert bank.names[:3] == ("bank0/layer0", "bank0/layer1", "bank1/layer0")
    x = make_batch().x
    for whole, part, own in [
        ([0, 1, 6], a, [0, 1, 2]),
        ([4, 2, 7], b, [2, 0, 3]),
        ([5, 9], c, [0, 2]),
    ]:
        np.testing.assert_array_equal(jc.apply_chain(bank, whole, x), jc.apply_chain(part, own, x))


def test_concat_moves_parents_and_refuses_other_stems():
    a = make_bank(2, 1, parents=[[0, 1, 2]], names=["a0", "a1", "ah"], num_steps=3)
    b = make_bank(2, 1, parents=[[1, 0, 2]], names=["b0", "b1", "bh"], num_steps=4)
    bank = jc.Bank.concat([a, b])
    assert bank.parents == ((0, 1, 4), (3, 2, 5))
    assert bank.names == ("a0", "a1", "b0", "b1", "ah", "bh")
    assert bank.num_steps == 7
    stem = nn.Dense(5)
    params = stem.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    with pytest.raises(ValueError, match="same stem, but the stem of bank 1 differs"):
        jc.Bank.concat([a, make_bank(2, 1, stem=stem, stem_params=params)])
    with pytest.raises(ValueError, match="empty bank"):
        jc.Bank.concat([])
    wide = jc.Bank.stack(
        LAYER,
        init_params(jc.layers.ResidualMLP(5, hidden=6), jax.random.key(0), 1, (5,)),
        HEAD,
        HEADS,
    )
    with pytest.raises(
        ValueError, match=r"token 2 of the new bank do not stack: .* as in token 0 of the new bank"
    ):
        jc.Bank.concat([make_bank(2, 1), wide])


def test_params_of_a_stem_may_be_numpy_arrays():
    stem = nn.Dense(5)
    params = jax.tree.map(np.asarray, stem.init(jax.random.key(0), jnp.ones((1, 5)))["params"])
    problem = jc.Problem(make_bank(2, 1, stem=stem, stem_params=params), make_batch(), 1)
    assert np.isfinite(jc.evaluate(problem, [[0, 2]]).loss).all()


def test_take(two_group_bank):
    taken = two_group_bank.take([4, 0], [6])
    x = make_batch().x
    np.testing.assert_array_equal(
        jc.apply_chain(taken, [0, 1, 2], x), jc.apply_chain(two_group_bank, [4, 0, 6], x)
    )
    assert taken.names == tuple(two_group_bank.names[i] for i in (4, 0, 6))
    assert len(two_group_bank.take([1]).layers) == 1
    bank = make_bank(3, 2, parents=[[0, 1, 3], [1, 2, 4]])
    assert bank.take([2, 1]).parents == ((1, 0, 3),)
    for layers, heads in [([], None), ([0, 0], None), ([5], None), ([0], [0]), ([0], [])]:
        with pytest.raises(ValueError, match=r"expected different .* tokens"):
            two_group_bank.take(layers, heads)


def test_reserved_layers_hold_copies_after_the_layers(two_group_bank):
    bank = two_group_bank.reserve(4)
    assert (bank.num_layers, bank.num_heads) == (5 + 2 * 4, 2)
    for spare, source in zip(range(5, 13), [0, 1, 2, 0, 3, 4, 3, 4], strict=True):
        assert_same_bits(bank.get_params(spare), two_group_bank.get_params(source))
        assert bank.origins[spare] == f"free, a copy of {two_group_bank.names[source]}"
    assert bank.names[:5] + bank.names[13:] == two_group_bank.names
    x = jnp.ones((2, 5))
    np.testing.assert_array_equal(
        jc.apply_chain(bank, [8, 9, 14, -1], x), jc.apply_chain(two_group_bank, [0, 3, 6, -1], x)
    )
    assert two_group_bank.reserve(0).names == two_group_bank.names
    twice = bank.reserve(1)
    assert len(set(twice.names)) == twice.num_layers + 2
    assert bank.without_names().reserve(1).without_names().take([0, 14]).num_layers == 2
    with pytest.raises(ValueError, match="num to be at least 0, got -1"):
        two_group_bank.reserve(-1)


def test_replaced_weights_have_a_new_version_and_the_others_stay(two_group_bank):
    params = [
        jax.tree.map(lambda leaf: leaf + 1, two_group_bank.get_params(token)) for token in (3, 6)
    ]
    bank = two_group_bank.replace([3, 6], params, names=["a", "b"], origins=["x", "y"])
    np.testing.assert_array_equal(bank.versions, [0, 0, 0, 1, 0, 0, 1])
    for token in range(7):
        expected = {3: params[0], 6: params[1]}.get(token, two_group_bank.get_params(token))
        assert_same_bits(bank.get_params(token), expected)
    assert (bank.names[3], bank.names[6], bank.origins[3], bank.origins[6]) == ("a", "b", "x", "y")
    assert two_group_bank.versions is None


class Flatten(nn.Module):
    """A module without params."""

    @nn.compact
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)


class Shift(nn.Module):
    """A module without a kernel, which also accepts other sizes."""

    @nn.compact
    def __call__(self, x):
        shift = self.param("shift", nn.initializers.ones, (1, x.shape[-1]))
        return self.param("alpha", nn.initializers.ones, (1, 1)) * x + shift


class Relu(nn.Module):
    def __call__(self, x):
        return nn.relu(x)


def test_modules_without_params_are_stems_and_layers(tmp_path):
    data = make_batch()
    layers = [{}, *init_params(Shift(), jax.random.key(0), 1, (5,))]
    bank = jc.Bank.stack([Relu(), Shift()], layers, HEAD, HEADS, stem=Flatten())
    bank.save(tmp_path / "bank")
    again = jc.Bank.load(tmp_path / "bank", modules=[Relu, Shift, Flatten])
    problem = jc.Problem(bank, data, 2)
    chains, out = jc.evaluate_all(problem)
    np.testing.assert_array_equal(jc.evaluate(problem.with_bank(again), chains).loss, out.loss)
    hidden = layers[1]["alpha"] * np.maximum(data.x, 0) + layers[1]["shift"]
    np.testing.assert_allclose(
        jc.apply_chain(bank, [0, 1, 2], data.x), HEAD.apply({"params": HEADS[0]}, hidden), rtol=1e-5
    )
    found = jc.run(jax.random.key(0), jc.BeamSearch(width=4, max_width=4), problem, budget=50)
    assert found.best_loss == pytest.approx(float(out.loss.min()), rel=1e-5)


def test_layers_that_compute_in_bfloat16_are_a_bank():
    module = nn.Dense(5, dtype=jnp.bfloat16)
    bank = jc.Bank.stack(module, init_params(module, jax.random.key(0), 2, (5,)), HEAD, HEADS)
    data = make_batch()
    out = jc.evaluate(
        jc.Problem(bank, jc.Batch(data.x.astype(jnp.bfloat16), data.y), 1), np.array([[0, 2]])
    )
    assert np.isfinite(out.loss).all()


def test_a_bank_prints_in_one_line(two_group_bank):
    stem = jc.layers.Dense(5)
    assert repr(make_bank(1, 2, names=["net0/0"])) == (
        "Bank(1 layer: ResidualMLP(5, hidden=7); 2 heads: 2 DenseHead(3); names net0/0..net0/0)"
    )
    names = [f"routed/{i}" for i in range(4)]
    bank = make_bank(4, 1, names=names, stem=stem, stem_params={})
    assert repr(bank) == (
        "Bank(4 layers: 4 ResidualMLP(5, hidden=7); 1 head: DenseHead(3); stem: Dense(5); "
        "names routed/0..routed/3)"
    )
    assert repr(two_group_bank.without_names()) == (
        "Bank(5 layers: 3 ResidualMLP(5, hidden=7), 2 Dense(5); 2 heads: 2 DenseHead(3))"
    )


def test_validate_checks_chains_of_any_length(bank):
    np.testing.assert_array_equal(bank.validate([[0, 4, -1]]), [[0, 4, -1]])
    with pytest.raises(ValueError, match="chain 0 has no head token"):
        bank.validate((0, 1))
