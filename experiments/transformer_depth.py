"""Which blocks of a pretrained transformer are needed, and do blocks of two fine-tunes mix?

    python experiments/transformer_depth.py

A GPT-2 of 8 blocks, 128 wide, reads bytes; it is trained on Python's standard library, and two fine-tunes of it on two parts of that
which it did not see: concurrency (A: asyncio, multiprocessing, ...) and the web (B: email, http, ...). All are written as checkpoints and
read by `jc.hub`. *Depth*: chains of at most k blocks of the base model, first and last pinned, repeats and any order allowed;
searches at 1,000 layer calls on `search`, the best of their finalists by `select`, judged on `test`, beside dropping the last blocks,
dropping those of the least influence (ShortGPT), the best run of blocks dropped, and, for more blocks than there are, the best run
repeated (both by `search`); and beside what is lower on `select`, that or the recipe. Where all chains can be scored, so they are: their lowest loss on `search` is the optimum. *Mix*: chains of the
blocks, embeddings and heads of both fine-tunes, on text of A and B in equal parts, beside each fine-tune, the base model, and the mean of the
fine-tunes' weights (model soup). Loss: nats of the next byte. Writes transformer_depth.json, .md and .png to experiments/results.

Not yet run in full: some 15 minutes of 2 CPU cores a model, half of them training; what is computed is kept. `--quick`: one small
model of few steps, two lengths; nothing is written.
"""

import argparse
import dataclasses
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from records import describe_machine, is_deterministic, keep, look_up

import jchain as jc
from jchain.files import write_atomically, write_json

CONFIG = {
    "model_type": "gpt2", "vocab_size": 256, "n_positions": 128, "n_embd": 128, "n_layer": 8, "n_head": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
PARTS = {
    "a": ("asyncio", "multiprocessing", "concurrent", "threading.py", "queue.py", "selectors.py", "socket.py", "subprocess.py", "signal.py"),
    "b": ("email", "http", "urllib", "html", "xml", "json", "wsgiref", "mimetypes.py", "imaplib.py", "smtplib.py", "ftplib.py"),
}  # fmt: skip
# Not text that people wrote, or not on every machine.
LEFT_OUT = (
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "encodings",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
    "turtledemo",
)
# Of files: for training, search, select and test.
SHARES = (0.7, 0.1, 0.1, 0.1)
LENGTH, BATCH = 128, 16
NUM_MODELS, NUM_STEPS, NUM_TUNE_STEPS = 5, 600, 150
LEARNING_RATE, TUNE_RATE = 2e-3, 5e-4
# Sequences of search, select and test. Of 8 in `search` searches learnt the text by heart where chains are long.
SIZES = (32, 64, 128)
# Blocks of which all chains are scored, and others; layer calls of a search; its runs by different keys.
KEPT, MORE, BUDGET, NUM_RUNS = (4, 5, 6, 7), (8, 9), 1000, 10
SEARCHES = {
    "random search": jc.RandomSearch(),
    "local search": jc.LocalSearch(),
    "evolution": jc.Evolution(),
    "beam search": jc.BeamSearch(),
    "linearized": jc.LinearizedSearch(),
}
# Needs weights and activations: not looked up. What is not looked up has fewer runs.
WEIGHING, NUM_FULL_RUNS = ("linearized",), 2
RECIPES = ("last blocks dropped", "least influence dropped", "best run dropped", "nothing dropped", "best run repeated")
FOUND = "local search"
CHOSEN = "local search or a recipe, by select"
MIX_ARMS = ("base", "fine-tune a", "fine-tune b", "soup of both", "random mix", *SEARCHES)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large all of it is."""

    num_models: int = NUM_MODELS
    num_steps: int = NUM_STEPS
    num_tune_steps: int = NUM_TUNE_STEPS
    kept: tuple[int, ...] = KEPT
    more: tuple[int, ...] = MORE
    num_runs: int = NUM_RUNS
    depth: int = 8
    width: int = 128
    budget: int = BUDGET


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model; nothing is written")
    parser.add_argument("--num-models", type=int, help=f"models that are trained (default: {NUM_MODELS})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    size = Size(1, 30, 10, (3, 4), (6,), 2, 5, 32, 100) if args.quick else Size()
    start = time.perf_counter()
    num_models = size.num_models if args.num_models is None else args.num_models
    runs = [measure(seed, size) for seed in range(num_models)]
    result = {**describe_machine(), "seconds": 0, **summarize(runs, size)}
    result["seconds"] = round(time.perf_counter() - start)
    table = format_tables(result)
    print(table)
    if args.quick:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "transformer_depth.json", result)
    write_atomically(args.out / "transformer_depth.md", lambda path: Path(path).write_text(table + "\n"))
    write_atomically(args.out / "transformer_depth.png", lambda path: draw(path, result))


def measure(seed: int, size: Size) -> dict[str, np.ndarray]:
    """Losses on `test` of one trained model."""
    text = load_text(seed)
    case = (seed, dataclasses.astuple(size))
    trained = keep(
        (train_models, fit, run_blocks, load_text, find_files),
        f"transformer-depth-weights-{seed}",
        (*case[:1], size.num_steps, size.num_tune_steps, size.depth, size.width),
        partial(train_models, seed, size, text),
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = write_checkpoints(Path(folder), trained, size)
        code = (
            measure_depth,
            measure_mix,
            search_all,
            pick,
            find_recipes,
            judge,
            load_text,
            find_files,
            write_checkpoints,
        )
        uses = [*SEARCHES.values()]
        depth = keep(code, f"transformer-depth-{seed}", case, lambda: measure_depth(seed, size, paths, text), uses=uses)
        mix = keep(code, f"transformer-mix-{seed}", case, lambda: measure_mix(seed, size, paths, text), uses=uses)
    return depth | mix


def find_files() -> dict[str, list[Path]]:
    """Files of the standard library: those of the base model, of A and of B."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Path]] = {"base": [], "a": [], "b": []}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in LEFT_OUT for part in parts):
            part = next((name for name, tops in PARTS.items() if parts[0] in tops), "base")
            found[part].append(path)
    return found


def load_text(seed: int) -> dict[str, list[np.ndarray]]:
    """Of each part the bytes of training, search, select and test, no file in two of them."""
    rng, text = np.random.default_rng(seed), {}
    for part, paths in find_files().items():
        order = [paths[i] for i in rng.permutation(len(paths))]
        cuts = np.round(np.cumsum(SHARES)[:-1] * len(order)).astype(int)
        pieces = np.split(np.array(order, object), cuts)
        text[part] = [np.frombuffer(b"".join(path.read_bytes() for path in piece), np.uint8) for piece in pieces]
    return text


def take(text: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Sequences of `LENGTH` bytes and the one behind each, `[num, LENGTH + 1]`."""
    starts = rng.choice((len(text) - 1) // LENGTH, num, replace=False) * LENGTH
    return text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)


def make_batch(rows: np.ndarray) -> jc.Batch:
    return jc.Batch(jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:]))


def make_splits(text: dict[str, list[np.ndarray]], parts: tuple[str, ...], seed: int) -> list[jc.Batch]:
    """Search, select and test of equal parts of the text."""
    rng = np.random.default_rng(1000 + seed)
    return [
        make_batch(np.concatenate([take(text[part][1 + i], num // len(parts), rng) for part in parts]))
        for i, num in enumerate(SIZES)
    ]


def write_config(folder: Path, size: Size) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"n_layer": size.depth, "n_embd": size.width}))
    return folder


def train_models(seed: int, size: Size, text: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Weights of the base model and of its fine-tunes, by model and path."""
    keys = jax.random.split(jax.random.key(seed), 4)
    with tempfile.TemporaryDirectory() as folder:
        bank = jc.hub.init(keys[0], write_config(Path(folder) / "new", size))
    base = fit(bank, text["base"][0], seed, size.num_steps, LEARNING_RATE)
    tuned = {part: fit(base, text[part][0], seed, size.num_tune_steps, TUNE_RATE) for part in PARTS}
    return {
        f"{name}/{i}": np.asarray(leaf)
        for name, model in {"base": base, **tuned}.items()
        for i, leaf in enumerate(jax.tree.leaves(model))
    }


def run_blocks(bank: jc.Bank, x: jax.Array) -> jax.Array:
    """The model as it is, unrolled, for its gradient."""
    hidden = bank.embed(x)
    for i in range(bank.num_layers):
        hidden = bank.layers[0].apply(i, hidden)
    return bank.heads[0].apply(0, hidden)


def fit(bank: jc.Bank, text: np.ndarray, seed: int, num_steps: int, learning_rate: float) -> jc.Bank:
    """The bank after so many steps of AdamW."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, num_steps // 10 + 1, num_steps, learning_rate / 20
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
    rng = np.random.default_rng(seed)

    def find_loss(bank: jc.Bank, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(run_blocks(bank, x), y).mean()

    @partial(jax.jit, donate_argnums=(0, 1), compiler_options=jc.compiler_options(jax.default_backend()))
    def step(bank: jc.Bank, state: Any, x: jax.Array, y: jax.Array) -> tuple[jc.Bank, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(find_loss)(bank, x, y)
        updates, state = optimizer.update(gradient, state, bank)  # pyright: ignore[reportArgumentType]
        new: Any = optax.apply_updates(bank, updates)  # pyright: ignore[reportArgumentType]
        return new, state, loss

    bank = jax.tree.map(jnp.array, bank.without_names())
    state = optimizer.init(bank)  # pyright: ignore[reportArgumentType]
    for i in range(num_steps):
        starts = rng.integers(0, len(text) - LENGTH - 1, BATCH)
        rows = text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
        bank, state, loss = step(bank, state, *make_batch(rows))
        if i % 100 == 0 or i == num_steps - 1:
            print(f"step {i}: {float(loss):.3f}", flush=True)
    return bank


def write_checkpoints(folder: Path, weights: dict[str, np.ndarray], size: Size) -> dict[str, Path]:
    """Folders of the models, with that of their mean beside them."""
    source = write_config(folder / "new", size)
    bank = jc.hub.init(jax.random.key(0), source)
    num = len(jax.tree.leaves(bank))
    models = {name: [weights[f"{name}/{i}"] for i in range(num)] for name in ("base", *PARTS)}
    models["soup"] = [np.mean(leaves, axis=0) for leaves in zip(*(models[part] for part in PARTS), strict=True)]
    structure = jax.tree.structure(bank)
    return {
        name: jc.hub.export(jax.tree.unflatten(structure, leaves), bank.parents[0], source, folder / name)
        for name, leaves in models.items()
    }


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
    splits = make_splits(text, ("base",), seed)
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
        recipes = find_recipes(whole, splits[0], influence, k, size.depth)
        by_hand = judge(whole, splits[1], recipes)
        on_test = judge(whole, splits[2], recipes)[:, None]
        results |= {f"{name}/{k}": row for name, row in zip(recipes, on_test, strict=True)}
        best = min(recipes, key=lambda name: by_hand[[*recipes].index(name)])
        for name, finalists in search_all(problem, table, size.num_runs, size.budget, seed):
            tokens, on_select = pick(jc.Problem(bank, splits[1], k - 2), finalists)
            results[f"{name}/{k}"] = np.asarray(jc.evaluate(test, jc.chain.pad(tokens, test.max_layers)).loss)
            results[f"{name}/{k}/blocks"] = np.array([len(row) + 1 for row in tokens])
            if name == FOUND:
                is_found = on_select <= by_hand.min()
                results[f"{CHOSEN}/{k}"] = np.where(is_found, results[f"{name}/{k}"], results[f"{best}/{k}"])
            print(f"model {seed}, {k} blocks: {name}", flush=True)
    return results


def find_recipes(
    bank: jc.Bank, split: jc.Batch, influence: np.ndarray, num_blocks: int, depth: int
) -> dict[str, list[int]]:
    """Chains of the whole model by recipe; runs of blocks are chosen by the loss on the split."""
    (parent,), by_hand = bank.parents, jc.hub.recipes
    num = depth - num_blocks
    if num > 0:
        found = {
            "last blocks dropped": by_hand.drop_last(parent, num)[None],
            "least influence dropped": by_hand.drop_least_influential(parent, influence, num)[None],
            "best run dropped": by_hand.drop_contiguous(parent, num),
        }
    else:
        found = {"nothing dropped": np.array([parent])}
        if num < 0:
            found["best run repeated"] = by_hand.repeat_contiguous(parent, -num)
    return {
        name: chains[int(np.argmin(judge(bank, split, dict(enumerate(chains.tolist())))))].tolist()
        for name, chains in found.items()
    }


def judge(bank: jc.Bank, split: jc.Batch, chains: dict[Any, list[int]]) -> np.ndarray:
    """Losses of chains by name, `[chains]`."""
    padded = jc.chain.pad([*chains.values()], 2 * bank.num_layers)
    return np.asarray(jc.evaluate(jc.Problem(bank, split, 2 * bank.num_layers), padded).loss)


def measure_mix(
    seed: int, size: Size, paths: dict[str, Path], text: dict[str, list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Loss on `test` of chains of both fine-tunes and of single models, on text of both parts, and of each."""
    bank = jc.hub.load_many([paths["a"], paths["b"]], pinned=(1, 1))
    splits = make_splits(text, ("a", "b"), seed)
    max_layers = size.depth - 1  # one of them for embeddings
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
        loss = jc.evaluate(jc.Problem(model, splits[2], size.depth), np.array(model.parents)).loss
        results[f"mix/{arm}"] = np.asarray(loss)
    return results


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
    config = {**dataclasses.asdict(size), "num_models": len(runs), "sizes": SIZES, "length": LENGTH}
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
        alone, chosen, theirs = (np.array(depth[name][k]["by_model"]) for name in (FOUND, CHOSEN, best))
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
    for arm in (*RECIPES, *SEARCHES, CHOSEN):
        row = result["depth"].get(arm, {})
        cells = [f"{row[k]['value']:.3f} [{row[k]['low']:.3f}, {row[k]['high']:.3f}]" if k in row else "" for k in kept]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", f"| blocks | best recipe | its loss | {FOUND} | lower in | {CHOSEN} | lower in |", "|---" * 7 + "|"]
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
    for arm in (*RECIPES, FOUND, CHOSEN):
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
        color=["tab:blue" if a in SEARCHES else "gray" for a in arms[::-1]],
    )
    right.set(
        xlabel="loss on test, nats per byte", title="Blocks of two fine-tunes", xlim=(0.9 * values[:, 0].min(), None)
    )
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
