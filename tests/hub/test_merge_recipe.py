"""Recipes for mergekit, read with the rules of its `ModelReference` and `ModelPath`."""

import json
import subprocess
import sys
from importlib.util import find_spec

import jax
import numpy as np
import pytest
import yaml
from checkpoints import make_tensors, write, write_config

import jchain as jc
from jchain.hub.merge_recipe import quote


def read_reference(value):
    """Read the path, the revision, and the adapter of a model as mergekit does."""

    def read_path(path):
        if isinstance(path, str):
            assert path.count("@") < 2, "Invalid model path"
            name, _, revision = path.partition("@")
            return name, revision or None
        return path["path"], path.get("revision")

    if isinstance(value, str):
        assert value.count("+") < 2, "Can't parse"
        model, _, adapter = value.partition("+")
        return *read_path(model), adapter or None
    return *read_path(value["model"]), value.get("lora")


def read_recipe(out):
    """Read the slices of a recipe, and its comments."""
    text = (out / "mergekit.yaml").read_text(encoding="utf-8")
    slices = [piece["sources"][0] for piece in yaml.safe_load(text)["slices"]]
    comments = [line for line in text.splitlines() if line.startswith("#")]
    return [(read_reference(own["model"]), own["layer_range"]) for own in slices], comments


NAMES = (
    "a+b", "a@b", "a+b+c@d@e", "a: b #c", "quo\"te'\\n", "ünï 模型 😀", "tab\tline\nend",
    "nb\xa0sp", "\x85\u2028\ufeffz", "{a}", "- a", "!tag", "&x *x", "%a", "~", "no", "1.0",
    "\x7f\x01", b"latin-\xe9".decode("utf-8", "surrogateescape"),
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_mergekit_reads_any_path_as_it_is(tmp_path, name):
    folder = write(tmp_path / name)
    out = jc.hub.export(jc.hub.load(folder, name="m"), [0, 2], folder, tmp_path / "out")
    slices, comments = read_recipe(out)
    assert slices == [((str(folder), None, None), [0, 1])]
    assert comments == ["# Paths are those of the machine that wrote this file."]
    assert str(tmp_path) not in (out / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_quoted_text_is_one_line_that_yaml_reads_back(name):
    assert len(quote(name).splitlines()) == 1
    assert yaml.safe_load(quote(name)) == name


@pytest.mark.parametrize("name", NAMES)
def test_models_may_have_the_names_of_their_folders(tmp_path, name):
    folder = write(tmp_path / name)
    bank = jc.hub.load(folder)
    bank = bank.replace([1], [jax.tree.map(lambda leaf: 2 * leaf, bank.get_params(1))])
    out = jc.hub.export(bank, [0, 1, 2], folder, tmp_path / "out")
    _, comments = read_recipe(out)
    assert len(comments) == 2
    assert "/1 were trained after loading." in comments[0]
    (out / "README.md").read_text(encoding="utf-8")


def test_models_of_the_cache_of_the_hub_have_their_names_and_others_their_paths(tmp_path):
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    snapshots.mkdir(parents=True)
    known = write(snapshots / ("0f" * 20))
    other = write(tmp_path / "other", tensors=make_tensors(seed=1))
    bank = jc.hub.load_many([known, other], names=["a", "b"])
    sources = {"a": known, "b": other}
    slices, comments = read_recipe(jc.hub.export(bank, [0, 1, 5], sources, tmp_path / "one"))
    assert slices == [(("owner/name", "0f" * 20, None), [0, 2])]
    assert comments == []
    slices, comments = read_recipe(jc.hub.export(bank, [0, 3, 6], sources, tmp_path / "two"))
    assert [path for (path, *_), _ in slices] == ["owner/name", str(other)]
    assert len(comments) == 1


def test_recipes_list_what_mergekit_cannot_reproduce(tmp_path):
    folders = [write(tmp_path / f"m{i}", tensors=make_tensors(seed=i)) for i in range(2)]
    bank = jc.hub.load(folders[0])
    bank = bank.replace([1], [jax.tree.map(lambda leaf: 2 * leaf, bank.get_params(1))])
    out = jc.hub.export(bank, [0, 1, 2], folders[0], tmp_path / "out")
    assert read_recipe(out)[1][0].endswith("in this folder: m0/1 were trained after loading.")
    many = jc.hub.load_many(folders)
    sources = {folder.name: folder for folder in folders}
    out = jc.hub.export(many, [4, 0, 5], sources, tmp_path / "many")
    assert read_recipe(out)[1][0].endswith("come from m1, but mergekit uses m0's.")


def test_recipes_name_the_options_of_single_blocks_that_mergekit_does_not_move(tmp_path):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    windows = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
    options = {"model_type": "qwen2", "num_attention_heads": 2, **sizes, **windows}
    folder = write_config(tmp_path / "qwen", options)
    bank = jc.hub.random_bank(jax.random.key(0), folder)
    _, comments = read_recipe(jc.hub.export(bank, [2, 0, 3], folder, tmp_path / "a"))
    assert "mergekit copies layer_types of the first model's config.json" in comments[0]
    _, comments = read_recipe(jc.hub.export(bank, [0, 1, 3], folder, tmp_path / "b"))
    assert len(comments) == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mergekit") is None, reason="needs mergekit")
@pytest.mark.parametrize("name", ["a+b", "a@b c"])
def test_mergekit_makes_the_same_weights(tmp_path, name):
    from safetensors.numpy import load_file

    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    options = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    empty = write_config(tmp_path / "new", options | {"num_attention_heads": 2})
    bank = jc.hub.random_bank(jax.random.key(0), empty)
    folder = jc.hub.export(bank, bank.parents[0], empty, tmp_path / name)
    out = jc.hub.export(jc.hub.load(folder), [0, 2, 2, 0, 3], folder, tmp_path / "out")
    code = "from mergekit.scripts.run_yaml import main; main()"
    merge = [sys.executable, "-c", code, str(out / "mergekit.yaml"), str(tmp_path / "merged")]
    subprocess.run([*merge, "--no-copy-tokenizer"], check=True)
    wanted, found = (load_file(path / "model.safetensors") for path in (out, tmp_path / "merged"))
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(found[key], tensor)
    depth = json.loads((tmp_path / "merged" / "config.json").read_text())["num_hidden_layers"]
    assert depth == 4
