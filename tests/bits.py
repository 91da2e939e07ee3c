"""Fingerprint what jchain computes, to show that a change of its code changed no bit.

Run the script on the code before and after the change, on the same machine, then compare:

    PYTHONPATH=CODE python bits.py --out FILE.json
    python bits.py --compare BEFORE.json AFTER.json

The first command takes 4 to 5 minutes on two free cores, nearly all of it for compilation, and
exits with status 1 if a part failed. `--only train,run` runs only parts whose names start with
these prefixes. The second command lists the entries that differ and exits with status 1 if there
are any.

An entry has two hashes over all arrays of a result. "sha256" covers their names and their order,
and "values" covers neither, so a field that was only renamed or moved can be told from a changed
number. "number" is for people to read: the best loss of a search, or the sum of all finite numbers.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jchain as jc

Entries = dict[str, object]
Part = Callable[[], Entries]
Entry = dict[str, str | float]

KINDS = ("linearized", "activations", "weights", "nearest")
NUM_STEPS = 20
BUDGET = 300

PARTS: dict[str, Part] = {}


def add_part(name: str) -> Callable[[Part], Part]:
    """Register a function that computes the entries `name/...`."""

    def add(part: Part) -> Part:
        PARTS[name] = part
        return part

    return add


# Hashes


def fingerprint(tree: object) -> Entry:
    named, contents, total = hashlib.sha256(), [], 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        named.update(jax.tree_util.keystr(path).encode() + b"=" + content)
        contents.append(hashlib.sha256(content).hexdigest())
        if array.dtype.kind != "U":
            numbers = array.astype(np.float64)
            total += float(numbers[np.isfinite(numbers)].sum())
    number = float(getattr(tree, "best_loss", total))
    values = hashlib.sha256("".join(sorted(contents)).encode()).hexdigest()
    return {"sha256": named.hexdigest(), "values": values, "number": number}


def read_bytes(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8)


def record_bank(bank: jc.Bank) -> Entries:
    """Record weights, labels, and words separately, because words may change on purpose."""
    groups = [*bank.layers, *bank.heads]
    labels = {
        "names": list(bank.names),
        "parents": bank.parents,
        "num_steps": bank.num_steps,
        "tokens": [group.tokens for group in groups],
        "described": [bank.describe(np.array(parent)) for parent in bank.parents],
    }
    return {"weights": bank, "labels": labels, "origins": list(bank.origins)}


# Helpers of the parts


@functools.cache
def load_data(name: str) -> jc.data.Dataset:
    return jc.data.load(name, seed=0)


def load_sequences() -> jc.Batch:
    """Load digits as sequences of 8 rows of 8 pixels."""
    x, y = load_data("digits_8x8").train
    return jc.Batch(x[..., 0], y)


def init_params(module: nn.Module, seed: int, x: jax.Array) -> object:
    return module.init(jax.random.key(seed), x[:1])["params"]


@functools.cache
def train_independent() -> jc.Bank:
    return jc.train.independent(
        jax.random.key(1),
        load_data("digits").train,
        layer=jc.layers.ResidualMLP(64, hidden=16),
        head=jc.layers.DenseHead(10),
        num_nets=2,
        depth=3,
        num_steps=NUM_STEPS,
    )


def train_wine(layer: nn.Module, seed: int, num_layers: int) -> jc.Bank:
    return jc.train.routed(
        jax.random.key(seed),
        load_data("wine").train,
        layer=layer,
        head=jc.layers.DenseHead(3),
        num_layers=num_layers,
        depth=3,
        num_steps=NUM_STEPS,
    )


@functools.cache
def make_two_groups() -> jc.Bank:
    """Make a bank of seven layers of two modules, and two heads."""
    first = train_wine(jc.layers.ResidualMLP(13), 2, 4)
    second = train_wine(jc.layers.Dense(13), 3, 3)
    return jc.Bank.concat([first, second])


@functools.cache
def train_conv() -> jc.Bank:
    data, stem = load_data("digits_8x8").train, jc.layers.ConvStem(4)
    return jc.train.independent(
        jax.random.key(4),
        data,
        layer=jc.layers.ConvBlock(4),
        head=jc.layers.PoolHead(10),
        num_nets=2,
        depth=2,
        num_steps=4,
        stem=stem,
        stem_params=init_params(stem, 5, data.x),
    )


@functools.cache
def train_invertible() -> jc.Bank:
    layers = (jc.layers.InvertibleDense, jc.layers.AdditiveCoupling, jc.layers.InvertibleResidual)
    return jc.train.routed(
        jax.random.key(6),
        load_data("wine").train,
        layer=[layer(13) for layer in layers],
        head=jc.layers.DenseHead(3),
        num_layers=6,
        depth=3,
        num_heads=2,
        num_steps=NUM_STEPS,
    )


def make_one_group_problem() -> jc.Problem:
    return jc.Problem(train_independent(), load_data("digits").search, max_layers=3)


@functools.cache
def make_problem() -> jc.Problem:
    return jc.Problem(make_two_groups(), load_data("wine").search, max_layers=3)


def make_invertible_problem() -> jc.Problem:
    return jc.Problem(train_invertible(), load_data("wine").search, max_layers=3)


def draw_chains(problem: jc.Problem, num: int, min_layers: int = 0) -> np.ndarray:
    rng, bank = np.random.default_rng(num), problem.bank
    chains = np.full((num, problem.max_layers + 1), -1, np.int32)
    for chain in chains:
        length = int(rng.integers(min_layers, problem.max_layers + 1))
        chain[:length] = rng.integers(0, bank.num_layers, length)
        chain[length] = bank.num_layers + rng.integers(bank.num_heads)
    return chains


def apply_layers(bank: jc.Bank, tokens: Sequence[int], hidden: jax.Array) -> jax.Array:
    """Apply layers without a head, which `apply_chain` would need."""
    for token in tokens:
        (group,) = (group for group in bank.layers if token in group.tokens)
        made = group.module.apply({"params": bank.get_params(token)}, hidden)
        hidden = jnp.asarray(made)
    return hidden


# Banks


@add_part("data/load")
def hash_data() -> Entries:
    names = ("digits", "digits_8x8", "wine", "breast_cancer")
    entries: Entries = {name: load_data(name) for name in names}
    return entries | {"sized": jc.data.load("wine", seed=1, sizes=(40, 12, 10, 8))}


@add_part("train/independent")
def hash_independent() -> Entries:
    return record_bank(train_independent())


@add_part("train/routed")
def hash_routed() -> Entries:
    """Hash a routed bank of layers of two modules that take turns, and two heads."""
    bank = jc.train.routed(
        jax.random.key(7),
        load_data("wine").train,
        layer=[jc.layers.ResidualMLP(13), jc.layers.Dense(13)],
        head=jc.layers.DenseHead(3),
        num_layers=5,
        depth=3,
        num_heads=2,
        num_steps=2 * NUM_STEPS,
        optimizer=optax.sgd(0.1),
    )
    return record_bank(bank)


@add_part("train/snapshots")
def hash_snapshots() -> Entries:
    bank = jc.train.snapshots(
        jax.random.key(8),
        load_data("digits").train,
        layer=jc.layers.Dense(64),
        head=jc.layers.DenseHead(10),
        num_snapshots=3,
        depth=2,
        num_steps=NUM_STEPS,
    )
    return record_bank(bank)


@add_part("train/random")
def hash_random() -> Entries:
    bank = jc.train.random(
        jax.random.key(9),
        load_sequences(),
        layer=jc.layers.TransformerBlock(8, 2),
        head=jc.layers.DenseHead(10),
        num_layers=4,
        depth=2,
        num_heads=2,
        num_steps=NUM_STEPS,
    )
    chain = np.array([1, 3, 5])
    return record_bank(bank) | {"outputs": jc.apply_chain(bank, chain, load_sequences().x[:20])}


@add_part("train/conv")
def hash_conv() -> Entries:
    return record_bank(train_conv())


@add_part("train/conv_routed")
def hash_conv_routed() -> Entries:
    data = load_data("digits_8x8").train
    bank = jc.train.routed(
        jax.random.key(10),
        data,
        layer=[jc.layers.ConvBlock(1), jc.layers.ConvBlock(1, depth=2)],
        head=jc.layers.ConvHead(10, pool=2),
        num_layers=3,
        depth=2,
        num_steps=4,
    )
    return record_bank(bank)


@add_part("train/invertible")
def hash_invertible() -> Entries:
    return record_bank(train_invertible())


@add_part("bank/build")
def hash_built_banks() -> Entries:
    """Hash the results of `stack`, `concat`, and `take`."""
    x = load_data("wine").train.x
    layers = [jc.layers.Dense(13, activation=nn.tanh), jc.layers.ResidualMLP(13)]
    head = jc.layers.DenseHead(3)
    stacked = jc.Bank.stack(
        layers,
        [init_params(layer, i, x) for i, layer in enumerate(layers)],
        head,
        [init_params(head, 2, x)],
        names=["a", "b"],
    )
    joined = jc.Bank.concat([stacked, make_two_groups()])
    banks = {"stack": stacked, "concat": joined, "take": make_two_groups().take([5, 0, 4], [8])}
    return {
        f"{name}/{key}": value
        for name, bank in banks.items()
        for key, value in record_bank(bank).items()
    }


@add_part("bank/save")
def hash_saved_banks() -> Entries:
    banks = {"two_groups": make_two_groups(), "conv": train_conv(), "inverse": train_invertible()}
    entries: Entries = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, bank in banks.items():
            path = Path(folder) / f"{name}.safetensors"
            bank.save(path)
            entries[f"{name}/file"] = read_bytes(path)
            loaded = record_bank(jc.Bank.load(path))
            entries |= {f"{name}/{key}": value for key, value in loaded.items()}
    return entries


# Evaluation


@add_part("evaluate/one_group")
def hash_one_group_evaluation() -> Entries:
    problem = make_one_group_problem()
    few, many = draw_chains(problem, 8), draw_chains(problem, 200)
    return {
        "evaluate": jc.evaluate(problem, many),
        "bfloat16": jc.evaluate(problem, many, dtype=jnp.bfloat16),
        "memory_limit": jc.evaluate(problem, many, memory_limit=2**21),
        "all": jc.evaluate_all(problem),
        "prefixes": jc.evaluate_prefixes(problem, few),
        "apply_chain": [jc.apply_chain(problem.bank, c, problem.data.x) for c in few[:3]],
    }


@add_part("evaluate/two_groups")
def hash_two_group_evaluation() -> Entries:
    problem = make_problem()
    chains = draw_chains(problem, 100)
    return {
        "evaluate": jc.evaluate(problem, chains),
        "all": jc.evaluate_all(problem),
        "prefixes": jc.evaluate_prefixes(problem, chains[:20]),
        "apply_chain": [jc.apply_chain(problem.bank, c, problem.data.x) for c in chains[:3]],
    }


@add_part("evaluate/prices")
def hash_priced_evaluation() -> Entries:
    bank, data = make_two_groups(), load_data("wine").search
    one = jc.Problem(bank, data, max_layers=3, min_layers=2, layer_cost=0.01)
    cost = np.linspace(0.0, 0.1, bank.num_layers)
    each = jc.Problem(bank, data, max_layers=2, min_layers=1, layer_cost=cost)
    return {"one": jc.evaluate_all(one), "each": jc.evaluate_all(each)}


@add_part("evaluate/conv")
def hash_conv_evaluation() -> Entries:
    data = load_data("digits_8x8").search
    problem = jc.Problem(train_conv(), data, max_layers=3)
    chains = draw_chains(problem, 40)
    return {
        "evaluate": jc.evaluate(problem, chains),
        "prefixes": jc.evaluate_prefixes(problem, chains[:10]),
        "apply_chain": jc.apply_chain(problem.bank, chains[0], data.x),
    }


# Searches


def make_agent() -> jc.ActorCritic:
    encoding = jc.TokenEncoding(features=8)
    return jc.ActorCritic(encoding=encoding, num_chains=6, num_elites=4)


SEARCHES: dict[str, Callable[[], jc.Search]] = {
    "RandomSearch": lambda: jc.RandomSearch(),
    "LocalSearch": lambda: jc.LocalSearch(),
    "Evolution": lambda: jc.Evolution(population_size=16, tournament_size=4),
    "BeamSearch": lambda: jc.BeamSearch(max_width=8),
    "MCTS": lambda: jc.MCTS(num_simulations=8),
    "QLearning": lambda: jc.QLearning(),
    "CriticSearch": lambda: jc.CriticSearch(width=64),
    "LinearizedSearch": lambda: jc.LinearizedSearch(),
    "TargetPropagation": lambda: jc.TargetPropagation(),
    "ActorCritic": lambda: jc.ActorCritic(),
    "ActorCritic_weights": lambda: jc.ActorCritic(encoding=jc.WeightEncoding()),
    "ActorCritic_replays": lambda: jc.ActorCritic(num_replays=4),
    "ActorCritic_scores": lambda: jc.ActorCritic(score_kind="linearized"),
}


def run_search(name: str) -> Entries:
    result = jc.run(jax.random.key(20), SEARCHES[name](), make_problem(), budget=BUDGET)
    return {"result": result}


for search_name in SEARCHES:
    add_part(f"run/{search_name}")(functools.partial(run_search, search_name))


@add_part("run/SuffixBeamSearch")
def run_suffix_search() -> Entries:
    # The class has another name in older versions.
    name = "SuffixBeamSearch" if hasattr(jc, "SuffixBeamSearch") else "MeetInTheMiddle"
    make_search: Callable[..., jc.Search] = getattr(jc, name)
    search, problem = make_search(width=4, num_candidates=4), make_invertible_problem()
    return {"result": jc.run(jax.random.key(21), search, problem, budget=BUDGET)}


@add_part("run/prices")
def run_with_prices() -> Entries:
    bank, data = make_two_groups(), load_data("wine").search
    problem = jc.Problem(bank, data, max_layers=3, min_layers=1, layer_cost=0.02)
    return {
        "result": jc.run(
            jax.random.key(23),
            jc.LocalSearch(num_chains=4),
            problem,
            budget=BUDGET,
            starts=draw_chains(problem, 2, min_layers=1),
        )
    }


@add_part("run_many/LocalSearch")
def run_many_searches() -> Entries:
    keys = jax.random.split(jax.random.key(24), 2)
    results = jc.run_many(keys, jc.LocalSearch(), make_problem(), budget=BUDGET)
    return {str(i): result for i, result in enumerate(results)}


def train_agent(name: str) -> Entries:
    """Record the agent's numbers after three steps; a best chain would hide changed last bits."""
    agent, problem = AGENTS[name](), make_problem()
    state, step = agent.init(jax.random.key(25), problem), jax.jit(agent.step)
    infos: list[object] = []
    for key in jax.random.split(jax.random.key(26), 3):
        state, info = step(key, state, problem)
        infos.append(info)
    chains = jnp.asarray(draw_chains(problem, 10))
    return {
        "infos": infos,
        "policy": agent.policy(state, problem, chains),
        "value": agent.value(state, problem, chains),
    }


AGENTS: dict[str, Callable[[], jc.ActorCritic]] = {
    "tokens": lambda: make_agent(),
    "weights_replays": lambda: jc.ActorCritic(
        encoding=jc.WeightEncoding(features=8), num_chains=6, num_elites=4, num_replays=4
    ),
}
for agent_name in AGENTS:
    add_part(f"agent/{agent_name}")(functools.partial(train_agent, agent_name))


# Gradients


@add_part("gradient/edits")
def hash_edit_scores() -> Entries:
    problem = make_problem()
    full, short = np.array([0, 5, 2, 7]), np.array([4, 8, -1, -1])
    entries: Entries = {}
    for kind in KINDS:
        entries[f"swap/{kind}"] = jc.swap_scores(problem, full, kind)
        entries[f"edits/{kind}"] = jc.gradient.score_edits(problem, short, kind)
    return entries


@add_part("gradient/moves")
def hash_move_scores() -> Entries:
    problem = make_one_group_problem()
    chain = np.array([0, 5, 2, 7])
    return {
        "moves": jc.gradient.score_moves(make_problem(), chain, num_best=3, num_pairs=8),
        "weight_gradients": jc.gradient.weight_gradients(problem, np.array([1, 3, 7, -1])),
    }


# Inverses


@add_part("inverse/pull_back")
def hash_pull_back() -> Entries:
    bank, x = train_invertible(), load_data("wine").search.x
    logits = jc.apply_chain(bank, np.array([0, 1, 2, 6]), x)
    return {
        "layers": jc.pull_back(bank, np.array([0, 4, 2]), x),
        "head": jc.pull_back(bank, np.array([1, 5, 7]), logits),
        "near": jc.pull_back(bank, np.array([3, 6]), logits, near=x),
    }


@add_part("inverse/meet_in_the_middle")
def hash_meetings() -> Entries:
    bank, x = train_invertible(), load_data("wine").search.x
    exact = apply_layers(bank, [4, 0, 2, 5], x)
    noise = 0.01 * np.random.default_rng(0).standard_normal(exact.shape).astype(np.float32)
    return {
        "all": jc.meet_in_the_middle(bank, x, exact, 2, 3),
        "exact": jc.meet_in_the_middle(bank, x, exact, 4, num_candidates=30),
        "noisy": jc.meet_in_the_middle(
            bank, x, exact + noise, 4, 2, num_candidates=30, tolerance=0.01
        ),
    }


# Updates


POLICIES: dict[str, Callable[[], jc.updates.Policy]] = {
    "Frozen": lambda: jc.updates.Frozen(),
    "TuneFound": lambda: jc.updates.TuneFound(num_steps=5),
    "CloneThenTune": lambda: jc.updates.CloneThenTune(num_rounds=2, num_steps=3),
    "SharedUpdates": lambda: jc.updates.SharedUpdates(num_updates=2),
}


def run_policy(name: str) -> Entries:
    search = make_agent() if name == "SharedUpdates" else jc.LocalSearch()
    train = load_data("wine").train
    outcome = POLICIES[name]().run(
        jax.random.key(30), search, make_problem(), train, budget=3 * BUDGET
    )
    bank = record_bank(outcome.bank)
    return bank | {"result": outcome.result, "update_calls": outcome.update_calls}


for policy_name in POLICIES:
    add_part(f"updates/{policy_name}")(functools.partial(run_policy, policy_name))


@add_part("updates/TuneFound_conv")
def tune_conv() -> Entries:
    """Tune convolutions, for which there is a separate program."""
    data = load_data("digits_8x8")
    problem = jc.Problem(train_conv(), data.search, max_layers=2)
    policy, search = jc.updates.TuneFound(num_steps=2), jc.LocalSearch()
    outcome = policy.run(jax.random.key(31), search, problem, data.train, budget=80)
    return {"bank": outcome.bank, "result": outcome.result}


# Pretrained transformers


LLAMA = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 2}
VIT = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
VIT |= {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
GPT2 = {"vocab_size": 11, "n_embd": 8, "n_layer": 4, "n_head": 2, "n_positions": 16}
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "qwen3": LLAMA | {"head_dim": 4}, "gpt_neox": LLAMA}
CONFIGS |= {"vit": VIT}


def write_config(folder: Path, family: str) -> Path:
    folder.mkdir()
    options = {"model_type": family} | CONFIGS[family]
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def make_inputs(family: str) -> jax.Array:
    if family == "vit":
        return load_data("digits_8x8").search.x[:4]
    return jnp.asarray(np.random.default_rng(1).integers(0, 11, (6, 9)))


def hash_family(family: str) -> Entries:
    """Hash a model of random weights, its export, and the model read back from the export."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = write_config(Path(name) / "new", family), Path(name) / "out"
        bank = jc.hub.random_bank(jax.random.key(40), folder)
        first, *_, head = bank.parents[0]
        chain, x = np.array([first, first + 2, first + 1, first + 1, head]), make_inputs(family)
        jc.hub.export(bank, chain, folder, out)
        files = {path.name: read_bytes(path) for path in sorted(out.glob("*.safetensors"))}
        loaded = jc.hub.load(out, name="again")
        entries = {f"loaded/{key}": value for key, value in record_bank(loaded).items()}
        entries |= {f"file/{key}": value for key, value in files.items()}
        entries["file/config.json"] = read_bytes(out / "config.json")
        entries["outputs"] = jc.apply_chain(bank, chain, x)
        entries["loaded/outputs"] = jc.apply_chain(loaded, np.array(loaded.parents[0]), x)
    return entries | record_bank(bank)


for family_name in CONFIGS:
    add_part(f"hub/{family_name}")(functools.partial(hash_family, family_name))


@add_part("hub/evaluate")
def evaluate_transformer() -> Entries:
    tokens = make_inputs("gpt2")
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(Path(name) / "new", "gpt2")
        bank = jc.hub.random_bank(jax.random.key(41), folder)
        jc.hub.export(bank, bank.parents[0], folder, Path(name) / "out")
        pinned = jc.hub.load(Path(name) / "out", name="pinned", pinned=(1, 1))
    data = jc.Batch(tokens[:, :-1], tokens[:, 1:])
    problem = jc.Problem(bank, data, max_layers=4)
    inner = jc.Problem(pinned, data, max_layers=2)
    return {
        "evaluate": jc.evaluate(problem, draw_chains(problem, 20)),
        "pinned": jc.evaluate_all(inner),
        "pinned/weights": pinned,
        "search": jc.run(jax.random.key(42), jc.BeamSearch(max_width=4), problem, budget=40),
    }


# Commands


def compute(prefixes: Sequence[str]) -> dict[str, Entry | str]:
    """Compute the entries of the parts whose names start with a prefix; of all if none is given."""
    entries: dict[str, Entry | str] = {}
    for name, part in PARTS.items():
        if prefixes and not name.startswith(tuple(prefixes)):
            continue
        began = time.perf_counter()
        try:
            found = {f"{name}/{key}": fingerprint(tree) for key, tree in part().items()}
        except Exception as error:  # One failure must not hide the results of the other parts.
            traceback.print_exc()
            entries[name] = f"error: {type(error).__name__}: {error}"
        else:
            entries |= found
        print(f"{time.perf_counter() - began:6.1f} s  {name}", file=sys.stderr, flush=True)
    return entries


def find_difference(before: Entry | str | None, after: Entry | str | None) -> str | None:
    """Describe how two entries differ; None if they are equal."""
    if isinstance(before, str) or isinstance(after, str):
        return " | ".join(entry for entry in (before, after) if isinstance(entry, str))
    if before is None or after is None:
        return "only in the second file" if before is None else "only in the first file"
    if before["sha256"] == after["sha256"]:
        return None
    if before["values"] == after["values"]:
        return "other names or another order, same values"
    return f"other values: {before['number']!r} and {after['number']!r}"


def compare(first: Path, second: Path) -> int:
    before, after = (json.loads(path.read_text()) for path in (first, second))
    names = list(dict.fromkeys([*before, *after]))
    found = {name: find_difference(before.get(name), after.get(name)) for name in names}
    different = {name: words for name, words in found.items() if words is not None}
    for name, words in different.items():
        print(f"{name}: {words}")
    print(f"{len(names) - len(different)} of {len(names)} entries are equal")
    return 1 if different or not names else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fingerprint what jchain computes.")
    parser.add_argument("--out", type=Path, help="write the entries to this JSON file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="compare two files")
    parser.add_argument("--only", default="", help="beginnings of the names of parts, with commas")
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    print(f"jchain of {jc.__file__}", file=sys.stderr)
    began = time.perf_counter()
    entries = compute([prefix for prefix in args.only.split(",") if prefix])
    text = json.dumps(entries, indent=1) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")
    errors = [name for name, entry in entries.items() if isinstance(entry, str)]
    seconds = time.perf_counter() - began
    print(f"{len(entries)} entries in {seconds:.0f} s, failed: {errors}", file=sys.stderr)
    return 1 if errors or not entries else 0


if __name__ == "__main__":
    sys.exit(main())
