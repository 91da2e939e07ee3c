"""Files of banks, and of arrays."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAD, LAYER, assert_same_bits, init_params, make_bank

import jchain as jc

SAVED = Path(__file__).parent.parent / "saved" / "two_modules_and_stem.safetensors"
LAYERS = init_params(LAYER, jax.random.key(0), 3, (5,))
HEADS = init_params(HEAD, jax.random.key(1), 2, (5,))


def test_save_and_load_give_the_same_bits(two_group_bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    two_group_bank.save(path)
    loaded = jc.Bank.load(path)
    assert_same_bits(loaded, two_group_bank)
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
        origins=[*"abcd"],
    )
    bank.save(tmp_path / "bank")
    loaded = jc.Bank.load(tmp_path / "bank")
    assert_same_bits(loaded, bank)
    assert jax.tree.structure(loaded) == jax.tree.structure(bank)
    x = jnp.ones((3, 2), jnp.float32)
    np.testing.assert_array_equal(
        jc.apply_chain(loaded, [0, 2], x), jc.apply_chain(bank, [0, 2], x)
    )


class Scale(nn.Module):
    """A user's module, unknown to jchain."""

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


def test_save_refuses_lambdas_and_keeps_the_old_file(tmp_path):
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
        with pytest.raises(ValueError, match="is damaged, truncated, or not a jchain file"):
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


def test_save_accepts_numpy_numbers_and_refuses_classes(tmp_path):
    head = nn.Dense(np.int64(3))
    bank = jc.Bank.stack(LAYER, LAYERS, head, HEADS)
    bank.save(tmp_path / "bank")
    assert jc.Bank.load(tmp_path / "bank").heads[0].module == nn.Dense(3)
    with pytest.raises(
        ValueError, match="cannot be saved: expected data, a dtype, or a jax.nn function"
    ):
        jc.Bank.stack(LAYER, LAYERS, nn.Dense(3, kernel_init=Scale), HEADS).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_bank_saved_by_an_older_version_loads(tmp_path):
    """The file and the losses were made before the package was restructured (0.1.0), by:

    layers = (jc.layers.ResidualMLP(5, hidden=7), jc.layers.InvertibleDense(5))
    stem = nn.Dense(5)
    bank = jc.train.independent(
        jax.random.key(0), data, layer=layers, head=jc.layers.DenseHead(3), num_nets=2, depth=2,
        num_steps=30, stem=stem, stem_params=stem.init(jax.random.key(1), data.x)["params"])
    bank = bank.replace([0], [jax.tree.map(lambda leaf: 0.5 * leaf, bank.get_params(0))])
    bank.save("tests/saved/two_modules_and_stem.safetensors")
    jc.evaluate(jc.Problem(bank, data, 2), chains).loss.tolist()
    """
    x = np.sin(np.arange(36.0, dtype=np.float32)).reshape(9, 4)
    data = jc.Batch(jnp.asarray(x), jnp.arange(9) % 3)
    chains = jc.chain.pad([[0, 1, 4], [3, 2, 5], [5]], 2)
    bank = jc.Bank.load(SAVED)
    assert bank.stem == nn.Dense(5)
    assert [group.tokens for group in bank.layers] == [(0, 2), (1, 3)]
    assert bank.parents == ((0, 1, 4), (2, 3, 5))
    assert (bank.names[2], bank.num_steps) == ("net1/0", 30)
    np.testing.assert_array_equal(bank.versions, [1, 0, 0, 0, 0, 0])
    loss = jc.evaluate(jc.Problem(bank, data, 2), chains).loss
    expected = [1.0307689905166626, 1.6417211294174194, 1.6614266633987427]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # Saving it again gives the same file.
    bank.save(tmp_path / "bank")
    assert (tmp_path / "bank").read_bytes() == SAVED.read_bytes()
