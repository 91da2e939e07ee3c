import os
import stat
import tempfile
import threading

import jax
import numpy as np
import pytest
from checkpoints import set_umask

import jchain as jc
from jchain.files import write_arrays, write_atomically, write_json


def list_modes(folder):
    """List the modes of the files and of the folders below a folder."""
    paths = list(folder.rglob("*"))
    files = {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()}
    return files, {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()}


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask):
    def replace(temporary):
        with tempfile.NamedTemporaryFile(dir=tmp_path, delete=False) as private:
            private.write(b"1")
        os.replace(private.name, temporary)

    with set_umask(umask):
        write_json(tmp_path / "a.json", {"a": 1})
        write_arrays(tmp_path / "b.safetensors", {}, {"a": np.ones(1)})
        write_atomically(tmp_path / "c", replace)
        write_atomically(tmp_path / "a.json", replace)  # also of a file that exists
    assert list_modes(tmp_path)[0] == {0o666 & ~umask}
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_saved_banks_and_runs_have_the_permissions_of_the_umask(tmp_path, umask):
    data = jc.data.load("wine", seed=0)
    layer, head = jc.layers.ResidualMLP(13), jc.layers.DenseHead(3)
    bank = jc.train.random(
        jax.random.key(0), data.train, layer=layer, head=head, num_layers=3, num_steps=1
    )
    problem = jc.Problem(bank, data.search, max_layers=2)
    with set_umask(umask):
        bank.save(tmp_path / "bank.safetensors")
        jc.run(
            jax.random.key(1),
            jc.LocalSearch(),
            problem,
            budget=40,
            checkpoint_dir=tmp_path / "run",
            save_every=20.0,
        )
    assert list_modes(tmp_path) == ({0o666 & ~umask}, {0o777 & ~umask})


def test_files_of_other_threads_keep_their_permissions(tmp_path):
    # The umask of a process cannot be read without changing it for a moment.
    old = os.umask(0o077)
    is_over = threading.Event()
    modes = set()

    def write_others():
        for i in range(10_000):
            if is_over.is_set():
                break
            path = tmp_path / f"other{i % 2}"
            path.unlink(missing_ok=True)
            path.write_text("")
            modes.add(stat.S_IMODE(path.stat().st_mode))

    thread = threading.Thread(target=write_others)
    thread.start()
    try:
        for _ in range(200):
            write_json(tmp_path / "a.json", [])
    finally:
        is_over.set()
        thread.join()
        os.umask(old)
    assert modes == {0o600}


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(temporary):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
