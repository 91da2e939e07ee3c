"""Opening tokenizers, and comparing them."""

import json

import numpy as np
import pytest
from checkpoints import make_checkpoint

from jchain.hub.tokenizing import TextEncoder, compare_tokenizers, open_tokenizer

tokenizers = pytest.importorskip("tokenizers")


def edit(folder, name, **options):
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | options))


@pytest.mark.parametrize(
    "names", [["tokenizer.model"], ["vocab.json", "merges.txt"], ["qwen.tiktoken"], ["tekken.json"]]
)
def test_other_files_of_tokenizers_are_named_with_what_to_do(tmp_path, names):
    folder = make_checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    for name in names:
        (folder / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError) as caught:
        open_tokenizer(folder)
    assert all(name in str(caught.value) for name in names)
    assert "AutoTokenizer.from_pretrained(" in str(caught.value)
    assert ".save_pretrained(" in str(caught.value)


def test_documents_are_separated_by_the_special_tokens_of_the_model(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    newline = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("\n").ids
    assert open_tokenizer(folder).separator.tolist() == newline
    for options, expected in (
        ({"bos_token_id": 5}, newline),
        ({"bos_token_id": 5, "eos_token_id": 7}, [7, 5]),
        ({"bos_token_id": 7, "eos_token_id": 7}, [7]),
        ({"eos_token_id": [9, 8]}, [9]),
        ({"eos_token_id": 300}, newline),
        ({"eos_token_id": True}, newline),
    ):
        folder = make_checkpoint(tmp_path / "model")
        edit(folder, "config.json", **options)
        assert open_tokenizer(folder).separator.tolist() == expected
    folder = make_checkpoint(tmp_path / "model")
    for token in ("a", {"content": "a"}):
        edit(folder, "tokenizer_config.json", eos_token=token)
        ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
        assert open_tokenizer(folder).separator.tolist() == ids


def test_texts_are_encoded_without_special_tokens_and_truncation(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="b $A", special_tokens=[("b", 1)]
    )
    encoder = TextEncoder(tokenizer, folder, 256, [])
    texts = ["abcdefgh", "", "xyz"]
    found = encoder.encode_many(texts, "here")
    assert [len(ids) for ids in found] == [8, 0, 3]
    assert [tokenizer.decode(ids) for ids in found] == texts
    assert all(ids.dtype == np.int32 for ids in found)


def make_pair(tmp_path, change):
    """Make a tokenizer, and another one that differs by `change` of its JSON."""
    folders = [make_checkpoint(tmp_path / name) for name in ("m0", "m1")]
    path = folders[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))
    return folders


def add_tokens(*tokens):
    def change(content):
        content["added_tokens"] += [
            {
                "id": i, "content": name, "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False,
            }
            for name, i in tokens
        ]  # fmt: skip

    return change


def swap_tokens(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda c: None, "same", ""),
        (lambda c: c.update(decoder=None), "same", ""),
        (lambda c: c["pre_tokenizer"].pop("use_regex"), "same", ""),
        (add_tokens(("<|end|>", 256), ("<|im|>", 257)), "extended", "none and '<|end|>', '<|im|>'"),
        (swap_tokens, "different", "token 'a': "),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "different", "pre_tokenizer"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "different", "normalizer: None and "),
        (lambda c: c["model"]["merges"].append(["a", "b"]), "different", "model.merges: None and "),
        (lambda c: c["model"]["vocab"].pop("a"), "different", "'a' and none"),
    ],
)
def test_tokenizers_are_compared_by_how_they_encode(tmp_path, change, kind, words):
    if kind == "different" and "merges" in words:
        original = change

        def change(content):
            content["model"]["vocab"]["ab"] = 256
            original(content)

    folders = make_pair(tmp_path, change)
    found = compare_tokenizers(*(folder / "tokenizer.json" for folder in folders))
    assert found.kind == kind
    assert words in found.difference
    assert (
        compare_tokenizers(*(folder / "tokenizer.json" for folder in reversed(folders))).kind
        == kind
    )


def test_merges_of_older_versions_are_the_same(tmp_path):
    folders = [make_checkpoint(tmp_path / name) for name in ("m0", "m1")]
    content = json.loads((folders[0] / "tokenizer.json").read_text())
    content["model"]["vocab"]["ab"] = 256
    for folder, merge in zip(folders, (["a", "b"], "a b"), strict=True):
        content["model"]["merges"] = [merge]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    assert compare_tokenizers(*(folder / "tokenizer.json" for folder in folders)) == ("same", "")


def test_damaged_tokenizers_cannot_be_compared(tmp_path):
    folders = make_pair(tmp_path, lambda c: c.update(model=3))
    with pytest.raises(ValueError, match="m1/tokenizer.json is damaged or not a tokenizer"):
        compare_tokenizers(*(folder / "tokenizer.json" for folder in folders))
