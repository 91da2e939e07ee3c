"""Tokenizers from the metadata of GGUF files."""

import json

import gguf
import numpy as np
import pytest
from checkpoints import TEXT, write_file
from gguf_files import (
    CONFIGS,
    add_byte_tokenizer,
    add_sentencepiece_tokenizer,
    write_gguf,
    write_model,
)

import jchain as jc
from jchain.hub.gguf_header import Header
from jchain.hub.gguf_tokenizer import SPLITS, make_tokenizer, make_tokenizer_files

pytest.importorskip("tokenizers")


def write_tokenizer(path, add, **changes):
    """Write a file with a tokenizer and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    add(writer)
    for key, value in changes.items():
        if value is None:
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]
        else:
            writer.kv_data[0][f"tokenizer.ggml.{key}"] = gguf.gguf_writer.GGUFValue(
                value, gguf.GGUFValueType.get_type(value)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Header(path)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("gpt-2", "hell  12", ["hell", "Ġ", "Ġ", "12"]),
        ("gpt-2", "\n\n12 t", ["Ċ", "Ċ", "12", "Ġt"]),
        # Digits are words of their own, so that the spaces before them are one word.
        ("smollm", "hell  12", ["hell", "ĠĠ", "1", "2"]),
        ("smollm", "\n\n12 t", ["ĊĊ", "1", "2", "Ġt"]),
        ("qwen2", "hell  12", ["hell", "Ġ", "Ġ", "1", "2"]),
        ("qwen2", "\n\n12 t", ["ĊĊ", "1", "2", "Ġt"]),
        ("llama-bpe", "hell  12", ["hell", "Ġ", "Ġ", "12"]),
        ("llama-bpe", "1212", ["12", "1", "2"]),
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(tmp_path, pre, text, tokens):
    header = write_tokenizer(tmp_path / "x.gguf", lambda writer: add_byte_tokenizer(writer, pre))
    tokenizer = make_tokenizer(header)
    assert encode(tokenizer, text) == tokens
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("pre", SPLITS)
def test_every_rule_keeps_all_bytes(tmp_path, pre):
    tokenizer = make_tokenizer(
        write_tokenizer(tmp_path / "x.gguf", lambda writer: add_byte_tokenizer(writer, pre))
    )
    text = "naïve café — 日本語 🙂\t\r\n  I'LL don't 12345 ½ ²\u00a0x"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_special_and_user_defined_tokens_stay_whole(tmp_path):
    header = write_tokenizer(tmp_path / "x.gguf", add_byte_tokenizer)
    tokenizer = make_tokenizer(header)
    assert encode(tokenizer, "a<|end|>b<tool>") == ["a", "<|end|>", "b", "<tool>"]
    ids = tokenizer.encode("a<|end|>b<tool>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>"
    assert tokenizer.get_vocab_size() == len(header.read_strings("tokenizer.ggml.tokens"))


def test_sentencepiece_joins_the_pair_with_the_highest_score(tmp_path):
    tokenizer = make_tokenizer(
        write_tokenizer(tmp_path / "x.gguf", add_sentencepiece_tokenizer),
    )
    assert encode(tokenizer, "abc") == ["▁abc"]
    # "bc" has a lower score than "ab".
    assert encode(tokenizer, "ababc") == ["▁ab", "abc"]
    assert encode(tokenizer, "a é") == ["▁a", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("a\nb  é").ids) == "a\nb  é"
    assert tokenizer.encode("a").tokens == ["<s>", "▁a"]


def test_the_space_before_a_text_can_be_left_out(tmp_path):
    header = write_tokenizer(
        tmp_path / "x.gguf", add_sentencepiece_tokenizer, add_space_prefix=False
    )
    assert encode(make_tokenizer(header), "abc ab") == ["abc", "▁ab"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model to be gpt2 or llama, got none"),
        ({"model": "bert"}, "to be gpt2 or llama, got 'bert': put the model's tokenizer.json"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre to be one of default, .*'deepseek-llm': put"),
        ({"tokens": None}, "expected tokenizer.ggml.tokens, an array of strings, got none"),
        ({"tokens": [1, 2]}, "expected tokenizer.ggml.tokens, an array of strings"),
        ({"merges": ["q zz"]}, "invalid tokenizer"),
        ({"token_type": [1, 1]}, "token_type to have a number for each of 265 tokens"),
        ({"bos_token_id": 999}, r"bos_token_id in 0\.\.264, got 999"),
        ({"bos_token_id": "a"}, r"bos_token_id in 0\.\.264, got 'a'"),
    ],
)
def test_an_invalid_tokenizer_is_described(tmp_path, changes, message):
    header = write_tokenizer(tmp_path / "x.gguf", add_byte_tokenizer, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        make_tokenizer(header)
    assert "x.gguf" in str(caught.value)


def test_text_is_encoded_by_the_tokenizer_of_the_file(tmp_path):
    model = write_model(tmp_path / "model", "llama", vocab_size=280)
    config = CONFIGS["llama"] | {"vocab_size": 280}
    file = write_gguf(tmp_path / "x.gguf", config, model, tokenizer=add_byte_tokenizer)
    text = write_file(tmp_path, TEXT)
    data = jc.hub.load_text(file, text, length=8)
    assert data.num_classes == 280
    ids = make_tokenizer(Header(file)).encode(TEXT, add_special_tokens=False).ids
    pairs = {(*ids[i : i + 9],) for i in range(0, len(ids) - 8, 8)}
    rows = np.concatenate([data.search.x, data.search.y[:, -1:]], axis=1)
    assert {tuple(row) for row in rows.tolist()} <= pairs


def test_a_tokenizer_beside_the_file_has_precedence(tmp_path):
    model = write_model(tmp_path / "model", "llama", vocab_size=280)
    config = CONFIGS["llama"] | {"vocab_size": 280}
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(folder / "x.gguf", config, model, tokenizer=add_byte_tokenizer)
    other = make_tokenizer(
        write_tokenizer(tmp_path / "y.gguf", lambda writer: add_byte_tokenizer(writer, "smollm"))
    )
    other.save(str(folder / "tokenizer.json"))
    text = write_file(tmp_path, "hell  12" * 400)
    ids = jc.hub.load_text(folder, text, length=8).train.x
    assert other.token_to_id("ĠĠ") in np.unique(ids)
    bank = jc.hub.load(folder)
    jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    copied = (tmp_path / "out" / "tokenizer.json").read_text()
    assert copied == (folder / "tokenizer.json").read_text()


def test_the_files_of_a_tokenizer_name_its_special_tokens(tmp_path):
    def add(writer):
        add_byte_tokenizer(writer)
        writer.add_chat_template("{{ messages }}")
        writer.add_add_bos_token(True)

    files = make_tokenizer_files(write_tokenizer(tmp_path / "x.gguf", add))
    config = json.loads(files["tokenizer_config.json"])
    assert config["bos_token"] == config["eos_token"] == "<|end|>"
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert config["chat_template"] == "{{ messages }}"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    assert tokenizer.encode("hell").tokens == ["<|end|>", "hell"]
    assert tokenizer.encode("hell", "t").tokens == ["<|end|>", "hell", "<|end|>", "t"]


def test_a_file_without_a_tokenizer_has_no_files_of_one(tmp_path):
    header = write_tokenizer(tmp_path / "x.gguf", lambda writer: None)
    assert make_tokenizer_files(header) == {}
