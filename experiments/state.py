"""What should the state be? Tokens, weights, or what the prefix does to data.

    python experiments/chainbench.py && python experiments/state.py

The run takes about 40 minutes on one CPU core shared with other jobs. Most of this is compilation.
`--quick` runs the wine data with one state and 2 runs.

Expected result: a critic that is regressed on the summary ranks prefixes of unseen banks with a
correlation of 0.76. On gradients, the correlation is 0.32, and on tokens, weights, and activations
it is -0.13 to 0.00. As states of the actor-critic, however, all of them have about the same regret
from scratch (0.046 to 0.076 at 1,000 layer calls). Training on other banks does not help on an
unseen one at 300 and 1,000 layer calls. Beam search has a regret of 0.061 after 300; the best
state, gradients on a seen bank, has 0.100.

Only the observation of a prefix differs between the runs; the actor-critic, the problems, and the
cost are the same. The states are the tokens through a GRU (discrete); the number of layers and a
sketch of their weights (continuous); 12 numbers that summarize what the layers did to the data
(`jchain.agent.observations.observe`); a sketch of the activations of the data; a sketch of the
gradient of the best head's loss with respect to them; and combinations. An encoding that observes
activations applies layers while it samples and does not store their outputs, so it pays again for
layers of chains that it has already scored.

Each state starts from random parameters on the bank that is searched (`from scratch`), from
parameters that were trained by searching other banks of the same data (`unseen`), or from
parameters that were trained on other banks and this one (`seen`). `seen` and `unseen` have the same
number of banks and steps, and the layer calls of training are not counted. In addition, a critic is
regressed on each state. Its rank correlation with the best reachable loss is measured over prefixes
of three layers: a held-out fifth of the prefixes of the banks it was trained on (`held out`), and
all prefixes of unseen banks.

The problems are four odd-numbered ChainBench problems with three heads: for both wine and digits,
one of separately trained nets and one of a routed supernet. Each has 10 runs (split over 2
trainings, if there was any). Rates were not tuned for any state: they are the defaults of the
actor-critic.

Finished parts are kept. The script writes state.json, state.md, and state.png to
experiments/results.
"""

import dataclasses
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from controller import make_problem
from matplotlib.figure import Figure
from records import correlate, describe_machine, describe_search, keep, make_parser, write_results

import jchain as jc

BUDGETS = (300, 1000, 4000)
DATA = ("wine", "digits")
TESTED = ("independent-1", "routed-2")
KINDS = ("independent", "routed")
TRAINED = (300, 301, 303)  # seeds of banks with three heads and unrotated inputs

# A training uses 6 other banks, or the 2 tested banks and 4 others.
NUM_OTHERS = 6
NUM_TRAININGS = 2
NUM_VISITS, VISIT_STEPS = 2, 24
# Sizes of the regression.
NUM_ROUNDS, ROUND_STEPS, BATCH, RATE = 4, 50, 64, 3e-3
DEPTH = 3
NUM_SUMMARY, NUM_SKETCH = jc.agent.observations.NUM_FEATURES, jc.agent.observations.NUM_SKETCHED + 1
EVERYTHING = jc.agent.observations.Join(
    (
        jc.agent.observations.observe,
        jc.agent.observations.observe_activations,
        jc.agent.observations.observe_gradients,
    )
)


def observe_columns(first: int, last: int, problem: Any, hidden: Any, parent: Any) -> Any:
    """Observe only some of the features in the table."""
    observation = jc.chainbench.tabular.observe(problem, hidden, parent)
    return observation._replace(features=observation.features[first:last])


def observe_summary(problem: Any, hidden: Any, parent: Any) -> Any:
    return observe_columns(0, NUM_SUMMARY, problem, hidden, parent)


def observe_activations(problem: Any, hidden: Any, parent: Any) -> Any:
    return observe_columns(NUM_SUMMARY, NUM_SUMMARY + NUM_SKETCH, problem, hidden, parent)


def observe_gradients(problem: Any, hidden: Any, parent: Any) -> Any:
    return observe_columns(
        NUM_SUMMARY + NUM_SKETCH, NUM_SUMMARY + 2 * NUM_SKETCH, problem, hidden, parent
    )


def observe_both(problem: Any, hidden: Any, parent: Any) -> Any:
    return observe_columns(NUM_SUMMARY, NUM_SUMMARY + 2 * NUM_SKETCH, problem, hidden, parent)


STATES: dict[str, Any] = {
    "tokens": jc.TokenEncoding(),
    "weights": jc.WeightEncoding(),
    "summary": jc.ObservedEncoding(observe_summary),
    "activations": jc.ObservedEncoding(observe_activations),
    "gradients": jc.ObservedEncoding(observe_gradients),
    "activations, gradients": jc.ObservedEncoding(observe_both),
    "tokens, summary": jc.JointEncoding((jc.TokenEncoding(), jc.ObservedEncoding(observe_summary))),
}
CONTROLS: dict[str, Any] = {
    "evolution": jc.Evolution(population_size=64, tournament_size=16),
    "local search": jc.LocalSearch(),
    "beam search": jc.BeamSearch(width=4, max_width=256),
    "random search": jc.RandomSearch(),
}
STARTS = ("from scratch", "unseen", "seen")


class Bank(NamedTuple):
    """A problem with losses and observations from tables."""

    problem: jc.Problem
    loss: np.ndarray  # loss of all chains, [C]

    def regret(self, loss: Any) -> np.ndarray:
        best, middle = self.loss.min(), np.median(self.loss)
        return (np.where(np.isfinite(loss), loss, middle) - best) / (middle - best)


def main() -> None:
    parser = make_parser(
        __doc__, quick="wine, one state, few runs; nothing is written", has_folder=True
    )
    parser.add_argument(
        "--data",
        action="append",
        choices=jc.chainbench.DATA,
        help="run only this data set; repeatable",
    )
    parser.add_argument(
        "--state", action="append", choices=STATES, help="run only this state; repeatable"
    )
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    begin, data_names, seeds = time.perf_counter(), args.data or DATA, args.seeds
    states = {name: encoding for name, encoding in STATES.items() if name in (args.state or STATES)}
    if args.quick:
        data_names, seeds = ("wine",), 2
        states = {"summary": STATES["summary"]}
    tested, others = {}, {}
    for data in data_names:
        if args.quick:
            jc.chainbench.build(args.folder, [f"{data}-{kind}" for kind in TESTED])
        tested |= load_tested(args.folder, data)
        others[data] = make_others(data)
        print(f"{data}: tables at {time.perf_counter() - begin:.0f} s", flush=True)
    regret, ranks = {}, {}
    for name, encoding in states.items():
        agent = jc.ActorCritic(encoding, entry_features=jc.chainbench.tabular.entry_features)
        regret[name], ranks[name] = run_state(name, agent, tested, others, seeds)
        jax.clear_caches()
        print(f"{name:28} {time.perf_counter() - begin:.0f} s", flush=True)
    controls = {name: run_control(search, tested, seeds) for name, search in CONTROLS.items()}
    summary = summarize(regret, ranks, controls)
    table = format_tables(summary)
    print(table, flush=True)
    if args.quick:
        return
    result = {
        **describe_machine(),
        "config": describe_config(list(tested), list(others), seeds, states),
        "summary": summary,
        "of_each_problem": {
            name: {start: rows.mean(axis=1).round(5).tolist() for start, rows in by.items()}
            for name, by in regret.items()
        },
    }
    write_results(
        args.out, "state", result, table, partial(draw, summary=summary, states=list(states))
    )


def load_tested(folder: Path, data: str) -> dict[str, Bank]:
    """Load the tested problems of one data set, by name."""
    solved = [jc.chainbench.load(folder, f"{data}-{kind}") for kind in TESTED]
    return {one.name: tabulate(one.name, one.problem) for one in solved}


def make_others(data: str) -> list[Bank]:
    """Make the other banks of one data set, for training."""
    names = [(kind, seed) for seed in TRAINED for kind in KINDS][:NUM_OTHERS]
    return [
        tabulate(f"{data}-{kind}-{seed}", make_problem(data, kind, seed)) for kind, seed in names
    ]


def describe_config(
    problems: list[str], data_names: list[str], seeds: int, states: dict[str, Any]
) -> dict[str, Any]:
    banks = [f"{kind}-{seed}" for seed in TRAINED for kind in KINDS][:NUM_OTHERS]
    return {
        "problems": problems,
        "seeds": seeds,
        "budgets": BUDGETS,
        "banks": dict.fromkeys(data_names, banks),
        "training": {"trainings": NUM_TRAININGS, "visits": NUM_VISITS, "steps": VISIT_STEPS},
        "regression": {"rounds": NUM_ROUNDS, "steps": ROUND_STEPS, "chains": BATCH, "rate": RATE},
        "states": {name: " ".join(repr(encoding).split()) for name, encoding in states.items()},
    }


def tabulate(name: str, problem: jc.Problem) -> Bank:
    """Make the table of losses and of every feature that a state may observe."""
    arrays = [
        np.asarray(leaf).tobytes()
        for leaf in jax.tree.leaves((problem.bank.without_names(), problem.data))
    ]

    def make() -> dict[str, np.ndarray]:
        return {"table": np.asarray(jc.chainbench.tabular.tabulate(problem, EVERYTHING).data.y[0])}

    table = keep(__file__, f"state-{name}", arrays, make)["table"]
    loss = table[:, : problem.bank.num_heads]
    tables = jc.chainbench.tabular.make_problem(
        problem.bank, loss.reshape(-1), problem.max_layers, table[:, problem.bank.num_heads :]
    )
    return Bank(tables.without_names(), loss.reshape(-1))


def run_state(
    name: str,
    agent: jc.ActorCritic,
    tested: dict[str, Bank],
    others: dict[str, list[Bank]],
    seeds: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run the actor-critic from each start, and regress a critic.

    Returns:
      The regret by start, `[M, S, B]`, and the rank correlation by kind of bank, `[M, S]`.
    """
    regret: dict[str, Any] = {start: [] for start in STARTS}
    ranks: dict[str, Any] = {"held out": [], "unseen": []}
    for data, banks in others.items():
        mine = [
            bank for problem_name, bank in tested.items() if problem_name.startswith(f"{data}-")
        ]
        inputs = ([bank.loss.tobytes() for bank in (*mine, *banks)], describe_search(agent), seeds)
        title = f"state-{name}-{data}".replace(" ", "")
        for start in STARTS:
            make = partial(search_from, start, agent, mine, banks, seeds)
            arrays = keep(__file__, f"{title}-{start.replace(' ', '-')}", (*inputs, start), make)
            regret[start].extend(arrays["regret"])
        arrays = keep(__file__, f"{title}-ranks", inputs, partial(regress, agent, mine, banks))
        for where, values in ranks.items():
            values.extend(arrays[where])
    regrets, correlations = (
        {key: np.array(rows) for key, rows in by.items()} for by in (regret, ranks)
    )
    return regrets, correlations


def search_from(
    start: str, agent: jc.ActorCritic, mine: list[Bank], banks: list[Bank], seeds: int
) -> dict[str, np.ndarray]:
    """Compute the regret on the tested banks, starting from one kind of params."""
    keys = jax.random.split(jax.random.key(0), seeds)
    if start == "from scratch":
        params = jax.vmap(lambda key: init_params(key, agent, mine[0].problem))(keys)
    else:
        seen = banks if start == "unseen" else [*mine, *banks[: len(banks) - len(mine)]]
        # The same number of runs starts from each training.
        params = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, seeds // NUM_TRAININGS, axis=0), train(agent, seen)
        )
    return {"regret": search_all(agent, params, keys, mine)}


@jax.jit
def init_params(key: Any, agent: jc.ActorCritic, problem: jc.Problem) -> Any:
    return agent.init(key, problem).params


def train(agent: jc.ActorCritic, banks: list[Bank]) -> Any:
    """Return the params after searching these banks in turn, `[trainings, ...]`."""
    problems = [bank.problem for bank in banks] * NUM_VISITS
    keys = jax.random.split(jax.random.key(1), NUM_TRAININGS)
    return jax.vmap(
        lambda key: jc.agent.pretrain.pretrain_agent(key, agent, problems, num_steps=VISIT_STEPS)
    )(keys)


def search_all(agent: jc.ActorCritic, params: Any, keys: Any, banks: list[Bank]) -> np.ndarray:
    """Compute the regret at each budget, starting from these params, `[M, S, B]`."""
    rows = []
    for bank in banks:
        # Searches begin with nothing, so that results show what they find themselves.
        results = [
            jc.run(
                key,
                dataclasses.replace(agent, params=jax.tree.map(lambda leaf, i=i: leaf[i], params)),
                bank.problem,
                budget=BUDGETS[-1],
                starts=None,
            )
            for i, key in enumerate(keys)
        ]
        rows.append(bank.regret(np.array([result.curve.at(BUDGETS) for result in results])))
    return np.array(rows)


def regress(agent: jc.ActorCritic, mine: list[Bank], banks: list[Bank]) -> dict[str, np.ndarray]:
    """Compute the rank correlation of a critic that is regressed on other banks.

    It is computed over prefixes of three layers. The targets are their best reachable rewards.
    """
    chains, best_rewards = find_best_rewards(banks[0], [bank.loss for bank in (*banks, *mine)])
    is_out = np.random.default_rng(0).random(len(chains)) < 0.2
    keys = jax.random.split(jax.random.key(2), NUM_TRAININGS)
    states = jax.vmap(lambda key: init_state(key, agent, banks[0].problem))(keys)
    optimizer_state = jax.vmap(optax.adam(RATE).init)(states.params)
    fit_all = jax.vmap(fit, in_axes=(0, 0, 0, None, None, None, None))
    for i in range(NUM_ROUNDS):
        for j, bank in enumerate(banks):
            keys = jax.random.split(jax.random.key(100 * i + j), NUM_TRAININGS)
            rows = jnp.asarray(np.flatnonzero(~is_out))
            training_data = jnp.asarray(chains)[rows], jnp.asarray(best_rewards[j])[rows]
            states, optimizer_state = fit_all(
                keys, states, optimizer_state, agent, bank.problem, *training_data
            )
    found: dict[str, Any] = {"held out": [], "unseen": []}
    for j, bank in enumerate((*banks, *mine)):
        inputs = init_state(keys[0], agent, bank.problem).inputs
        values = jax.vmap(
            lambda s, bank=bank, inputs=inputs: find_value(
                s._replace(inputs=inputs), agent, bank.problem, jnp.asarray(chains)
            )
        )(states)
        rows = is_out if j < len(banks) else np.ones_like(is_out)
        rank = [
            correlate(np.asarray(one)[rows, DEPTH], best_rewards[j][rows, DEPTH]) for one in values
        ]
        found["held out" if j < len(banks) else "unseen"].append(rank)
    return {where: np.array(rows) for where, rows in found.items()}


@jax.jit
def init_state(key: Any, agent: jc.ActorCritic, problem: jc.Problem) -> Any:
    return agent.init(key, problem)._replace(cache=None)


@jax.jit
def find_value(state: Any, agent: jc.ActorCritic, problem: jc.Problem, chains: Any) -> Any:
    return agent.value(state, problem, chains)


@jax.jit
def fit(
    key: Any,
    state: Any,
    optimizer_state: Any,
    agent: jc.ActorCritic,
    problem: jc.Problem,
    chains: Any,
    best_rewards: Any,
) -> Any:
    """Run ROUND_STEPS steps of least squares on the prefixes of one bank."""
    state = state._replace(inputs=agent.init(key, problem).inputs)

    def step(carry: Any, key: Any) -> tuple[Any, None]:
        params, optimizer_state = carry
        rows = jax.random.randint(key, (BATCH,), 0, chains.shape[0])

        def loss_fn(params: Any) -> Any:
            found = agent.value(state._replace(params=params), problem, chains[rows])
            return jnp.mean((found[:, : DEPTH + 1] - best_rewards[rows]) ** 2)

        updates, optimizer_state = optax.adam(RATE).update(
            jax.grad(loss_fn)(params), optimizer_state
        )
        return (optax.apply_updates(params, updates), optimizer_state), None

    carry = state.params, optimizer_state
    (params, optimizer_state), _ = jax.lax.scan(step, carry, jax.random.split(key, ROUND_STEPS))
    return state._replace(params=params), optimizer_state


def find_best_rewards(bank: Bank, losses: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a chain through each prefix of three layers, and the best reachable log rewards.

    The rewards are one array per bank, `[12^3, 4]`, for the prefixes of each chain, and they are
    centered.
    """
    num_layers, num_heads = bank.problem.bank.num_layers, bank.problem.bank.num_heads
    chains = np.stack([*np.indices((num_layers,) * DEPTH).reshape(DEPTH, -1)], axis=1)
    chains = np.pad(chains, ((0, 0), (0, 2)), constant_values=-1)
    chains[:, DEPTH] = num_layers
    best_rewards = []
    for loss in losses:
        reward = (
            np.asarray(jc.agent.rewards.log_rewards(jnp.asarray(loss)))
            .reshape(-1, num_heads)
            .max(axis=1)
        )
        edges = np.cumsum([0, *(num_layers**d for d in range(DEPTH + 2))])
        levels = [reward[a:b] for a, b in pairwise(edges)]
        for d in range(DEPTH, -1, -1):
            levels[d] = np.maximum(levels[d], levels[d + 1].reshape(-1, num_layers).max(axis=1))
        columns = [np.repeat(levels[d], num_layers ** (DEPTH - d)) for d in range(DEPTH + 1)]
        best_rewards.append(np.stack(columns, axis=1) - levels[DEPTH].mean())
    return chains, best_rewards


def run_control(search: Any, tested: dict[str, Bank], seeds: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), seeds)
    rows = []
    for bank in tested.values():
        # Searches begin with nothing, so that results show what they find themselves.
        results = jc.run_many(keys, search, bank.problem, budget=BUDGETS[-1], starts=None)
        rows.append(bank.regret(np.array([result.curve.at(BUDGETS) for result in results])))
    return np.array(rows)


def summarize(
    regret: dict[str, dict[str, np.ndarray]],
    ranks: dict[str, dict[str, np.ndarray]],
    controls: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Compute the IQM and interval of the regret by state, start, and budget.

    Do the same for the rank correlations.
    """
    by_state = {
        name: {start: estimate(rows) for start, rows in by.items()} for name, by in regret.items()
    }
    by_control = {name: {"from scratch": estimate(rows)} for name, rows in controls.items()}
    by_rank = {
        name: {where: jc.chainbench.stats.iqm(values)._asdict() for where, values in by.items()}
        for name, by in ranks.items()
    }
    return {"regret": {**by_state, **by_control}, "ranks": by_rank}


def estimate(regret: np.ndarray) -> dict[str, Any]:
    return {
        str(budget): jc.chainbench.stats.iqm(regret[:, :, b])._asdict()
        for b, budget in enumerate(BUDGETS)
    }


def show(cell: dict[str, float], digits: int = 3) -> str:
    return f"{cell['value']:.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"


def format_tables(summary: dict[str, Any]) -> str:
    """Format Markdown tables of regret and rank correlation, with intervals.

    The regret is by state, start, and budget.
    """
    head = ["state", "start", *(f"regret at {budget:,}" for budget in BUDGETS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, by in summary["regret"].items():
        for start, row in by.items():
            label = start if name in summary["ranks"] else ""
            lines.append(
                f"| {name} | {label} | " + " | ".join(show(row[str(b)]) for b in BUDGETS) + " |"
            )
    lines += [
        "",
        "| critic regressed on | prefixes held out of seen banks | unseen banks |",
        "|---|---|---|",
    ]
    for name, by in summary["ranks"].items():
        lines.append(f"| {name} | {show(by['held out'], 2)} | {show(by['unseen'], 2)} |")
    return "\n".join(lines)


def draw(path: str, summary: dict[str, Any], states: list[str]) -> None:
    """Plot the regret by state and start at two budgets.

    Also plot the rank correlation of a regressed critic.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    places = np.arange(len(states))
    for axes, budget in zip(panels, BUDGETS[:2], strict=False):
        for i, start in enumerate(STARTS):
            cells = [summary["regret"][name][start][str(budget)] for name in states]
            plot_bars(axes, places + 0.25 * (i - 1), cells, start)
        for name, style in zip(CONTROLS, ("-", "--", ":", "-."), strict=True):
            value = summary["regret"][name]["from scratch"][str(budget)]["value"]
            axes.axhline(value, color="black", linestyle=style, linewidth=0.8, label=name)
        axes.set(title=f"Regret after {budget:,} layer calls", yscale="log")
    for i, where in enumerate(("held out", "unseen")):
        cells = [summary["ranks"][name][where] for name in states]
        label = "prefixes held out of seen banks" if where == "held out" else "unseen banks"
        plot_bars(panels[2], places + 0.25 * (i - 0.5), cells, label)
    panels[2].set(title="Rank correlation of a regressed critic")
    for axes in panels:
        axes.set_xticks(places, states, rotation=30, ha="right")
    panels[0].legend(fontsize=7)
    panels[2].legend(fontsize=7)
    figure.savefig(path, format="png", dpi=150)


def plot_bars(axes: Any, places: np.ndarray, cells: list[dict[str, float]], label: str) -> None:
    value, low, high = np.array(
        [[cell[key] for key in ("value", "low", "high")] for cell in cells]
    ).T
    axes.errorbar(
        places, value, [value - low, high - value], fmt="o", markersize=4, capsize=2, label=label
    )


if __name__ == "__main__":
    main()
