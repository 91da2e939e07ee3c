"""Files that jchain reads, how each is damaged, and what reads it."""

import contextlib
import csv
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import (
    GPT2,
    QUESTION,
    VIT,
    make_checkpoint,
    write_config,
    write_file,
    write_parquet,
)
from fuzz.mutations import damage_bytes, damage_json, damage_text
from gguf_files import (
    add_byte_tokenizer,
    add_sentencepiece_tokenizer,
    read_options,
    write_gguf,
    write_model,
)

import jchain as jc
from jchain.__main__ import main
from jchain.agent.critic import NUM_INPUTS, Network
from jchain.cli.config import SearchConfig
from jchain.cli.own_files import load_data
from jchain.files import read_arrays, write_arrays
from jchain.hub.gguf_header import Header

ROTARY = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
CONFIGS = {
    "gpt2": GPT2,
    "llama": ROTARY | {"model_type": "llama", "rope_theta": 1e4},
    "qwen3": ROTARY | {"model_type": "qwen3", "head_dim": 4, "layer_types": 2 * ["full_attention"]},
    "gpt_neox": ROTARY | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "vit": VIT,
    "smollm3": ROTARY
    | {"model_type": "smollm3", "no_rope_layers": [1, 0], "rope_scaling": DYNAMIC}
    | {"max_position_embeddings": 16, "use_sliding_window": True, "sliding_window": 4},
    "gemma": ROTARY | {"model_type": "gemma", "head_dim": 4, "hidden_act": "gelu"},
    "gemma2": ROTARY
    | {"model_type": "gemma2", "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": ROTARY
    | {"model_type": "gemma3_text", "head_dim": 4, "sliding_window": 4, "rope_theta": 1e6}
    | {"sliding_window_pattern": 2, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    "phi3": ROTARY
    | {"model_type": "phi3", "original_max_position_embeddings": 4, "rope_scaling": LONGROPE}
    | {"max_position_embeddings": 16, "sliding_window": 4},
    "olmo": ROTARY | {"model_type": "olmo", "clip_qkv": 8.0},
    "olmo2": ROTARY | {"model_type": "olmo2", "rms_norm_eps": 1e-6},
    "qwen3_moe": ROTARY
    | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 4}
    | {"moe_intermediate_size": 4, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "granite": ROTARY
    | {"model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0}
    | {"residual_multiplier": 0.5, "attention_multiplier": 0.5},
    "starcoder2": ROTARY | {"model_type": "starcoder2", "sliding_window": 4, "use_bias": True},
}


class Target(NamedTuple):
    """A kind of file.

    Attributes:
      make: writes the files into a folder, and returns the one to damage.
      damage: damages it.
      read: reads it.
    """

    make: Callable[[Path], Path]
    damage: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]


class Refused(Exception):
    """The command line refused a file, with its line as the message."""


def make_bank(folder: Path) -> Path:
    x = np.zeros((1, 5), np.float32)
    layers = [jc.layers.ResidualMLP(5, hidden=7), jc.layers.InvertibleDense(5)]
    head = jc.layers.DenseHead(3)
    keys = jax.random.split(jax.random.key(0), 4)
    params = [module.init(key, x)["params"] for module, key in zip(layers * 2, keys, strict=True)]
    heads = [head.init(jax.random.key(1), x)["params"]]
    bank = jc.Bank.stack(layers * 2, params, head, heads, parents=[[0, 1, 4]])
    bank.save(folder / "bank.safetensors")
    return folder / "bank.safetensors"


def make_critic(folder: Path) -> Path:
    size = jnp.zeros(NUM_INPUTS)
    params = Network(4).init(jax.random.key(0), size)["params"]
    jc.Critic(params, size, size + 1, 4).save(folder / "critic.safetensors")
    return folder / "critic.safetensors"


def make_model(family: str, name: str, folder: Path) -> Path:
    source = write_config(folder / "source", CONFIGS[family])
    bank = jc.hub.random_bank(jax.random.key(0), source)
    jc.hub.export(bank, bank.parents[0], source, folder / "model")
    shutil.rmtree(source)
    return folder / "model" / name


def make_tokenizer(folder: Path) -> Path:
    model = make_checkpoint(folder / "model")
    write_file(folder, "The blocks of a pretrained transformer are layers.\n" * 40)
    return model / "tokenizer.json"


def make_result(folder: Path) -> Path:
    options = "--data wine --num-layers 3 --depth 1 --num-steps 3 --budget 60 --search random"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["search", *options.split(), "--quick", "--out", str(folder / "out")]) == 0
    return folder / "out" / "result.json"


def damage_file(rng: random.Random, path: Path) -> None:
    path.write_bytes(damage_bytes(rng, path.read_bytes()))


def damage_json_file(rng: random.Random, path: Path) -> None:
    path.write_text(damage_text(rng, path.read_text()))


def damage_header(rng: random.Random, path: Path) -> None:
    """Change the header of a file of arrays, which keeps a right checksum."""
    header, arrays = read_arrays(path)
    changed = damage_json(rng, header)
    write_arrays(path, changed if isinstance(changed, dict) else {"layers": changed}, arrays)


def damage_tensor_header(rng: random.Random, path: Path) -> None:
    """Change the header of a file of safetensors."""
    blob = path.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    text = json.dumps(damage_json(rng, json.loads(blob[8 : 8 + size]))).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + size :])


def make_gguf(case: str, add_tokenizer: Callable[..., int], folder: Path) -> Path:
    model = write_model(folder / "model", case, vocab_size=280)
    write_file(folder, "hello 12  the tests of abc.\n" * 40)
    kind = "F32" if case == "gpt2" else "Q8_0"
    return write_gguf(folder / "x.gguf", read_options(model), model, kind, tokenizer=add_tokenizer)


def damage_gguf(rng: random.Random, path: Path) -> None:
    """Change bytes or a number of the header, which is much smaller than the weights."""
    blob = path.read_bytes()
    size = min(entry.offset for entry in Header(path).tensors.values())
    header = damage_bytes(rng, blob[:size])
    if rng.random() < 0.5:
        position = rng.randrange(size - 8)
        number = rng.choice((0, 1, 2**16, 2**31, 10**9, 10**12, 10**18, 2**63, 2**64 - 1))
        header = blob[:position] + number.to_bytes(8, "little") + blob[position + 8 : size]
    path.write_bytes(header + blob[size:])


def load_gguf_text(path: Path) -> object:
    return jc.hub.load_text(path, path.parent / "text.txt", length=8)


def run_command(*arguments: str) -> None:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = main([*arguments])
    if code:
        raise Refused(err.getvalue())


def load_model(path: Path) -> object:
    return jc.hub.load(path.parent)


def load_text(path: Path) -> object:
    return jc.hub.load_text(path.parent, path.parent.parent / "text.txt", length=8)


def evaluate_result(path: Path) -> None:
    run_command("evaluate", str(path.parent))


def compare_result(path: Path) -> None:
    run_command("compare", str(path.parent))


def read_result(path: Path) -> object:
    return jc.Result.from_json(path.read_text())


def make_npz(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(folder / "mine.npz", x=rng.normal(size=(40, 3)), y=rng.integers(0, 2, 40))
    return folder / "mine.npz"


def make_csv(folder: Path) -> Path:
    numbers = np.random.default_rng(0).normal(size=(40, 2))
    rows = [f"{a:.3f},{b:.3f},{'ab'[i % 2]}" for i, (a, b) in enumerate(numbers)]
    return write_file(folder, "\n".join(["a,b,class", *rows]), "mine.csv")


DOCUMENTS = [{"id": i, "text": f'Document {i} of a few, "with" commas.\n'} for i in range(12)]
LABELED = {"text": ["c", "dea"], "label": ["A", "B"]}
COLUMNS = {"question": "ab", "A": "c", "B": "dea", "answer": "B"}
ARC = {"question": "ab", "choices": LABELED, "answerKey": "B"}
LAYOUTS = [
    QUESTION,
    QUESTION | {"answer": "B"},
    {"question": "2 + 2 =", "choices": [3, 4], "answer": "1"},
    ARC,
    {
        "question": {"stem": "ab", "choices": [{"text": t, "label": t} for t in ("A", "dea")]},
        "answerKey": "A",
    },
    {"ctx": "ab", "endings": ["c", "dea", "b"], "label": "1"},
    {"goal": "ab", "sol1": "c", "sol2": "dea", "label": 1},
    {"question": "ab", "mc1_targets": {"choices": ["c", "dea"], "labels": [1, 0]}},
    {"sentence": "a _ b", "option1": "c", "option2": "dea", "answer": "2"},
    COLUMNS,
]


def write_records(path: Path, rows: list[dict], has_header: bool = True) -> Path:
    """Write records in the format of the file's ending, beside a model in `model`."""
    make_checkpoint(path.parent / "model")
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    if path.suffix == ".csv":
        lines = io.StringIO()
        header = [[*rows[0]]] if has_header else []
        csv.writer(lines).writerows([*header, *(row.values() for row in rows)])
        return write_file(path.parent, lines.getvalue(), path.name)
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    return write_file(path.parent, text, path.name)


def damage_records(rng: random.Random, path: Path) -> None:
    """Damage the values of a file of JSON lines or of an array, or its bytes."""
    if path.suffix not in (".json", ".jsonl") or rng.random() < 0.3:
        damage_file(rng, path)
        return
    lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    chosen = rng.randrange(len(lines))
    lines[chosen] = damage_text(rng, lines[chosen])
    path.write_text("\n".join(lines), errors="replace")


def read_documents(path: Path) -> object:
    # At times all tokens are kept, and at times a few are drawn.
    sizes = [1, 1, 1, 1] if path.stat().st_size % 2 else None
    return jc.hub.load_text(path.parent / "model", path, length=8, sizes=sizes)


def read_own_data(path: Path) -> object:
    return load_data(SearchConfig(data=str(path)))


def read_questions(path: Path) -> object:
    return jc.hub.load_choices(path.parent / "model", path, length=8)


def make_search(folder: Path) -> Path:
    return make_result(folder).with_name("search.json")


TARGETS = {
    "bank": Target(make_bank, damage_file, jc.Bank.load),
    "bank header": Target(make_bank, damage_header, jc.Bank.load),
    "critic": Target(make_critic, damage_file, jc.Critic.load),
    "critic header": Target(make_critic, damage_header, jc.Critic.load),
    "tokenizer": Target(make_tokenizer, damage_json_file, load_text),
    "result, evaluate": Target(make_result, damage_json_file, evaluate_result),
    "result, compare": Target(make_result, damage_json_file, compare_result),
    "search.json": Target(make_search, damage_json_file, read_result),
    "npz": Target(make_npz, damage_file, read_own_data),
    "csv": Target(make_csv, damage_file, read_own_data),
    **{
        f"text {ending}": Target(
            lambda folder, ending=ending: write_records(folder / f"a{ending}", DOCUMENTS),
            damage_records,
            read_documents,
        )
        for ending in (".txt", ".json", ".jsonl", ".csv", ".parquet")
    },
    **{
        f"questions {name}": Target(
            lambda folder, name=name, rows=rows: write_records(
                folder / f"q{name.split(',')[0]}", rows, has_header="no header" not in name
            ),
            damage_records,
            read_questions,
        )
        for name, rows in {
            ".jsonl": LAYOUTS,
            ".json": LAYOUTS,
            ".csv": [COLUMNS] * 6,
            ".csv, no header": [COLUMNS] * 6,
            ".parquet": [ARC] * 6,
        }.items()
    },
    "weights": Target(
        lambda folder: make_model("gpt2", "model.safetensors", folder), damage_file, load_model
    ),
    "weights header": Target(
        lambda folder: make_model("gpt2", "model.safetensors", folder),
        damage_tensor_header,
        load_model,
    ),
    **{
        f"gguf of {case}": Target(
            lambda folder, case=case: make_gguf(case, add_byte_tokenizer, folder),
            damage_gguf,
            jc.hub.load,
        )
        for case in ("llama", "qwen3", "gpt2", "gpt_neox")
    },
    **{
        f"tokenizer of gguf, {kind}": Target(
            lambda folder, add=add: make_gguf("gpt2", add, folder), damage_gguf, load_gguf_text
        )
        for kind, add in (
            ("bytes", add_byte_tokenizer),
            ("sentencepiece", add_sentencepiece_tokenizer),
        )
    },
    **{
        f"config of {family}": Target(
            lambda folder, family=family: make_model(family, "config.json", folder),
            damage_json_file,
            load_model,
        )
        for family in CONFIGS
    },
}
