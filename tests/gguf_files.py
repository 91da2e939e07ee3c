"""Tiny GGUF files, written as llama.cpp's convert_hf_to_gguf.py does."""

import json
import struct

import gguf
import jax
import numpy as np
from checkpoints import write_config
from safetensors.numpy import load_file

import jchain as jc

FEATURES = {
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "llama": FEATURES | {"num_key_value_heads": 2, "model_type": "llama"},
    "llama tied": FEATURES
    | {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 16}
    | {"attention_bias": True, "mlp_bias": True},
    "mistral": FEATURES
    | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 3, "head_dim": 8},
    "qwen2": FEATURES | {"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6},
    "qwen3": FEATURES
    | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}
    | {"tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 11,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 16,
    },
    "gpt_neox": FEATURES | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt_neox sequential": FEATURES | {"model_type": "gpt_neox", "use_parallel_residual": False},
}
ARCHITECTURES = {"mistral": "llama", "gpt_neox": "gptneox"}
NAMES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2"}
NAMES["gptneox"] = "GPTNEOX"
FLOATS = ("F32", "F16", "BF16")


def write_model(folder, case, **changes):
    """Write a random model in the format of Hugging Face, with changed options."""
    source = write_config(folder.with_name(f"{folder.name}-config"), CONFIGS[case] | changes)
    bank = jc.hub.random_bank(jax.random.key(0), source)
    jc.hub.export(bank, bank.parents[0], source, folder)
    return folder


def write_gguf(path, config, tensors, kind="F32", *, change=None, tokenizer=None):
    """Convert a model.

    Args:
      path: the file to write.
      config: content of config.json.
      tensors: the tensors by their Hugging Face names, or the folder of them.
      kind: name of the type of all matrices; vectors are in float32.
      change: called with the writer before it writes.
      tokenizer: called with the writer, to add a tokenizer.
    """
    if not isinstance(tensors, dict):
        tensors = load_file(tensors / "model.safetensors")
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    num_blocks = add_options(writer, config)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[NAMES[architecture]], num_blocks)
    kind = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        laid_out = np.ascontiguousarray(lay_out(found, tensor, config))
        own_kind = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(found, gguf.quantize(laid_out, own_kind), raw_dtype=own_kind)
    if tokenizer is not None:
        tokenizer(writer)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_options(folder):
    return json.loads((folder / "config.json").read_text())


def convert(folder, case="llama", kind="F32", **options):
    """Write the random model `model`, and the same one as `tiny.gguf`, as `write_gguf` does."""
    model = folder / "model"
    if not model.exists():
        write_model(model, case)
    return write_gguf(folder / "tiny.gguf", read_options(model), model, kind, **options)


def add_options(writer, config):
    """Add the options of a config, and return the number of blocks."""
    kind, is_gpt2 = config["model_type"], config["model_type"] == "gpt2"
    features, num_heads = (
        config["n_embd" if is_gpt2 else "hidden_size"],
        config["n_head" if is_gpt2 else "num_attention_heads"],
    )
    num_blocks = config["n_layer" if is_gpt2 else "num_hidden_layers"]
    writer.add_block_count(num_blocks)
    writer.add_context_length(config.get("n_positions", 2048))
    writer.add_embedding_length(features)
    writer.add_feed_forward_length(config["n_inner" if is_gpt2 else "intermediate_size"])
    writer.add_head_count(num_heads)
    if kind in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(config.get("num_key_value_heads", num_heads))
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
        if "head_dim" in config:
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        if kind in ("llama", "mistral"):
            writer.add_vocab_size(config["vocab_size"])
            writer.add_rope_dimension_count(config.get("head_dim", features // num_heads))
    if kind == "mistral":
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gpt_neox":
        size = int(config.get("rotary_pct", 0.25) * (features // num_heads))
        writer.add_rope_dimension_count(size)
        writer.add_parallel_residual(config.get("use_parallel_residual", True))
    return num_blocks


def lay_out(name, tensor, config):
    """Change the layout of a tensor as llama.cpp's converter does."""
    module = name.split(".")[-2]
    if config["model_type"] in ("llama", "mistral") and module in ("attn_q", "attn_k"):
        num_heads = config["num_attention_heads"]
        if module == "attn_k":
            num_heads = config.get("num_key_value_heads", num_heads)
        halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if config["model_type"] == "gpt_neox" and module == "attn_qkv":
        size = config["hidden_size"] // config["num_attention_heads"]
        parts = tensor.reshape(config["num_attention_heads"], 3, size, *tensor.shape[1:])
        rows = [parts[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)]
        return np.concatenate(rows)
    is_affine = module in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    return tensor.T if config["model_type"] == "gpt2" and is_affine else tensor


def add_byte_tokenizer(writer, pre="gpt-2"):
    """Add a tokenizer of bytes, with a few merges and special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "Ġ Ġ", "Ċ Ċ", "1 2", "Ġ t"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<|end|>", "<tool>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 4])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 2)
    return len(tokens)


def add_sentencepiece_tokenizer(writer):
    """Add a tokenizer of SentencePiece with byte fallback."""
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "▁abc", "bc", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)


def pack_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def pack_header(values=(), tensors=(), *, magic=b"GGUF", version=3, num_tensors=None, order="<"):
    """Pack a header from packed values and tensor entries, without checks."""
    counts = (len(tensors) if num_tensors is None else num_tensors, len(values))
    return b"".join(
        [magic, struct.pack(f"{order}IQQ", version, *counts), *values, *tensors],
    )


def pack_value(key, kind, value):
    return pack_string(key) + struct.pack("<I", kind) + value


def pack_entry(name, shape, kind=0, offset=0):
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return pack_string(name) + dimensions + struct.pack("<IQ", kind, offset)
