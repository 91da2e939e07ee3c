"""Do gradient trends of each weight index help to find the layer to choose next?

    python experiments/gradient_trends.py

The run takes 8 minutes on 2 CPU cores shared with other jobs. `--quick` uses one bank of each kind
and 100 chains, and writes nothing.

Expected result on random chains: the weight index alone explains 2% to 12% of a gradient, and the
layer itself explains 9% to 32%. The mean gradient of other slots points in much the same direction
as that of the same slot (cosines of 0.16 and 0.18, and of 0.33 and 0.40). Trends rank swaps with a
correlation of 0.1 to 0.4. Importance does not predict which slot to change (-0.1 to 0.2).

The trends are the mean gradients of each weight index over 1,000 random chains
(`jchain.gradient.trends`). Four tests use other chains, some random and some of the best 1%:

- *Explained*: the share of the squared gradient that the mean gradient of a context predicts,
  1 - |g - m|^2 / |g|^2 with both terms summed over chains. The four contexts are the weight index
  alone, the slot, the previous layer, and the layer itself.
- *Outside*: does a trend hold outside of its context? The test compares the cosine of a gradient
  with the mean in its own context and with the mean in all other contexts.
- *Retrieval*: swaps are scored by the trend instead of the chain's own gradient, without any layer
  call. The result is Spearman's correlation with the true change in loss. In `aligned`, the hidden
  units of all layers are in the order of those of layer 0 (`jchain.align`).
- *Which slot*: does the gradient of the layer in a slot predict the gain of the best swap there?
  The result is Spearman's correlation, over the slots of a chain, of the gain with each of three
  numbers: the length of the gradient, its importance (the sum of |w dL/dw|), and the best
  linearized score of a swap.

The banks are digits banks of four kinds with 12 layers and 4 slots, from 3 seeds. The script writes
gradient_trends.json, .md, and .png to experiments/results. It also writes layer_report.png, the
gradient's report on the layers of the best chain of a routed bank.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from records import correlate, describe_machine, evaluate_swaps, keep, make_parser, write_results

import jchain as jc

DEPTH, NUM_LAYERS = 4, 12
SIZES = {"banks": 3, "seen": 1000, "tested": 100}
QUICK = {"banks": 1, "seen": 100, "tested": 10}
CONTEXTS = jc.gradient.trends.CONTEXTS
LABELS = dict(zip(CONTEXTS, ("index alone", "slot", "layer before", "layer itself"), strict=True))
SORTS = ("random", "good")


def main() -> None:
    parser = make_parser(__doc__, quick="one bank of each kind, 100 chains; nothing is written")
    args = parser.parse_args()
    sizes = QUICK if args.quick else SIZES
    rows = []
    for kind in jc.chainbench.KINDS:
        found = keep(
            __file__,
            f"trends-{kind}",
            (kind, sizes),
            lambda kind=kind: evaluate_kind(kind, **sizes),
        )
        for sort in SORTS:
            means = {
                name.removeprefix(f"{sort} "): v
                for name, v in found.items()
                if name.startswith(sort)
            }
            rows.append(
                {
                    "kind": kind,
                    "chains": sort,
                    **{name: v.mean(axis=0).tolist() for name, v in means.items()},
                }
            )
        print(format_tables(rows[-2:]), flush=True)
        jax.clear_caches()
    if args.quick:
        return
    config = {**sizes, "layers": NUM_LAYERS, "slots": DEPTH}
    result = {**describe_machine(), "config": config, "contexts": CONTEXTS, "rows": rows}
    write_results(
        args.out, "gradient_trends", result, format_tables(rows), partial(draw, rows=rows)
    )


def evaluate_kind(kind: str, banks: int, seen: int, tested: int) -> dict[str, np.ndarray]:
    """Run the four tests on banks of one kind.

    Returns:
      Shares explained, cosines inside and outside, and correlations, by sort of chains, each
      `[banks, contexts]`.
    """
    results: dict[str, list[Any]] = {}
    for seed in range(banks):
        problem = make_problem(kind, seed)
        aligned = jc.Problem(jc.align.match_units(problem.bank, 0), problem.data, DEPTH)
        bank = problem.bank
        rng = np.random.default_rng(seed)
        drawn = draw_chains(rng, seen + 2 * tested, bank)
        learned = {
            name: compute_trends(of, drawn[:seen])
            for name, of in (("plain", problem), ("aligned", aligned))
        }
        chains, out = jc.evaluate_all(problem)
        is_long = chains[:, DEPTH] >= bank.num_layers
        best = chains[is_long][np.argsort(np.asarray(out.loss)[is_long])[: is_long.sum() // 100]]
        used = {tuple(chain) for chain in drawn[:seen]}
        for sort, candidates in (("random", drawn[seen:]), ("good", rng.permutation(best))):
            rows = np.array([chain for chain in candidates if tuple(chain) not in used][:tested])
            gradients = np.asarray(find_gradients(problem, rows))
            for name, values in explain_gradients(
                learned["plain"], gradients, rows, bank.num_layers
            ).items():
                results.setdefault(f"{sort} {name}", []).append(values)
            few = rows[:30]
            changes = [evaluate_swaps(problem, chain) for chain in few]
            for name, of in (("plain", problem), ("aligned", aligned)):
                pairs = zip(few, changes, strict=True)
                values = np.mean(
                    [correlate_swaps(learned[name], of, *pair) for pair in pairs], axis=0
                )
                results.setdefault(f"{sort} retrieval, {name}", []).append(values)
            values = [
                correlate_slots(problem, *row) for row in zip(few, changes, gradients, strict=False)
            ]
            results.setdefault(f"{sort} which slot", []).append(np.mean(values, axis=0))
    return {name: np.array(values) for name, values in results.items()}


def make_problem(kind: str, seed: int) -> jc.Problem:
    bank, data = jc.chainbench.make_bank(
        f"digits-{kind}-{3 * seed}", num_layers=NUM_LAYERS, depth=DEPTH
    )
    return jc.Problem(bank, data.search, DEPTH)


def draw_chains(rng: np.random.Generator, num: int, bank: jc.Bank) -> np.ndarray:
    """Draw full chains of random layers, `[num, DEPTH + 1]`."""
    layers = rng.integers(0, bank.num_layers, (num, DEPTH))
    heads = rng.integers(bank.num_layers, bank.num_layers + bank.num_heads, (num, 1))
    return np.concatenate([layers, heads], axis=1).astype(np.int32)


def compute_trends(problem: jc.Problem, chains: np.ndarray) -> jc.gradient.trends.Trends:
    """Compute the trends over these chains."""
    # Without its names, a bank can share the compiled program of another.
    problem = problem.without_names()

    @jax.jit
    def run(problem: jc.Problem, chains: jax.Array) -> jc.gradient.trends.Trends:
        def update(trends: jc.gradient.trends.Trends, chain: jax.Array) -> Any:
            return jc.gradient.trends.update(trends, problem, chain), None

        return jax.lax.scan(update, jc.gradient.trends.init(problem), chains)[0]

    return run(problem, jnp.asarray(chains))


def find_gradients(problem: jc.Problem, chains: np.ndarray) -> jax.Array:
    """Compute the gradients with respect to the weights of each layer, `[P, D, W]`."""
    run = jax.jit(
        lambda problem, chains: jax.lax.map(
            lambda c: jc.gradient.weight_gradients(problem, c), chains
        )
    )
    return run(problem.without_names(), jnp.asarray(chains))[:, :DEPTH]


def find_contexts(chains: np.ndarray, num_layers: int) -> tuple[np.ndarray, ...]:
    """Find where each slot of each chain is in the moments of each context, `[P, D]`."""
    layers = chains[:, :DEPTH]
    slots = np.broadcast_to(np.arange(DEPTH), layers.shape)
    before = np.concatenate([np.full((len(chains), 1), num_layers), layers[:, :-1]], axis=1)
    return np.zeros_like(layers), slots, before, layers


def explain_gradients(
    trends: jc.gradient.trends.Trends, gradients: np.ndarray, chains: np.ndarray, num_layers: int
) -> dict[str, np.ndarray]:
    """Compute the shares explained, and the cosines with the means, `[contexts]`.

    The cosines are those with the mean inside and with the mean outside of a context.
    """
    length = np.linalg.norm(gradients, axis=2, keepdims=True)
    is_there = np.isfinite(length) & (length > 0)
    unit = np.where(is_there, gradients / np.where(is_there, length, 1), 0)
    found: dict[str, list[float]] = {
        name: [] for name in ("explained", "cosine inside", "cosine outside")
    }
    for moments, place in zip(trends, find_contexts(chains, num_layers), strict=True):
        count, mean = np.asarray(moments.num_seen)[:, None], np.asarray(moments.mean)
        own = mean[place]
        total = (count * mean).sum(axis=0)
        others = (total - count * mean) / np.maximum(count.sum() - count, 1)
        found["explained"].append(float(1 - np.sum((gradients - own) ** 2) / np.sum(gradients**2)))
        inside, outside = (np.sum(unit * normalize(m[place]), axis=2) for m in (mean, others))
        found["cosine inside"].append(float(np.mean(inside)))
        found["cosine outside"].append(float(np.mean(outside)) if len(mean) > 1 else np.nan)
    return {name: np.array(values) for name, values in found.items()}


def normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def correlate_swaps(
    trends: jc.gradient.trends.Trends, problem: jc.Problem, chain: np.ndarray, change: np.ndarray
) -> np.ndarray:
    """Correlate swap scores with the true change in loss, `[contexts + 1]`.

    The scores use the trend of each context and, last, the chain's own gradient.
    """
    scores = [
        jc.gradient.trends.predict_swaps(trends, problem, chain, context) for context in CONTEXTS
    ]
    scores.append(jc.swap_scores(problem, chain, "weights"))
    is_swap = np.arange(change.shape[1]) != chain[:DEPTH, None]
    return np.array(
        [correlate(np.asarray(score)[:DEPTH][is_swap], change[is_swap]) for score in scores]
    )


def correlate_slots(
    problem: jc.Problem, chain: np.ndarray, change: np.ndarray, gradient: np.ndarray
) -> np.ndarray:
    """Correlate three numbers over slots with the gain of the best swap, `[3]`.

    They are the gradient's length, the importance, and the best linearized score.
    """
    weights = np.asarray(jc.gradient.trends.stack_weights(problem))[chain[:DEPTH]]
    is_own = np.arange(change.shape[1]) == chain[:DEPTH, None]
    scores = np.asarray(jc.swap_scores(problem, chain))[:DEPTH]
    score, best = (np.where(is_own, np.inf, of).min(axis=1) for of in (scores, change))
    predictors = np.linalg.norm(gradient, axis=1), np.abs(weights * gradient).sum(axis=1), -score
    return np.array([correlate(predictor, -best) for predictor in predictors])


def format_tables(rows: list[dict[str, Any]]) -> str:
    """Format Markdown tables of the four tests.

    The first shows what trends explain, whether they hold outside of their context, and retrieval.
    The second shows which slot to change.
    """
    names = (
        "explained",
        "cosine inside",
        "cosine outside",
        "retrieval, plain",
        "retrieval, aligned",
    )
    parts = (
        (names, (*CONTEXTS, "own gradient")),
        (("which slot",), ("gradient", "importance", "linearized")),
    )
    lines: list[str] = []
    for names, columns in parts:
        lines += [
            f"| bank | chains | measure | {' | '.join(columns)} |",
            "|---" * (3 + len(columns)) + "|",
        ]
        for row in rows:
            for name in names:
                cells = ["" if np.isnan(value) else f"{value:.2f}" for value in row[name]]
                cells += [""] * (len(columns) - len(cells))
                lines.append(f"| {row['kind']} | {row['chains']} | {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def draw(path: str, rows: list[dict[str, Any]]) -> None:
    """Plot the cosines inside and outside of each context, and retrieval, by kind of bank."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="col")
    kinds = jc.chainbench.KINDS
    for i, sort in enumerate(SORTS):
        those = {row["kind"]: row for row in rows if row["chains"] == sort}
        for j, context in enumerate(CONTEXTS):
            place = np.arange(len(kinds)) + 0.2 * j
            inside, outside = (
                [those[kind][f"cosine {side}"][j] for kind in kinds]
                for side in ("inside", "outside")
            )
            axes[i, 0].bar(place, inside, 0.1, color=f"C{j}", label=LABELS[context])
            if context != "everywhere":
                axes[i, 0].bar(
                    place + 0.1,
                    outside,
                    0.1,
                    color=f"C{j}",
                    alpha=0.4,
                    hatch="//",
                    label=f"{LABELS[context]}, all others",
                )
        for j, context in enumerate((*LABELS.values(), "gradient of the chain itself")):
            values = [those[kind]["retrieval, plain"][j] for kind in kinds]
            axes[i, 1].bar(
                np.arange(len(kinds)) + 0.15 * j, values, 0.15, color=f"C{j}", label=context
            )
        axes[i, 0].set(title=f"{sort} chains", ylabel="cosine, gradient with mean gradient")
        axes[i, 1].set(title=f"{sort} chains", ylabel="Spearman, predicted with true change")
    for ax in axes[-1]:
        ax.set(xticks=np.arange(len(kinds)) + 0.35, xticklabels=kinds)
        ax.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
