"""Scaling of rotary positions in GGUF files."""

import numpy as np
import pytest
from gguf_files import (
    CONFIGS,
    write_gguf,
    write_model,
)

import jchain as jc
from jchain.hub.opening import open_checkpoint


def test_llama3_scaling_is_found_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = CONFIGS["llama"] | {"head_dim": 16, "rope_theta": 5e5}
    model = write_model(
        tmp_path / "model", "llama", head_dim=16, rope_theta=5e5, rope_scaling=scaling
    )

    def add_factors(writer):
        # As in Llama3Model.generate_extra_tensors of convert_hf_to_gguf.py.
        factors = []
        for frequency in 1.0 / 500000.0 ** (np.arange(0, 16, 2) / 16):
            wavelength = 2 * np.pi / frequency
            if wavelength < 8192 / 4:
                factors.append(1.0)
            elif wavelength > 8192 / 1:
                factors.append(8.0)
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                factors.append(1 / ((1 - smooth) / 8 + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    file = write_gguf(tmp_path / "t.gguf", config, model, change=add_factors)
    assert open_checkpoint(file).config["rope_scaling"] == scaling
    ours, theirs = jc.hub.load(file), jc.hub.load(model)
    assert [group.module for group in ours.layers] == [group.module for group in theirs.layers]

    def add_others(writer):
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))

    file = write_gguf(tmp_path / "other.gguf", config, model, change=add_others)
    with pytest.raises(ValueError, match="rope_freqs.weight to be those of Llama 3"):
        jc.hub.load(file)
