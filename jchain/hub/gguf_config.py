"""The config of a GGUF file, as a config.json would have it, from the file's metadata."""

from jchain.hub.checkpoint import JsonObject
from jchain.hub.gguf_header import Header
from jchain.hub.gguf_metadata import Options
from jchain.hub.gguf_rope import read_scaling

# The architectures, with `model_type` and the class of transformers.
MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "gptneox": ("gpt_neox", "GPTNeoXForCausalLM"),
}
# Options that would change the outputs and are not supported, with their neutral values.
_NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.temperature_scale": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 0,
    "expert_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 0,
    "nextn_predict_layers": 0,
    "residual_scale": 0,
}


def read_config(header: Header) -> JsonObject:
    """Make the config of a file.

    Args:
      header: the header of the file.

    Raises:
      ValueError: if the file is not a whole model of a supported architecture, or if its metadata
        lacks a value or has one that is not supported.
    """
    found = Options(header)
    for key, neutral in _NEUTRAL.items():
        value = found.get(key, neutral)
        if value != neutral:
            raise found.reject(key, value, f"{neutral!r} or none, as no other is supported")
    kind, class_name = MODELS[found.architecture]
    make = {"gpt2": _make_gpt2, "gptneox": _make_gpt_neox}.get(found.architecture, _make_rotary)
    config = {"architectures": [class_name], "model_type": kind} | make(found)
    config["vocab_size"] = _get_shape(header, "token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = header.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int:
            config[f"{name}_token_id"] = token
    return {key: value for key, value in config.items() if value is not None}


def _get_shape(header: Header, name: str) -> tuple[int, ...]:
    if name not in header.tensors:
        raise ValueError(f"{header.path}: expected tensor {name}, which is missing")
    return header.tensors[name].shape


def _make_rotary(found: Options) -> JsonObject:
    """Make the options of Llama, Mistral, Qwen2, and Qwen3."""
    features, num_heads = found.require_count("embedding_length"), found.num_heads
    rotated = found.read_count("rope.dimension_count", max(features // num_heads, 1))
    head_size = found.read_count("attention.key_length", rotated)
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.read_count(key, head_size) != head_size:
            raise found.reject(
                key, found.require_count(key), f"{head_size}, as for queries and keys"
            )
    tensors, base = found.header.tensors, found.read_number("rope.freq_base", 10000.0)
    config: JsonObject = {
        "hidden_size": features,
        "intermediate_size": found.require_count("feed_forward_length"),
        "num_hidden_layers": found.require_count("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": found.num_kv_heads,
        "head_dim": head_size,
        "hidden_act": "silu",
        "max_position_embeddings": found.require_count("context_length"),
        "rms_norm_eps": found.read_number("attention.layer_norm_rms_epsilon"),
        "rope_theta": base,
        "rope_scaling": read_scaling(found, head_size, base),
    }
    if found.architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if found.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    window = found.get("attention.sliding_window", 0)
    if window:
        if found.architecture != "llama" or found.get("attention.sliding_window_pattern"):
            raise found.reject("attention.sliding_window", window, "0 or none")
        mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        config |= mistral | {"sliding_window": found.require_count("attention.sliding_window")}
    return config


def _make_gpt2(found: Options) -> JsonObject:
    return {
        "n_embd": found.require_count("embedding_length"),
        "n_inner": found.require_count("feed_forward_length"),
        "n_layer": found.require_count("block_count"),
        "n_head": found.num_heads,
        "n_positions": _get_shape(found.header, "position_embd.weight")[0],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": found.read_number("attention.layer_norm_epsilon"),
    }


def _make_gpt_neox(found: Options) -> JsonObject:
    features, num_heads = found.require_count("embedding_length"), found.num_heads
    head_size, base = max(features // num_heads, 1), found.read_number("rope.freq_base", 10000.0)
    is_parallel = found.get("use_parallel_residual", True)
    if type(is_parallel) is not bool:
        raise found.reject("use_parallel_residual", is_parallel, "true or false")
    return {
        "hidden_size": features,
        "intermediate_size": found.require_count("feed_forward_length"),
        "num_hidden_layers": found.require_count("block_count"),
        "num_attention_heads": num_heads,
        "hidden_act": "gelu",
        "max_position_embeddings": found.require_count("context_length"),
        "layer_norm_eps": found.read_number("attention.layer_norm_epsilon"),
        "use_parallel_residual": is_parallel,
        "rotary_pct": found.require_count("rope.dimension_count") / head_size,
        "rotary_emb_base": base,
        "rope_scaling": read_scaling(found, head_size, base),
    }
