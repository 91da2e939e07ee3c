"""How should the value of a prefix be updated? Credit rules at equal cost, and their calibration.

    python experiments/chainbench.py && python experiments/values.py

The run takes 30 minutes on one CPU core shared with other jobs. `--quick` runs one problem with 3
runs in 2 to 4 minutes.

Expected result: at 4,000 layer calls, the four rules with imitation and restarts have a regret of
0.006 to 0.009, which is worse than evolution, local search, and beam search (0.001 to 0.003).
Without imitation and restarts, they have 0.075 to 0.148, which is no better than random search
(0.076). Ranks have 0.001 and 0.037. Predictions are near the return of the agent's own policy (bias
within 0.1) and 0.7 to 0.9 below the best reachable reward.

The rules are the actor-critic with TD(0), TD(0.5), Monte Carlo returns, and V-trace with replay,
and tabular Q-learning. The script measures their regret and the calibration of the critic. The
critic's prediction for each of the 1,885 prefixes with room for a layer is compared with the best
reachable reward after the prefix, which is known because every chain is scored. This is done once
over all prefixes, and once over those of the agent's own last chains. Spearman's correlation, bias
(predicted minus true), and root mean square error are computed within each depth, 1 to 3, and then
averaged.

The target of a TD critic is not the best reachable reward but the return of its own policy, which
is known as well (`own policy`: exact, from all 22,621 prefixes); that of Q-learning is the best
reachable reward. Rewards are minus the log of the loss, so an error of 0.1 is a tenth of the loss.
The default reward of the actor-critic, ranks without a unit, is included. Everything is measured
twice: with imitation of the best chains and restarts from them, and without both (`pure`), where
credit is the only signal. Critic search is a reference: its Spearman correlation is over the
prefixes that it has observed and not extended yet.

The problems are the 12 odd-numbered ChainBench problems with three heads, which share compiled
programs. Losses are looked up in tables, and each search has 10 runs. Rates were chosen on
even-numbered problems (`--tune`).

The script writes values.json, values.md, and values.png to experiments/results.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from calibration import (
    compare_values,
    correlate_open_prefixes,
    count_visits,
    evaluate_policy,
    find_truth,
    list_chains,
    split_by_depth,
)
from matplotlib.figure import Figure
from records import describe_machine, describe_search, keep, make_parser, use_tables, write_results

import jchain as jc

BUDGETS = (300, 1000, 4000)
NUM_RECENT = 4  # the chains of this many last steps count as visited
PURE: dict[str, Any] = {"imitation_weight": 0.0, "restart_rate": 0.0}
RATES: dict[str, Any] = {"learning_rate": 3e-2, "entropy_weight": 0.5}


def make_agent(**changes: Any) -> jc.ActorCritic:
    return jc.ActorCritic(**{"reward_fn": jc.agent.rewards.log_rewards, **RATES, **changes})


RULES: dict[str, Any] = {
    "TD(0)": {"lambda_": 0.0},
    "TD(0.5)": {"lambda_": 0.5},
    "Monte Carlo": {"lambda_": 1.0},
    "V-trace, replay": {"lambda_": 1.0, "num_replays": 32},
}
RANKS = "TD(0.95) of ranks"  # the default of the actor-critic
AGENTS: dict[str, Any] = {
    **{name: make_agent(**rule) for name, rule in RULES.items()},
    RANKS: jc.ActorCritic(),
    **{f"{name}, pure": make_agent(**rule, **PURE) for name, rule in RULES.items()},
    f"{RANKS}, pure": jc.ActorCritic(**PURE),
    "Q-learning": jc.QLearning(learning_rate=0.3, reward_fn=jc.agent.rewards.log_rewards),
    "critic search": jc.CriticSearch(),
}
CONTROLS: dict[str, Any] = {
    "evolution": jc.Evolution(population_size=64, tournament_size=16),
    "local search": jc.LocalSearch(),
    "beam search": jc.BeamSearch(width=4, max_width=256),
    "random search": jc.RandomSearch(),
}


class Track(NamedTuple):
    """What is known of all runs at each budget."""

    best: np.ndarray  # lowest loss, [S, B]
    kept: list[list[Any]]  # state of the critic, by seed and budget
    visited: list[list[np.ndarray]]  # the chains of the last steps, by seed and budget, [C, L]


def main() -> None:
    parser = make_parser(
        __doc__, quick="one problem, 3 seeds, few rules; nothing is written", has_folder=True
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--tune",
        action="store_true",
        help="compare rates on even-numbered problems; nothing is written",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    if args.tune:
        tune(args.folder)
        return
    seeds, agents = args.seeds, AGENTS
    if args.quick:
        names, seeds = ["wine-routed-2"], 3
        jc.chainbench.build(args.folder, names)
        agents = {name: AGENTS[name] for name in ("TD(0), pure", "Monte Carlo, pure", "Q-learning")}
    else:
        names = find_problems(args.folder, slice(1, None, 2))
    problems = {name: jc.chainbench.load(args.folder, name) for name in names}
    # Searches that differ only in rates share programs.
    structures = {name: str(jax.tree.structure(search)) for name, search in agents.items()}
    results, last = {}, ""
    for name in sorted(agents, key=structures.__getitem__):
        if structures[name] != last:
            jax.clear_caches()
        last = structures[name]
        results[name] = evaluate_problems(name, agents[name], problems, seeds)
    results = {name: results[name] for name in agents}
    jax.clear_caches()
    for name, search in CONTROLS.items():
        results[name] = {
            "regret": np.array([run_control(search, solved, seeds) for solved in problems.values()])
        }
    summary = {name: summarize(arrays) for name, arrays in results.items()}
    table = format_tables(summary)
    print(table, flush=True)
    if args.quick:
        return
    result = {
        **describe_machine(),
        "config": {
            "problems": names,
            "seeds": seeds,
            "budgets": BUDGETS,
            "rates": RATES,
            "searches": {
                name: describe_search(search) for name, search in {**agents, **CONTROLS}.items()
            },
        },
        "seconds": round(time.perf_counter() - start),
        "summary": summary,
        "regret": {name: arrays["regret"].round(5).tolist() for name, arrays in results.items()},
    }
    write_results(
        args.out, "values", result, table, partial(draw, results=results, summary=summary)
    )


def find_problems(folder: Path, half: slice) -> list[str]:
    """Find the names of the problems with three heads."""
    return [
        name
        for name in jc.chainbench.NAMES[half]
        if jc.chainbench.load(folder, name).bank.num_heads == 3
    ]


def evaluate_problems(
    name: str, search: Any, problems: dict[str, Any], seeds: int
) -> dict[str, np.ndarray]:
    """Compute the regret and calibration of a search on all problems, `[M, S, ...]`."""
    start, rows = time.perf_counter(), []
    for problem_name, solved in problems.items():
        leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(search)]
        inputs = (
            problem_name,
            solved.loss["search"].tobytes(),
            describe_search(search),
            leaves,
            seeds,
        )
        make = partial(evaluate_search, search, solved, seeds)
        rows.append(
            keep(
                __file__,
                f"values-{name}-{problem_name}".replace(" ", "-"),
                inputs,
                make,
            )
        )
    print(f"{name:28} {time.perf_counter() - start:.0f} s", flush=True)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def evaluate_search(search: Any, solved: Any, seeds: int) -> dict[str, np.ndarray]:
    """Compute the regret and calibration of each run at each budget."""
    problem, truth = solved.tabular_problem(), find_truth(solved)
    track = run_agent(search, problem, seeds)
    loss = np.where(np.isfinite(track.best), track.best, np.median(solved.loss["search"]))
    out = {"regret": solved.regret(loss)}
    if isinstance(search, jc.CriticSearch):
        out["rank_open"] = np.array(
            [
                [correlate_open_prefixes(truth, *track.kept[s][b]) for b in range(3)]
                for s in range(seeds)
            ]
        )
        return out
    problem = problem.without_names()

    def predict(s: int, b: int) -> list[np.ndarray]:
        return split_by_depth(
            np.asarray(
                find_values(
                    use_tables(search),
                    track.kept[s][b],
                    jnp.asarray(truth.chains),
                    problem,
                )
            )
        )

    out["everywhere"], out["visited"] = np.zeros((2, seeds, len(BUDGETS), 3))
    for s in range(seeds):
        for b in range(len(BUDGETS)):
            predicted = predict(s, b)
            out["everywhere"][s, b] = compare_values(predicted, truth.best)
            out["visited"][s, b] = compare_values(
                predicted, truth.best, count_visits(track.visited[s][b])
            )
    if isinstance(search, jc.ActorCritic):
        sampled = [predict(s, -1) for s in range(seeds)]
        full = jnp.asarray(list_chains(problem.max_layers))
        policies = (
            find_policy(use_tables(search), track.kept[s][-1], full, problem) for s in range(seeds)
        )
        own = [evaluate_policy(np.asarray(policy), truth) for policy in policies]
        out["own"] = np.array(
            [
                compare_values(predicted, values)
                for predicted, values in zip(sampled, own, strict=True)
            ]
        )
        out["predicted"] = np.array([np.concatenate(levels) for levels in sampled[:2]])
        out["own_value"] = np.array([np.concatenate(levels) for levels in own[:2]])
    else:
        rows = predicted  # pyright: ignore[reportPossiblyUnboundVariable]
        out["predicted"] = np.concatenate(rows)[None]
    out["best"] = np.concatenate(truth.best)
    return out


def run_agent(search: Any, problem: jc.Problem, seeds: int) -> Track:
    """Run all seeds up to each budget."""
    search, keys = use_tables(search), jax.random.split(jax.random.key(0), seeds)
    by_budget = [
        jc.run_many(
            keys, search, problem, budget=budget, starts=None, keep_state=True, record="chains"
        )
        for budget in BUDGETS
    ]
    by_seed = [*zip(*by_budget, strict=True)]
    return Track(
        np.array([[result.best_loss for result in results] for results in by_seed]),
        [[read_critic(search, result.state) for result in results] for results in by_seed],
        [[list_recent(result) for result in results] for results in by_seed],
    )


def list_recent(result: jc.Result) -> np.ndarray:
    """List the chains of the last steps of a run."""
    scored = result.scored
    assert scored is not None
    return scored.chains[scored.step > scored.step.max(initial=0) - NUM_RECENT]


@jax.jit
def find_values(search: Any, state: Any, chains: Any, problem: jc.Problem) -> Any:
    return search.value(state, problem, chains)[:, :-1]


@jax.jit
def find_policy(search: Any, state: Any, chains: Any, problem: jc.Problem) -> Any:
    return jnp.exp(search.policy(state, problem, chains))


def read_critic(search: Any, state: Any) -> Any:
    """Return the part of a state that its critic needs to predict.

    For critic search, this is the open prefixes and their predicted compressed losses.
    """
    if isinstance(search, jc.CriticSearch):
        prefixes = state.prefixes
        return prefixes.chains, prefixes.prior_prediction + jnp.einsum(
            "dwi,di->dw", prefixes.inputs, state.weights
        )
    if isinstance(search, jc.QLearning):
        return state._replace(chains=None, reward=None, cache=None)
    return state._replace(opt_state=None, elite=None, cache=None, replay_buffer=None)


def run_control(search: Any, solved: Any, seeds: int) -> np.ndarray:
    """Compute the regret at each budget, `[S, B]`."""
    keys = jax.random.split(jax.random.key(0), seeds)
    # Searches begin with nothing, so that results show what they find themselves.
    problem = solved.tabular_problem()
    results = jc.run_many(keys, search, problem, budget=BUDGETS[-1], starts=None)
    loss = np.array([result.curve.at(BUDGETS) for result in results])
    return solved.regret(np.where(np.isfinite(loss), loss, np.median(solved.loss["search"])))


def summarize(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compute the IQM and interval of each metric, by budget."""
    out: dict[str, Any] = {"regret": estimate(arrays["regret"])}
    for key in ("everywhere", "visited"):
        if key in arrays:
            for i, metric in enumerate(("rank", "bias", "rmse")):
                out[f"{metric}_{key}"] = estimate(arrays[key][..., i])
    if "rank_open" in arrays:
        out["rank_open"] = estimate(arrays["rank_open"])
    if "own" in arrays:
        for i, metric in enumerate(("rank", "bias", "rmse")):
            out[f"{metric}_own"] = {str(BUDGETS[-1]): estimate_one(arrays["own"][..., i])}
    return out


def estimate(values: np.ndarray) -> dict[str, Any]:
    return {str(budget): estimate_one(values[:, :, b]) for b, budget in enumerate(BUDGETS)}


def estimate_one(values: np.ndarray) -> dict[str, float]:
    # A deterministic policy has no ranking: its correlation counts as 0.
    return jc.chainbench.stats.iqm(np.where(np.isfinite(values), values, 0.0))._asdict()


def show(cell: dict[str, float], digits: int = 2) -> str:
    return f"{cell['value']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"


def format_tables(summary: dict[str, Any]) -> str:
    """Format Markdown tables of the regret and of the calibration.

    Each cell is an IQM with its interval. The errors of ranks have no unit.
    """
    last = str(BUDGETS[-1])
    head = ["rule", *(f"regret at {budget:,}" for budget in BUDGETS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in summary.items():
        lines.append(
            f"| {name} | " + " | ".join(show(row["regret"][str(b)], 3) for b in BUDGETS) + " |"
        )
    head = [
        "critic",
        *(f"rank, all prefixes, {b:,}" for b in BUDGETS),
        *(f"rank, visited, {b:,}" for b in BUDGETS),
        f"bias / RMSE, all, {last}",
        f"bias / RMSE, visited, {last}",
        f"rank to own policy, {last}",
        f"bias / RMSE to own policy, {last}",
    ]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in summary.items():
        if "rank_everywhere" in row:
            cells = [
                show(row[f"rank_{where}"][str(b)])
                for where in ("everywhere", "visited")
                for b in BUDGETS
            ]
            has_unit = "ranks" not in name
            for where in ("everywhere", "visited"):
                cells.append(show_errors(row, where, last) if has_unit else "")
            cells.append(show(row["rank_own"][last]) if "rank_own" in row else "")
            cells.append(show_errors(row, "own", last) if has_unit and "rank_own" in row else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        elif "rank_open" in row:
            cells = [show(row["rank_open"][str(b)]) for b in BUDGETS]
            lines.append(
                f"| {name}, open prefixes | "
                + " | ".join(["", "", "", *cells, "", "", "", ""])
                + " |"
            )
    return "\n".join(lines)


def show_errors(row: dict[str, Any], where: str, budget: str) -> str:
    bias, rmse = (row[f"{metric}_{where}"][budget]["value"] for metric in ("bias", "rmse"))
    return f"{bias:+.2f} / {rmse:.2f}"


def draw(path: str, results: dict[str, dict[str, np.ndarray]], summary: dict[str, Any]) -> None:
    """Plot predicted against best reachable reward, and rank correlation against budget.

    Rewards are centered by problem.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, arrays in results.items():
        if "predicted" not in arrays or "ranks" in name:
            continue
        best = arrays["best"][:, None].repeat(arrays["predicted"].shape[1], axis=1)
        center = arrays["best"].mean(axis=1)[:, None, None]
        x, y = (best - center).ravel(), (arrays["predicted"] - center).ravel()
        edges = np.quantile(x, np.linspace(0, 1, 13))
        place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, 11)
        style = "--" if "pure" in name else "-"
        means = [[v[place == i].mean() for i in range(12)] for v in (x, y)]
        left.plot(*means, style, marker=".", label=name)
        ranks = [summary[name]["rank_everywhere"][str(b)]["value"] for b in BUDGETS]
        right.plot(BUDGETS, ranks, style, marker=".", label=name)
    low, high = left.get_xlim()
    left.plot([low, high], [low, high], color="black", linewidth=0.8)
    left.set(xlabel="best reachable log reward less its mean", ylabel="predicted, less the same")
    left.set_title(f"All prefixes after {BUDGETS[-1]:,} layer calls")
    right.set(xscale="log", xlabel="layer calls", ylabel="rank correlation with best reachable")
    right.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=150)


def tune(folder: Path) -> None:
    """Compare rates of TD(0.5) on one even-numbered problem of each data set."""
    names = find_problems(folder, slice(0, None, 2))
    chosen = [next(name for name in names if name.startswith(data)) for data in jc.chainbench.DATA]
    solved = [jc.chainbench.load(folder, name) for name in chosen]
    problems = [(one, one.tabular_problem()) for one in solved]
    for pure in ({}, PURE):
        for learning_rate, entropy_weight in ((3e-3, 0.5), (1e-2, 0.5), (3e-2, 0.5)):
            rates = {"learning_rate": learning_rate, "entropy_weight": entropy_weight}
            search = make_agent(lambda_=0.5, **pure, **rates)
            regret = np.array(
                [solved.regret(run_agent(search, problem, 5).best) for solved, problem in problems]
            )
            means = [
                jc.chainbench.stats.iqm(regret[:, :, b], num_resamples=2).value
                for b in range(len(BUDGETS))
            ]
            print("pure" if pure else "full", rates, np.round(means, 4), flush=True)


if __name__ == "__main__":
    main()
