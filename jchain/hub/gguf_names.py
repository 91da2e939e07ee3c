"""The tensors of a GGUF file under the names and in the layouts of Hugging Face.

llama.cpp's converter changes layouts: it reorders the rows of queries and keys for its rotary
positions (Llama), splits the fused map to queries, keys, and values into three blocks (GPT-NeoX),
and transposes affine maps (GPT-2).
"""

import re
from typing import NamedTuple

import numpy as np

_ROTARY = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.attn_norm": "model.layers.{}.input_layernorm",
    "blk.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.ffn_down": "model.layers.{}.mlp.down_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.attn_norm": "transformer.h.{}.ln_1",
    "blk.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.ffn_norm": "transformer.h.{}.ln_2",
    "blk.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.ffn_down": "transformer.h.{}.mlp.c_proj",
}
_GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk.attn_norm": "gpt_neox.layers.{}.input_layernorm",
    "blk.attn_qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "blk.attn_output": "gpt_neox.layers.{}.attention.dense",
    "blk.ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "blk.ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "blk.ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
# The names in Hugging Face's files, by the `general.architecture` of the GGUF file.
NAMES = {"llama": _ROTARY, "qwen2": _ROTARY, "qwen3": _ROTARY, "gpt2": _GPT2, "gptneox": _GPT_NEOX}

# Factors of Llama 3's rotary positions, which the config describes.
ROPE_FACTORS = "rope_freqs.weight"


class Layout(NamedTuple):
    """How a tensor of the file becomes a tensor of Hugging Face.

    Attributes:
      order: the row of the result for each row of the file; None if rows keep their order.
      is_transposed: whether the result is the transpose.
    """

    order: np.ndarray | None = None
    is_transposed: bool = False


def translate(name: str, architecture: str) -> str:
    """Return the Hugging Face name of a tensor, or the same name if the family does not have it.

    Args:
      name: name of the tensor in the GGUF file.
      architecture: `general.architecture` of the file.
    """
    match = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    if match is None:
        return name
    block, module, kind = match.groups()
    found = NAMES[architecture].get(module if block is None else f"blk.{module}")
    return name if found is None else f"{found.format(block)}.{kind}"


def get_layout(
    name: str, shape: tuple[int, ...], architecture: str, num_heads: int, num_kv_heads: int
) -> Layout:
    """Return how a tensor of the file is laid out.

    Args:
      name: name of the tensor in the GGUF file.
      shape: shape of the tensor in the file.
      architecture: `general.architecture` of the file.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads.
    """
    module = name.rpartition(".")[0].rpartition(".")[2]
    if architecture == "gpt2":
        is_affine = module in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        return Layout(is_transposed=is_affine and len(shape) == 2)
    if architecture == "llama" and module in ("attn_q", "attn_k"):
        return Layout(_order_halves(shape[0], num_heads if module == "attn_q" else num_kv_heads))
    if architecture == "gptneox" and module == "attn_qkv":
        return Layout(_order_heads(shape[0], num_heads))
    return Layout()


def _order_halves(size: int, num_heads: int) -> np.ndarray | None:
    """Order the rows of queries or keys.

    In the file, the two features that are rotated together are neighbors; in Hugging Face's files,
    they are half a head apart.
    """
    if size % (2 * num_heads):
        return None  # the shape is wrong, which the check of shapes reports
    rows = np.arange(size).reshape(num_heads, 2, size // num_heads // 2)
    return rows.swapaxes(1, 2).reshape(size)


def _order_heads(size: int, num_heads: int) -> np.ndarray | None:
    """Order the rows of a fused map.

    In the file, the queries of all heads are followed by all keys and all values; in Hugging Face's
    files, each head has its query, key, and value.
    """
    if size % (3 * num_heads):
        return None
    rows = np.arange(size).reshape(num_heads, 3, size // num_heads // 3)
    return rows.swapaxes(0, 1).reshape(size)
