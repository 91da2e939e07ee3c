"""Folders of exported checkpoints are written whole or not at all."""

import json
import os
import resource
import shutil
import stat

import jax
import numpy as np
import pytest
from checkpoints import set_umask, write

import jchain as jc


@pytest.fixture
def model(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.json").chmod(0o600)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


def list_tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("size", [600, 10**9])
def test_all_files_have_the_permissions_of_the_umask(model, tmp_path, umask, size):
    bank = jc.hub.load(model)
    with set_umask(umask):
        out = jc.hub.export(bank, [0, 2], model, tmp_path / "a" / "out", max_shard_size=size)
    for path in (out.parent, out, *out.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert (len(list(out.glob("*.safetensors"))) > 1) == (size == 600)


@pytest.mark.parametrize("size", [1, 600, 2_000])
def test_shards_hold_all_tensors_and_are_not_larger_than_asked(model, tmp_path, size):
    bank = jc.hub.load(model)
    out = jc.hub.export(bank, [1, 0, 2], model, str(tmp_path / "out"), max_shard_size=size)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(p.name for p in out.glob("model-*"))
    for path in out.glob("model-*"):
        names = [name for name, own in index["weight_map"].items() if own == path.name]
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert len(names) == 1 or path.stat().st_size - header <= size
    one = jc.hub.load(jc.hub.export(bank, [1, 0, 2], model, tmp_path / "one"))
    for a, b in zip(jax.tree.leaves(jc.hub.load(out)), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_folder_may_be_inside_its_source_and_exported_again(model):
    bank = jc.hub.load(model)
    before = list_tree(model)
    out = jc.hub.export(bank, [0, 1, 2], model, model / "shallow" / "one")
    added = {"shallow", "shallow/one", *(f"shallow/one/{name}" for name in list_tree(out))}
    assert set(list_tree(model)) == {*before, *added}
    again = jc.hub.export(jc.hub.load(out), [1, 2], out, model / "two")
    assert list_tree(again) == list_tree(out)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_whatever_is_at_out_is_refused_before_anything_is_computed(tmp_path, kind, monkeypatch):
    model = write(tmp_path / "model")
    bank, out = jc.hub.load(model), tmp_path / "out"
    if kind == "file":
        out.write_text("")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "missing")
    else:
        out.mkdir()
        (out / "own.txt").write_text("") if kind == "folder" else None
    before = list_tree(tmp_path)
    monkeypatch.setattr("jchain.hub.exporting.unfold_chain", pytest.fail)
    with pytest.raises(FileExistsError, match="already exists; choose another output folder"):
        jc.hub.export(bank, [0, 2], model, out)
    assert list_tree(tmp_path) == before


def test_places_that_cannot_be_written_are_refused_before_anything_is_computed(
    model, tmp_path, monkeypatch
):
    bank = jc.hub.load(model)
    monkeypatch.setattr("jchain.hub.exporting.unfold_chain", pytest.fail)
    with pytest.raises(ValueError, match=r"below the file .*config.json"):
        jc.hub.export(bank, [0, 2], model, model / "config.json" / "out")
    # Root may write to any folder.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"in a folder that can be written, got .*test_places"):
        jc.hub.export(bank, [0, 2], model, tmp_path / "new" / "out")


def test_a_full_disk_is_an_error_before_anything_is_written(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    before = list_tree(tmp_path)
    with pytest.raises(OSError, match=r"cannot write .*out: it needs [\d,]+ bytes, and 1,000 are"):
        jc.hub.export(jc.hub.load(model), [0, 2], model, tmp_path / "new" / "out")
    assert list_tree(tmp_path) == before


def test_a_file_that_cannot_be_written_leaves_nothing(model, tmp_path):
    bank, before = jc.hub.load(model), list_tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*out: .*File too large"):
            jc.hub.export(bank, [0, 1, 2], model, tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list_tree(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("place", ["write_shards", "sync", "_rename"])
def test_an_interruption_leaves_nothing(model, tmp_path, monkeypatch, error, place):
    def stop(*args):
        raise error

    monkeypatch.setattr(f"jchain.hub.export_folder.{place}", stop)
    before = list_tree(tmp_path)
    with pytest.raises(error):
        jc.hub.export(jc.hub.load(model), [0, 2], model, tmp_path / "new" / "deep" / "out")
    assert list_tree(tmp_path) == before


def test_what_appears_at_out_meanwhile_is_kept(model, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def write_too(folder, tensors, max_shard_size):
        out.mkdir()
        (out / "own.txt").write_text("")

    monkeypatch.setattr("jchain.hub.export_folder.write_shards", write_too)
    with pytest.raises(FileExistsError, match=r"out has appeared meanwhile; nothing is written"):
        jc.hub.export(jc.hub.load(model), [0, 2], model, out)
    assert [path.name for path in out.iterdir()] == ["own.txt"]
    assert not list(tmp_path.glob(".*"))
