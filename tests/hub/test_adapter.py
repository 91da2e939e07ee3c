"""LoRA adapters: merged as peft merges them, or refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_tensors, write

import jchain as jc

PREFIX = "base_model.model."
MODULE = "transformer.h.1.attn.c_attn"


def write_adapter(folder, base, tensors=None, **options):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    tensors = make_factors() if tensors is None else tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def make_factors(module=MODULE, inputs=6, outputs=18, rank=2):
    rng = np.random.default_rng(1)
    shapes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {
        f"{PREFIX}{module}.lora_{kind}.weight": rng.normal(size=shape).astype(np.float32)
        for kind, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 3),
        ({"use_rslora": True}, 6 / np.sqrt(2)),
        ({"r": 4, "rank_pattern": {"c_attn": 2}, "alpha_pattern": {r"h\.1\..*": 5}}, 2.5),
    ],
)
def test_an_adapter_is_added_to_the_weights_of_its_model(tmp_path, options, scale):
    folder = write(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", folder, **options)
    bank = jc.hub.load(adapter)
    assert bank.names == ("adapter/0", "adapter/1", "adapter/head")
    a, b = make_factors().values()
    name = f"{MODULE}.weight"
    tensors = make_tensors()
    expected = tensors[name] + scale * (b.astype(np.float64) @ a).T
    found = bank.get_params(1)["attn"]["c_attn"]["weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    plain = jc.hub.load(folder)
    same = jax.tree.map(np.array_equal, bank.get_params(0), plain.get_params(0))
    assert all(jax.tree.leaves(same))
    again = jc.hub.load(folder, adapter=adapter)
    assert again.names[0] == "model/0"
    np.testing.assert_array_equal(again.get_params(1)["attn"]["c_attn"]["weight"], found)


def test_the_merged_weights_are_exported_without_the_adapter(tmp_path):
    folder = write(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", folder)
    bank = jc.hub.load_many([folder, adapter])
    assert bank.names[:4] == ("model/0", "model/1", "adapter/0", "adapter/1")
    assert len(bank.parents) == 2
    out = jc.hub.export(bank, [0, 3, 4], {"model": folder, "adapter": adapter}, tmp_path / "out")
    assert not [path.name for path in out.iterdir() if "adapter" in path.name]
    ids = jnp.array([[1, 2, 3]])
    again = jc.hub.load(out)
    np.testing.assert_allclose(
        jc.apply_chain(again, np.array([0, 1, 2]), ids),
        jc.apply_chain(bank, np.array([0, 3, 4]), ids),
        rtol=1e-6,
    )


def test_a_folder_with_a_model_and_an_adapter_is_ambiguous(tmp_path):
    folder = write(tmp_path / "model")
    write_adapter(folder, folder)
    with pytest.raises(ValueError, match=r"got both config.json and adapter_config.json: to merge"):
        jc.hub.load(folder)
    merged = jc.hub.load(folder, adapter=folder).get_params(1)["attn"]["c_attn"]["weight"]
    assert np.abs(merged - make_tensors()[f"{MODULE}.weight"]).max() > 0.1
    with pytest.raises(ValueError, match="expected a model to merge"):
        jc.hub.load(write_adapter(tmp_path / "alone", folder), adapter=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "expected an adapter of peft_type LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora = True is not supported; merge the adapter with peft's"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = .* is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported, expected none"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported, as it"),
        ({"r": 3}, "expected the rank of transformer.h.1.attn.c_attn to be that of its matrices"),
        ({"lora_alpha": "6"}, "expected lora_alpha to be a number, got '6'"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has an invalid pattern"),
        ({"rank_pattern": [1]}, "expected rank_pattern to be an object"),
        ({"base_model_name_or_path": None}, "expected base_model_name_or_path, got None: load the"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(tmp_path, options, message):
    folder = write(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        jc.hub.load(write_adapter(tmp_path / "adapter", folder, **options))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected matrices lora_A and lora_B of float32, bfloat16, float16, got none"),
        (make_factors("transformer.h.7.attn.c_attn"), "got one with transformer.h.7.attn.c_attn.w"),
        (make_factors(outputs=6), r"has shape \[6, 18\] in .*, got one for shape \[6, 6\]"),
        (make_factors("transformer.wte", 6, 11), "that leaves tied embeddings unchanged, got one"),
        ({"x.lora_magnitude_vector": np.ones(2, np.float32)}, "got x.lora_magnitude_vector"),
        (dict([*make_factors().items()][:1]), "expected lora_A and lora_B of .*, got one"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, tensors, message):
    folder = write(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        jc.hub.load(write_adapter(tmp_path / "adapter", folder, tensors))


def test_missing_files_of_an_adapter_are_named(tmp_path):
    folder = write(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"is a LoRA adapter \(adapter_config.json\) of"):
        jc.hub.load(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"found adapter_model.bin: only safetensors are"):
        jc.hub.load(folder, adapter=adapter)
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config.json in .*model, found"):
        jc.hub.load(folder, adapter=folder)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_equals_that_of_peft(tmp_path, kind, dtype):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    import torch
    import transformers

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3} if kind == "GPT2" else {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=67, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model")
    targets = ["c_attn", "c_fc"] if kind == "GPT2" else ["q_proj", "v_proj", "down_proj"]
    options = {"r": 3, "lora_alpha": 5, "target_modules": targets, "use_rslora": True}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().eval()
    bank = jc.hub.load(tmp_path / "adapter")
    ids = np.random.default_rng(0).integers(0, 67, (2, 9))
    with torch.no_grad():
        expected = merged(torch.tensor(ids)).logits.float().numpy()
    found = np.asarray(jc.apply_chain(bank, np.arange(3), jnp.asarray(ids)), np.float32)
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
