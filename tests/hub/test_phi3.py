"""Options of Phi-3."""

import pytest
from fuzz.targets import CONFIGS

from jchain.hub.families import make_architecture

PHI3 = CONFIGS["phi3"]


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_older_names_of_longrope_are_read(kind):
    older = make_architecture(
        PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"type": kind}}, "config"
    )
    assert older.blocks == make_architecture(PHI3, "config").blocks
    assert older.blocks[0].self_attn.long_rotary[0] == 4


def test_the_original_length_is_4096_unless_the_config_has_it():
    options = {key: PHI3[key] for key in PHI3 if key != "original_max_position_embeddings"}
    found = make_architecture(options, "config").blocks[0].self_attn
    assert found.long_rotary[0] == 4096


def test_other_kinds_of_scaling_are_rejected():
    with pytest.raises(ValueError, match="rope_type = 'linear' is not supported, expected default"):
        make_architecture(PHI3 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "config")
