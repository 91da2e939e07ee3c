"""Texts that are encoded in pieces have the tokens of the whole text."""

import inspect
import json

import numpy as np
import pytest

from jchain.hub import pieces, questions, text, tokenizing
from jchain.hub.pieces import cut_pieces, encode_pieces, find_cut
from jchain.hub.text_files import Part
from jchain.hub.tokenizing import TextEncoder

tokenizers = pytest.importorskip("tokenizers")

# Prose and code with indents and blank lines.
PROSE = "\n\n\n".join(map(inspect.getsource, (pieces, questions, text, tokenizing)))
# What Llama 3, Qwen, and others split at.
SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(kind):
    """Train a small tokenizer of the kind of a model family."""
    models, splits, norms = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.normalizers
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    special = ["<unk>"]
    if kind == "gpt2":
        made.pre_tokenizer = splits.ByteLevel(add_prefix_space=False)
    elif kind == "llama3":
        pattern = splits.Split(tokenizers.Regex(SPLITS), "isolated")
        level = splits.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = splits.Sequence([pattern, level])
    elif kind == "llama2":  # no tokens end for certain, and a space begins each text
        made.model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        special += [f"<0x{i:02X}>" for i in range(256)]
        made.normalizer = norms.Sequence([norms.Prepend("▁"), norms.Replace(" ", "▁")])
        made.pre_tokenizer = splits.Split(tokenizers.Regex(r"▁*[^▁\n]+|▁+|\n"), "isolated")
    else:
        made.pre_tokenizer = splits.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False,
        initial_alphabet=splits.ByteLevel.alphabet() if kind in ("gpt2", "llama3") else [],
    )  # fmt: skip
    made.train_from_iterator([PROSE], trainer)
    if kind == "llama2":
        content = json.loads(made.to_str()) | {"pre_tokenizer": None}
        made = tokenizers.Tokenizer.from_str(json.dumps(content))
    return TextEncoder(made, "tokenizer.json", 10_000, [])


def split(text, size, name="here"):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    return [Part(p, i == 0, i == len(parts) - 1, name) for i, p in enumerate(parts)]


def encode(texts, encoder, size):
    parts = [part for text in texts for part in split(text, size)]
    found = [*encode_pieces(cut_pieces(parts, encoder), encoder)]
    return [piece for piece, _ in found], np.concatenate([ids for _, ids in found])


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "metaspace"])
def test_pieces_have_the_tokens_of_the_whole_text(kind, monkeypatch):
    encoder, rng = make_tokenizer(kind), np.random.default_rng(0)
    texts = [
        PROSE,
        PROSE.replace("\n", "\r\n"),
        "".join(rng.choice(list("abcdefgh"), 9000)),
        "".join(map(chr, rng.integers(0x4E00, 0x5E00, 3000))),
        "e\u0301 \N{GRINNING FACE}\n" * 1000,
    ]
    whole = [encoder.encode(text, "here") for text in texts]
    for size in (600, 1500):
        monkeypatch.setattr(pieces, "PIECE_SIZE", size)
        found, ids = encode(texts, encoder, 1000)
        assert len(found) > sum(map(len, texts)) / (1.1 * size) - len(texts)
        assert sum(piece.is_start for piece in found) == len(texts)
        np.testing.assert_array_equal(ids, np.concatenate(whole))


def test_cuts_inside_long_runs_change_few_tokens(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_SIZE", 1000)
    encoder, text = make_tokenizer("gpt2"), "a" + " " * 5000 + "b" + "\n" * 5000
    found, ids = encode([text], encoder, 1000)
    assert len(found) >= 8
    assert abs(len(ids) - len(encoder.encode(text, "here"))) <= len(found)
    tokenizer = encoder._tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    assert tokenizer.decode(ids) == text


def test_a_cut_is_at_the_last_line_that_ends_a_token():
    encoder = make_tokenizer("gpt2")
    text = "one two\nthree four\nfive six seven\n"
    assert text[: find_cut(text, 0, len(text) - 4, encoder, "here").position] == (
        "one two\nthree four\n"
    )
    cut = find_cut("one two three", 0, 11, encoder, "here")
    assert cut.position == cut.num_context == len("one two")
    assert cut.num_tokens == len(encoder.encode("one two", "here"))
