"""Parity with transformers (torch, CPU): original models, skipped and repeated blocks, exports."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_model_and_text
from test_docs import EXAMPLES

import jchain as jc

try:
    import torch
    import transformers
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(
    torch is None, reason="needs the parity extra: torch and transformers"
)

IDS = np.random.default_rng(0).integers(0, 67, (2, 9))
SIZES = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GPT2 = {"vocab_size": 67, "n_embd": 24, "n_layer": 4, "n_head": 3, "n_positions": 16}
ROPE = {"rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GROUPED = SIZES | {"num_key_value_heads": 2}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
# The special tokens of some families are outside of this vocabulary.
TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LONG = {
    "max_position_embeddings": 24,
    "partial_rotary_factor": 0.7,
    "rope_parameters": ROPE
    | {"rope_type": "longrope", "short_factor": [1.1, 1.5], "long_factor": [2.0, 3.0]},
}
EXPERTS = GROUPED | {
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
# Maps the name of a case to the class and the options of its config.
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 scaled": (
        "GPT2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "gpt2 untied": (
        "GPT2",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 50, "activation_function": "relu"},
    ),
    "llama": ("Llama", GROUPED),
    "llama tied": (
        "Llama",
        SIZES
        | {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 10}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "llama linear": (
        "Llama",
        SIZES | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}},
    ),
    "llama llama3": ("Llama", SIZES | {"rope_parameters": ROPE | LLAMA3}),
    "llama yarn": ("Llama", SIZES | {"rope_parameters": ROPE | YARN}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 4}),
    "ministral": (
        "Ministral",
        GROUPED
        | {"layer_types": ["full_attention"] + 3 * ["sliding_attention"], "sliding_window": 3}
        | {"head_dim": 8},
    ),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2 windows": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 dynamic": (
        "Qwen3",
        GROUPED | {"max_position_embeddings": 6, "rope_parameters": ROPE | DYNAMIC, "head_dim": 8},
    ),
    "smollm3": ("SmolLM3", GROUPED | TOKENS),
    "smollm3 windows": (
        "SmolLM3",
        GROUPED
        | TOKENS
        | {"no_rope_layer_interval": 2, "use_sliding_window": True}
        | {"sliding_window": 3, "attention_bias": True, "mlp_bias": True},
    ),
    "gemma": ("Gemma", GROUPED | TOKENS | {"head_dim": 10, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        GROUPED
        | TOKENS
        | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 20}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        GROUPED
        | TOKENS
        | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 20}
        | {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "phi3": ("Phi3", GROUPED | TOKENS | {"sliding_window": 4}),
    "phi3 long": ("Phi3", GROUPED | TOKENS | LONG | {"original_max_position_embeddings": 6}),
    "phi3 short": ("Phi3", GROUPED | TOKENS | LONG | {"original_max_position_embeddings": 16}),
    "olmo": ("Olmo", GROUPED | TOKENS | {"clip_qkv": 0.3}),
    "olmo2": ("Olmo2", GROUPED | TOKENS),
    "olmo2 biases": ("Olmo2", GROUPED | TOKENS | {"attention_bias": True}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe dense": (
        "Qwen3Moe",
        EXPERTS | {"mlp_only_layers": [0], "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "granite": (
        "Granite",
        GROUPED
        | {"embedding_multiplier": 3.0, "logits_scaling": 2.0}
        | {"residual_multiplier": 0.4, "attention_multiplier": 0.2},
    ),
    "starcoder2": ("Starcoder2", GROUPED | {"sliding_window": 4}),
    "gpt_neox": ("GPTNeoX", SIZES | {"rotary_pct": 0.5}),
    "gpt_neox sequential": (
        "GPTNeoX",
        SIZES
        | {"use_parallel_residual": False, "attention_bias": False}
        | {"hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
}
CHAINS = ([0, 1, 2, 3, 4], [0, 2, 3, 4], [3, 1, 1, 0, 2, 2, 4], [1, 4])


def make_model(case, seed=0):
    kind, options = CASES[case]
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(seed)
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + suffix)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # this includes biases, which start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def find_blocks(model):
    base = getattr(model, model.base_model_prefix)
    return base, "h" if hasattr(base, "h") else "layers"


def rearrange(model, blocks):
    """Return the model with its blocks in another order. Repeated blocks are copied."""
    model = copy.deepcopy(model)
    base, name = find_blocks(model)
    old = list(getattr(base, name))
    setattr(base, name, torch.nn.ModuleList(copy.deepcopy(old[i]) for i in blocks))
    model.config.num_hidden_layers = len(blocks)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[i] for i in blocks]
    if getattr(model.config, "no_rope_layers", None) is not None:
        model.config.no_rope_layers = [model.config.no_rope_layers[i] for i in blocks]
    return model


def run_torch(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.float().numpy()


def assert_close(ours, theirs, tolerance=1e-4):
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def apply(bank, chain, ids=IDS):
    return np.asarray(jc.apply_chain(bank, np.array(chain), jnp.asarray(ids)), np.float32)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    model = make_model(request.param)
    folder = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(folder)
    return request.param, model, folder


def test_logits_are_those_of_transformers(case):
    _, model, folder = case
    bank = jc.hub.load(folder)
    assert bank.names == ("model/0", "model/1", "model/2", "model/3", "model/head")
    assert bank.parents == ((0, 1, 2, 3, 4),)
    for chain in CHAINS:
        assert_close(apply(bank, chain), run_torch(rearrange(model, chain[:-1])))


def test_exported_chains_load_with_from_pretrained(case, tmp_path):
    _, model, folder = case
    bank, chain = jc.hub.load(folder), CHAINS[2]
    jc.hub.export(bank, chain, folder, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    assert again.config.num_hidden_layers == len(chain) - 1
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert_close(run_torch(again), run_torch(rearrange(model, chain[:-1])), 1e-6)
    assert_close(apply(jc.hub.load(tmp_path / "out"), range(len(chain))), apply(bank, chain), 1e-6)


def test_classifiers_of_images(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=12,
        patch_size=4,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    bank = jc.hub.load(tmp_path / "model")
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()
    assert_close(apply(bank, [0, 1, 2, 3], images), expected)
    jc.hub.export(bank, [0, 2, 3], tmp_path / "model", tmp_path / "out")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = again(torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()
    assert_close(apply(bank, [0, 2, 3], images), expected)


HALVES = (
    "gpt2", "gpt2 scaled", "llama tied", "qwen3", "gpt_neox", "smollm3", "gemma", "gemma2",
    "gemma3", "phi3 long", "olmo", "olmo2", "qwen3_moe", "granite", "starcoder2",
)  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_shards(tmp_path, name, dtype):
    model = make_model(name)
    expected = run_torch(model)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model", max_shard_size="10KB")
    half = run_torch(model)
    # Norms after each branch amplify the rounding, in transformers as well.
    noise = max(2e-2, 1.5 * np.abs(half - expected).max() / np.abs(expected).max())
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    bank = jc.hub.load(tmp_path / "model")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(bank) if leaf.ndim} == {dtype}
    assert_close(apply(bank, range(5)), expected, noise)
    wide = jc.hub.load(tmp_path / "model", dtype=jnp.float32)
    # Not `model.float()`, as the half-precision model also rounded its rotary frequencies.
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    ).eval()
    assert_close(apply(wide, range(5)), run_torch(rounded))
    jc.hub.export(bank, range(5), tmp_path / "model", tmp_path / "out", max_shard_size=10_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    # Scales that are folded into weights round them.
    assert_close(run_torch(again), run_torch(rounded), 1e-3 if "scaled" in name else 1e-6)


def test_a_chain_of_several_models_is_exported_as_one_model(tmp_path):
    """Embeddings and output layer come from different models, so they are not tied."""
    models = [make_model("gpt2", seed) for seed in range(2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"m{i}")
    bank = jc.hub.load_many([tmp_path / "m0", tmp_path / "m1"], pinned=(1, 1))
    for model, parent in zip(models, bank.parents, strict=True):
        assert_close(apply(bank, parent), run_torch(model))
    chain = [bank.names.index("m1/embeddings"), 0, 3, 1, bank.names.index("m0/head")]
    jc.hub.export(bank, chain, {f"m{i}": tmp_path / f"m{i}" for i in range(2)}, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.n_layer == 5
    assert_close(run_torch(again), apply(bank, chain), 1e-5)


def test_transformers_loads_a_chain_that_a_search_found(tmp_path, monkeypatch):
    """The examples of docs/transformers.md."""
    monkeypatch.chdir(tmp_path)
    make_model_and_text(tmp_path)
    scope = {}
    for example in EXAMPLES["transformers"]:
        exec(compile(example, "transformers.md", "exec"), scope)
    ids = np.arange(16)[None]
    again = jc.hub.load("shallower")
    assert scope["model"].config.n_layer < 6
    assert_close(apply(again, again.parents[0], ids), run_torch(scope["model"], ids))


def test_a_base_model_without_prefix_is_read(tmp_path):
    """The format of gpt2 on the Hugging Face hub."""
    model = make_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "model")
    assert_close(apply(jc.hub.load(tmp_path / "model"), range(5)), run_torch(model))
