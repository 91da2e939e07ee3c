"""Options of config.json, one at a time, compared with what transformers makes of the same file.

An option that changes the outputs of transformers changes ours in the same way, or is refused. All
others are ignored, among them those that matter in other families only.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.hub.families import make_architecture

try:
    import torch
    import transformers
except ImportError:
    torch = None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch is None, reason="needs the parity extra: torch and transformers"),
]

IDS = np.random.default_rng(0).integers(0, 67, (2, 9))
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
SIZES = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
# Sizes of a config of each family. No option has its default if that would turn others off.
FAMILIES = {
    "GPT2": {
        "vocab_size": 67,
        "n_embd": 24,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 4},
    "Ministral": GROUPED | {"sliding_window": 4, "head_dim": 6},
    "Qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "Qwen3": GROUPED | {"head_dim": 8},
    "SmolLM3": GROUPED | {"sliding_window": 4},
    "GPTNeoX": SIZES | {"hidden_size": 32, "rotary_pct": 0.5},
    "Gemma": GROUPED | {"head_dim": 6},
    "Gemma2": GROUPED | {"head_dim": 6, "sliding_window": 4},
    "Gemma3": GROUPED | {"head_dim": 6, "sliding_window": 4, "sliding_window_pattern": 3},
    "Phi3": GROUPED,
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Qwen3Moe": GROUPED
    | {"head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"use_sliding_window": True, "sliding_window": 4},
    "Granite": GROUPED,
    "Starcoder2": GROUPED | {"sliding_window": 4},
    "ViT": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "image_size": 12,
        "patch_size": 4,
        "num_labels": 5,
    },
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
FACTORS = {"rope_type": "longrope", "short_factor": [1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 6.0]}
# Values to try besides those that `change` makes from the value or the type of an option.
VALUES = {
    "hidden_act": ["relu", "gelu", "quick_gelu", "relu2", "sigmoid", "prelu"],
    "hidden_activation": ["relu", "gelu", "quick_gelu", "relu2", "prelu"],
    "activation_function": ["relu", "gelu", "quick_gelu", "gelu_python", "mish", "leaky_relu"],
    "layer_types": [TYPES, ["full_attention"] * 4, ["attention"] * 4, ["conv"] * 4],
    "no_rope_layers": [[1, 1, 1, 0], [0, 1, 1, 1]],
    "no_rope_layer_interval": [2, 3],
    "mlp_only_layers": [[1, 2]],
    "rope_theta": [500.0],
    "rotary_emb_base": [500.0],
    "rope_local_base_freq": [500.0],
    "sliding_window_pattern": [2, 3],
    "partial_rotary_factor": [0.5],
    "rotary_pct": [0.25, 1.0],
    "head_dim": [6, 10],
    "head_size": [10],
    "clip_qkv": [0.1],
    "is_causal": [False, None],
    "original_max_position_embeddings": [4, 8],
    "rope_interleaved": [True],
    "per_layer_config": [{"1": {"rms_norm_eps": 0.1, "layer_norm_epsilon": 0.1}}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "attention_chunk_size": [3],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 3.0},
        {"type": "linear", "factor": 3.0, "rope_theta": 500.0, "surplus": 3},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 8},
        {"rope_type": "yarn", "factor": 3.0, "truncate": False, "beta_fast": 4, "mscale": 2.0},
        {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 700.0},
        {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {"rope_type": "mrope", "mrope_section": [1, 1, 1]},
        FACTORS,
        FACTORS | {"original_max_position_embeddings": 4, "factor": 2.0},
        FACTORS | {"original_max_position_embeddings": 16},
    ],
}
VALUES["rope_parameters"] = [{"rope_theta": 500.0} | value for value in VALUES["rope_scaling"]] + [
    {"full_attention": {"rope_theta": 700.0}, "sliding_attention": {"rope_theta": 300.0}},
    {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}},
]
# Options that transformers reads at other places than in these models, or that it sets itself.
SKIPPED = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
# Refused although these outputs stay the same: what the option says is not what the file holds.
REFUSED_ANYWAY = (
    "add_cross_attention",
    "quantization_config",
    "tie_word_embeddings",
    "use_bidirectional_attention",
)


def get_class(family):
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    return getattr(transformers, family + suffix)


def list_options(family):
    return {field.name: field.default for field in dataclasses.fields(get_class(family))}


def list_all_options():
    """List the options that any of the families declares, and some that none declares."""
    names = dict.fromkeys(name for family in FAMILIES for name in list_options(family))
    return [name for name in (*names, *(key for key in VALUES if key not in names))]


def change(name, value):
    """List other values of an option."""
    if name in VALUES:
        return [new for new in VALUES[name] if new != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, 1] if value else [1]
    if isinstance(value, float):
        return [2 * value + 0.5]
    if isinstance(value, str):
        return [f"{value}x"]
    return [True, 2, 0.5]


def make_model(family, folder):
    torch.manual_seed(0)
    config = get_class(family)(**FAMILIES[family])
    task = "ImageClassification" if family == "ViT" else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{task}")
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return auto


def run_transformers(auto, folder):
    """Return the outputs, or None if transformers refuses the file or draws new weights."""
    try:
        model, info = auto.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return None
        with torch.no_grad():
            if auto is transformers.AutoModelForImageClassification:
                return model(torch.tensor(IMAGES).permute(0, 3, 1, 2)).logits.numpy()
            return model.eval()(torch.tensor(IDS), use_cache=False).logits.float().numpy()
    except Exception:
        return None


def run_ours(folder):
    bank = jc.hub.load(folder)
    x = IMAGES if bank.stem.__module__.endswith("vit") else IDS
    return np.asarray(jc.apply_chain(bank, np.array(bank.parents[0]), jnp.asarray(x)))


def is_close(ours, theirs):
    return ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def judge(auto, path, raw, name, value, base):
    """Return what is wrong with an option's value, or None."""
    options = raw | {name: value}
    path.write_text(json.dumps(options))
    theirs = run_transformers(auto, path.parent)
    try:
        ours = base if get_modules(options) == get_modules(raw) else run_ours(path.parent)
    except ValueError:
        is_needless = theirs is not None and is_close(base, theirs)
        return "refused needlessly" if is_needless and name not in REFUSED_ANYWAY else None
    return None if theirs is None or is_close(ours, theirs) else "other outputs"


def get_modules(options):
    found = make_architecture(options, "config")
    return found.stem, found.blocks, found.head, found.head_names, found.folded_scale


@pytest.mark.parametrize("family", FAMILIES)
def test_each_option_is_ignored_or_matched_or_refused(tmp_path, family):
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    auto = make_model(family, tmp_path / "model")
    path = Path(tmp_path / "model" / "config.json")
    raw = json.loads(path.read_text())
    base = run_transformers(auto, path.parent)
    assert is_close(run_ours(path.parent), base)
    own = list_options(family)
    wrong, num_tried = [], 0
    for name in list_all_options():
        if name in SKIPPED:
            continue
        for value in change(name, raw.get(name, own.get(name))):
            num_tried += 1
            if found := judge(auto, path, raw, name, value, base):
                wrong.append(f"{name} = {value}: {found}")
    assert not wrong, "\n".join(wrong)
    assert num_tried > 100
