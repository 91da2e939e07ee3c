"""Tiny GPT-2 checkpoints without torch, a tokenizer of bytes, texts, and questions."""

import contextlib
import json
import os
from pathlib import Path

import jax
import numpy as np

import jchain as jc

TEXT = "The blocks of a pretrained transformer are layers.\n" * 40
QUESTION = {"question": "ab", "choices": ["c", "dea", "b"], "answer": 1}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_embd": 6,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 8,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


@contextlib.contextmanager
def set_umask(umask):
    """Set the umask of the process in a `with` block."""
    old = os.umask(umask)
    try:
        yield
    finally:
        os.umask(old)


def write_config(folder, options):
    """Write a checkpoint folder without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def write(folder, *, tensors=None, config=None, name="model.safetensors"):
    """Write a tiny GPT-2, with changed options in `config`."""
    from safetensors.numpy import save_file

    write_config(folder, GPT2 | (config or {}))
    if tensors is None:
        tensors = make_tensors()
    save_file(tensors, folder / name)
    return folder


def make_tensors(depth=2, seed=0, vocabulary=11, positions=8):
    """Make random tensors of a tiny GPT-2, by name."""
    rng = np.random.default_rng(seed)
    block = {
        "ln_1.weight": 6,
        "ln_1.bias": 6,
        "ln_2.weight": 6,
        "ln_2.bias": 6,
        "attn.c_attn.weight": (6, 18),
        "attn.c_attn.bias": 18,
        "attn.c_proj.weight": (6, 6),
        "attn.c_proj.bias": 6,
        "mlp.c_fc.weight": (6, 24),
        "mlp.c_fc.bias": 24,
        "mlp.c_proj.weight": (24, 6),
        "mlp.c_proj.bias": 6,
    }
    shapes = {"transformer.wte.weight": (vocabulary, 6), "transformer.wpe.weight": (positions, 6)}
    shapes |= {"transformer.ln_f.weight": 6, "transformer.ln_f.bias": 6}
    shapes |= {
        f"transformer.h.{i}.{name}": shape for i in range(depth) for name, shape in block.items()
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_checkpoint(folder, vocabulary=256, alphabet=256):
    """Make a tiny GPT-2 of bytes, with a tokenizer."""
    import tokenizers

    folder = write(
        folder,
        config={"vocab_size": vocabulary, "n_positions": 16},
        tensors=make_tensors(vocabulary=vocabulary, positions=16),
    )
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:alphabet]
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_file(folder, content, name="text.txt"):
    path = folder / name
    path.write_text(content)
    return path


def write_parquet(path, rows):
    """Write rows, given as dicts, as a table."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def make_model_and_text(folder):
    """Make tiny models `model` and `model.gguf`, the text `my.txt`, and `questions.jsonl`."""
    from gguf_files import CONFIGS, add_byte_tokenizer, write_gguf, write_model

    options = {"vocab_size": 256, "n_embd": 8, "n_layer": 6, "n_positions": 128}
    model = write_config(make_checkpoint(folder / "new"), GPT2 | options)
    bank = jc.hub.random_bank(jax.random.key(0), model)
    jc.hub.export(bank, bank.parents[0], model, folder / "model")
    (folder / "my.txt").write_text((Path(__file__).parent.parent / "README.md").read_text())
    (folder / "questions.jsonl").write_text(f"{json.dumps(QUESTION)}\n" * 8)
    other = write_model(folder / "other", "llama", vocab_size=280)
    llama = CONFIGS["llama"] | {"vocab_size": 280}
    write_gguf(folder / "model.gguf", llama, other, tokenizer=add_byte_tokenizer)
