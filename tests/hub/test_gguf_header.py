"""Headers of GGUF files, damaged and of other kinds."""

from pathlib import Path

import pytest
from gguf_files import (
    convert,
    pack_entry,
    pack_header,
    pack_string,
    pack_value,
)

import jchain as jc

MODEL = (pack_value("general.architecture", 8, pack_string("llama")),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file: it starts with b''"),
        (b"PK\3\4" + bytes(100), "is not a GGUF file: it starts with"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "pointer of git-lfs, .* git lfs pull",
        ),
        (b"GGUF\3\0", "is truncated: expected 4 bytes of the version"),
        (pack_header(version=1), "of version 1, expected 2 or 3"),
        (pack_header(version=3, order=">"), "is a big-endian GGUF file"),
        (pack_header(num_tensors=10**18), "at most 65,536 tensors, got 1,000,000,000,000,000,000"),
        (
            pack_header([b"\0\x10\xa5\xd4\xe8\0\0\0abc"]),
            "at most 3 bytes of a metadata key, got 1,000,000,000,000",
        ),
        (pack_header(), "general.architecture to be one of llama, .* got none"),
        (
            pack_header([pack_value("general.architecture", 8, pack_string("gemma3"))]),
            "general.architecture to be one of llama, .* gptneox, got 'gemma3'",
        ),
        (pack_header([*MODEL, *MODEL]), "is damaged: it has 'general.architecture' twice"),
        (pack_header([pack_value("a", 77, b"")]), "'a' has a value of unknown type 77"),
        (
            pack_header([pack_value("a", 9, b"\x08\0\0\0" + b"\xff" * 8)]),
            "at most 0 values of 'a', got 18,446,744,073,709,551,615",
        ),
        (pack_header([pack_value("a", 9, b"\x09\0\0\0" + bytes(8))]), "got type 9"),
        (pack_header([pack_value("a", 8, pack_string("x"))])[:-1] + b"\xff", "expected UTF-8"),
        (pack_header(MODEL, [pack_entry("a", (4,) * 5)]), "expected 1 to 4 dimensions of 'a'"),
        (pack_header(MODEL, [pack_entry("a", (4,), 99)]), "'a' has type 99, which gguf"),
        (pack_header(MODEL, [pack_entry("a", (0,))]), r"in 'a', got shape \[0\]"),
        (pack_header(MODEL, [pack_entry("a", (31,), 8)]), "rows of 32 values or a multiple in 'a'"),
        (pack_header(MODEL, [pack_entry("a", (2**40, 2**40))]), "expected .* bytes of 'a'"),
        (
            pack_header(MODEL, [pack_entry("a", (1,)), pack_entry("b", (1,))]) + bytes(128),
            "bytes of 'b' at position .* that no other tensor has",
        ),
        (
            pack_header([*MODEL, pack_value("general.alignment", 4, b"\x03\0\0\0")]),
            "general.alignment to be a power of 2, got 3",
        ),
    ],
)
def test_a_damaged_header_is_described(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        jc.hub.load(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    file = convert(tmp_path, kind="Q8_0")
    whole = file.read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 60):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="tiny.gguf"):
            jc.hub.load(file)


def test_a_link_without_its_file_is_described(tmp_path):
    link = tmp_path / "model.gguf"
    link.symlink_to(tmp_path / "blob")
    with pytest.raises(FileNotFoundError, match="got a link to .*blob, which is missing"):
        jc.hub.load(link)
    with pytest.raises(FileNotFoundError, match=r"a GGUF file, or a model of the .*, found none"):
        jc.hub.load(Path(tmp_path, "other.gguf"))
