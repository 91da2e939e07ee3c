"""Parity of GGUF files with transformers' own reading of the same file (torch, CPU)."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import (
    add_byte_tokenizer,
    add_sentencepiece_tokenizer,
    read_options,
    write_gguf,
    write_model,
)

import jchain as jc
from jchain.hub.gguf_header import Header
from jchain.hub.gguf_tokenizer import make_tokenizer
from jchain.hub.opening import open_checkpoint

try:
    import accelerate as accelerate  # transformers needs it to read GGUF files
    import torch
    import transformers
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(
    torch is None, reason="needs the parity extra: torch, transformers, and accelerate"
)
IDS = np.random.default_rng(0).integers(0, 11, (2, 9))
# transformers cannot read GPT-NeoX, and takes these sizes from the defaults of its configs.
CASES = (
    ("llama", "F32", {}),
    ("llama", "Q4_0", {}),
    ("qwen2", "Q8_0", {}),
    ("qwen3", "F16", {"head_dim": 128}),
    ("gpt2", "Q8_0", {"n_positions": 1024, "n_inner": 128}),
)
TEXTS = (
    "hello world",
    "  two spaces, trailing  ",
    "a\n\n\nb\r\n\tc",
    "1234 5.67, 1e-5",
    "naïve café — 日本語 🙂 नमस्ते ٣٤٥",
    "I'LL don't <|end|>hell<tool> t",
    "",
)


def run_torch(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.float().numpy()


def convert(folder, case, kind="F32", add=None, **changes):
    model = write_model(folder / "model", case, **changes)
    return write_gguf(folder / "tiny.gguf", read_options(model), model, kind, tokenizer=add)


@pytest.mark.parametrize(("case", "kind", "changes"), CASES)
def test_weights_and_logits_equal_those_of_transformers(tmp_path, case, kind, changes):
    # transformers takes the size of the vocabulary from the tokenizer.
    file = convert(tmp_path, case, kind, add_byte_tokenizer, vocab_size=265, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    ).eval()
    expected, checkpoint = model.state_dict(), open_checkpoint(file)
    for name, shape in checkpoint.shapes.items():
        row = np.empty(shape, np.float32)
        checkpoint.read(name, row)
        np.testing.assert_array_equal(row, expected[name].numpy(), name)
    bank = jc.hub.load(file)
    ours = np.asarray(jc.apply_chain(bank, np.array(bank.parents[0]), jnp.asarray(IDS)))
    theirs = run_torch(model, IDS)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_exports_equal_the_model_and_keep_its_tokenizer(tmp_path, case):
    # transformers splits text for Qwen by this rule in any case.
    add = functools.partial(add_byte_tokenizer, pre="qwen2" if "qwen" in case else "gpt-2")
    file = convert(tmp_path, case, "Q8_0", add, vocab_size=265)
    bank = jc.hub.load(file)
    chain = np.array([1, 0, 1, bank.num_layers])
    jc.hub.export(bank, chain, file, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = np.asarray(jc.apply_chain(bank, chain, jnp.asarray(IDS)))
    theirs = run_torch(model, IDS)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    own = make_tokenizer(Header(file))
    for text in TEXTS:
        assert loaded(text)["input_ids"] == own.encode(text).ids
    assert loaded.eos_token == "<|end|>"


@pytest.mark.parametrize(
    "add",
    [
        add_byte_tokenizer,
        functools.partial(add_byte_tokenizer, pre="qwen2"),
        functools.partial(add_byte_tokenizer, pre="llama-bpe"),
        functools.partial(add_byte_tokenizer, pre="tekken"),
        add_sentencepiece_tokenizer,
    ],
)
def test_token_ids_equal_those_of_transformers(tmp_path, add):
    file = convert(tmp_path, "llama", add=add, vocab_size=280)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = make_tokenizer(Header(file))
    for text in TEXTS:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(found) == theirs.decode(found, skip_special_tokens=True)
