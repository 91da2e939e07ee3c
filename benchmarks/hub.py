"""Measure the speed of chains of transformer blocks, and the memory that an import takes.

    python benchmarks/hub.py --json benchmarks/results/hub_cpu.json  # 6 minutes on 2 CPU cores
    python benchmarks/hub.py --quick                                 # 1 minute, writes nothing

The script needs `pip install -e ".[parity]"` and 3 GB of disk. A GPT-2 of 12 blocks with random
weights is written as a checkpoint, and both jchain and PyTorch read it. PyTorch runs one chain at a
time, with the model's list of blocks in the order of the chain. Losses are compared first. The
limit is the arithmetic of all distinct layer and head calls at the speed of the fastest large
matrix product.

*Import*: the checkpoint has the shape of Qwen2 1.5B in bfloat16. The result is the peak of resident
memory of a separate process, minus that before the import, divided by the size of the files.
"""

# pyright: reportMissingImports=false

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import count_call_flops, describe_device, measure_matmul, time_call, versions

import jchain as jc
from jchain import files

DEPTH = 12
# Width, heads, vocabulary, sequences, their length, and number of populations. The wide model has
# only one population, for which PyTorch takes minutes.
MODELS = {
    "128 wide, 256 tokens": (128, 4, 256, 8, 128, 3),
    "768 wide, 4,096 tokens": (768, 12, 4096, 2, 128, 1),
}
# Number of timings of each; one is enough if PyTorch takes at least `LONG` seconds.
REPEATS, LONG = 7, 15.0
LARGE = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument(
        "--quick", action="store_true", help="the small model, fewer chains, no import"
    )
    parser.add_argument("--measure-import", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_import:
        print(json.dumps(measure_import(args.measure_import)))
        return
    result: dict[str, Any] = {
        "device": describe_device(),
        "versions": versions("transformers"),
        "matmul_gflops": measure_matmul(),
        "rows": [],
    }
    for name in itertools.islice(MODELS, 1 if args.quick else None):
        result["rows"] += compare(name, result["matmul_gflops"], is_quick=args.quick)
        save(args.json, result)
    if not args.quick:
        result["import"] = run_import()
        print(format_import(result["import"]))
    save(args.json, result)


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, result)


def make_populations(num_layers: int, num: int) -> dict[str, np.ndarray]:
    """Make chains that share prefixes, as in a search for a shallower or rearranged model."""
    whole = jnp.arange(num_layers + 1)
    drop = {
        k: [
            [*kept, num_layers]
            for kept in itertools.combinations(range(num_layers), num_layers - k)
        ]
        for k in (2, 4)
    }
    edits, is_chain = map(
        np.asarray, jc.chain.ChainSpace(num_layers, 1, len(whole) - 1).neighbors(whole)
    )
    populations = {
        "2 of 12 dropped": jc.chain.pad(drop[2], max_layers=num_layers),
        "4 of 12 dropped": jc.chain.pad(drop[4], max_layers=num_layers),
        "one edit away": edits[is_chain],
    }
    return dict(itertools.islice(populations.items(), num))


def compare(name: str, gflops: float, *, is_quick: bool) -> list[dict[str, Any]]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    width, num_heads, vocabulary, num_sequences, length, num_populations = MODELS[name]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=DEPTH, n_head=num_heads, n_positions=length
    )
    model = GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        bank = jc.hub.load(folder, name="model")
    ids = np.random.default_rng(0).integers(0, vocabulary, (num_sequences, length + 1))
    problem = jc.Problem(
        bank, jc.Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])), max_layers=DEPTH
    )
    blocks = list(model.transformer.h)
    x, y = torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:])

    @torch.inference_mode()
    def run_torch(chains: np.ndarray) -> np.ndarray:
        losses = []
        for chain in chains:
            model.transformer.h = torch.nn.ModuleList(
                [blocks[token] for token in chain if 0 <= token < DEPTH]
            )
            model.config.num_hidden_layers = len(model.transformer.h)
            logits = model(x, use_cache=False).logits
            losses.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
            )
        return np.array(losses)

    def run_jchain(chains: np.ndarray) -> np.ndarray:
        return np.asarray(jc.evaluate(problem, chains).loss)

    hidden = bank.embed(problem.data.x)
    flops = [count_call_flops(groups[0], hidden) for groups in (bank.layers, bank.heads)]
    rows = []
    for population, chains in make_populations(DEPTH, 1 if is_quick else num_populations).items():
        said = jc.explain_plan(problem, chains)
        begin = time.perf_counter()
        expected = run_torch(chains)
        repeats = REPEATS if time.perf_counter() - begin < LONG else 1
        np.testing.assert_allclose(run_jchain(chains), expected, rtol=1e-4)
        # Both take turns, so that a slow moment of the machine affects both.
        timings = [
            [time_call(partial(run, chains)) for run in (run_jchain, run_torch)]
            for _ in range(repeats)
        ]
        ours, theirs = np.median(timings, axis=0)
        work = said.layer_calls * flops[0] + said.head_calls * flops[1]
        rows.append(
            {
                "model": name,
                "population": population,
                "chains": len(chains),
                "layer_calls": said.layer_calls,
                "unshared_layer_calls": said.unshared_layer_calls,
                "plan": str(said.plan),
                "seconds": float(ours),
                "torch_seconds": float(theirs),
                "timings": timings,
                "of_limit": float(work / gflops / 1e9 / ours),
            }
        )
        print(format_row(rows[-1]), flush=True)
    return rows


def format_row(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}, {row['population']}: {row['chains']} chains, "
        f"{row['layer_calls']:,} of {row['unshared_layer_calls']:,} layer calls, "
        f"{row['seconds']:.2f} s, PyTorch {row['torch_seconds']:.2f} s "
        f"({row['torch_seconds'] / row['seconds']:.2f} times), {row['of_limit']:.0%} of the limit"
    )


def run_import() -> dict[str, Any]:
    """Measure the peak memory of importing a large checkpoint in a separate process each time."""
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(LARGE))
        save_file(make_weights(), folder / "model.safetensors")
        size = (folder / "model.safetensors").stat().st_size
        done = subprocess.run(
            [sys.executable, __file__, "--measure-import", name],
            capture_output=True,
            text=True,
            check=True,
        )
        return {"bytes": size, **json.loads(done.stdout)}


def make_weights() -> dict[str, np.ndarray]:
    """Make random tensors of the shape of Qwen2 1.5B, by name."""
    width, hidden = LARGE["hidden_size"], LARGE["intermediate_size"]
    narrow = width * LARGE["num_key_value_heads"] // LARGE["num_attention_heads"]
    block = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    for name, size in (("q", width), ("k", narrow), ("v", narrow)):
        block |= {
            f"self_attn.{name}_proj.weight": (size, width),
            f"self_attn.{name}_proj.bias": (size,),
        }
    block |= {"self_attn.o_proj.weight": (width, width), "mlp.down_proj.weight": (width, hidden)}
    block |= {f"mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
    shapes = {
        "model.embed_tokens.weight": (LARGE["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for i in range(LARGE["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    return {
        name: (0.02 * rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16)
        for name, shape in shapes.items()
    }


def measure_import(folder: Path) -> dict[str, float]:
    """Measure the seconds and the peak of resident memory of an import.

    The peak of an empty process with JAX is subtracted.
    """
    jax.block_until_ready(jnp.zeros(1))
    before = read_peak()
    begin = time.perf_counter()
    bank = jc.hub.load(folder)
    jax.block_until_ready(bank)
    seconds = time.perf_counter() - begin
    peak = read_peak()
    params = sum(leaf.size for leaf in jax.tree.leaves((bank.layers, bank.stem_params)))
    return {"params": params, "peak_bytes": peak - before, "seconds": seconds}


def read_peak() -> int:
    """Read the peak of resident memory, in bytes.

    The peak of `getrusage` is not used because it starts at that of the parent process.
    """
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return 1024 * int(line.split()[1])


def format_import(row: dict[str, Any]) -> str:
    return (
        f"import: {row['params'] / 1e9:.2f} billion params, {row['bytes'] / 1e9:.2f} GB, "
        f"peak {row['peak_bytes'] / row['bytes']:.2f} times that, {row['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
