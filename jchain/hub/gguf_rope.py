"""How a GGUF file scales rotary positions."""

import numpy as np

from jchain.hub.checkpoint import JsonObject
from jchain.hub.gguf_header import Header
from jchain.hub.gguf_metadata import Options
from jchain.hub.gguf_names import ROPE_FACTORS

_PREFIX = "rope.scaling."
_KNOWN = (
    "type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow",
)  # fmt: skip
# All models with Llama 3's scaling have these values, which the file does not have.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FLOAT32 = 0  # the number of this type in the file


def read_scaling(options: Options, head_size: int, base: float) -> JsonObject | None:
    """Read the option `rope_scaling` of a config.

    Args:
      options: the options of the model.
      head_size: number of features of each head.
      base: the base of the frequencies.

    Returns:
      The option, or None if rotary positions are not scaled.

    Raises:
      ValueError: if the kind of scaling or one of its values is not supported.
    """
    start = f"{options.architecture}.{_PREFIX}"
    given = [key[len(start) :] for key in options.header.metadata if key.startswith(start)]
    for key in given:
        if key not in _KNOWN:
            raise options.reject(_PREFIX + key, options.get(_PREFIX + key), "none")
    kind = options.get(f"{_PREFIX}type", "none")
    if ROPE_FACTORS in options.header.tensors:
        if kind != "none":
            raise options.reject(f"{_PREFIX}type", kind, f"none in a file with {ROPE_FACTORS}")
        return _read_llama3(options.header, head_size, base)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise options.reject(f"{_PREFIX}type", kind, "none, linear, or yarn")
    scaling = {"rope_type": kind, "factor": options.read_number(f"{_PREFIX}factor")}
    if kind == "yarn":
        length = options.require_count(f"{_PREFIX}original_context_length")
        scaling["original_max_position_embeddings"] = length
        for key in ("beta_fast", "beta_slow"):
            if f"yarn_{key}" in given:
                scaling[key] = options.read_number(f"{_PREFIX}yarn_{key}")
    return scaling


def _read_llama3(header: Header, head_size: int, base: float) -> JsonObject:
    """Find the options of Llama 3's scaling, of which the file has the resulting divisors."""
    entry = header.tensors[ROPE_FACTORS]
    size = head_size // 2
    if entry.shape != (size,) or entry.type != _FLOAT32:
        raise ValueError(
            f"{header.path}: expected {ROPE_FACTORS} to be {size} numbers in float32, got shape "
            f"{list(entry.shape)}"
        )
    with header.path.open("rb") as file:
        file.seek(entry.offset)
        divisors = np.frombuffer(file.read(entry.num_bytes), "<f4").astype(np.float64)
    factor = float(divisors.max())
    frequencies = base ** (-np.arange(0, head_size, 2) / head_size)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / (share + (1 - share) / factor), rtol=1e-4):
        raise ValueError(
            f"{header.path}: expected the numbers in {ROPE_FACTORS} to be those of Llama 3's "
            "scaling of 8,192 positions, got others, which are not supported"
        )
    return {"rope_type": "llama3", "factor": float(str(np.float32(factor)))} | _LLAMA3
