"""When should bank weights be updated: never, after the search, on clones during it, or shared?

    python experiments/updates.py

The run takes about 12 minutes on 2 CPU cores. `--quick` runs one kind of bank, two searches, one
seed, and one budget in two minutes.

Expected result: at 4,000 layer calls, the loss on test is 0.26 if weights are frozen, 0.15 to 0.17
if the chain that was found is tuned, 0.17 if clones are tuned, 0.20 with shared updates, and 0.18
for a net trained from scratch. On the routed bank, it is 0.15 even if weights are frozen.

The four policies of `jchain.updates` run on digits banks of three kinds (12 layers, chains of up to
4), with 10 seeds of bank, splits, and search each. The cost is equal: the layer calls of the search
plus those of the gradient steps. Searches use `search`, gradients use `train`, the 16 best chains
are re-ranked on `select`, and the loss on `test` is reported. The baselines, which have the same
cost if they have one, are: every chain evaluated (no gradient steps); the best parent, unchanged
and trained further; a random chain, unchanged, with its best single swap, and trained further; and
a net of 4 layers trained from scratch. Gradient steps are AdamW at 1e-3 on minibatches of 128. They
get half of the budget if the policy has the choice. No size or rate was tuned.

Finished parts are kept, so an interrupted run continues where it stopped. The script writes
updates.json, updates.md, and updates.png to experiments/results.
"""

import time
from functools import partial
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from records import describe_machine, keep, make_parser, make_pool, write_results

import jchain as jc

KINDS = ("independent", "routed", "random")
BUDGETS = (1000, 4000)
DEPTH, NUM_LAYERS = 4, 12
# Share of the budget for gradient steps.
SHARES = {"tune found": 0.5, "clone then tune": 0.5}
# Number of rounds of cloning, and of shared gradient steps after each step of a search.
NUM_ROUNDS, NUM_UPDATES = 4, 8
SEARCHES: dict[str, Any] = {
    "actor-critic": jc.ActorCritic(),
    "critic search": jc.CriticSearch(),
    "local search": jc.LocalSearch(),
    "evolution": jc.Evolution(),
    "beam search": jc.BeamSearch(),
    "random search": jc.RandomSearch(),
}
Case = tuple[str, int]


def main() -> None:
    parser = make_parser(
        __doc__, quick="one kind, one seed, one budget; nothing is written", has_workers=True
    )
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    start = time.perf_counter()
    kinds, seeds, budgets, searches = KINDS, range(args.seeds), BUDGETS, tuple(SEARCHES)
    if args.quick:
        kinds, seeds, budgets, searches = (
            KINDS[:1],
            range(1),
            BUDGETS[:1],
            ("actor-critic", "local search"),
        )
    rows = run_all(kinds, seeds, budgets, searches, args.workers)
    summary = {name: summarize(values) for name, values in rows.items() if name.endswith("/loss")}
    summary = {name.removesuffix("/loss"): row for name, row in summary.items()}
    table = format_table(summary, rows, kinds)
    print(table, flush=True)
    if args.quick:
        return
    ahead = compare(rows, budgets[-1])
    result = {
        **describe_machine(),
        "config": {
            "kinds": kinds,
            "seeds": list(seeds),
            "budgets": budgets,
            "shares": SHARES,
            "num_rounds": NUM_ROUNDS,
            "num_updates": NUM_UPDATES,
        },
        "seconds": round(time.perf_counter() - start),
        "test_loss": {
            name: dict(zip(("all", *kinds), row, strict=True)) for name, row in summary.items()
        },
        "probability_of_lower_test_loss": ahead,
        "runs": {name: values.round(5).tolist() for name, values in rows.items()},
    }
    write_results(args.out, "updates", result, table, partial(draw, rows=rows, budgets=budgets))


def run_all(
    kinds: Any, seeds: Any, budgets: Any, searches: tuple[str, ...], workers: int
) -> dict[str, np.ndarray]:
    """Return each number of each row, `[kinds, seeds]`."""
    with make_pool(workers) as pool:
        # Neighbors in the list share programs.
        cases = [(kind, seed) for kind in kinds for seed in seeds]
        found = list(
            pool.map(
                partial(run_case, budgets=budgets, searches=searches),
                cases,
                chunksize=max(1, len(seeds) // workers),
            )
        )
    shape = len(kinds), len(seeds)
    return {name: np.array([row[name] for row in found]).reshape(shape) for name in found[0]}


def make_problem(kind: str, seed: int) -> tuple[jc.Problem, jc.Dataset]:
    data = jc.data.load("digits", seed)
    options: Any = {
        "layer": jc.layers.ResidualMLP(64),
        "head": jc.layers.DenseHead(10),
        "depth": DEPTH,
    }
    if kind == "independent":
        bank = jc.train.independent(
            jax.random.key(seed), data.train, num_nets=NUM_LAYERS // DEPTH, **options
        )
    else:
        make: Any = getattr(jc.train, kind)
        bank = make(jax.random.key(seed), data.train, num_layers=NUM_LAYERS, **options)
    return jc.Problem(bank, data.search, max_layers=DEPTH), data


def count_steps(budget: float, data: jc.Dataset) -> int:
    """Count the gradient steps on a chain of 4 layers that a budget in layer calls pays for."""
    cost = jc.updates.tune.training_cost(DEPTH, len(data.train.y), len(data.search.y), 1000)
    return max(1, int(budget / cost * 1000))


def make_policies(budget: int, data: jc.Dataset) -> dict[str, Any]:
    found, clone = (count_steps(budget * share, data) for share in SHARES.values())
    return {
        "frozen": jc.updates.Frozen(),
        "tune found": jc.updates.TuneFound(num_steps=found),
        "clone then tune": jc.updates.CloneThenTune(
            num_rounds=NUM_ROUNDS, num_steps=clone // NUM_ROUNDS
        ),
        "shared updates": jc.updates.SharedUpdates(num_updates=NUM_UPDATES),
    }


def run_case(case: Case, budgets: tuple[int, ...], searches: tuple[str, ...]) -> dict[str, float]:
    def make() -> dict[str, np.ndarray]:
        problem, data = make_problem(*case)
        rows = {}
        for budget in budgets:
            policies = make_policies(budget, data)
            for name in searches:
                if name != "actor-critic" and budget != budgets[-1]:
                    continue
                for policy in policies if name == "actor-critic" else ["frozen", "tune found"]:
                    title = f"{policy}, {name}/{budget}"
                    rows |= run(
                        title, policies[policy], SEARCHES[name], problem, data, budget, case[1]
                    )
            rows |= run_controls(problem, data, budget, case[1])
        return {name: np.array(value) for name, value in rows.items()}

    name = f"updates-{case[0]}-{case[1]}"
    arrays = keep(
        __file__,
        name,
        (case, budgets, [repr(SEARCHES[name]) for name in searches]),
        make,
    )
    print(f"{case[0]:12} {case[1]:3}", flush=True)
    return {name: float(value) for name, value in arrays.items()}


def run(
    title: str,
    policy: Any,
    search: Any,
    problem: jc.Problem,
    data: jc.Dataset,
    budget: int,
    seed: int,
) -> dict[str, float]:
    """Run a policy, and return the loss on test of the chain that was found.

    Also return the share of the budget that gradient steps used.
    """
    key = jax.random.key(1000 + seed)
    outcome = policy.run(key, search, problem, data.train, budget=budget, starts=None)
    row = evaluate_on_test(
        title, select_chain(outcome.bank, data, outcome.result.finalists), outcome.bank, data
    )
    return {
        **row,
        f"{title}/update_share": outcome.update_calls / budget,
        f"{title}/spent": outcome.result.layer_calls / budget,
        f"{title}/search_loss": outcome.result.best_loss,
    }


def select_chain(bank: jc.Bank, data: jc.Dataset, chains: np.ndarray) -> np.ndarray:
    """Select the chain with the lowest loss on `select`."""
    return chains[int(np.argmin(jc.evaluate(jc.Problem(bank, data.select, DEPTH), chains).loss))]


def evaluate_on_test(
    title: str, chain: np.ndarray, bank: jc.Bank, data: jc.Dataset
) -> dict[str, float]:
    out = jc.evaluate(jc.Problem(bank, data.test, DEPTH), chain[None])
    return {f"{title}/loss": float(out.loss[0]), f"{title}/accuracy": float(out.accuracy[0])}


def get_parents(bank: jc.Bank) -> np.ndarray | None:
    return jc.chain.pad(bank.parents, DEPTH) if bank.parents else None


def run_controls(problem: jc.Problem, data: jc.Dataset, budget: int, seed: int) -> dict[str, float]:
    bank, rows = problem.bank, {}
    tune_key, draw_key, net_key = jax.random.split(jax.random.key(2000 + seed), 3)
    train_problem = jc.Problem(bank, data.train, DEPTH)
    tune = partial(
        jc.updates.tune.tune_chain, tune_key, train_problem, num_steps=count_steps(budget, data)
    )
    layers = jax.random.randint(draw_key, (DEPTH,), 0, bank.num_layers)
    chain = np.array([*map(int, layers), bank.num_layers], np.int32)
    rows |= evaluate_on_test(f"random chain, trained on/{budget}", chain, tune(chain), data)
    net = jc.train.independent(
        net_key,
        data.train,
        layer=jc.layers.ResidualMLP(64),
        head=jc.layers.DenseHead(10),
        num_nets=1,
        depth=DEPTH,
        num_steps=count_steps(budget, data),
    )
    rows |= evaluate_on_test(
        f"net trained from nothing/{budget}", np.array([*range(DEPTH + 1)]), net, data
    )
    parents = get_parents(bank)
    if parents is not None:
        best = select_chain(bank, data, parents)
        rows |= evaluate_on_test(f"best parent, trained on/{budget}", best, tune(best), data)
    else:
        rows |= {
            f"best parent, trained on/{budget}/{what}": np.nan for what in ("loss", "accuracy")
        }
    # These cost the same at all budgets.
    rows |= evaluate_on_test("random chain", chain, bank, data)
    swaps = np.repeat(chain[None], DEPTH * bank.num_layers, axis=0)
    slots, tokens = np.indices((DEPTH, bank.num_layers)).reshape(2, -1)
    swaps[np.arange(len(swaps)), slots] = tokens
    best_swap = swaps[int(np.argmin(jc.evaluate(problem, swaps).loss))]
    rows |= evaluate_on_test("random chain, best single swap", best_swap, bank, data)
    chains, out = jc.evaluate_all(problem)
    rows |= evaluate_on_test(
        "best of all chains",
        select_chain(bank, data, chains[np.argsort(out.loss)[:16]]),
        bank,
        data,
    )
    if parents is not None:
        rows |= evaluate_on_test("best parent", select_chain(bank, data, parents), bank, data)
    else:
        rows |= {f"best parent/{what}": np.nan for what in ("loss", "accuracy")}
    return rows


def summarize(values: np.ndarray) -> list[dict[str, float] | None]:
    """Compute the IQM over all kinds of bank that have the row, then that of each kind."""
    there = values[~np.isnan(values).any(axis=1)]
    return [
        jc.chainbench.stats.iqm(there)._asdict(),
        *(
            None if np.isnan(row).any() else jc.chainbench.stats.iqm(row[None])._asdict()
            for row in values
        ),
    ]


def compare(rows: dict[str, np.ndarray], budget: int) -> dict[str, dict[str, Any]]:
    """Compute the probability that an actor-critic row beats another row.

    It beats the other row if it has a lower loss on the same bank.
    """
    names = [name for name in rows if name.endswith("/loss") and not np.isnan(rows[name]).any()]
    names = [name for name in names if f"/{budget}/" in name or name.count("/") == 1]
    return {
        a.removesuffix("/loss"): {
            b.removesuffix("/loss"): jc.chainbench.stats.probability_of_improvement(
                rows[a], rows[b], num_resamples=500
            )._asdict()
            for b in names
            if b != a
        }
        for a in names
        if "actor-critic" in a
    }


def format_table(summary: dict[str, Any], rows: dict[str, np.ndarray], kinds: Any) -> str:
    """Format a Markdown table of the IQM and interval of the loss on test.

    It also has the mean accuracy and the share of gradient steps in the cost.
    """
    head = ["", "layer calls", "loss on test", *kinds, "accuracy", "for gradients"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in sorted(summary, key=lambda name: summary[name][0]["value"]):
        title, _, budget = name.partition("/")
        whole, *each = summary[name]
        share = rows.get(f"{name}/update_share")
        cells = [
            title,
            f"{int(budget):,}" if budget else "",
            f"{whole['value']:.4f} [{whole['low']:.4f}, {whole['high']:.4f}]",
            *("" if cell is None else f"{cell['value']:.4f}" for cell in each),
            f"{np.nanmean(rows[f'{name}/accuracy']):.1%}",
            "" if share is None else f"{share.mean():.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: str, rows: dict[str, np.ndarray], budgets: tuple[int, ...]) -> None:
    """Plot the loss on test of the four policies and the baselines, by kind of bank."""
    names = [
        *(
            f"{policy}, actor-critic/{budgets[-1]}"
            for policy in ("frozen", "tune found", "clone then tune")
        ),
        f"shared updates, actor-critic/{budgets[-1]}",
        "best of all chains",
        f"random chain, trained on/{budgets[-1]}",
        f"net trained from nothing/{budgets[-1]}",
    ]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        estimates = np.array([jc.chainbench.stats.iqm(row[None]) for row in rows[f"{name}/loss"]])
        value, low, high = estimates.T
        place = np.arange(len(value)) + i * width
        axes.bar(
            place,
            value,
            width,
            label=name.partition("/")[0],
            yerr=[value - low, high - value],
            capsize=2,
        )
    axes.set_xticks(np.arange(len(KINDS)) + 0.4 - width / 2, [f"{kind} bank" for kind in KINDS])
    axes.set_ylabel(f"loss on test after {budgets[-1]:,} layer calls")
    axes.legend(fontsize="small", ncols=2)
    axes.set_ylim(0, 1.6 * max(float(np.mean(rows[f"{name}/loss"])) for name in names))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
