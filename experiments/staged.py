"""Does scoring on few examples first find chains as good for a fifth of the layer calls?

    python experiments/chainbench.py && python experiments/staged.py

The run takes about 15 minutes on 2 CPU cores, much of it compilation. `--quick` runs one problem of
the wine data with 2 seeds and small budgets, and writes nothing.

Expected result: with a fifth of the layer calls, local search, evolution, and random search end no
higher than the same search that scores all chains on all examples.

Each search runs ten times on each problem, twice: as it is, and inside `jc.Staged`, which scores
the chains of a step on 1/16 of the examples, the best quarter on 1/4, and the best quarter of these
on all. A staged search may spend a fifth of the layer calls. A layer call on a part of the examples
counts as that part. Staged local search scores 16 neighbors per step instead of 8, and staged
evolution 16 children, because a larger step has more to choose from.

*Digits*: the 8 solved problems of ChainBench with digits and one head. Layers are applied, because
the tables hold no losses of parts. The regret is 0 for the best of all chains, and 1 for the median
chain. `search` has 359 examples, so 1/16 are 22.

*Bytes*: GPT-2 models of 8 blocks, 64 wide, that read bytes (`byte_models.py`), on 64 sequences of
128 bytes; chains of up to 6 blocks. The best of all chains is not known, so regret is relative to
the lowest loss that any run found, and to the median of 200 random chains.

The script writes staged.json, staged.md, and staged.png to experiments/results: the regret at the
end of both budgets, as interquartile means with 95% bootstrap intervals stratified by problem
(`jchain.chainbench.stats`), and the layer calls after which the interquartile mean of the staged
search is at most that of the other one at its end.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import byte_models
import jax
import numpy as np
from matplotlib.figure import Figure
from records import describe_machine, describe_search, keep, make_parser, write_results
from scipy.stats import trim_mean

import jchain as jc
from jchain.chainbench import stats

DIGITS = (
    *(f"digits-{kind}-{seed}" for kind in ("independent", "snapshots") for seed in range(3)),
    "digits-routed-0",
    "digits-random-0",
)
MODEL = byte_models.Model(depth=8, width=64, num_steps=300, num_tune_steps=2)
NUM_MODELS, NUM_SEQUENCES, MAX_BLOCKS = 2, 64, 6
NUM_SEEDS, SHARE = 10, 5
BUDGETS = {"digits": 2000, "bytes": 1000}
# Each search as it is, and what is staged.
SEARCHES: dict[str, tuple[Any, Any]] = {
    "local search": (jc.LocalSearch(), jc.LocalSearch(num_chains=16)),
    "evolution": (jc.Evolution(), jc.Evolution(num_chains=16)),
    "random search": (jc.RandomSearch(), jc.RandomSearch()),
}


class Solved(NamedTuple):
    """A problem, and what regret is relative to; None if it is not known."""

    problem: jc.Problem
    best: float | None
    median: float


def main() -> None:
    parser = make_parser(
        __doc__, quick="one problem of the wine data; nothing is written", has_folder=True
    )
    args = parser.parse_args()
    began = time.perf_counter()
    if args.quick:
        jc.chainbench.build(args.folder, ["wine-independent-0"])
        groups, num_seeds = {"digits": ["wine-independent-0"]}, 2
        budgets = {"digits": 300}
    else:
        groups = {"digits": DIGITS, "bytes": [f"bytes-{seed}" for seed in range(NUM_MODELS)]}
        num_seeds, budgets = NUM_SEEDS, BUDGETS
    result: dict[str, Any] = {
        **describe_machine(),
        "num_seeds": num_seeds,
        "share": SHARE,
        "budgets": budgets,
        "fractions": list(jc.Staged(jc.LocalSearch()).fractions),
        "keep": jc.Staged(jc.LocalSearch()).keep,
        "searches": {
            name: [describe_search(search) for search in pair] for name, pair in SEARCHES.items()
        },
        "groups": {},
    }
    for group, names in groups.items():
        result["groups"][group] = compare(names, budgets[group], num_seeds, args.folder)
        print(format_table({group: result["groups"][group]}), flush=True)
    result["seconds"] = round(time.perf_counter() - began)
    if not args.quick:
        table = format_table(result["groups"])
        write_results(args.out, "staged", result, table, partial(draw, result=result))


def compare(names: Any, budget: int, num_seeds: int, folder: Path) -> dict[str, Any]:
    """Run all searches on the problems of a group, and summarize their regrets."""
    arms: dict[str, tuple[Any, int]] = {}
    for name, (whole, staged) in SEARCHES.items():
        arms[name] = whole, budget
        arms[f"{name}, staged"] = jc.Staged(staged), budget // SHARE
    curves: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
    scales = []
    for name in names:
        solved = load(name, folder)
        for arm, (search, limit) in arms.items():
            inputs = name, describe_search(search), limit, num_seeds
            kept = keep(
                __file__,
                f"staged-{name}-{arm.replace(' ', '-').replace(',', '')}",
                inputs,
                lambda s=search, n=limit, p=solved: run(s, p, n, num_seeds),
            )
            curves[arm].append(kept["loss"])
            print(f"{name}, {arm}: {kept['loss'][:, -1].round(4)}", flush=True)
        found = min(float(curves[arm][-1].min()) for arm in arms)
        scales.append((found if solved.best is None else solved.best, solved.median))
    best, median = np.array(scales).T[:, :, None, None]
    regrets = {arm: (np.stack(rows) - best) / (median - best) for arm, rows in curves.items()}
    return summarize(regrets, budget)


def load(name: str, folder: Path) -> Solved:
    if name.startswith("bytes"):
        return load_bytes(int(name.partition("-")[2]))
    solved = jc.chainbench.load(folder, name)
    loss = solved.loss["search"]
    return Solved(solved.problem, float(loss.min()), float(np.median(loss)))


def load_bytes(seed: int) -> Solved:
    """Train a model of bytes, unless it is kept, and make the problem of its blocks."""
    text = byte_models.load_text(seed)
    inputs = seed, MODEL, [len(part) for parts in text.values() for part in parts]
    weights = keep(
        byte_models.__file__,
        f"staged-bytes-{seed}",
        inputs,
        lambda: byte_models.train_models(seed, MODEL, text),
    )
    with tempfile.TemporaryDirectory() as made:
        folders = byte_models.write_checkpoints(Path(made), weights, MODEL)
        bank = jc.hub.load(folders["base"], pinned=(1, 1))
    (batch,) = byte_models.make_splits(text, ("base",), seed, (NUM_SEQUENCES,))
    problem = jc.Problem(
        bank, batch, MAX_BLOCKS, loss_fn=jc.hub.next_token_loss, min_layers=MAX_BLOCKS // 2
    )
    chains = jc.env.sample_chains(jax.random.key(0), problem, 200)
    return Solved(problem, None, float(np.median(jc.evaluate(problem, chains).loss)))


def make_grid(budget: int) -> np.ndarray:
    """Return the layer calls at which the best loss is recorded: 100 equal steps."""
    return np.linspace(0, budget, 101)[1:]


def run(search: Any, solved: Solved, budget: int, num_seeds: int) -> dict[str, np.ndarray]:
    """Return the best loss of each run along the budget, `[S, G]`."""
    target = -np.inf if solved.best is None else solved.best * (1 + 1e-6)
    keys = jax.random.split(jax.random.key(0), num_seeds)
    results = jc.run_many(
        keys, search, solved.problem, budget=budget, starts=None, target_loss=target
    )
    if stopped := [result.stopped_by for result in results if result.stopped_by]:
        raise RuntimeError(f"expected runs that end, got {stopped[0]}")
    curves = np.stack([result.curve.at(make_grid(budget)) for result in results])
    # Nothing is known before the first chain is scored: the median chain stands for it.
    return {"loss": np.where(np.isfinite(curves), curves, solved.median).astype(np.float64)}


def summarize(regrets: dict[str, np.ndarray], budget: int) -> dict[str, Any]:
    """Compare each staged search with the same search on all examples; regrets are `[M, S, G]`."""
    rows = {}
    for name in SEARCHES:
        whole, staged = regrets[name], regrets[f"{name}, staged"]
        end, staged_end = stats.iqm(whole[..., -1]), stats.iqm(staged[..., -1])
        whole_means, means = find_means(whole), find_means(staged)
        reached = np.flatnonzero(means <= end.value)
        calls = make_grid(budget // SHARE)[reached[0]] if len(reached) else None
        at_share = stats.iqm(whole[..., 100 // SHARE - 1])
        rows[name] = {
            "whole": end._asdict(),
            "staged": staged_end._asdict(),
            "whole_with_a_fifth": at_share._asdict(),
            "improvement": stats.probability_of_improvement(
                staged[..., -1], whole[..., -1]
            )._asdict(),
            "is_within": bool(staged_end.value <= end.high),
            "calls_to_reach": calls,
            "share_to_reach": None if calls is None else calls / budget,
            "curves": {"whole": whole_means.tolist(), "staged": means.tolist()},
        }
    return {"budget": budget, "num_problems": len(regrets["random search"]), "rows": rows}


def find_means(regrets: np.ndarray) -> np.ndarray:
    """Return the interquartile mean of `[M, S, G]` along the budget."""
    return trim_mean(regrets.reshape(-1, regrets.shape[-1]), 0.25, axis=0)


def draw(path: str, result: dict[str, Any]) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(result["groups"]), squeeze=False)[0]
    for axes, (group, found) in zip(panels, result["groups"].items(), strict=True):
        for color, (name, row) in enumerate(found["rows"].items()):
            for kind, style, share in (("whole", "--", 1), ("staged", "-", result["share"])):
                label = name if kind == "whole" else f"{name}, staged"
                grid = make_grid(found["budget"] // share)
                axes.plot(grid, row["curves"][kind], style, color=f"C{color}", label=label)
        axes.set(title=group, xlabel="layer calls", ylabel="regret", xscale="log")
        axes.set_yscale("symlog", linthresh=1e-3)
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def format_table(groups: dict[str, Any]) -> str:
    lines = [
        "| problems | search | all examples | all examples, a fifth of the calls | staged, a fifth "
        "of the calls | share of the calls for the same regret |",
        "|---|---|---|---|---|---|",
    ]
    for group, found in groups.items():
        for name, row in found["rows"].items():
            cells = [
                "{value:.4f} [{low:.4f}, {high:.4f}]".format(**row[key])
                for key in ("whole", "whole_with_a_fifth", "staged")
            ]
            share = row["share_to_reach"]
            shown = "not reached" if share is None else f"{share:.0%}"
            lines.append(f"| {group} | {name} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
