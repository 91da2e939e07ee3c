"""Records from JSON, JSON lines, tables, and Parquet."""

import csv
import gzip
import json

import pytest
from checkpoints import write_parquet

from jchain.hub import record_files
from jchain.hub.record_files import get_format, read_records


def read(path):
    return [record.value for record in read_records(path)]


@pytest.mark.parametrize("size", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("is_array", [False, True])
def test_json_is_read_in_parts_of_any_size(tmp_path, monkeypatch, size, is_array):
    monkeypatch.setattr(record_files, "_CHUNK_SIZE", size)
    values = [{"text": 'a "b" \\ \n c', "n": [1, 2.5e3, None]}, "é\u2028", {}, {"a": {"b": "]}"}}]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        lines = [json.dumps(value, indent=indent, ensure_ascii=False) for value in values]
        text = f" [{','.join(lines)}\n] " if is_array else "\n".join(lines)
        path.write_text(text)
        assert read(path) == values
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(path) == values


def test_locations_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2} {"a": 3}\n')
    locations = [record.location for record in read_records(path)]
    assert locations == [f"{path}, line {line}" for line in (1, 3, 3)]
    table = tmp_path / "a.csv"
    table.write_text('a,b\n1,"x\ny"\n\n2,z\n')
    assert [(record.value, record.location) for record in read_records(table)] == [
        ({"a": "1", "b": "x\ny"}, f"{table}, line 3"),
        ({"a": "2", "b": "z"}, f"{table}, line 5"),
    ]


def test_tables_are_read_with_and_without_a_header(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n1\t2,3\n")
    assert read(path) == [{"a": "1", "b": "2,3"}]
    rows = [record.value for record in read_records(path, is_header=lambda row: False)]
    assert rows == [["a", "b"], ["1", "2,3"]]
    long, limit = "x" * 300_000, csv.field_size_limit()
    path.write_text(f"a\n{long}\n")
    assert read(path) == [{"a": long}]
    assert csv.field_size_limit() == limit


def test_compressed_files_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    assert get_format(path) == ".jsonl"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert read(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(gzip.compress(b'{"a": 1}' * 1000)[:-12])
    with pytest.raises(ValueError, match="a.jsonl.gz is damaged"):
        read(path)
    path.write_bytes(b'{"a": 1}')
    with pytest.raises(ValueError, match="a.jsonl.gz is damaged"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1,]", "a.json, line 1: expected JSON, got Expecting value"),
        ("a.json", b"[1", "line 1: expected ']' in the array"),
        ("a.json", b"[1 2]", "line 1: expected ',' in the array"),
        ("a.json", b"[1]\n2", "line 2: expected the end after the array"),
        ("a.json", b"[" * 100_000, "line 1: maximum recursion depth exceeded"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: Exceeds the limit"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: expected JSON, got Expecting value"),
        ("a.jsonl", b'{"a": "b', "line 1: expected JSON, got Unterminated string"),
        ("a.jsonl", b"\xff", "expected text in UTF-8 in .*a.jsonl"),
        ("a.csv", b"a,b\n1\n", "a.csv, line 2: expected 2 cells, got 1"),
        ("a.csv", b'a,b\n1,"2', "a.csv is damaged: unexpected end of data"),
        ("a.csv", b"a\n\xff\n", "expected text in UTF-8 in .*a.csv"),
        ("a.csv", "a\n1\n".encode("utf-16"), "expected text in UTF-8 in .*a.csv, got UTF-16"),
    ],
)
def test_damaged_files_are_refused_with_their_names(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_damaged_line_is_found_before_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_CHUNK_SIZE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nno json\n' + '{"a": 1}\n' * 10_000)
    reads = []
    with record_files.open_text(path) as file:
        reader = record_files._JsonReader(file, path)
        original = reader._read_more
        reader._read_more = lambda: (reads.append(1), original())
        with pytest.raises(ValueError, match="line 2: expected JSON"):
            list(reader.read_all())
    assert len(reads) == 1


def test_parquet_is_read_by_column(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    rows = [{"a": i, "b": {"text": ["x", "y"]}} for i in range(600)]
    write_parquet(path, rows)
    assert read(path) == rows
    assert [r.value for r in read_records(path, ["a"])] == [{"a": i} for i in range(600)]
    with pytest.raises(ValueError, match="a.parquet: expected the field 'c', found a, b"):
        list(read_records(path, ["c"]))
    write_parquet(path, [{"a": "unlike"}])
    path.write_bytes(path.read_bytes().replace(b"unlike", b"unli\xffe"))
    with pytest.raises(ValueError, match="a.parquet is damaged: .*utf-8"):
        read(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="a.parquet is damaged"):
        read(path)
    with pytest.raises(FileNotFoundError, match="expected a text file at .*b.parquet"):
        read(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pip install -e \".\[parquet\]\""):
        read(tmp_path / "a.parquet")
