"""The files that an export takes over from the folder of its source."""

import json

import pytest
from checkpoints import write

import jchain as jc
from jchain.hub.small_files import clean_options, is_license, read_small_files

KEPT = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3",
    "tokenizer.4.0.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tools.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE",
    "LICENSE.txt", "LICENCE.md", "NOTICE", "LICENSE-APACHE-2.0", "Notice.txt", "USE_POLICY.md",
]  # fmt: skip
LEFT = [
    "README.md", "model.safetensors.tmp", "model.safetensors.index.json.bak", "pytorch_model.bin",
    "onnx_model.onnx_data", "onnx/model.onnx", "tf_model.h5", "consolidated.00.pth", "params.json",
    "events.out.tfevents.1", "trainer_state.json", "training_args.bin", "optimizer.pt",
    "scheduler.pt", "rng_state_0.pth", "scaler.pt", "quantize_config.json", "adapter_config.json",
    "adapter_model.safetensors", "eval_results.json", "all_results.json", "train_results.json",
    "modeling_llama.py", "configuration_llama.py", "latest", "global_step5/zero.pt", "wandb.json",
    ".gitattributes", ".env", ".git/config", ".cache/huggingface/x", ".tokenizer.json.swp",
    "tokenizer.json.tmp", "tokenizer.json~", "tokenizer_old.json", "LICENSE.bak", "LICENSE~",
    "licenses.py", "vocab.json.1", "chat_template.jinja.orig", "config.json.orig", "gguf.gguf",
    "runs/events", "additional_chat_templates/.hidden.jinja", "additional_chat_templates/x.py",
    "model.safetensors.lock", "tokenizer.json.incomplete", "mergekit_config.yml", "private.key",
]  # fmt: skip


def test_files_of_the_tokenizer_settings_and_license_are_copied_and_nothing_else(tmp_path):
    folder = write(tmp_path / "model")
    bank = jc.hub.load(folder)
    for name in KEPT + LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    out = jc.hub.export(bank, [0, 2], folder, tmp_path / "out")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {*KEPT, "README.md", "config.json", "mergekit.yaml", "model.safetensors"}


def test_settings_are_copied_without_paths_and_other_files_byte_for_byte(tmp_path):
    folder = write(
        tmp_path / "model",
        config={
            "_name_or_path": "/home/jo/base",
            "auto_map": {"AutoModel": "x.M"},
            "_commit_hash": "1",
        }
        | {"transformers_version": "4.57.0", "eos_token_id": 3},
    )
    settings = {
        "name_or_path": "../base", "special_tokens_map_file": "/root/.cache/hub/special.json",
        "tokenizer_file": "C:\\Users\\jo\\tokenizer.json", "auto_map": {"AutoTokenizer": ["x.T"]},
        "bos_token": "/a/b", "pad_token": "</s>", "chat_template": "/{{ x }}", "eos_token": "é",
        "added_tokens_decoder": {"0": {"content": "/home/jo"}}, "extra": {"dir": "~/x", "n": 1},
        "files": ["/home/jo/a.txt", "/home/jo/b.txt"], "model_max_length": 8, "sep": "/",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = '{"eos_token_id":   3}'
    (folder / "generation_config.json").write_text(generation)
    (folder / "tokenizer.json").write_bytes(b'{"a": "/home/jo/x"}\r\n')
    out = jc.hub.export(jc.hub.load(folder), [0, 2], folder, tmp_path / "out")
    dropped = ("name_or_path", "special_tokens_map_file", "tokenizer_file", "auto_map", "files")
    wanted = {key: value for key, value in settings.items() if key not in dropped}
    wanted["extra"] = {"n": 1}
    assert json.loads((out / "tokenizer_config.json").read_text()) == wanted
    assert (out / "generation_config.json").read_text() == generation
    assert (out / "tokenizer.json").read_bytes() == b'{"a": "/home/jo/x"}\r\n'
    config = json.loads((out / "config.json").read_text())
    assert not {"_name_or_path", "auto_map", "_commit_hash"} & config.keys()
    assert (config["transformers_version"], config["eos_token_id"]) == ("4.57.0", 3)
    for name in ("config.json", "README.md", "tokenizer_config.json"):
        assert str(tmp_path) not in (out / name).read_text()


def test_options_of_a_quantized_or_moved_model_are_left_out():
    options = {"quantization_config": {"bits": 4}, "hidden_size": 4, "path": "file:///data/x"}
    nested = {"rope": {"rope_type": "yarn", "_name_or_path": "a/b"}, "url": "https://a.b/c/d"}
    assert clean_options(options | nested) == {
        "hidden_size": 4,
        "rope": {"rope_type": "yarn"},
        "url": "https://a.b/c/d",
    }


@pytest.mark.parametrize("name", ["LICENSE", "license.txt", "COPYING", "NOTICE.md", "LICENSE_en"])
def test_licenses_are_recognized(name):
    assert is_license(name)
    assert not is_license(f"{name}.bin")
    assert not is_license(f"my_{name}")


def test_files_that_are_not_there_or_damaged_are_refused(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "tokenizer.json").symlink_to("missing.json")
    with pytest.raises(ValueError, match=r"got a link to .*missing.json, which is no file"):
        read_small_files(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(ValueError, match=r"tokenizer.model of the model, got a pointer of git-lfs"):
        read_small_files(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        jc.hub.export(jc.hub.load(folder), [0, 2], folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
