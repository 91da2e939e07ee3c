import os
import stat
import threading

import pytest

from jchain.files import write_atomically, write_json


def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


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
