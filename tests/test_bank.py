import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAD, LAYER, init_params, make_bank, make_batch

import jchain as jc

LAYERS = init_params(LAYER, jax.random.key(0), 3, (5,))
HEADS = init_params(HEAD, jax.random.key(1), 2, (5,))


def assert_same(a, b):
    leaves, other = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves) == len(other) > 0
    for x, y in zip(leaves, other, strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_stack_keeps_every_layer():
    bank = jc.Bank.stack(LAYER, LAYERS, HEAD, HEADS)
    assert (bank.num_layers, bank.num_heads) == (3, 2)
    (group,) = bank.layers
    for i, params in enumerate(LAYERS):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], group.params), params)
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
        (LAYER, [], HEAD, HEADS, {}, "empty bank: expected at least one layer and one head, got 0 and 2"),
        (LAYER, LAYERS, HEAD, [], {}, "empty bank: expected at least one layer and one head, got 3 and 0"),
        (
            LAYER,
            [*LAYERS, init_params(jc.layers.ResidualMLP(5, hidden=6), jax.random.key(0), 1, (5,))[0]],
            HEAD,
            HEADS,
            {},
            r"params of layer 3 do not stack: expected float32\[7\] at \['Dense_0'\]\['bias'\] as in layer 0, got float32\[6\]",
        ),
        (LAYER, [*LAYERS, {"Dense_0": LAYERS[0]["Dense_0"]}], HEAD, HEADS, {}, "params of layer 3 do not stack: expected the structure"),
        (
            [jc.layers.Dense(5), LAYER, LAYER],
            [init_params(jc.layers.Dense(5), jax.random.key(0), 1, (5,))[0], LAYERS[0], {"Dense_0": LAYERS[0]["Dense_0"]}],
            HEAD,
            HEADS,
            {},
            "params of layer 2 do not stack: expected the structure",
        ),
        (Widen(), init_params(Widen(), jax.random.key(0), 2, (5,)), HEAD, HEADS, {}, r"Widen must keep the shape of its input: expected float32\[1, 5\], got float32\[1, 10\]"),
        (nn.Conv(4, (3, 3)), init_params(nn.Conv(4, (3, 3)), jax.random.key(0), 2, (8, 8, 2)), HEAD, HEADS, {}, "Conv must keep the shape"),
        (LAYER, LAYERS, HEAD, HEADS, {"names": ["a", "b"]}, r"expected 3 names \(layers\) or 5 .* got 2"),
        (LAYER, LAYERS, HEAD, HEADS, {"names": ["a", "b", "a"]}, r"different name for each layer and head, got \['a'\]"),
        (LAYER, LAYERS, HEAD, HEADS, {"parents": [[0, 1]]}, "has no head token"),
        (LAYER, LAYERS, HEAD, HEADS, {"origins": ["x"]}, "expected 5 origins"),
    ],
)  # fmt: skip
def test_stack_refuses(layer, layers, head, heads, kwargs, message):
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
    with pytest.raises(ValueError, match="same stem, but that of bank 1 differs"):
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


def test_params_of_a_stem_may_be_arrays_of_numpy():
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


def test_save_and_load_give_the_same_bits(two_group_bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    two_group_bank.save(path)
    loaded = jc.Bank.load(path)
    assert_same(loaded, two_group_bank)
    assert jax.tree.structure(loaded) == jax.tree.structure(two_group_bank)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def test_save_keeps_stem_fields_dtypes_and_metadata(tmp_path):
    layer = jc.layers.Dense(5, activation=nn.gelu)
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), init_params(layer, jax.random.key(0), 2, (5,))
    )
    stem = nn.Dense(5, use_bias=False)
    stem_params = stem.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    bank = jc.Bank.stack(
        layer,
        params,
        HEAD,
        HEADS,
        stem=stem,
        stem_params=stem_params,
        parents=[[0, 1, 2]],
        num_steps=9,
        origins="abcd",
    )
    bank.save(tmp_path / "bank")
    loaded = jc.Bank.load(tmp_path / "bank")
    assert_same(loaded, bank)
    assert jax.tree.structure(loaded) == jax.tree.structure(bank)
    x = jnp.ones((3, 2), jnp.float32)
    np.testing.assert_array_equal(
        jc.apply_chain(loaded, [0, 2], x), jc.apply_chain(bank, [0, 2], x)
    )


class Scale(nn.Module):
    """A user's own module, unknown to jchain."""

    factor: float = 2.0

    @nn.compact
    def __call__(self, x):
        return x * self.factor * self.param("scale", nn.initializers.normal(), (1, x.shape[-1]))


def test_load_asks_for_unknown_modules_and_runs_no_code_of_the_file(tmp_path):
    layer = Scale(factor=3.0)
    bank = jc.Bank.stack(layer, init_params(layer, jax.random.key(0), 2, (5,)), HEAD, HEADS)
    bank.save(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"unknown module 'Scale': pass its class"):
        jc.Bank.load(tmp_path / "bank")
    assert jc.Bank.load(tmp_path / "bank", modules=[Scale]).layers[0].module == layer


def test_save_refuses_fields_that_are_no_data(tmp_path):
    layer = jc.layers.Dense(5, activation=lambda x: x)
    bank = jc.Bank.stack(layer, init_params(layer, jax.random.key(0), 1, (5,)), HEAD, HEADS)
    (tmp_path / "bank").write_text("old")
    with pytest.raises(ValueError, match=r"Dense.activation = .* cannot be saved"):
        bank.save(tmp_path / "bank")
    assert (tmp_path / "bank").read_text() == "old"


def test_damaged_files_give_one_clear_error(bank, tmp_path):
    path = tmp_path / "bank"
    bank.save(path)
    blob = path.read_bytes()
    for size in (0, 5, 100, len(blob) // 2, len(blob) - 1):
        path.write_bytes(blob[:size])
        with pytest.raises(ValueError, match="is damaged, truncated or no jchain file"):
            jc.Bank.load(path)
    path.write_bytes(blob[:-3] + bytes([blob[-3] ^ 1]) + blob[-2:])
    with pytest.raises(ValueError, match="is damaged: it does not have the checksum"):
        jc.Bank.load(path)
    path.write_bytes(blob.replace(b"jchain/1", b"jchain/9"))
    with pytest.raises(ValueError, match="expected format 'jchain/1', got 'jchain/9'"):
        jc.Bank.load(path)
    path.write_bytes(blob.replace(b"layer1", b"layer7"))
    with pytest.raises(ValueError, match="is damaged: it does not have the checksum"):
        jc.Bank.load(path)
    with pytest.raises(FileNotFoundError, match="expected a jchain file"):
        jc.Bank.load(tmp_path / "none")


def test_an_interrupted_save_leaves_the_old_file(bank, tmp_path, monkeypatch):
    path = tmp_path / "bank"
    bank.save(path)
    blob = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_bank(seed=9).save(path)
    assert path.read_bytes() == blob
    assert [file.name for file in tmp_path.iterdir()] == ["bank"]


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
    with pytest.raises(ValueError, match="one layer module, or 3 as there are params, got 2"):
        jc.Bank.stack(modules[:2], params, head, heads)


def test_reserved_places_hold_copies_behind_the_layers(two_group_bank):
    bank = two_group_bank.reserve(4)
    assert (bank.num_layers, bank.num_heads) == (5 + 2 * 4, 2)
    for place, source in zip(range(5, 13), [0, 1, 2, 0, 3, 4, 3, 4], strict=True):
        assert_same(bank.get_params(place), two_group_bank.get_params(source))
        assert bank.origins[place] == f"free, a copy of {two_group_bank.names[source]}"
    assert bank.names[:5] + bank.names[13:] == two_group_bank.names
    x = jnp.ones((2, 5))
    np.testing.assert_array_equal(
        jc.apply_chain(bank, [8, 9, 14, -1], x), jc.apply_chain(two_group_bank, [0, 3, 6, -1], x)
    )
    assert two_group_bank.reserve(0).names == two_group_bank.names
    twice = bank.reserve(1)
    assert len(set(twice.names)) == twice.num_layers + 2
    assert bank.without_names().reserve(1).without_names().take([0, 14]).num_layers == 2
    with pytest.raises(ValueError, match="num of at least 0, got -1"):
        two_group_bank.reserve(-1)


def test_parents_keep_their_heads_when_places_are_reserved():
    bank = make_bank(parents=[(0, 1, 4), (2, 5)]).reserve(3)
    assert bank.parents == ((0, 1, 7), (2, 8))
    assert bank.describe([2, 8]) == "layer2 -> head1"


def test_replaced_weights_have_a_new_version_and_the_others_stay(two_group_bank):
    params = [
        jax.tree.map(lambda leaf: leaf + 1, two_group_bank.get_params(token)) for token in (3, 6)
    ]
    bank = two_group_bank.replace([3, 6], params, names=["a", "b"], origins=["x", "y"])
    np.testing.assert_array_equal(bank.versions, [0, 0, 0, 1, 0, 0, 1])
    for token in range(7):
        expected = {3: params[0], 6: params[1]}.get(token, two_group_bank.get_params(token))
        assert_same(bank.get_params(token), expected)
    assert (bank.names[3], bank.names[6], bank.origins[3], bank.origins[6]) == ("a", "b", "x", "y")
    assert two_group_bank.versions is None


def test_versions_go_where_their_tokens_go(tmp_path):
    bank = make_bank(names=["a", "b", "c", "d", "h", "i"])
    bank = bank.replace([1, 4], [bank.get_params(1), bank.get_params(4)])
    np.testing.assert_array_equal(bank.take([2, 1], [5, 4]).versions, [0, 1, 0, 1])
    joined = jc.Bank.concat([make_bank(3, 1), bank])
    np.testing.assert_array_equal(joined.versions, [0, 0, 0, 0, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(bank.reserve(2).versions, [0, 1, 0, 0, 0, 1, 1, 0])
    bank.save(tmp_path / "bank")
    np.testing.assert_array_equal(jc.Bank.load(tmp_path / "bank").versions, bank.versions)
    make_bank().save(tmp_path / "bank")
    assert jc.Bank.load(tmp_path / "bank").versions is None


def test_weights_that_do_not_fit_are_not_put_in(bank):
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


class Flatten(nn.Module):
    """No params."""

    @nn.compact
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)


class Shift(nn.Module):
    """Without a kernel, so that it takes other sizes too."""

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


def test_fields_that_are_no_data_cannot_be_saved(tmp_path):
    head = nn.Dense(np.int64(3))
    bank = jc.Bank.stack(LAYER, LAYERS, head, HEADS)
    bank.save(tmp_path / "bank")
    assert jc.Bank.load(tmp_path / "bank").heads[0].module == nn.Dense(3)
    with pytest.raises(
        ValueError, match="cannot be saved: expected data, a dtype or a jax.nn function"
    ):
        jc.Bank.stack(LAYER, LAYERS, nn.Dense(3, kernel_init=Flatten), HEADS).save(
            tmp_path / "other"
        )
    assert not (tmp_path / "other").exists()
