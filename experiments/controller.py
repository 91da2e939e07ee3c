"""Does a controller that was trained on other banks find good chains of an unseen one sooner?

    python experiments/chainbench.py && python experiments/controller.py

Trains critics on banks of the three data sets and four kinds, made with other seeds, training lengths, depths, label noise and
rotated inputs; one for all kinds and one without each kind. Each then ranks prefixes of the ChainBench problems of odd
number: zero-shot (it learns nothing there, one run) and fine-tuned (10 runs). Beside them: the same search without a critic,
which ranks by the loss of the best head, and local search. Writes controller.json to experiments/results.

Not run in full yet: studying its 176 banks took 10 minutes on one CPU core. `--quick`: wine alone, 8 banks, 2 minutes.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jchain as jc
from jchain.files import write_atomically

FOLDER = Path.home() / ".cache" / "jchain" / "chainbench"
KINDS = jc.chainbench.KINDS
BUDGETS = (48, 96, 300, 1000)
NUM_SEEDS = {"wine": 24, "breast_cancer": 12, "digits": 8}
FIRST_SEED = 300  # ChainBench has 0 to 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of ChainBench (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each search that is random")
    parser.add_argument("--half", choices=("odd", "even"), default="odd", help="problems, by their number")
    parser.add_argument("--quick", action="store_true", help="wine alone, few banks and runs; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = jc.chainbench.NAMES[1::2] if args.half == "odd" else jc.chainbench.NAMES[::2]
    num_banks = NUM_SEEDS
    if args.quick:
        names = [name for name in jc.chainbench.NAMES if name.startswith("wine") and name.endswith("0")]
        num_banks = {"wine": 2}
        jc.chainbench.build(args.folder, names)
    solved = [jc.chainbench.load(args.folder, name) for name in names]
    start = time.perf_counter()
    cases = [(data, kind, i) for data, count in num_banks.items() for i in range(count) for kind in KINDS]
    lessons = {case: jc.pretrain.study(make_problem(case[0], case[1], FIRST_SEED + case[2])) for case in cases}
    print(f"{len(lessons)} banks studied in {time.perf_counter() - start:.0f} s", flush=True)
    critics = {unseen: train(lessons, unseen) for unseen in ("", *KINDS)}
    keys = jax.random.split(jax.random.key(0), 3 if args.quick else args.seeds)

    def select(one: jc.chainbench.Solved, without: bool) -> Any:
        return critics[one.name.split("-")[1] if without else ""]

    inf = jnp.inf

    def run_all(make: Any) -> np.ndarray:
        # Programs map memory, of which a process may have only so many pieces.
        jax.clear_caches()
        return np.array([measure(one, *make(one)) for one in solved])

    searches: dict[str, Any] = {
        "by head loss": lambda one: (jc.CriticSearch(ridge=inf, epsilon=0.0), keys[:1]),
        "zero-shot": lambda one: (jc.CriticSearch(select(one, False), ridge=inf, epsilon=0.0), keys[:1]),
        "zero-shot, kind unseen": lambda one: (jc.CriticSearch(select(one, True), ridge=inf, epsilon=0.0), keys[:1]),
        "from scratch": lambda one: (jc.CriticSearch(), keys),
        "fine-tuned": lambda one: (jc.CriticSearch(select(one, False)), keys),
        "fine-tuned, kind unseen": lambda one: (jc.CriticSearch(select(one, True)), keys),
        "local search": lambda one: (jc.LocalSearch(), keys),
    }
    ratios = {name: run_all(make) for name, make in searches.items()}
    summary = {
        name: {str(b): jc.stats.iqm(rows[:, :, i])._asdict() for i, b in enumerate(BUDGETS)}
        for name, rows in ratios.items()
    }
    print(format_table(summary), flush=True)
    if args.quick:
        return
    result = {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jchain": jc.__version__},
        "config": {"problems": list(names), "banks": num_banks, "seeds": args.seeds, "budgets": BUDGETS},
        "seconds": round(time.perf_counter() - start),
        "summary": summary,
        "loss_over_best": {name: dict(zip(names, rows.tolist(), strict=True)) for name, rows in ratios.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(args.out / "controller.json", lambda path: Path(path).write_text(text))


def make_problem(data_name: str, kind: str, seed: int) -> jc.Problem:
    """A bank of 12 layers that varies with its seed in more than its weights."""
    rng = np.random.default_rng(seed)
    data = jc.data.load(data_name, seed)
    steps, depth, noise = ((1.0, 4, 0.0), (0.3, 4, 0.0), (1.0, 2, 0.0), (1.0, 4, 0.2))[seed % 4]
    x, y = np.asarray(data.train.x), np.array(data.train.y)
    search_x = np.asarray(data.search.x)
    is_noisy = rng.random(len(y)) < noise
    y[is_noisy] = rng.integers(0, data.num_classes, is_noisy.sum())
    if seed % 8 >= 4:
        turn = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))[0].astype(x.dtype)
        x, search_x = x @ turn, search_x @ turn
    train = jc.Batch(jnp.asarray(x), jnp.asarray(y))
    options: Any = {
        "layer": jc.layers.ResidualMLP(x.shape[1]),
        "head": jc.layers.DenseHead(data.num_classes),
        "depth": depth,
        "num_steps": int(steps * (1000 if data_name == "digits" else 200)),
    }
    key = jax.random.key(seed)
    if kind in ("routed", "random"):
        make: Any = getattr(jc.train, kind)
        bank = make(key, train, num_layers=12, num_heads=3, **options)
    elif kind == "independent":
        bank = jc.train.independent(key, train, num_nets=12 // depth, **options)
    else:
        bank = jc.train.snapshots(key, train, num_snapshots=12 // depth, **options)
    return jc.Problem(bank, jc.Batch(jnp.asarray(search_x), data.search.y), max_layers=4)


def train(lessons: dict[tuple[str, str, int], jc.pretrain.Lesson], unseen: str) -> jc.Critic:
    """A critic of all banks but those of one kind."""
    return jc.pretrain_controller(
        jax.random.key(0), [lesson for (_, kind, _), lesson in lessons.items() if kind != unseen]
    )


def measure(solved: jc.chainbench.Solved, search: Any, keys: Any) -> np.ndarray:
    """Lowest loss after each budget over the lowest of all chains, `[S, len(BUDGETS)]`."""
    results = jc.run_many(keys, search, solved.problem, budget=max(BUDGETS))
    rows = []
    for result in results:
        place = np.searchsorted(result.curve.layer_calls, BUDGETS, side="right") - 1
        loss = result.curve.best_loss[np.maximum(place, 0)]
        rows.append(np.where(place >= 0, loss, np.median(solved.loss["search"])) / solved.loss["search"].min())
    return np.array(rows)


def format_table(summary: dict[str, Any]) -> str:
    lines = [
        "| search | " + " | ".join(f"{b:,} layer calls" for b in BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for name, row in summary.items():
        cells = [f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
