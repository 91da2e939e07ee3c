"""Which blocks of a pretrained transformer are needed, and do blocks of two fine-tunes mix?

    python experiments/transformer_depth.py

A GPT-2 of 8 blocks, 128 wide, reads bytes; it is trained on Python's standard library, and two fine-tunes of it on two parts of that
which it did not see: concurrency (A: asyncio, multiprocessing, ...) and the web (B: email, http, ...). All are written as checkpoints and
read by `jc.hub`. *Depth*: chains of at most k blocks of the base model, first and last pinned, repeats and any order allowed;
searches at 1,000 layer calls on `search`, the best of their finalists by `select`, judged on `test`, beside dropping the last blocks,
dropping those of the least influence (ShortGPT), the best run of blocks dropped, and, for more blocks than there are, the best run
repeated (both by `search`). Local search begins at a random chain, and in a row of its own at what is done by hand (the model, without
each run of blocks or with it twice); a last row is what is lower on `select`, that or a recipe. Where all chains can be scored, so they are: their lowest loss on `search` is the optimum. *Mix*: chains of the
blocks, embeddings and heads of both fine-tunes, on text of A and B in equal parts, beside each fine-tune, the base model, and the mean of the
fine-tunes' weights (model soup). Loss: nats of the next byte. Writes transformer_depth.json, .md and .png to experiments/results.

Not yet run in full: some 50 minutes of a CPU core a model, a fifth of them training; what is computed is kept. `--quick`: one small
model of few steps, two lengths; nothing is written.
"""

import argparse
import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import byte_models
import jax
import numpy as np
from byte_models import Model
from matplotlib.figure import Figure
from records import describe_machine, is_deterministic, keep, look_up, make_pool, write_results

import jchain as jc

NUM_MODELS = 5
# Sequences of search, select and test. Of 8 in `search` searches learnt the text by heart where chains are long.
SIZES = (16, 64, 128)
# Blocks of which all chains are scored, and others; layer calls of a search; its runs by different keys.
KEPT, MORE, BUDGET, NUM_RUNS = (4, 5, 6), (7, 8, 9), 1000, 10
SEARCHES = {
    "random search": jc.RandomSearch(),
    "local search": jc.LocalSearch(),
    "evolution": jc.Evolution(),
    "beam search": jc.BeamSearch(),
    "linearized": jc.LinearizedSearch(),
}
# Needs weights and activations: not looked up. What is not looked up has fewer runs.
WEIGHING, NUM_FULL_RUNS = ("linearized",), 2
WHOLE = "nothing dropped"
RECIPES = (
    "last blocks dropped", "blocks of least influence dropped", "best run of blocks dropped", WHOLE, "best run repeated"
)  # fmt: skip
FOUND = "local search"
# From the models and what is done by hand, as `jchain search --checkpoint`, which has the recipes and models among its finalists too.
STARTED, CHOSEN = "local search from recipes", "that or a recipe, by select"
MIX_ARMS = ("base", "fine-tune a", "fine-tune b", "soup of both", "random mix", *SEARCHES, STARTED, CHOSEN)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large all of it is."""

    model: Model
    kept: tuple[int, ...] = KEPT
    more: tuple[int, ...] = MORE
    budget: int = BUDGET
    num_runs: int = NUM_RUNS


QUICK = Size(Model(depth=5, width=32, num_steps=30, num_tune_steps=10), (3, 4), (6,), 200, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model; nothing is written")
    parser.add_argument("--num-models", type=int, default=NUM_MODELS, help="models to train (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    size, num_models = (QUICK, 1) if args.quick else (Size(Model()), args.num_models)
    start = time.perf_counter()
    with make_pool(min(args.workers, num_models)) as pool:
        futures = [pool.submit(measure, seed, size) for seed in range(num_models)]
        runs = [future.result() for future in futures]
    result = {**describe_machine(), "seconds": 0, **summarize(runs, size)}
    result["seconds"] = round(time.perf_counter() - start)
    table = format_tables(result)
    print(table)
    if not args.quick:
        write_results(args.out, "transformer_depth", result, table, partial(draw, result=result))


def measure(seed: int, size: Size) -> dict[str, np.ndarray]:
    """Losses on `test` of one trained model."""
    text = byte_models.load_text(seed)
    of_text = (byte_models.load_text, byte_models.find_files)
    case = (seed, platform.python_version(), repr(size))
    trained = keep(
        (byte_models.train_models, byte_models.fit, byte_models.run_blocks, *of_text),
        f"transformer-depth-weights-{seed}",
        (seed, platform.python_version(), repr(size.model)),
        partial(byte_models.train_models, seed, size.model, text),
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = byte_models.write_checkpoints(Path(folder), trained, size.model)
        code = (search_all, pick, byte_models.make_splits, byte_models.take, byte_models.write_checkpoints, *of_text)
        uses = [*SEARCHES.values()]
        depth = keep(
            (measure_depth, judge, *code),
            f"transformer-depth-{seed}",
            case,
            lambda: measure_depth(seed, size, paths, text),
            uses=uses,
        )
        mix = keep(
            (measure_mix, judge, *code),
            f"transformer-mix-{seed}",
            case,
            lambda: measure_mix(seed, size, paths, text),
            uses=uses,
        )
        started = keep(
            (measure_started, start_all, find_recipes, judge, *code),
            f"transformer-started-{seed}",
            case,
            lambda: measure_started(seed, size, paths, text),
            uses=[jc.LocalSearch()],
        )
    return depth | mix | started


def search_all(
    problem: jc.Problem, table: jc.Problem | None, num_runs: int, budget: int, seed: int
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Of each search the finalists of its runs; looked up in the table where there is one and the search does not need weights."""
    for name, search in SEARCHES.items():
        if table is None or name in WEIGHING:
            posed, num = problem, min(num_runs, NUM_FULL_RUNS)
        else:
            search, posed, num = look_up(search), table, num_runs
        keys = jax.random.split(jax.random.key(seed), 1 if is_deterministic(search) else num)
        runs = jc.run_many(keys, search, posed, budget=budget)
        yield name, [np.asarray(run.finalists) for run in runs]


def pick(select: jc.Problem, finalists: list[np.ndarray]) -> tuple[list[list[int]], np.ndarray]:
    """Of each run the finalist with the lowest loss on `select`, and that loss."""
    loss = np.asarray(jc.evaluate(select, np.concatenate(finalists)).loss)
    parts = np.split(loss, np.cumsum([len(rows) for rows in finalists])[:-1])
    best = [rows[int(part.argmin())] for rows, part in zip(finalists, parts, strict=True)]
    return [[int(t) for t in row if t >= 0] for row in best], np.array([part.min() for part in parts])


def measure_depth(
    seed: int, size: Size, paths: dict[str, Path], text: dict[str, list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Loss on `test` of what each search found and of each recipe, by the number of blocks that were allowed."""
    whole, bank = jc.hub.load(paths["base"]), jc.hub.load(paths["base"], pinned=(1, 1))
    splits = byte_models.make_splits(text, ("base",), seed, SIZES)
    (parent,) = whole.parents
    deepest = max(size.kept) - 2
    chains, out = jc.evaluate_all(jc.Problem(bank, splits[0], deepest))
    length = (chains >= 0).sum(axis=1) - 1
    loss = np.asarray(out.loss)
    influence = jc.hub.recipes.find_influence(whole, parent, splits[0].x)
    results = {"influence": influence, "optimum": np.array([loss[length <= k - 2].min() for k in size.kept])}
    test = jc.Problem(bank, splits[2], max(*size.kept, *size.more) - 2)
    for k in (*size.kept, *size.more):
        problem = jc.Problem(bank, splits[0], k - 2)
        table = jc.lookup.make_problem(bank, loss[length <= k - 2], k - 2) if k in size.kept else None
        recipes = find_recipes(whole, splits[0], k)
        on_test = judge(whole, splits[2], recipes)[:, None]
        results |= {f"{name}/{k}": row for name, row in zip(recipes, on_test, strict=True)}
        for name, finalists in search_all(problem, table, size.num_runs, size.budget, seed):
            tokens, _ = pick(jc.Problem(bank, splits[1], k - 2), finalists)
            results[f"{name}/{k}"] = np.asarray(jc.evaluate(test, jc.chain.pad(tokens, test.max_layers)).loss)
            results[f"{name}/{k}/blocks"] = np.array([len(row) + 1 for row in tokens])
            print(f"model {seed}, {k} blocks: {name}", flush=True)
    return results


def find_recipes(whole: jc.Bank, split: jc.Batch, num_blocks: int) -> dict[str, list[int]]:
    """What is done by hand to bring the model to so many blocks, or where it has no more the model itself."""
    (parent,) = whole.parents
    recipes = jc.hub.recipes.find_chains(jc.Problem(whole, split, num_blocks), parent, num_blocks)
    return recipes | ({WHOLE: list(parent)} if num_blocks >= whole.num_layers else {})


def judge(bank: jc.Bank, split: jc.Batch, chains: dict[Any, list[int]]) -> np.ndarray:
    """Losses of chains by name, `[chains]`."""
    padded = jc.chain.pad([*chains.values()], 2 * bank.num_layers)
    return np.asarray(jc.evaluate(jc.Problem(bank, split, 2 * bank.num_layers), padded).loss)


def measure_mix(
    seed: int, size: Size, paths: dict[str, Path], text: dict[str, list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Loss on `test` of chains of both fine-tunes and of single models, on text of both parts, and of each."""
    bank = jc.hub.load_many([paths["a"], paths["b"]], pinned=(1, 1))
    splits = byte_models.make_splits(text, ("a", "b"), seed, SIZES)
    max_layers = size.model.depth - 1  # one of them for embeddings
    search, select, test = (jc.Problem(bank, split, max_layers) for split in splits)
    results = {}
    for name, finalists in search_all(search, None, size.num_runs, size.budget, seed):
        tokens, _ = pick(select, finalists)
        results[f"mix/{name}"] = np.asarray(jc.evaluate(test, jc.chain.pad(tokens, max_layers)).loss)
        num_a = [sum(bank.names[token].startswith("a/") for token in row) for row in tokens]
        results[f"mix/{name}/share of a"] = np.array(num_a) / [len(row) for row in tokens]
        print(f"model {seed}, mix: {name}", flush=True)
    sampled = jc.chain.sample(jax.random.key(seed), 32, bank.num_layers, 2, max_layers, min_layers=max_layers)
    results["mix/random mix"] = np.asarray(jc.evaluate(test, sampled).loss).mean()[None]
    for name, arm in (("base", "base"), ("a", "fine-tune a"), ("b", "fine-tune b"), ("soup", "soup of both")):
        model = jc.hub.load(paths[name])
        results[f"mix/{arm}"] = judge(model, splits[2], {arm: list(model.parents[0])})
    return results


def measure_started(
    seed: int, size: Size, paths: dict[str, Path], text: dict[str, list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Loss on `test` of what local search finds from the models and what is done by hand, alone and with these by `select`."""
    whole, bank = jc.hub.load(paths["base"]), jc.hub.load(paths["base"], pinned=(1, 1))
    splits, results = byte_models.make_splits(text, ("base",), seed, SIZES), {}
    for k in (*size.kept, *size.more):
        recipes = find_recipes(whole, splits[0], k)
        known = [judge(whole, split, recipes) for split in splits[1:]]
        results |= {f"{name}/{k}": row for name, row in start_all(bank, splits, k - 2, known, size, seed).items()}
        print(f"model {seed}, {k} blocks: {STARTED}", flush=True)
    tunes, splits = [jc.hub.load(paths[part]) for part in "ab"], byte_models.make_splits(text, ("a", "b"), seed, SIZES)
    known = [np.array([judge(tune, split, {0: list(tune.parents[0])})[0] for tune in tunes]) for split in splits[1:]]
    both = jc.hub.load_many([paths["a"], paths["b"]], pinned=(1, 1))
    found = start_all(both, splits, size.model.depth - 1, known, size, seed)
    return results | {f"mix/{name}": row for name, row in found.items()}


def start_all(
    bank: jc.Bank, splits: list[jc.Batch], max_layers: int, known: list[np.ndarray], size: Size, seed: int
) -> dict[str, np.ndarray]:
    """Of each run the loss on `test` of what it found, and of that or what is `known`, by the loss on `select`.

    Args:
      bank: of blocks.
      splits: search, select and test.
      max_layers: of a chain.
      known: losses of models or recipes on select and test.
      size: of the experiment.
      seed: of the runs.
    """
    search, select, test = (jc.Problem(bank, split, max_layers) for split in splits)
    method = jc.LocalSearch(starts=jc.hub.recipes.find_starts(bank, max_layers))
    runs = jc.run_many(jax.random.split(jax.random.key(seed), NUM_FULL_RUNS), method, search, budget=size.budget)
    tokens, on_select = pick(select, [np.asarray(run.finalists) for run in runs])
    loss = np.asarray(jc.evaluate(test, jc.chain.pad(tokens, max_layers)).loss)
    best = int(known[0].argmin())
    return {STARTED: loss, CHOSEN: np.where(on_select <= known[0][best], loss, known[1][best])}


def summarize(runs: list[dict[str, np.ndarray]], size: Size) -> dict[str, Any]:
    """Interquartile means over models and runs, with intervals."""

    def pool(name: str) -> Any:
        values = np.concatenate([run[name] for run in runs if name in run])
        return {**jc.stats.iqm(values)._asdict(), "by_model": [float(run[name].mean()) for run in runs if name in run]}

    names = sorted({name for run in runs for name in run if "/" in name and not name.startswith("mix/")})
    depth: dict[str, dict[str, Any]] = {}
    for name in names:
        arm, k, *rest = name.split("/")
        if not rest:
            depth.setdefault(arm, {})[k] = pool(name)
        else:
            depth[arm][k][rest[0]] = float(np.concatenate([run[name] for run in runs]).mean())
    mix = {arm: pool(f"mix/{arm}") for arm in MIX_ARMS}
    shares = {arm: pool(f"mix/{arm}/share of a") for arm in SEARCHES}
    config = {**dataclasses.asdict(size), "num_models": len(runs), "sizes": SIZES, "length": byte_models.LENGTH}
    return {
        "config": config,
        "influence": np.mean([run["influence"] for run in runs], axis=0).tolist(),
        "optimum": np.mean([run["optimum"] for run in runs], axis=0).tolist(),
        "depth": depth,
        "mix": mix,
        "share_of_a": shares,
        "wins": count_wins(depth, size),
    }


def count_wins(depth: dict[str, dict[str, Any]], size: Size) -> dict[str, Any]:
    """By number of blocks: the best recipe, and in how many models what was found is no worse, and better."""
    wins = {}
    for k in map(str, (*size.kept, *size.more)):
        there = [name for name in RECIPES if k in depth.get(name, {})]
        best = min(there, key=lambda name: np.mean(depth[name][k]["by_model"]))
        alone, chosen, theirs = (np.array(depth[name][k]["by_model"]) for name in (STARTED, CHOSEN, best))
        wins[k] = {
            "recipe": best, "loss": float(theirs.mean()), "found": float(alone.mean()), "chosen": float(chosen.mean()),
            "better": int((alone < theirs).sum()), "chosen_better": int((chosen < theirs).sum()), "models": len(theirs),
        }  # fmt: skip
    return wins


def format_tables(result: dict[str, Any]) -> str:
    kept = [*map(str, (*result["config"]["kept"], *result["config"]["more"]))]
    lines = [
        "| loss on test, nats per byte | " + " | ".join(f"{k} blocks" for k in kept) + " |",
        "|---" * (1 + len(kept)) + "|",
    ]
    for arm in (*RECIPES, *SEARCHES, STARTED, CHOSEN):
        row = result["depth"].get(arm, {})
        cells = [f"{row[k]['value']:.3f} [{row[k]['low']:.3f}, {row[k]['high']:.3f}]" if k in row else "" for k in kept]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", f"| blocks | best recipe | its loss | {STARTED} | lower in | {CHOSEN} | lower in |", "|---" * 7 + "|"]
    for k, row in result["wins"].items():
        cells = [k, row["recipe"], f"{row['loss']:.3f}"]
        for loss, better in ((row["found"], row["better"]), (row["chosen"], row["chosen_better"])):
            cells += [f"{loss:.3f}", f"{better} of {row['models']} models"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| text of A and B | loss on test | share of A |", "|---" * 3 + "|"]
    for arm, row in result["mix"].items():
        share = f"{result['share_of_a'][arm]['value']:.0%}" if arm in result["share_of_a"] else ""
        lines.append(f"| {arm} | {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {share} |")
    return "\n".join(lines)


def draw(path: str, result: dict[str, Any]) -> None:
    """Loss against blocks, and the mix."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in (*RECIPES, FOUND, STARTED, CHOSEN):
        rows = sorted((int(k), row) for k, row in result["depth"].get(arm, {}).items())
        values = np.array([(k, row["value"], row["low"], row["high"]) for k, row in rows])
        style = {"ls": "--", "marker": "s", "ms": 4} if arm in RECIPES else {"marker": "o", "lw": 2}
        (line,) = left.plot(values[:, 0], values[:, 1], label=arm, **style)
        left.fill_between(values[:, 0], values[:, 2], values[:, 3], alpha=0.15, color=line.get_color())
    left.set(xlabel="blocks", ylabel="loss on test, nats per byte", title="Fewer and more blocks", yscale="log")
    left.legend(fontsize=8)
    arms = [arm for arm in result["mix"] if arm != "random mix"]
    values = np.array([[result["mix"][arm][of] for of in ("value", "low", "high")] for arm in arms])
    errors = np.abs(values[:, 1:] - values[:, :1]).T
    right.barh(
        arms[::-1],
        values[::-1, 0],
        xerr=errors[:, ::-1],
        color=["tab:blue" if a in (*SEARCHES, STARTED, CHOSEN) else "gray" for a in arms[::-1]],
    )
    right.set(
        xlabel="loss on test, nats per byte", title="Blocks of two fine-tunes", xlim=(0.9 * values[:, 0].min(), None)
    )
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
