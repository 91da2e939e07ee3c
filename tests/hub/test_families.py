"""The family of a config."""

import pytest
from checkpoints import GPT2

from jchain.hub.families import make_architecture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type = 'bert' is not supported, expected gpt2, llama"),
        ({"model_type": None}, "expected model_type, got none"),
        ({"n_embd": "six"}, "an option has an invalid value"),
    ],
)
def test_configs_of_no_family_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(GPT2 | change, "config")
