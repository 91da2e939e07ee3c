"""GPT-2. test_parity.py compares its outputs with those of transformers."""

import jax
import jax.numpy as jnp
import pytest
from checkpoints import GPT2, write_config

import jchain as jc


def test_sequences_longer_than_the_positions_are_rejected(tmp_path):
    bank = jc.hub.random_bank(jax.random.key(0), write_config(tmp_path / "new", GPT2))
    assert bank.embed(jnp.zeros((1, 8), int)).shape == (1, 8, 6)
    with pytest.raises(ValueError, match="expected sequences of at most 8 tokens, got 9"):
        bank.embed(jnp.zeros((1, 9), int))
