"""GGUF files as checkpoints: weights and dtypes."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import (
    CONFIGS,
    FEATURES,
    add_options,
    convert,
    read_options,
    write_gguf,
    write_model,
)
from safetensors.numpy import load_file

import jchain as jc
from jchain.hub.gguf_file import GGUFCheckpoint


def get_leaves(bank):
    return jax.tree.leaves((bank.layers, bank.heads, bank.stem_params))


def read_all(checkpoint):
    rows = {}
    for name, shape in checkpoint.shapes.items():
        rows[name] = np.empty(shape, jnp.dtype(checkpoint.dtypes[name]))
        checkpoint.read(name, rows[name])
    return rows


@pytest.mark.parametrize("case", CONFIGS)
def test_a_converted_model_is_the_same_bank(tmp_path, case):
    model = write_model(tmp_path / "model", case)
    file = write_gguf(tmp_path / "tiny.gguf", read_options(model), model)
    ours, theirs = jc.hub.load(file), jc.hub.load(model)
    assert [group.module for group in ours.layers] == [group.module for group in theirs.layers]
    assert ours.stem == theirs.stem
    assert ours.heads[0].module == theirs.heads[0].module
    for leaf, expected in zip(get_leaves(ours), get_leaves(theirs), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, expected)


def test_layers_are_named_after_the_file(tmp_path):
    bank = jc.hub.load(convert(tmp_path))
    assert bank.names == ("tiny/0", "tiny/1", "tiny/head")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_matrices_are_dequantized_to_float32(tmp_path, kind):
    config = CONFIGS["qwen2"]  # its layouts are those of the file
    model = write_model(tmp_path / "model", "qwen2")
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "tiny.gguf", config, model, kind))
    assert set(checkpoint.dtypes.values()) == {"float32"}
    tensors, found = load_file(model / "model.safetensors"), read_all(checkpoint)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            own = gguf.GGMLQuantizationType[kind]
            expected = gguf.dequantize(gguf.quantize(tensor, own), own)
            assert np.abs(expected - tensor).max() > 0
        else:
            expected = tensor
        np.testing.assert_array_equal(found[name], expected, name)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox"])
def test_quantized_rows_return_to_their_places(tmp_path, case):
    model = write_model(tmp_path / "model", case)
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "t.gguf", CONFIGS[case], model, "Q8_0"))
    found = read_all(checkpoint)
    for name, tensor in load_file(model / "model.safetensors").items():
        # The largest magnitude in a block of 32 values is 127 steps of a size in float16.
        bound = (1 / 254 + 2**-11) * np.abs(tensor).max()
        assert np.abs(found[name] - tensor).max() <= 1.001 * bound, name


def test_parts_are_read_in_any_size(tmp_path, monkeypatch):
    file = convert(tmp_path, "llama", "Q4_0")
    whole = read_all(GGUFCheckpoint(file))
    monkeypatch.setattr("jchain.hub.gguf_file._CHUNK_SIZE", 96)
    for name, row in read_all(GGUFCheckpoint(file)).items():
        np.testing.assert_array_equal(row, whole[name])


@pytest.mark.parametrize(("kind", "dtype"), [("F16", np.float16), ("BF16", jnp.bfloat16)])
def test_a_file_of_one_float_type_keeps_it(tmp_path, kind, dtype):
    model = write_model(tmp_path / "model", "llama")
    path = tmp_path / "half.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    num_blocks = add_options(writer, CONFIGS["qwen2"] | {"model_type": "llama"})
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_blocks)
    own = gguf.GGMLQuantizationType[kind]
    for name, tensor in load_file(model / "model.safetensors").items():
        writer.add_tensor(
            known.get_name(name, try_suffixes=(".weight",)),
            gguf.quantize(tensor, own),
            raw_dtype=own,
        )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file):
        step()
    writer.write_tensors_to_file()
    writer.close()
    assert {leaf.dtype for leaf in get_leaves(jc.hub.load(path))} == {jnp.dtype(dtype)}
    asked = jc.hub.load(path, dtype="float32")
    assert {leaf.dtype for leaf in get_leaves(asked)} == {jnp.dtype("float32")}


def make_k_blocks(kind, num_rows, width, rng):
    """Make random blocks of a K-quant, whose scales are finite."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (num_rows * width // size, num_bytes), dtype=np.uint8)
    scales = {gguf.GGMLQuantizationType.Q4_K: (0, 2), gguf.GGMLQuantizationType.Q6_K: (208,)}[kind]
    for start in scales:
        scale = rng.uniform(0.01, 0.02, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scale[:, None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


def write_k_quants(path):
    """Write a Llama of K-quants, and return its Q4_K map to queries and its Q6_K embeddings."""
    rng = np.random.default_rng(0)
    config = FEATURES | {"model_type": "llama", "hidden_size": 256, "intermediate_size": 256}
    writer = gguf.GGUFWriter(path, "llama")
    num_blocks = add_options(writer, config)
    types = gguf.GGMLQuantizationType
    embeddings = make_k_blocks(types.Q6_K, 11, 256, rng)
    writer.add_tensor("token_embd.weight", embeddings, raw_dtype=types.Q6_K)
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    queries = []
    for i in range(num_blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            blocks = make_k_blocks(types.Q4_K, 256, 256, rng)
            writer.add_tensor(f"blk.{i}.{name}.weight", blocks, raw_dtype=types.Q4_K)
            queries += [blocks] if name == "attn_q" else []
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.dequantize(queries[0], types.Q4_K), gguf.dequantize(embeddings, types.Q6_K)


def test_k_quants_are_dequantized(tmp_path):
    queries, embeddings = write_k_quants(tmp_path / "k.gguf")
    found = read_all(GGUFCheckpoint(tmp_path / "k.gguf"))
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], embeddings)
    # In each head of 64, the file has rows 0, 32, 1, 33, and so on.
    order = [64 * head + i + 32 * half for head in range(4) for i in range(32) for half in range(2)]
    np.testing.assert_array_equal(found["model.layers.0.self_attn.q_proj.weight"][order], queries)
    bank = jc.hub.load(tmp_path / "k.gguf")
    out = jc.apply_chain(bank, np.array(bank.parents[0]), jnp.arange(6)[None])
    assert np.isfinite(out).all()


def test_tensors_are_compared_by_value(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.{}.self_attn.q_proj.weight"
    tensors[name.format(1)] = tensors[name.format(0)]
    file = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], tensors)
    checkpoint = GGUFCheckpoint(file)
    assert checkpoint.are_equal(name.format(0), name.format(1))
    assert not checkpoint.are_equal(name.format(0), "model.layers.0.self_attn.o_proj.weight")
    assert not checkpoint.are_equal(name.format(0), "model.layers.0.self_attn.k_proj.weight")


def test_models_of_both_formats_are_loaded_together(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    file = write_gguf(tmp_path / "tiny.gguf", CONFIGS["llama"], model)
    bank = jc.hub.load_many([model, file])
    x = jnp.arange(8).reshape(1, 8)
    first, second = (jc.apply_chain(bank, np.array(chain), x) for chain in bank.parents)
    np.testing.assert_array_equal(first, second)


def test_a_missing_or_wrong_tensor_is_named(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    missing = {key: value for key, value in tensors.items() if key != name}
    file = write_gguf(tmp_path / "missing.gguf", CONFIGS["llama"], missing)
    with pytest.raises(ValueError, match=f"expected tensors {name}, which are missing"):
        jc.hub.load(file)
    wrong = tensors | {name: np.ones((32, 32), np.float32)}
    file = write_gguf(tmp_path / "wrong.gguf", CONFIGS["llama"], wrong)
    with pytest.raises(ValueError, match=rf"expected {name} of shape \[32, 64\]"):
        jc.hub.load(file)
    del tensors["model.embed_tokens.weight"]
    file = write_gguf(tmp_path / "none.gguf", CONFIGS["llama"], tensors)
    with pytest.raises(ValueError, match="expected tensor token_embd.weight, which is missing"):
        jc.hub.load(file)


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path):
    config = CONFIGS["llama"]
    model = write_model(tmp_path / "model", "llama")

    def add(writer):
        row = np.zeros(32, np.int8)
        writer.add_tensor("blk.0.extra.weight", row, raw_dtype=gguf.GGMLQuantizationType.I8)

    file = write_gguf(tmp_path / "t.gguf", config, model, change=add)
    with pytest.raises(ValueError, match="blk.0.extra.weight has type I8, which gguf cannot"):
        jc.hub.load(file)


def test_a_file_that_became_shorter_is_refused(tmp_path):
    file = convert(tmp_path)
    checkpoint = GGUFCheckpoint(file)
    file.write_bytes(file.read_bytes()[:5000])
    name = "model.norm.weight"
    with pytest.raises(ValueError, match=f"is truncated: expected 128 bytes of {name}"):
        checkpoint.read(name, np.empty(32, np.float32))
