"""Attention and MLP as layers, against transformers, for every family."""

import numpy as np
import pytest
from test_parity import CASES, apply, assert_close, make_model, run_torch, torch

import jchain as jc

pytestmark = pytest.mark.skipif(
    torch is None, reason="needs the parity extra: torch and transformers"
)


@pytest.mark.parametrize("name", CASES)
def test_chains_of_sublayers_compute_what_transformers_computes(tmp_path, name):
    import transformers

    model = make_model(name)
    model.save_pretrained(tmp_path / "model")
    if getattr(model.config, "use_parallel_residual", False):
        with pytest.raises(ValueError, match="that apply them in parallel"):
            jc.hub.load(tmp_path / "model", sublayers=True)
        return
    bank = jc.hub.load(tmp_path / "model", sublayers=True)
    depth = len(bank.parents[0]) // 2
    assert_close(apply(bank, bank.parents[0]), run_torch(model))
    # Blocks 0 and 1, the latter with the MLP of block 3; then parts that stand alone.
    head = 2 * depth
    chain, alone = [0, 1, 2, 7, head], [0, 1, 2, 4, 5, 7, head]
    for i, tokens in enumerate((chain, alone)):
        out = jc.hub.export(bank, tokens, tmp_path / "model", tmp_path / f"out{i}")
        again = transformers.AutoModelForCausalLM.from_pretrained(
            out, attn_implementation="eager"
        ).eval()
        assert_close(run_torch(again), apply(bank, tokens))
        assert np.abs(run_torch(again) - run_torch(model)).max() > 1e-3
