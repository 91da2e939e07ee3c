"""Text as sequences of tokens, from files of all formats."""

import contextlib
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import TEXT, make_checkpoint, write_file, write_parquet
from scipy.special import log_softmax as scipy_log_softmax
from stopping import ENVIRONMENT

import jchain as jc
from jchain.hub import text as text_lib

tokenizers = pytest.importorskip("tokenizers")

DOCUMENTS = ["one two\n", 'three "four"', "", "five é\N{GRINNING FACE}, six", "seven " * 40]


def log_softmax(outputs):
    return scipy_log_softmax(np.asarray(outputs, np.float64), axis=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model")


def test_text_is_cut_into_sequences_and_the_tokens_that_follow(checkpoint, tmp_path):
    data = jc.hub.load_text(checkpoint, write_file(tmp_path, TEXT), length=10)
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert data.num_classes == 256
    rows = []
    for split in (data.train, data.search, data.select, data.test):
        assert split.x.shape == split.y.shape
        np.testing.assert_array_equal(split.x[:, 1:], split.y[:, :-1])
        rows += [(*map(int, x), int(y[-1])) for x, y in zip(split.x, split.y, strict=True)]
    assert len(rows) == (len(TEXT) - 1) // 10
    expected = [TEXT[i : i + 11] for i in range(0, len(rows) * 10, 10)]
    assert sorted(tokenizer.decode(row) for row in rows) == sorted(expected)
    few = jc.hub.load_text(checkpoint, write_file(tmp_path, TEXT), length=10, sizes=(5, 4, 3, 2))
    assert [len(split.x) for split in few[:4]] == [5, 4, 3, 2]
    bank = jc.hub.load(checkpoint)
    out = jc.evaluate(jc.Problem(bank, data.search, 2), np.array([[0, 1, 2]]))
    logits = log_softmax(
        np.asarray(jc.apply_chain(bank, np.array([0, 1, 2]), data.search.x), np.float64)
    )
    expected = -np.take_along_axis(logits, np.asarray(data.search.y)[..., None], axis=-1).mean()
    assert float(out.loss[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "short",
            {},
            "expected text of at least 513 tokens, a sequence of 128 for each split, "
            "got 5 in .*text.txt",
        ),
        (TEXT, {"length": 0}, "expected a length of at least 1, got 0"),
        (
            TEXT,
            {"length": 10, "sizes": (100, 100, 3, 3)},
            "at least 1 and at most 203 in all, got .100, 100, 3, 3.",
        ),
        (TEXT, {"length": 10, "sizes": (1, 2)}, "expected sizes of train, search, select, test"),
    ],
)
def test_unsuitable_text_is_rejected(checkpoint, tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        jc.hub.load_text(checkpoint, write_file(tmp_path, text), **options)


def test_unsuitable_tokenizers_and_files_are_rejected(checkpoint, tmp_path):
    text = write_file(tmp_path, TEXT)
    small = make_checkpoint(tmp_path / "small", vocabulary=50)
    with pytest.raises(
        ValueError,
        match=r"expected tokens in 0..49, the model's, got \d+ from .*tokenizer.json for .*text",
    ):
        jc.hub.load_text(small, text, length=10)
    (small / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json is damaged or not a tokenizer"):
        jc.hub.load_text(small, text)
    (small / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json in .*small, found none"):
        jc.hub.load_text(small, text)
    with pytest.raises(FileNotFoundError, match="expected a text file at .*none.txt"):
        jc.hub.load_text(checkpoint, tmp_path / "none.txt")
    text.write_bytes(b"\xff\xfe\xfa" * 500)
    with pytest.raises(ValueError, match="expected text in UTF-8 in .*text.txt"):
        jc.hub.load_text(checkpoint, text)


def test_damaged_tokenizers_raise_only_clear_errors(tmp_path):
    path = make_checkpoint(tmp_path / "model") / "tokenizer.json"
    whole, text, rng = path.read_bytes(), write_file(tmp_path, TEXT), np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: rng.integers(0, len(damaged))]
        for place in rng.integers(0, max(1, len(damaged)), trial % 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            jc.hub.load_text(path.parent, text, length=10)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab={"a": 0}, unk_token="none"))
    words.save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot encode .*text.txt: .*UNK"):
        jc.hub.load_text(path.parent, text, length=10)


def write_documents(path, documents, field="text"):
    """Write documents in the format of the file's ending."""
    rows = [{"id": i, field: document} for i, document in enumerate(documents)]
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    match path.suffixes:
        case [".jsonl"]:
            path.write_text("\ufeff" + lines)
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress(lines.encode()))
        case [".json"]:
            path.write_text(json.dumps(rows, indent=1))
        case [".csv"] | [".tsv"]:
            import csv

            with path.open("w", newline="") as file:
                mark = "\t" if path.suffix == ".tsv" else ","
                csv.writer(file, delimiter=mark).writerows([["id", field], *map(dict.values, rows)])
        case [".parquet"]:
            pytest.importorskip("pyarrow")
            write_parquet(path, rows)
    return path


def make_model(folder, **config):
    folder = make_checkpoint(folder)
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(options | config))
    return folder


def join(data):
    """Map the sequences of all splits to their labels."""
    rows = [(x, y) for split in data[:4] for x, y in zip(*map(np.asarray, split), strict=True)]
    return {tuple(x.tolist()): tuple(y.tolist()) for x, y in rows}


def get_stream(checkpoint, documents, separator):
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    parts = [tokenizer.encode(document).ids for document in documents if document]
    return sum(([*separator, *part] for part in parts[1:]), parts[0])


FORMATS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"]


@pytest.mark.parametrize("field", [None, "content"])
@pytest.mark.parametrize("name", FORMATS)
def test_documents_of_each_format_are_joined_by_special_tokens(tmp_path, name, field):
    checkpoint = make_model(tmp_path / "model", bos_token_id=1, eos_token_id=2)
    path = write_documents(tmp_path / name, DOCUMENTS, field or "text")
    stream = get_stream(checkpoint, DOCUMENTS, [2, 1])
    found = join(jc.hub.load_text(checkpoint, path, length=7, field=field))
    starts = range(0, len(stream) - 7, 7)
    assert found == {tuple(stream[i : i + 7]): tuple(stream[i + 1 : i + 8]) for i in starts}


def test_several_files_are_mixed_and_joined_by_new_lines(checkpoint, tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.md")]
    files[0].write_bytes(b"\xef\xbb\xbfa plain text\r\nof two lines")
    write_documents(files[1], DOCUMENTS[:2])
    files[2].write_text("# another")
    texts = ["a plain text\nof two lines", *DOCUMENTS[:2], "# another"]
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    stream = get_stream(checkpoint, texts, tokenizer.encode("\n").ids)
    data = jc.hub.load_text(checkpoint, files, length=5)
    starts = range(0, len(stream) - 5, 5)
    assert join(data) == {tuple(stream[i : i + 5]): tuple(stream[i + 1 : i + 6]) for i in starts}
    assert data.name == "a+b+c"


def test_json_strings_and_one_object_are_documents(checkpoint, tmp_path):
    path = tmp_path / "a.json"
    for content in (["ab " * 20, "cd"], {"text": "ab " * 20 + "\ncd", "id": [{}]}):
        path.write_text(json.dumps(content))
        data = jc.hub.load_text(checkpoint, path, length=5)
        assert len(join(data)) > 1
        assert len(data.train.x) + len(data.search.x) + len(data.select.x) == 11


def test_a_config_is_read_as_plain_text_with_a_warning(checkpoint, tmp_path):
    config = json.dumps({"hidden": 8, "names": ["a", "b"], "more": {"a": list(range(50))}})
    path = write_file(tmp_path, config, "config.json")
    with pytest.warns(UserWarning, match="config.json is one JSON object without the field 'text'"):
        found = jc.hub.load_text(checkpoint, path, length=9)
    with pytest.raises(ValueError, match="expected the field 'text', found names"):
        jc.hub.load_text(checkpoint, write_file(tmp_path, '[{"names": 1}]', "b.json"), length=9)
    plain = jc.hub.load_text(checkpoint, write_file(tmp_path, config), length=9)
    np.testing.assert_array_equal(found.train.x, plain.train.x)
    with pytest.raises(ValueError, match="expected the field 'body', found hidden, more, names"):
        jc.hub.load_text(checkpoint, path, length=9, field="body")


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_field_is_named_with_those_that_are_there(checkpoint, tmp_path, name):
    path = write_documents(tmp_path / name, DOCUMENTS, "content")
    with pytest.raises(ValueError, match=f"{name}.*expected the field 'text', found content, id"):
        jc.hub.load_text(checkpoint, path, length=7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": null}', "a.jsonl, line 1: expected text, or an object .* got None"),
        ('{"text": "a"}\n{"text": ["b"]}', "a.jsonl, line 2: expected text, .* got \\['b'\\]"),
        ("3", "a.jsonl, line 1: expected text, .* got 3"),
        ('{"data": [{"text": "a"}]}', "a.jsonl, line 1: expected the field 'text', found data"),
        ("", "expected text of at least 29 tokens, .* got 0 in"),
        (r'{"text": "\ud800"}', "cannot encode .*a.jsonl"),
    ],
)
def test_records_without_text_are_refused(checkpoint, tmp_path, content, message):
    path = write_file(tmp_path, content, "a.jsonl")
    with pytest.raises(ValueError, match=message):
        jc.hub.load_text(checkpoint, path, length=7)


def make_long_text(num):
    """Make a text whose parts are all different."""
    return "".join(f"Sentence {i} of a text.{' '[: i % 3]}\n" for i in range(num))


def test_sequences_that_are_drawn_are_parts_of_the_text(checkpoint, tmp_path, monkeypatch):
    encoded = []
    original = text_lib.encode_pieces
    monkeypatch.setattr(
        text_lib,
        "encode_pieces",
        lambda pieces, encoder: original((encoded.append(p) or p for p in pieces), encoder),
    )
    text = make_long_text(20_000)
    path = write_file(tmp_path, text)
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    data = jc.hub.load_text(checkpoint, path, length=100, sizes=(8, 7, 6, 5))
    assert [split.x.shape for split in data[:4]] == [(8, 100), (7, 100), (6, 100), (5, 100)]
    rows = [[*x, y[-1]] for x, y in join(data).items()]
    assert len(rows) == 26
    places = [text.index(tokenizer.decode(row)) for row in rows]
    assert min(abs(a - b) for i, a in enumerate(places) for b in places[:i]) >= 100
    # The places are spread over the whole text, of which little was encoded.
    assert np.histogram(places, 4, (0, len(text)))[0].min() >= 1
    assert sum(len(piece.text) for piece in encoded) < len(text) / 5
    again = jc.hub.load_text(checkpoint, path, length=100, sizes=(8, 7, 6, 5))
    other = jc.hub.load_text(checkpoint, path, length=100, sizes=(8, 7, 6, 5), seed=1)
    assert join(again) == join(data)
    assert not join(other).keys() & join(data).keys()


def test_every_part_of_a_text_is_drawn_as_often(checkpoint, tmp_path):
    text = make_long_text(12_000)
    path = write_file(tmp_path, text)
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    counts = np.zeros(4, int)
    for seed in range(12):
        data = jc.hub.load_text(checkpoint, path, length=64, sizes=(3, 3, 3, 3), seed=seed)
        places = [text.index(tokenizer.decode([*x, y[-1]])) for x, y in join(data).items()]
        counts += np.histogram(places, 4, (0, len(text)))[0]
    assert counts.sum() == 144
    # 144 draws in blocks; a quarter has 36 on average.
    assert counts.min() >= 15, counts


def test_short_documents_that_are_drawn_are_joined(tmp_path):
    checkpoint = make_model(tmp_path / "model", eos_token_id=0)
    documents = [f"document number {i}" for i in range(5000)]
    path = write_documents(tmp_path / "a.jsonl", documents)
    data = jc.hub.load_text(checkpoint, path, length=60, sizes=(4, 4, 4, 4))
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    parts = [
        tokenizer.decode(part, skip_special_tokens=False)
        for row in join(data)
        for part in " ".join(map(str, row)).split(" 0 ")
        for part in [[int(token) for token in part.split()]]
    ]
    whole = [part for part in parts if part in set(documents)]
    assert len(whole) >= 16 * 2
    assert len({*whole}) == len(whole)


def test_most_keeps_the_first_sequences_of_larger_splits(checkpoint, tmp_path):
    path = write_file(tmp_path, make_long_text(400))
    whole = jc.hub.load_text(checkpoint, path, length=20)
    most = (50, None, 10, 10**6)
    data = jc.hub.load_text(checkpoint, path, length=20, most=most)
    for split, other, num in zip(data[:4], whole[:4], most, strict=True):
        np.testing.assert_array_equal(split.x, other.x[:num])
        np.testing.assert_array_equal(split.y, other.y[:num])
    drawn = jc.hub.load_text(checkpoint, path, length=8, most=(3, 2, 1, 2))
    assert [len(split.x) for split in drawn[:4]] == [3, 2, 1, 2]


def test_all_text_is_read_if_blocks_have_too_few_tokens(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(text_lib, "_LEAST_BLOCK", 300)
    monkeypatch.setattr(text_lib, "_BLOCK_SIZE", 1)
    path = write_file(tmp_path, TEXT * 20)
    data = jc.hub.load_text(checkpoint, path, length=150, sizes=(60, 60, 60, 60))
    assert len(data.test.x) == 60
    with pytest.raises(ValueError, match="of at least 1 and at most 271 in all"):
        jc.hub.load_text(checkpoint, path, length=150, sizes=(60, 60, 60, 600))


MEMORY = """
import sys, jax, jax.numpy as jnp, jchain as jc
def read_peak():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
model, small, large, sizes = sys.argv[1:]
sizes = [4, 4, 4, 4] if sizes else None
jc.hub.load_text(model, small, length=16, sizes=sizes)
before = read_peak()
data = jc.hub.load_text(model, large, length=16, sizes=sizes)
print((read_peak() - before), 8 * sum(split.x.size for split in data[:4]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "sizes"), [("large.txt", ""), ("large.txt", "few"), ("large.jsonl", "few")]
)
def test_memory_is_that_of_the_tokens(checkpoint, tmp_path, name, sizes):
    small, text = write_file(tmp_path, TEXT * 200), make_long_text(400_000 if sizes else 100_000)
    path = tmp_path / name
    if name.endswith(".txt"):
        path.write_text(text)
    else:
        write_documents(path, [text[i : i + 5000] for i in range(0, len(text), 5000)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, checkpoint, small, path, sizes],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    grown, needed = map(int, done.stdout.split())
    # Encoding all at once took over 100 bytes for each byte of text.
    assert grown < 1.2 * needed + 16 * 2**20, f"{grown:,} bytes for {needed:,}"
