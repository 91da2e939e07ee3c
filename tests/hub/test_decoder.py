"""What decoders share. test_families.py runs the families, test_parity.py compares them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz.targets import CONFIGS

from jchain.hub.families import make_architecture

GEMMA = CONFIGS["gemma2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types = .* is not supported, expected 2 of"),
        ({"layer_types": 2 * ["conv"]}, "layer_types = 'conv' is not supported, expected full_at"),
        ({"sliding_window": 0}, "sliding_window = 0 is not supported, expected at least 1 posit"),
        ({"sliding_window": None}, "sliding_window = None is not supported, expected a number of"),
        ({"is_causal": False}, "is_causal = False is not supported, expected True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supp"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0.0 is not supported"),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar = None is not supported"),
        ({"tie_word_embeddings": 7}, "tie_word_embeddings = 7 is not supported, expected true or"),
    ],
)
def test_unsupported_options_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        make_architecture(GEMMA | change, "config")


def test_older_names_of_layer_types_are_read():
    older = make_architecture(GEMMA | {"layer_types": 2 * ["attention"]}, "config")
    newer = make_architecture(GEMMA | {"layer_types": 2 * ["full_attention"]}, "config")
    assert older.blocks == newer.blocks


@pytest.mark.parametrize("family", CONFIGS)
def test_a_block_is_the_sum_of_its_branches(family):
    """Both branches are methods that a module of their own can call with a part of the params."""
    architecture = make_architecture(CONFIGS[family], "config")
    block = architecture.blocks[-1]
    if getattr(block, "is_parallel", False):
        pytest.skip("its branches are parallel")

    class Attend(type(block)):
        @nn.compact
        def __call__(self, x):
            return x + self.attention_branch(x)

    class Transform(type(block)):
        @nn.compact
        def __call__(self, x):
            return x + self.mlp_branch(x)

    fields = {name: getattr(block, name) for name in block.__dataclass_fields__}
    fields = {name: value for name, value in fields.items() if name not in ("parent", "name")}
    first, second = Attend(**fields), Transform(**fields)
    x = jax.random.normal(jax.random.key(0), (1, 3, 8))
    params = block.init(jax.random.key(1), x)["params"]
    own = [
        {name: params[name] for name in part.init(jax.random.key(1), x).get("params", {})}
        for part in (first, second)
    ]
    assert not own[0].keys() & own[1].keys()
    assert own[0].keys() | own[1].keys() == params.keys()
    hidden = first.apply({"params": own[0]}, x)
    np.testing.assert_allclose(
        second.apply({"params": own[1]}, hidden), block.apply({"params": params}, x), rtol=1e-5
    )
    assert jnp.all(jnp.isfinite(hidden))
