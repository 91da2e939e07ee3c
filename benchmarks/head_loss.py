"""Measure what it saves to compute the loss of a large vocabulary by parts.

    python benchmarks/head_loss.py --json benchmarks/results/head_loss_cpu.json

The run took 13 minutes on 2 CPU cores that many other jobs also used; alone, it takes less.
Expected result: by parts, the loss takes less than half the time that it takes with logits that are
kept, and its gradients no more time and a tenth of the memory.

The head has the sizes of SmolLM2-135M: a norm of 576 features and a matrix of 49,152 rows, with
random weights. It reads 8 sequences of 128 tokens. Of the questions, one token in eight counts.
Both ways take turns. The memory is what XLA reserves for temporaries, without arguments and
results.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe_device, time_call, versions

import jchain as jc
from jchain.engine import head_calls
from jchain.engine.backend import compiler_options

CONFIG = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
NUM_SEQUENCES, LENGTH, SHARE = 8, 128, 8
NUM_PAIRS, QUICK_PAIRS = 5, 2
HEAD = 1


def make_bank() -> jc.Bank:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        return jc.hub.random_bank(jax.random.key(0), folder)


def make_problems(bank: jc.Bank) -> dict[str, jc.Problem]:
    """Make a problem of text, and one of questions of which few tokens count."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(CONFIG["vocab_size"], size=(2, NUM_SEQUENCES, LENGTH))
    questions = np.where(np.arange(LENGTH) % SHARE == 0, y, -1)
    return {
        "text": jc.Problem(bank, jc.Batch(jnp.asarray(x), jnp.asarray(y)), 1),
        "questions": jc.Problem(
            bank,
            jc.Batch(jnp.asarray(x), jnp.asarray(questions)),
            1,
            loss_fn=jc.hub.next_token_loss,
            accuracy_fn=jc.hub.next_token_accuracy,
        ),
    }


def score(problem: jc.Problem, hidden: jax.Array, params: Any) -> Any:
    """Compute the loss as `jc.evaluate` does."""
    return jc.env.head_loss(put_params(problem, params), jnp.array(HEAD), hidden)


def differentiate(problem: jc.Problem, hidden: jax.Array, params: Any) -> Any:
    """Compute the loss and its gradient with respect to the activations."""
    return jax.value_and_grad(
        lambda h: head_calls.compute_head_loss(put_params(problem, params), HEAD, h)
    )(hidden)


def differentiate_all(problem: jc.Problem, hidden: jax.Array, params: Any) -> Any:
    """Compute the gradient with respect to the weights of the head, too."""
    return jax.value_and_grad(
        lambda h, p: head_calls.compute_head_loss(put_params(problem, p), HEAD, h), (0, 1)
    )(hidden, params)


def put_params(problem: jc.Problem, params: Any) -> jc.Problem:
    heads = (dataclasses.replace(problem.bank.heads[0], params=params),)
    return problem.with_bank(dataclasses.replace(problem.bank, heads=heads))


WORK = {
    "loss": score,
    "loss and gradient": differentiate,
    "loss and gradients of the head too": differentiate_all,
}


def compile_for(fn: Callable[..., Any], arguments: tuple[Any, ...], *, in_parts: bool) -> Any:
    """Compile a function for outputs that are read in parts, or kept."""
    least = head_calls._MIN_OUTPUTS
    head_calls._MIN_OUTPUTS = least if in_parts else CONFIG["vocab_size"] + 1
    try:
        # Another function each time, because JAX keeps what it traced.
        lowered = jax.jit(
            lambda *args: fn(*args), compiler_options=compiler_options(jax.default_backend())
        ).lower(*arguments)
        return lowered.compile()
    finally:
        head_calls._MIN_OUTPUTS = least


def compare(name: str, work: str, problem: jc.Problem, num_pairs: int) -> dict[str, Any]:
    """Time both ways in turns, after their results have been compared."""
    hidden = jax.random.normal(jax.random.key(1), (NUM_SEQUENCES, LENGTH, CONFIG["hidden_size"]))
    arguments = problem.without_names(), hidden, problem.bank.heads[0].params
    parts, kept = (
        compile_for(WORK[work], arguments, in_parts=in_parts) for in_parts in (True, False)
    )
    pairs = zip(jax.tree.leaves(parts(*arguments)), jax.tree.leaves(kept(*arguments)), strict=True)
    error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    if error > 1e-4:
        raise ValueError(f"expected equal results, got a relative difference of {error}")

    def run(program: Any) -> None:
        jax.block_until_ready(program(*arguments))

    seconds = np.array(
        [[time_call(partial(run, own)) for own in (parts, kept)] for _ in range(num_pairs)]
    )
    ratios = seconds[:, 1] / seconds[:, 0]
    memory = [own.memory_analysis().temp_size_in_bytes for own in (parts, kept)]
    return {
        "data": name,
        "work": work,
        "parts_s": float(np.median(seconds[:, 0])),
        "kept_s": float(np.median(seconds[:, 1])),
        "speedup": float(np.median(ratios)),
        "speedup_spread": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "parts_bytes": memory[0],
        "kept_bytes": memory[1],
        "relative_error": error,
    }


def measure(*, quick: bool) -> dict[str, Any]:
    problems = make_problems(make_bank())
    num_pairs = QUICK_PAIRS if quick else NUM_PAIRS
    rows = [
        compare(name, work, problem, num_pairs)
        for name, problem in problems.items()
        for work in WORK
    ]
    return {
        "device": describe_device(),
        "versions": versions(),
        "config": CONFIG | {"sequences": NUM_SEQUENCES, "length": LENGTH, "pairs": num_pairs},
        "part": head_calls._CPU_SIZES._asdict(),
        "rows": rows,
    }


def format_table(result: dict[str, Any]) -> str:
    """Format a Markdown table of times and memory."""
    lines = [
        "| data | work | by parts, s | kept, s | times as fast | by parts, MiB | kept, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["speedup_spread"]
        lines.append(
            f"| {row['data']} | {row['work']} | {row['parts_s']:.2f} | {row['kept_s']:.2f} | "
            f"{row['speedup']:.2f} ({low:.2f} to {high:.2f}) | {row['parts_bytes'] / 2**20:.0f} | "
            f"{row['kept_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure losses of a large vocabulary.")
    parser.add_argument("--quick", action="store_true", help="time fewer pairs")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    result = measure(quick=args.quick)
    print(format_table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
