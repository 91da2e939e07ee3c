"""Which blocks of a pretrained transformer are needed, and do blocks of two fine-tunes mix?

    python experiments/transformer_depth.py

The run takes about an hour of one CPU core for each of 5 models, a sixth of it for training.
`--quick` runs one small model with few steps and two lengths in 4 minutes on 2 cores, and writes
nothing.

Expected result, as the mean loss on test of 5 models: with 4, 5, and 6 blocks, local search from
recipes has 2.137, 2.099, and 2.073. The best recipe has 2.159, 2.121, and 2.080, which is higher
for all models. With 8 and 9 blocks, nothing is below the model itself. Of the mixes, the mean of
the fine-tunes' weights is best (interquartile mean 1.956); local search from recipes has 1.977.

A GPT-2 of 8 blocks, 128 wide, reads bytes. It is trained on Python's standard library, and two
fine-tunes of it are trained on two parts of the library that it did not see: concurrency (A:
asyncio, multiprocessing, ...) and the web (B: email, http, ...). All models are written as
checkpoints and read by `jc.hub`. Losses are in nats per byte.

*Depth*: chains of at most k blocks of the base model with the first and last block pinned, in any
order and with repeats. Searches spend 1,000 layer calls on `search`, and the best of their
finalists on `select` is evaluated on `test`. The baselines are recipes that people use: drop the
last blocks; drop the blocks of least influence (ShortGPT); drop the best run of blocks; and, for
more blocks than the model has, repeat the best run (both runs are chosen on `search`). Local search
starts at a random chain and, in a row of its own, at the recipes (the model without each run of
blocks, or with the run twice). A last row takes that chain or a recipe, whichever is lower on
`select`. For up to 6 blocks, all chains are scored. Losses then come from a table, each search runs
ten times (linearized search, which needs weights, runs once), and the lowest loss on `search` is
known.

*Mix*: chains of the blocks, embeddings, and heads of both fine-tunes, on text of A and B in equal
parts. They are compared with each fine-tune, the base model, and the mean of the fine-tunes'
weights (model soup).

Finished parts are kept, so an interrupted run continues where it stopped. The script writes
transformer_depth.json, .md, and .png to experiments/results. The figure shows differences from each
model itself.
"""

import dataclasses
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
from records import describe_machine, keep, make_parser, make_pool, use_tables, write_results

import jchain as jc

NUM_MODELS = 5
# Sequences of search, select, and test. Searches overfitted when `search` had 8 or 16.
SIZES = (32, 128, 256)
# Numbers of blocks for which all chains are scored, and others; layer calls and runs of a search.
KEPT, MORE, BUDGET, NUM_RUNS = (4, 5, 6), (7, 8, 9), 1000, 10
SEARCHES = {
    "random search": jc.RandomSearch(),
    "local search": jc.LocalSearch(),
    "evolution": jc.Evolution(),
    "beam search": jc.BeamSearch(),
    "linearized": jc.LinearizedSearch(),
}
# Searches that need weights, so losses from tables are not enough. They have fewer runs.
NEEDS_WEIGHTS, NUM_FULL_RUNS = ("linearized",), 1
LOWEST = "lowest of all on search"
# The losses of one chain can differ by this much between programs.
ROUNDING = 1e-5
RECIPES = (
    "last blocks dropped",
    "blocks of least influence dropped",
    "best run of blocks dropped",
    "nothing dropped",
    "best run repeated",
)
FOUND = "local search"
# These start at models and recipes, like `jchain search --checkpoint`, which also adds them to the
# finalists.
STARTED, CHOSEN = "local search from recipes", "best of local search and recipes on select"
MODELS = {"base": "base", "a": "fine-tune a", "b": "fine-tune b", "soup": "soup of both"}
MIX_ARMS = (*MODELS.values(), "random mix", *SEARCHES, STARTED, CHOSEN)


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of the experiment."""

    model: Model
    kept: tuple[int, ...] = KEPT
    more: tuple[int, ...] = MORE
    budget: int = BUDGET
    num_runs: int = NUM_RUNS


QUICK = Size(Model(depth=5, width=32, num_steps=30, num_tune_steps=10), (3, 4), (6,), 200, 2)


def main() -> None:
    parser = make_parser(__doc__, quick="one small model; nothing is written", has_workers=True)
    parser.add_argument(
        "--num-models",
        type=int,
        default=NUM_MODELS,
        help="number of models to train (default: %(default)s)",
    )
    args = parser.parse_args()
    size, num_models = (QUICK, 1) if args.quick else (Size(Model()), args.num_models)
    with make_pool(args.workers) as pool:
        trained = [pool.submit(train, seed, size) for seed in range(num_models)]
        for future in trained:
            future.result()
        parts = (*size.more, None, *size.kept[::-1])  # the longest parts come first
        futures = [
            [pool.submit(run_part, seed, part, size) for seed in range(num_models)]
            for part in parts
        ]
        found = [[future.result() for future in row] for row in futures]
    runs = [
        {name: loss for part in row for name, loss in part.items()}
        for row in zip(*found, strict=True)
    ]
    result = {**describe_machine(), **summarize(runs, size)}
    table = format_tables(result)
    print(table)
    if not args.quick:
        write_results(args.out, "transformer_depth", result, table, partial(draw, result=result))


def train(seed: int, size: Size) -> None:
    """Train the models of a seed, unless they are kept."""
    _load_or_train(seed, size, byte_models.load_text(seed))


def _load_or_train(
    seed: int, size: Size, text: dict[str, list[np.ndarray]]
) -> dict[str, np.ndarray]:
    return keep(
        __file__,
        f"transformer-depth-weights-{seed}",
        (seed, platform.python_version(), repr(size.model)),
        partial(byte_models.train_models, seed, size.model, text),
    )


def run_part(seed: int, num_blocks: int | None, size: Size) -> dict[str, np.ndarray]:
    """Compute the losses on `test` of one part of the experiment.

    The part is the depth `num_blocks` of a base model or, if that is None, the mix.
    """
    start, text = time.perf_counter(), byte_models.load_text(seed)
    trained = _load_or_train(seed, size, text)
    with tempfile.TemporaryDirectory() as folder:
        paths = byte_models.write_checkpoints(Path(folder), trained, size.model)
        if num_blocks is None:
            name, make = "mix", partial(evaluate_mix, seed, size, paths, text)
        else:
            name = f"depth-{num_blocks}"
            make = partial(evaluate_depth, seed, num_blocks, size, paths, text)
        found = keep(
            __file__,
            f"transformer-{name}-{seed}",
            (seed, platform.python_version(), repr(size)),
            make,
        )
    print(f"model {seed}, {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def run_searches(
    problem: jc.Problem, table: jc.Problem | None, num_runs: int, budget: int, seed: int
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield the finalists of the runs of each search.

    If there is a table and the search does not need weights, losses come from the table.
    """
    for name, search in SEARCHES.items():
        if table is None or name in NEEDS_WEIGHTS:
            posed, num = problem, min(num_runs, NUM_FULL_RUNS)
        else:
            search, posed, num = use_tables(search), table, num_runs
        keys = jax.random.split(jax.random.key(seed), 1 if search.is_deterministic else num)
        runs = jc.run_many(keys, search, posed, budget=budget, starts=None)
        yield name, [np.asarray(run.finalists) for run in runs]


def select_finalists(
    select: jc.Problem, finalists: list[np.ndarray]
) -> tuple[list[list[int]], np.ndarray]:
    """Select the finalist of each run with the lowest loss on `select`.

    Return the finalists and their losses.
    """
    loss = np.asarray(jc.evaluate(select, np.concatenate(finalists)).loss)
    parts = np.split(loss, np.cumsum([len(rows) for rows in finalists])[:-1])
    best = [rows[int(part.argmin())] for rows, part in zip(finalists, parts, strict=True)]
    return [[int(t) for t in row if t >= 0] for row in best], np.array(
        [part.min() for part in parts]
    )


def evaluate_depth(
    seed: int,
    num_blocks: int,
    size: Size,
    paths: dict[str, Path],
    text: dict[str, list[np.ndarray]],
) -> dict[str, np.ndarray]:
    """Compute the loss on `test` of the chain of each search and of each recipe.

    If all chains are scored, also compute how far each search is above the lowest loss on `search`.
    """
    whole, bank = jc.hub.load(paths["base"]), jc.hub.load(paths["base"], pinned=(1, 1))
    splits = byte_models.make_splits(text, ("base",), seed, SIZES)
    search, select, test = (jc.Problem(bank, split, num_blocks - 2) for split in splits)
    recipes = jc.hub.recipes.find_chains(
        jc.Problem(whole, splits[0], num_blocks), whole.parents[0], num_blocks
    )
    known = [evaluate_chains(whole, split, recipes) for split in splits[1:]]
    results = {
        f"{name}/{num_blocks}": loss[None] for name, loss in zip(recipes, known[1], strict=True)
    }
    table, lowest = None, np.nan
    if num_blocks in size.kept:
        chains, out = jc.evaluate_all(search)
        loss = np.asarray(out.loss)
        table, lowest = jc.chainbench.tabular.make_problem(bank, loss, num_blocks - 2), loss.min()
        best = chains[[int(loss.argmin())]]
        results[f"{LOWEST}/{num_blocks}"] = np.asarray(jc.evaluate(test, best).loss)
    for name, finalists in run_searches(search, table, size.num_runs, size.budget, seed):
        tokens, _ = select_finalists(select, finalists)
        results[f"{name}/{num_blocks}"] = np.asarray(
            jc.evaluate(test, jc.chain.pad(tokens, test.max_layers)).loss
        )
        results[f"{name}/{num_blocks}/blocks"] = np.array([len(row) + 1 for row in tokens])
        if table is not None:
            results[f"{name}/{num_blocks}/above"] = select_finalists(table, finalists)[1] - lowest
    starts = jc.hub.recipes.find_starts(bank, search.max_layers)
    posed, num = (search, NUM_FULL_RUNS) if table is None else (table, size.num_runs)
    found = search_from_recipes(starts, (posed, select, test), known, num, size.budget, seed)
    return results | {f"{name}/{num_blocks}": loss for name, loss in found.items()}


def evaluate_chains(bank: jc.Bank, split: jc.Batch, chains: dict[Any, list[int]]) -> np.ndarray:
    """Compute the losses of named chains, `[chains]`."""
    padded = jc.chain.pad([*chains.values()], 2 * bank.num_layers)
    return np.asarray(jc.evaluate(jc.Problem(bank, split, 2 * bank.num_layers), padded).loss)


def evaluate_mix(
    seed: int, size: Size, paths: dict[str, Path], text: dict[str, list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """Compute the loss on `test` of chains of both fine-tunes and of single models.

    The text is of both parts.
    """
    bank = jc.hub.load_many([paths["a"], paths["b"]], pinned=(1, 1))
    splits = byte_models.make_splits(text, ("a", "b"), seed, SIZES)
    max_layers = size.model.depth - 1  # one of the layers chooses the embeddings
    search, select, test = (jc.Problem(bank, split, max_layers) for split in splits)
    results = {}
    for name, finalists in run_searches(search, None, size.num_runs, size.budget, seed):
        tokens, _ = select_finalists(select, finalists)
        results[f"mix/{name}"] = np.asarray(
            jc.evaluate(test, jc.chain.pad(tokens, max_layers)).loss
        )
        num_a = [sum(bank.names[token].startswith("a/") for token in row) for row in tokens]
        results[f"mix/{name}/share of a"] = np.array(num_a) / [len(row) for row in tokens]
        print(f"model {seed}, mix: {name}", flush=True)
    sampled = jc.chain.ChainSpace(bank.num_layers, 2, max_layers, max_layers).sample(
        jax.random.key(seed), 32
    )
    results["mix/random mix"] = np.asarray(jc.evaluate(test, sampled).loss).mean()[None]
    models = {name: jc.hub.load(paths[name]) for name in ("base", "a", "b", "soup")}
    for name, model in models.items():
        results[f"mix/{MODELS[name]}"] = evaluate_chains(
            model, splits[2], {name: list(model.parents[0])}
        )
    known = [
        np.concatenate(
            [
                evaluate_chains(models[name], split, {name: list(models[name].parents[0])})
                for name in "ab"
            ]
        )
        for split in splits[1:]
    ]
    starts = jc.hub.recipes.find_starts(bank, max_layers)
    found = search_from_recipes(
        starts, (search, select, test), known, NUM_FULL_RUNS, size.budget, seed
    )
    return results | {f"mix/{name}": loss for name, loss in found.items()}


def search_from_recipes(
    starts: np.ndarray,
    problems: tuple[jc.Problem, jc.Problem, jc.Problem],
    known: list[np.ndarray],
    num_runs: int,
    budget: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Run local search from models and recipes, and evaluate what it finds on `test`.

    Return the loss of the best finalist, and the loss of either that or the best known chain.

    Args:
      starts: chains at which the search starts.
      problems: one problem for each of search, select, and test.
      known: losses of models or recipes on select and test. The best one is taken if it is lower on
        select.
      num_runs: number of runs of the search.
      budget: layer calls of a run.
      seed: seed of the runs.
    """
    (search, select, test), keys = problems, jax.random.split(jax.random.key(seed), num_runs)
    runs = jc.run_many(keys, jc.LocalSearch(), search, budget=budget, starts=starts)
    tokens, on_select = select_finalists(select, [np.asarray(run.finalists) for run in runs])
    loss = np.asarray(jc.evaluate(test, jc.chain.pad(tokens, test.max_layers)).loss)
    best = int(known[0].argmin())
    return {STARTED: loss, CHOSEN: np.where(on_select <= known[0][best], loss, known[1][best])}


def summarize(runs: list[dict[str, np.ndarray]], size: Size) -> dict[str, Any]:
    """Compute interquartile means over models of the mean of their runs.

    Intervals resample the models.
    """

    def pool(name: str) -> Any:
        by_model = [float(run[name].mean()) for run in runs]
        return {**jc.chainbench.stats.iqm([by_model])._asdict(), "by_model": by_model}

    names = sorted(
        {name for run in runs for name in run if "/" in name and not name.startswith("mix/")}
    )
    depth: dict[str, dict[str, Any]] = {}
    for name in names:
        arm, k, *rest = name.split("/")
        if not rest:
            depth.setdefault(arm, {})[k] = pool(name)
        else:
            depth[arm][k][rest[0]] = float(np.concatenate([run[name] for run in runs]).mean())
    mix = {arm: pool(f"mix/{arm}") for arm in MIX_ARMS}
    shares = {arm: pool(f"mix/{arm}/share of a") for arm in SEARCHES}
    config = {
        **dataclasses.asdict(size),
        "num_models": len(runs),
        "sizes": SIZES,
        "length": byte_models.LENGTH,
    }
    return {
        "config": config,
        "depth": depth,
        "mix": mix,
        "share_of_a": shares,
        "wins": count_wins(depth, size),
    }


def count_wins(depth: dict[str, dict[str, Any]], size: Size) -> dict[str, Any]:
    """Find the best recipe by number of blocks, and count the models in which a search beats it.

    Models with an equal loss are counted separately.
    """
    wins = {}
    for k in map(str, (*size.kept, *size.more)):
        available = [name for name in RECIPES if k in depth.get(name, {})]
        best = min(available, key=lambda name: np.mean(depth[name][k]["by_model"]))
        theirs = np.array(depth[best][k]["by_model"])
        wins[k] = {"recipe": best, "loss": float(theirs.mean()), "models": len(theirs)}
        for name, arm in (("found", STARTED), ("chosen", CHOSEN)):
            less = theirs - depth[arm][k]["by_model"]
            equal = np.abs(less) < ROUNDING
            wins[k][name] = {
                "loss": float((theirs - less).mean()),
                "lower": int(((less > 0) & ~equal).sum()),
                "equal": int(equal.sum()),
            }
    return wins


def format_tables(result: dict[str, Any]) -> str:
    kept = [*map(str, (*result["config"]["kept"], *result["config"]["more"]))]
    lines = [
        "| loss on test, nats per byte | " + " | ".join(f"{k} blocks" for k in kept) + " |",
        "|---" * (1 + len(kept)) + "|",
    ]
    for arm in (*RECIPES, LOWEST, *SEARCHES, STARTED, CHOSEN):
        row = result["depth"].get(arm, {})
        cells = [
            f"{row[k]['value']:.3f} [{row[k]['low']:.3f}, {row[k]['high']:.3f}]" if k in row else ""
            for k in kept
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    known = kept[: len(result["config"]["kept"])]
    lines += [
        "",
        "| above the lowest on search | " + " | ".join(f"{k} blocks" for k in known) + " |",
    ]
    lines.append("|---" * (1 + len(known)) + "|")
    for arm in SEARCHES:
        lines.append(
            f"| {arm} | "
            + " | ".join(f"{result['depth'][arm][k]['above']:.4f}" for k in known)
            + " |"
        )
    lines += [
        "",
        "These losses are plain means over the models, so they differ from those of the first "
        'table. "Lower, equal in" counts the models in which the search is lower than the recipe, '
        "and equal:",
        "",
        f"| blocks | best recipe | its mean loss | {STARTED} | lower, equal in "
        f"| {CHOSEN} | lower, equal in |",
    ]
    lines.append("|---" * 7 + "|")
    for k, row in result["wins"].items():
        cells = [k, row["recipe"], f"{row['loss']:.3f}"]
        for found in (row["found"], row["chosen"]):
            cells += [
                f"{found['loss']:.3f}",
                f"{found['lower']}, {found['equal']} of {row['models']} models",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Chains that mix the blocks of two fine-tunes, A and B. The soup averages their weights:",
        "",
        "| text of A and B | loss on test | blocks from A |",
        "|---" * 3 + "|",
    ]
    for arm, row in result["mix"].items():
        share = f"{result['share_of_a'][arm]['value']:.0%}" if arm in result["share_of_a"] else ""
        lines.append(
            f"| {arm} | {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {share} |"
        )
    return "\n".join(lines)


def draw(path: str, result: dict[str, Any]) -> None:
    """Plot the loss against the number of blocks, and the losses of mixes.

    Losses are relative to the base model of each seed because models differ by more than methods
    do.
    """
    depth, mix = result["depth"], result["mix"]
    own = np.array(depth["nothing dropped"][str(result["config"]["model"]["depth"])]["by_model"])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = (*(arm for arm in RECIPES if arm != "nothing dropped"), FOUND, STARTED)
    for arm, shift in zip(arms, np.linspace(-0.12, 0.12, len(arms)), strict=True):
        places = sorted(map(int, depth[arm]))
        values, errors = find_differences([depth[arm][str(k)]["by_model"] for k in places], own)
        style = {"ls": "--", "marker": "s", "ms": 4} if arm in RECIPES else {"marker": "o", "lw": 2}
        left.errorbar(np.array(places) + shift, values, errors, label=arm, capsize=2, **style)
    left.axhline(0, color="black", lw=0.8)
    left.set(
        xlabel="blocks",
        ylabel="loss on test above the model's, nats per byte",
        title="Fewer and more blocks",
    )
    left.legend(fontsize=8)
    arms = [arm for arm in mix if arm not in ("base", "random mix")][::-1]
    values, errors = find_differences(
        [mix[arm]["by_model"] for arm in arms], np.array(mix["base"]["by_model"])
    )
    for i, (arm, value) in enumerate(zip(arms, values, strict=True)):
        color = "tab:gray" if arm in MODELS.values() else "tab:blue"
        right.errorbar(value, i, xerr=errors[:, i : i + 1], marker="o", color=color, capsize=2)
    right.set(
        xlabel="loss on test above the base model's, nats per byte",
        title="Blocks of two fine-tunes",
        yticks=range(len(arms)),
        yticklabels=arms,
    )
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def find_differences(by_model: list[list[float]], own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute interquartile means over models of losses minus `own`.

    Also return the lengths of the error bars.
    """
    rows = [jc.chainbench.stats.iqm([np.subtract(losses, own)]) for losses in by_model]
    values = np.array([row.value for row in rows])
    return values, np.array(
        [[row.value - row.low for row in rows], [row.high - row.value for row in rows]]
    )


if __name__ == "__main__":
    main()
