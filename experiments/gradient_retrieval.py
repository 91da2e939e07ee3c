"""Does the gradient of a chain tell which layer to choose next?

    python experiments/gradient_retrieval.py

The run takes 55 minutes on 2 CPU cores shared with three other jobs. `--quick` runs depth 2 with
one bank of each kind and writes nothing.

Expected result: linearized scores correlate with the true change by 0.90 to 0.99 at 4 slots and by
0.77 to 0.95 at 16 (0.80 to 0.95 with 4 or 2 products). Weight-space scores correlate by 0.1 to 0.7
at 4 slots, and nearest layers by 0.

The script scores all single swaps of chains of digits banks (`jchain.gradient`) and also evaluates
them. The banks are of four kinds and have 2 to 32 slots. The chains are random or nearly optimal.
Nearly optimal chains are drawn from the best 1% of all chains if all can be evaluated; otherwise
they are the best ones of critic search, which uses no gradient. There are three numbers for each
score: Spearman's correlation of the predicted with the true change in loss, the rank of the first
choice (1 is the best of all swaps), and how often the first choice lowers the loss. Weight-space
scores are also given for the same bank with its hidden units shuffled, and with the hidden units of
all layers aligned to the layer of the slot (`jchain.align`). The last table is for a bank whose
heads return 512 numbers, 8 levels for each of 64 pixels. There, linearized scores are estimated
from samples, and the table shows their correlation with the true change and their error.

The script writes gradient_retrieval.json, .md, and .png to experiments/results.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from records import correlate, describe_machine, evaluate_swaps, keep, make_parser, write_results

import jchain as jc
from jchain.gradient.slot_scores import ScoreKind

KINDS = jc.chainbench.KINDS
# By number of slots: layers in the bank, banks of each kind, and chains of each sort.
SIZES = {2: (12, 3, 10), 4: (12, 3, 10), 8: (24, 3, 10), 16: (32, 2, 10), 32: (64, 1, 5)}
NUM_STEPS = 1000
BUDGET = 4_000  # layer calls of a search for one nearly optimal chain
LEARNING_RATES = (0.01, 0.1, 1.0)
FEW = (4, 2)  # products with the Jacobian; exact scores of 10 classes need 9
# Wide outputs: 64 pixels with 8 levels each.
NUM_LEVELS, WIDE_PRODUCTS, WIDE_CHAINS = 8, (3, 5, 9, 17, 33, 65, 129), 10
SCORES = (
    "linearized",
    *(f"linearized, {num} products" for num in FEW),
    "activations",
    "weights",
    "weights, shuffled",
    "weights, aligned",
    *(f"nearest, {rate:g}" for rate in LEARNING_RATES),
    *(f"nearest, {rate:g}, aligned" for rate in LEARNING_RATES),
)
METRICS = ("spearman", "first_rank", "first_improves")


def main() -> None:
    parser = make_parser(__doc__, quick="depth 2, one bank of each kind; nothing is written")
    args = parser.parse_args()
    sizes = (
        {depth: (n, 1, 3) for depth, (n, _, _) in SIZES.items() if depth <= 2}
        if args.quick
        else SIZES
    )
    rows = []
    for depth, (num_layers, num_banks, num_chains) in sizes.items():
        for kind in KINDS:
            case = (kind, depth, num_layers, num_banks, num_chains)
            found = keep(
                __file__,
                f"retrieval-{kind}-{depth}",
                case,
                lambda c=case: evaluate_kind(*c),
            )
            for sort in ("random", "good"):
                by_score = dict(
                    zip(SCORES, map(average, np.moveaxis(found[sort], 1, 0)), strict=True)
                )
                rows.append(
                    {
                        "kind": kind,
                        "depth": depth,
                        "layers": num_layers,
                        "chains": sort,
                        "scores": by_score,
                    }
                )
            print(format_table(rows[-2:]), flush=True)
        jax.clear_caches()
    wide = [describe_wide_outputs(loss, 1 if args.quick else WIDE_CHAINS) for loss in WIDE_LOSSES]
    print(format_wide(wide))
    if args.quick:
        return
    config = {"sizes": SIZES, "num_steps": NUM_STEPS, "budget": BUDGET}
    result = {**describe_machine(), "config": config, "rows": rows, "wide": wide}
    tables = f"{format_table(rows)}\n\n{format_wide(wide)}"
    write_results(args.out, "gradient_retrieval", result, tables, partial(draw, rows=rows))


def average(rows: np.ndarray) -> dict[str, float | None]:
    """Average `METRICS` over the chains, `[chains, 3]`; None if no chain has a value."""
    known = [column[~np.isnan(column)] for column in rows.T]
    return {
        name: float(column.mean()) if column.size else None
        for name, column in zip(METRICS, known, strict=True)
    }


def evaluate_kind(
    kind: str, depth: int, num_layers: int, num_banks: int, num_chains: int
) -> dict[str, np.ndarray]:
    """Compute `METRICS` of each score for random and nearly optimal chains.

    Each array has the shape `[banks * chains, SCORES, 3]`.
    """
    found: dict[str, list[np.ndarray]] = {"random": [], "good": []}
    for seed in range(num_banks):
        problem = make_problem(kind, depth, num_layers, seed)
        rng = np.random.default_rng(seed)
        layers = rng.integers(0, num_layers, (num_chains, depth))
        heads = rng.integers(num_layers, num_layers + problem.bank.num_heads, (num_chains, 1))
        chains = {
            "random": np.concatenate([layers, heads], axis=1),
            "good": find_good_chains(problem, num_chains, seed),
        }
        for sort, rows in chains.items():
            found[sort] += [evaluate_chain(problem, chain) for chain in rows.astype(np.int32)]
    return {sort: np.stack(rows) for sort, rows in found.items()}


def make_problem(kind: str, depth: int, num_layers: int, seed: int) -> jc.Problem:
    data = jc.data.load("digits", seed)
    options: Any = {
        "layer": jc.layers.ResidualMLP(64),
        "head": jc.layers.DenseHead(10),
        "depth": depth,
        "num_steps": NUM_STEPS,
    }
    if kind == "independent":
        options["num_nets"] = num_layers // depth
    elif kind == "snapshots":
        options["num_snapshots"] = num_layers // depth
    else:
        options["num_layers"] = num_layers
    bank = getattr(jc.train, kind)(jax.random.key(seed), data.train, **options)
    return jc.Problem(bank, data.search, max_layers=depth)


def find_good_chains(problem: jc.Problem, num_chains: int, seed: int) -> np.ndarray:
    """Return nearly optimal chains, `[num_chains, L]`.

    If all chains can be evaluated, they are drawn from the best 1% of them. Otherwise, they are the
    best chains of `num_chains` runs of a search without gradients.
    """
    if problem.space.num_chains < 100_000:
        chains, out = jc.evaluate_all(problem)
        best = np.argsort(np.asarray(out.loss))[: max(len(chains) // 100, num_chains)]
        return chains[np.random.default_rng(seed).choice(best, num_chains, replace=False)]
    results = jc.run_many(
        jax.random.split(jax.random.key(seed), num_chains),
        jc.CriticSearch(),
        problem,
        budget=BUDGET,
        starts=None,  # to show what the search finds itself
    )
    return np.stack([result.best_chain for result in results])


def evaluate_chain(problem: jc.Problem, chain: np.ndarray) -> np.ndarray:
    """Compute `METRICS` of each score, `[SCORES, 3]`; nan if no swap has a score."""
    length = int((chain >= 0).sum()) - 1
    if length == 0:
        return np.full((len(SCORES), 3), np.nan)
    change, scores = evaluate_swaps(problem, chain), score_swaps(problem, chain)
    is_swap = np.isfinite(change) & (np.arange(change.shape[1]) != chain[:-1, None])
    return np.stack(
        [compare_ranking(scores[name][:-1][is_swap], change[is_swap]) for name in SCORES]
    )


def compare_ranking(score: np.ndarray, change: np.ndarray) -> np.ndarray:
    first = int(np.argmin(score))
    rank = 1 + int(np.sum(change < change[first]))
    improves = float(change[first] < 0) if (change < 0).any() else np.nan
    return np.array([correlate(score, change), rank, improves])


def score_swaps(problem: jc.Problem, chain: np.ndarray) -> dict[str, np.ndarray]:
    """Compute all scores of all swaps, `[L, N]` each."""

    def score(
        bank: jc.Bank, kind: ScoreKind, rate: float = 1.0, num_products: int | None = None
    ) -> np.ndarray:
        other = dataclasses.replace(problem, bank=bank)
        scores = jc.gradient.score_edits(
            other, chain, kind, learning_rate=rate, num_products=num_products
        )
        return np.asarray(scores.swap)

    bank, length = problem.bank, int((chain >= 0).sum()) - 1
    aligned = {int(token): jc.align.match_units(bank, int(token)) for token in set(chain[:length])}

    def score_aligned(kind: ScoreKind, rate: float = 1.0) -> np.ndarray:
        """Score each slot with the bank that is aligned to the layer of that slot."""
        by_token = {token: score(other, kind, rate) for token, other in aligned.items()}
        rows = np.full((chain.size, bank.num_layers), np.nan)
        for slot in range(length):
            rows[slot] = by_token[int(chain[slot])][slot]
        return rows

    return {
        "linearized": score(bank, "linearized"),
        **{
            f"linearized, {num} products": score(bank, "linearized", num_products=num)
            for num in FEW
        },
        "activations": score(bank, "activations"),
        "weights": score(bank, "weights"),
        "weights, shuffled": score(jc.align.shuffle(jax.random.key(0), bank), "weights"),
        "weights, aligned": score_aligned("weights"),
        **{f"nearest, {rate:g}": score(bank, "nearest", rate) for rate in LEARNING_RATES},
        **{
            f"nearest, {rate:g}, aligned": score_aligned("nearest", rate) for rate in LEARNING_RATES
        },
    }


class PixelHead(nn.Module):
    """A head that returns logits for the level of each of the 64 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(64 * NUM_LEVELS)(x).reshape(-1, 64, NUM_LEVELS)


def brier(outputs: jax.Array, levels: jax.Array) -> jax.Array:
    return jnp.sum((jax.nn.softmax(outputs) - jax.nn.one_hot(levels, NUM_LEVELS)) ** 2, axis=-1)


WIDE_LOSSES = {"cross-entropy": optax.softmax_cross_entropy_with_integer_labels, "brier": brier}


def evaluate_wide_outputs(loss: str, num_chains: int) -> dict[str, np.ndarray]:
    """Compare scores that are estimated from samples with the true change.

    The numbers are the correlation with the true change, and the relative error. The last row is
    for products with all outputs, which are exact.
    """
    data = jc.data.load("digits", 0)
    edges = jnp.linspace(data.train.x.min(), data.train.x.max(), NUM_LEVELS + 1)[1:-1]
    train, search = (jc.Batch(b.x, jnp.digitize(b.x, edges)) for b in (data.train, data.search))
    sizes: Any = {"num_layers": 12, "depth": 4, "num_steps": NUM_STEPS}
    bank = jc.train.routed(
        jax.random.key(0), train, layer=jc.layers.ResidualMLP(64), head=PixelHead(), **sizes
    )
    problem = jc.Problem(bank, search, max_layers=4, loss_fn=WIDE_LOSSES[loss])
    found = []
    for chain in np.random.default_rng(0).integers(0, 12, (num_chains, 4)):
        chain = np.append(chain, 12).astype(np.int32)
        change = evaluate_swaps(problem, chain)
        is_swap = np.arange(12) != chain[:-1, None]
        numbers = (*WIDE_PRODUCTS, 64 * NUM_LEVELS)
        scores = [
            jc.gradient.score_edits(problem, chain, num_products=number).swap for number in numbers
        ]
        rows = [np.asarray(score)[:-1][is_swap] for score in scores]
        found.append(
            [
                [
                    correlate(row, change[is_swap]),
                    np.abs(row - rows[-1]).mean() / np.abs(rows[-1]).mean(),
                ]
                for row in rows
            ]
        )
    return {"measured": np.mean(found, axis=0)}


def describe_wide_outputs(loss: str, num_chains: int) -> dict[str, Any]:
    found = keep(
        __file__,
        f"retrieval-wide-{loss}",
        (loss, num_chains),
        lambda: evaluate_wide_outputs(loss, num_chains),
    )
    correlation, error = found["measured"].T.tolist()
    return {
        "loss": loss,
        "products": [*WIDE_PRODUCTS, 64 * NUM_LEVELS],
        "spearman": correlation,
        "error": error,
    }


def format_wide(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table of scores estimated from samples.

    It has their correlation with the true change, and their error relative to the exact scores.
    """
    lines = [
        "| loss of 64 pixels | "
        + " | ".join(f"{num} products" for num in rows[0]["products"])
        + " |"
    ]
    lines.append("|---" * (1 + len(rows[0]["products"])) + "|")
    for row in rows:
        cells = [f"{c:.2f}, {e:.1%}" for c, e in zip(row["spearman"], row["error"], strict=True)]
        lines.append(f"| {row['loss']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format a Markdown table of correlation, mean rank of the first choice, and success rate.

    The success rate is how often the first choice lowers the loss, among chains for which some swap
    lowers it.
    """
    lines = [
        "| bank | slots | chains | " + " | ".join(SCORES) + " |",
        "|---" * (3 + len(SCORES)) + "|",
    ]
    for row in rows:
        cells = [
            f"{s['spearman']:.2f}, {s['first_rank']:.0f}, "
            + ("-" if s["first_improves"] is None else f"{s['first_improves']:.0%}")
            for s in row["scores"].values()
        ]
        lines.append(
            f"| {row['kind']} | {row['depth']} | {row['chains']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def draw(path: str, rows: list[dict[str, Any]]) -> None:
    """Plot the correlation against depth, by kind of bank and sort of chain."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(KINDS), sharex=True, sharey=True)
    shown = (
        "linearized",
        "linearized, 4 products",
        "activations",
        "weights",
        "weights, aligned",
        "nearest, 0.1, aligned",
    )
    for i, sort in enumerate(("random", "good")):
        for j, kind in enumerate(KINDS):
            selected = [row for row in rows if row["kind"] == kind and row["chains"] == sort]
            for name in shown:
                values = [row["scores"][name]["spearman"] for row in selected]
                axes[i, j].plot([row["depth"] for row in selected], values, marker="o", label=name)
            axes[i, j].set(title=f"{kind}, {sort} chains", xscale="log", ylim=(-0.2, 1.02))
            axes[i, j].grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xticks([*SIZES], [str(depth) for depth in SIZES])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("slots")
    for row in axes:
        row[0].set(ylabel="Spearman, predicted with true change")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown)
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
