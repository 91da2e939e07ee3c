"""Exported folders as other programs read them: transformers, and lm-evaluation-harness."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GPT2, VIT, make_checkpoint, write_config

import jchain as jc

needs_transformers = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None,
    reason="needs the parity extra: torch and transformers",
)
QUESTIONS = [
    {"question": "the quick", "choices": [" brown fox", " dog", " 0123"], "answer": i % 3}
    for i in range(6)
]


def make_model(folder):
    """Make a GPT-2 of bytes with a tokenizer, its settings, and those of generation."""
    options = GPT2 | {"vocab_size": 256, "n_embd": 8, "n_layer": 4, "n_positions": 32}
    options |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": 10, "eos_token_id": 10}
    new = write_config(make_checkpoint(folder / "new"), options)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "e", "pad_token": "p"}
    (new / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": "/home/jo"}))
    (new / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (new / "generation_config.json").write_text(json.dumps({"eos_token_id": 10, "max_length": 7}))
    bank = jc.hub.random_bank(jax.random.key(0), new)
    return jc.hub.export(bank, bank.parents[0], new, folder / "model", max_shard_size=4_000)


@needs_transformers
def test_transformers_loads_every_file(tmp_path):
    import torch
    import transformers

    folder = make_model(tmp_path)
    bank = jc.hub.load(folder)
    out = jc.hub.export(bank, [0, 2, 3, 4], folder, tmp_path / "out")
    names = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    names |= {"README.md", "mergekit.yaml", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    text = "ein Text"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(text)["input_ids"]
    assert ids == transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("e", "p")
    message = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "a!"
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.generation_config.max_length == 7
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits.numpy()
    wanted = jc.apply_chain(bank, np.array([0, 2, 3, 4]), jnp.asarray([ids]))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.n_layer, config.architectures) == (3, ["GPT2LMHeadModel"])


@needs_transformers
def test_transformers_loads_the_processor_of_images(tmp_path):
    import transformers

    folder = write_config(tmp_path / "vit", VIT | {"id2label": {"0": "a", "1": "b"}})
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(processor | {"name_or_path": "~/x"})
    )
    bank = jc.hub.random_bank(jax.random.key(0), folder)
    out = jc.hub.export(bank, [0, 2, 3], folder, tmp_path / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert "name_or_path" not in json.loads((out / "preprocessor_config.json").read_text())
    if find_spec("PIL") is not None and find_spec("torchvision") is not None:
        shown = transformers.AutoImageProcessor.from_pretrained(out)
        assert shown.size["height"] == 8


@pytest.mark.slow
@needs_transformers
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")
def test_the_language_model_evaluation_harness_scores_an_exported_folder(tmp_path, monkeypatch):
    """The command of docs/transformers.md, whose accuracy is that of `choice_accuracy`."""
    folder = make_model(tmp_path)
    out = jc.hub.export(jc.hub.load(folder), [0, 2, 3, 4], folder, tmp_path / "shallower")
    (tmp_path / "my.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
    (tmp_path / "my.yaml").write_text(
        "task: my\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/my.jsonl}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "my", "--device", "cpu"]
    command += ["--model_args", f"pretrained={out}", "--include_path", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (accuracy,) = re.findall(r"\|acc +\|↑ +\|([\d.]+)", shown)
    # All questions have the same answers, so a third of them is right.
    assert float(accuracy) == pytest.approx(1 / 3, abs=1e-3)
