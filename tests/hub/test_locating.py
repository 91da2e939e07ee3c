"""Checkpoints by folder, by the cache of huggingface_hub, and by a name of the hub."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_tensors, write
from fake_hub import COMMIT, no_network, serve

import jchain as jc
from jchain.hub.locating import choose_names, locate


def test_a_model_of_the_hub_is_downloaded_once_and_then_read_without_a_network(tmp_path):
    folder, cache, log = make_checkpoint(tmp_path / "model"), tmp_path / "cache", []
    for name in ("pytorch_model.bin", "onnx/model.onnx", "optimizer.pt", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    with serve({"some-org/my-model": folder}, cache, log):
        bank = jc.hub.load("some-org/my-model")
        assert bank.names[0] == "my-model/0"
        assert {*log} == {"config.json", "model.safetensors", "tokenizer.json"}
        count = len(log)
        assert jc.hub.load("some-org/my-model@v1").names[0] == "my-model@v1/0"
        assert len(log) == count
    with no_network(cache):
        for name in ("some-org/my-model", f"some-org/my-model@{COMMIT}"):
            again = jc.hub.load(name, name="a")
            np.testing.assert_array_equal(
                again.stem_params["wte"]["weight"], bank.stem_params["wte"]["weight"]
            )


def test_only_the_shards_that_the_index_names_are_downloaded(tmp_path):
    source, log = write(tmp_path / "model"), []
    bank = jc.hub.load(source)
    shards = jc.hub.export(bank, bank.parents[0], source, tmp_path / "shards", max_shard_size=1000)
    shutil.copy(source / "model.safetensors", shards / "consolidated.safetensors")
    with serve({"o/shards": shards}, tmp_path / "cache", log):
        assert jc.hub.load("o/shards").names[0] == "shards/0"
    assert "consolidated.safetensors" not in log
    assert len([name for name in log if name.startswith("model-")]) > 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("o/none", "expected the checkpoint o/none: there is no such folder here, and no such"),
        ("o/model@v9", "expected the checkpoint o/model@v9: it has no branch, tag, or commit v9"),
        ("o/pickles", "in o/pickles, found pytorch_model.bin: only these are read, never pickle"),
        ("o/files/x.gguf", "expected the file x.gguf of o/files on the hub, got none"),
        ("o/none-at-all/x/y", "expected a checkpoint folder, a GGUF file, or a model of the"),
    ],
)
def test_what_the_hub_does_not_have_is_said(tmp_path, name, message):
    models = {"o/model": write(tmp_path / "model"), "o/pickles": write(tmp_path / "pickles")}
    models["o/files"] = write(tmp_path / "files")
    (models["o/pickles"] / "model.safetensors").rename(models["o/pickles"] / "pytorch_model.bin")
    with serve(models, tmp_path / "cache"), pytest.raises(FileNotFoundError, match=message):
        jc.hub.load(name)


def test_one_of_several_gguf_files_must_be_named(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF")
    with serve({"o/files": folder}, tmp_path / "cache"):
        with pytest.raises(ValueError, match=r"a-Q4_0.gguf, a-Q8_0.gguf: name one of them, such"):
            locate("o/files")
        found = locate("o/files/a-Q8_0.gguf@v1")
    assert (found.path.name, found.name) == ("a-Q8_0.gguf", "a-Q8_0")


def test_without_a_network_and_without_the_model_the_error_says_both(tmp_path):
    message = "is not in the cache of huggingface_hub, and the hub cannot be reached"
    with no_network(tmp_path), pytest.raises(FileNotFoundError, match=message):
        jc.hub.load("o/model")


def test_folders_of_the_cache_are_named_by_their_model(tmp_path):
    entry = tmp_path / "models--some-org--my-model"
    (entry / "snapshots").mkdir(parents=True)
    write(entry / "snapshots" / COMMIT)
    for path in (entry, entry / "snapshots" / COMMIT):
        assert jc.hub.load(path).names[0] == "my-model/0"
    write(entry / "snapshots" / "other")
    with pytest.raises(ValueError, match="expected one snapshot in .*snapshots, or refs/main"):
        jc.hub.load(entry)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("other\n")
    assert locate(entry).path.name == "other"


def test_names_are_as_short_as_they_can_be(tmp_path):
    folders = [tmp_path / name for name in ("a/x", "b/x", "c")]
    for folder in folders:
        folder.mkdir(parents=True)
    locations = [locate(folder) for folder in folders]
    assert choose_names(locations[1:]) == ["x", "c"]
    assert choose_names(locations[:2]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="expected different checkpoints"):
        choose_names([locations[0]] * 2)


def test_models_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / owner / "model" for owner in "ab"]
    for seed, folder in enumerate(folders):
        folder.parent.mkdir()
        write(folder, tensors=make_tensors(seed=seed))
    assert jc.hub.load_many(folders).names[:3:2] == ("a/model/0", "b/model/0")


def test_other_files_and_dangling_links_are_refused(tmp_path):
    folder = write(tmp_path / "model")
    with pytest.raises(ValueError, match=r"or a GGUF file, got the file .*model.safetensors; a"):
        jc.hub.load(folder / "model.safetensors")
    (tmp_path / "link").symlink_to("missing")
    with pytest.raises(FileNotFoundError, match="got a link to missing, which is missing"):
        jc.hub.load(tmp_path / "link")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("blob")
    with pytest.raises(FileNotFoundError, match=r"got a link to blob, which is missing: the down"):
        jc.hub.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        (b"PK\x03\x04....", "a pickle of PyTorch, which is never read"),
        (b"\x80\x02}.", "a pickle, which is never read"),
        (b"<!DOCTYPE html>", "a web page or XML: the download failed"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file: name it with the ending .gguf"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_are_something_else_are_called_what_they_are(tmp_path, name, content, message):
    folder = write(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        jc.hub.load(folder)


def test_an_index_may_name_tensors_that_no_shard_holds(tmp_path):
    source = write(tmp_path / "model")
    bank = jc.hub.load(source)
    folder = jc.hub.export(bank, bank.parents[0], source, tmp_path / "out", max_shard_size=1000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    index["weight_map"] |= {"lm_head.weight": first, "visual.patch.weight": first}
    path.write_text(json.dumps(index))
    again = jc.hub.load(folder)
    np.testing.assert_array_equal(
        again.stem_params["wte"]["weight"], bank.stem_params["wte"]["weight"]
    )
