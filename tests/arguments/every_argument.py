"""A valid call of every public function, and wrong values for each of its arguments.

Run as a script, it tries them all and prints, as JSON, the outcome of each. The tests run it in
another process: here, they check types first.
"""

import contextlib
import inspect
import json
import math
import sys
import tempfile
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.axes
import numpy as np
import optax
from beartype.door import is_bearable

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoints import QUESTION, TEXT, make_checkpoint
from small_searches import INVERTIBLE, SEARCHES
from test_signatures import CALLABLES

import jchain as jc
from jchain.agent import observations
from jchain.agent.pretrain import make_training_set
from jchain.agent.rewards import plain_rewards
from jchain.engine import score_cache
from jchain.engine.prefix_sharing import sort_chains
from jchain.gradient import trends
from jchain.updates import tune

# The first two start other processes or download; the last two make classes.
LEFT_OUT = ("initialize", "prepare", "static", "pytree_dataclass")
# Calls that are not valid as they stand, but whose wrong values can be told from valid ones.
INVALID = (
    "step", "start", "value", "policy", "refresh", "apply", "check", "load", "load_images", "read",
    "Fused.evaluate", "make_bank", "train_plain_net", "tabular.observe",
)  # fmt: skip


def make_world(folder):
    """Make the objects that valid calls use."""
    data, key = jc.data.load("wine"), jax.random.key(0)
    small = jc.Batch(data.search.x[:6], data.search.y[:6])
    layer, inverse = jc.layers.ResidualMLP(13, hidden=3), jc.layers.InvertibleDense(13)
    head = jc.layers.DenseHead(3)
    layers, inverses, heads = (
        [module.init(key, small.x)["params"]] * 2 for module in (layer, inverse, head)
    )
    bank = jc.Bank.stack(layer, layers, head, heads[:1])
    invertible = jc.Bank.stack(inverse, inverses, head, heads[:1])
    model = make_checkpoint(folder / "model")
    for name, text in (("text.txt", TEXT), ("questions.jsonl", f"{json.dumps(QUESTION)}\n" * 8)):
        (folder / name).write_text(text)
    bank.save(folder / "bank")
    problem = jc.Problem(bank, small, 2)
    result = jc.run(key, jc.RandomSearch(4), problem, budget=20, record="chains")
    num_chains = jc.chain.ChainSpace(2, 1, 4).num_chains
    losses = np.random.default_rng(0).random(num_chains).astype(np.float32)
    splits = dict.fromkeys(("search", "select", "test"), losses)
    features = np.zeros((15, 3), np.float32)
    solved = jc.chainbench.SolvedProblem("wine", bank, data, splits, splits, features)
    return {
        "folder": folder, "data": data, "batch": small, "layer": layer, "head": head, "key": key,
        "bank": bank, "invertible": invertible, "model": model, "problem": problem,
        "solvable": jc.Problem(invertible, small, 2), "result": result, "solved": solved,
        "chain": jnp.array([0, 2, -1]), "chains": jnp.array([[0, 2, -1], [1, 0, 2]]),
        "loss": jnp.array([0.5, 0.7]), "hidden": small.x, "token": jnp.array(0),
        "parents": jnp.array([[0, 1, 2]]),
    }  # fmt: skip


def make_calls(w):
    """Return a function and the arguments of a valid call, for each public function."""
    key, bank, problem, data, batch = (w[k] for k in ("key", "bank", "problem", "data", "batch"))
    chain, chains, loss, hidden, token = (
        w[k] for k in ("chain", "chains", "loss", "hidden", "token")
    )
    folder, model, solved, result = (w[k] for k in ("folder", "model", "solved", "result"))
    outputs, classes = jnp.zeros((6, 3)), jnp.zeros((6, 3, 4, 5))
    on = {"problem": problem, "chain": chain}
    many = {"problem": problem, "chains": chains}
    engine = {"dtype": None, "memory_limit": None, "mesh": None, "plan": None}
    after = {"problem": problem, "hidden": hidden, "parent": hidden}
    split = {"pinned": (0, 0), "sublayers": False, "alternate": False}
    files = {"adapter": None, "dtype": None, "name": None} | split
    text = {"checkpoint": model, "seed": 0, "sizes": None, "most": None}
    training = {
        "key": key, "data": data.train, "layer": w["layer"], "head": w["head"], "num_steps": 0,
        "depth": 1, "optimizer": optax.sgd(0.1), "batch_size": 4, "stem": None, "stem_params": None,
        "loss_fn": optax.softmax_cross_entropy_with_integer_labels,
    }  # fmt: skip
    sized = training | {"num_layers": 2, "num_heads": 1}
    running = {
        "search": jc.RandomSearch(4), "problem": problem, "budget": 20, "target_loss": -math.inf,
        "num_finalists": 2, "progress": False, "mesh": None, "starts": None, "save_every": 30.0,
        "checkpoint_dir": None, "max_seconds": None, "callback": None, "record_fn": None,
        "record": None, "keep_state": False,
    }  # fmt: skip
    pairs = {"inputs": hidden, "outputs": hidden, "depth": 1}
    sizes = {"num_probes": 4, "num_sketch": 4, "num_candidates": 8, "top_k": 1}
    chosen = {"tolerance": None, "num_forward": None, "match_fn": None, "memory_limit": None}
    observed = observations.observe_root(observations.observe, problem)
    trend, cache, state = trends.init(problem), score_cache.init(problem), jc.env.reset(problem)
    critic = jc.Critic(np.zeros(1), jnp.zeros(1), jnp.ones(1), 1)
    population = sort_chains(chains, 2)[0]
    said = jc.hub.add_parent(bank, batch, parent=[0, 2])
    tuned = {"key": key, "problem": problem, "optimizer": optax.sgd(0.1)}
    space, group = problem.space, bank.layers[0]
    solve = {"problem": w["solvable"], "chain": chain, "step_size": 1.0, "is_exact": False}
    solve |= {"is_projected": True}
    policy_run = {"key": key, "search": jc.RandomSearch(4), "problem": problem, "train": data.train}
    policy_run |= {"budget": 20, "num_finalists": 2, "starts": None}
    saving = {"progress": False, "checkpoint_dir": None, "save_every": 30.0, "max_seconds": None}
    stack = {
        "layer": w["layer"], "layer_params": [bank.get_params(0)], "head": w["head"],
        "head_params": [bank.get_params(2)], "stem": None, "stem_params": None,
        "input_shape": (13,),
        "names": None, "origins": None, "parents": (), "num_steps": 0, "stages": None,
        "head_stages": None,
    }  # fmt: skip
    calls = {
        "jc.agent.entry_features": {"bank": bank, "size": 4},
        "align.match_units": {"bank": bank, "token": 0},
        "align.shuffle": {"key": key, "bank": bank, "token": 0},
        "jc.apply_chain": {"bank": bank, "chain": chain, "x": batch.x},
        "jc.chainbench.build": {"folder": folder / "solved", "names": []},
        "jc.chainbench.describe": {"solved": solved},
        "jc.chainbench.find_local_optima": {"solved": solved},
        "jc.check_search": {"search": jc.RandomSearch(4), "problem": problem, "num_steps": 1},
        "jc.cost": {"bank": bank, "chains": chains, "x": None},
        "jc.engine.choose_plan": {
            "problem": problem, "hidden": hidden, "num_chains": 2, "memory_limit": None,
            "backend": "cpu",
        },
        "jc.engine.compiler_options": {"backend": "cpu"},
        "jc.evaluate": many | engine,
        "jc.evaluate_all": {"problem": problem} | engine,
        "jc.evaluate_prefixes": {"problem": problem, "chains": chains} | engine,
        "jc.evaluate_staged": {
            "problem": problem, "chains": chains, "fractions": (0.5, 1), "keep": 0.5
        },
        "jc.explain_plan": many | engine,
        "jc.front": {"results": result},
        "jc.gradient.score_edits": on | {
            "kind": "linearized", "learning_rate": 0.01, "num_products": None
        },
        "jc.gradient.score_moves": on | {
            "num_best": 1, "num_pairs": 1, "tokens": None, "num_products": None
        },
        "jc.gradient.swap_scores": on | {"kind": "linearized"},
        "jc.gradient.weight_gradients": on,
        "jc.hub.add_parent": {"bank": bank, "data": batch, "parent": [0, 2], "top_k": 2},
        "jc.hub.choice_accuracy": {"outputs": classes, "y": jnp.zeros((6, 3, 4), int)},
        "jc.hub.choice_loss": {"outputs": classes, "y": jnp.zeros((6, 3, 4), int)},
        "jc.hub.export": {
            "bank": None, "chain": [0, 1, 2], "source": model, "out": folder / "out",
            "facts": None, "scores": None, "max_shard_size": 10**9,
        },
        "jc.hub.kl_to_parent": {"outputs": jnp.zeros((6, 3)), "y": said.y},
        "jc.hub.load": {"path": model} | files,
        "jc.hub.load_choices": text | {"file": folder / "questions.jsonl", "length": None},
        "jc.hub.load_images": text | {"name": "mnist", "data_dir": folder},
        "jc.hub.load_many": {"paths": [model], "dtype": None, "names": None} | split,
        "jc.hub.load_text": text | {"files": [folder / "text.txt"], "length": 8, "field": None},
        "jc.hub.mixed_loss": {"parts": [(jc.hub.next_token_loss, 1.0)]},
        "jc.hub.next_token_accuracy": {"outputs": classes[0], "y": jnp.zeros((3, 4), int)},
        "jc.hub.next_token_loss": {"outputs": classes[0], "y": jnp.zeros((3, 4), int)},
        "jc.hub.random_bank": {"key": key, "path": model, "name": "model"} | split,
        "images.read": {"name": "mnist", "data_dir": folder},
        "jc.inverse.condition_numbers": {"bank": w["invertible"], "chain": chain, "x": batch.x},
        "jc.inverse.invert_layers": {"bank": w["invertible"]},
        "jc.inverse.meet_in_the_middle": {"bank": w["invertible"], **pairs, **sizes, **chosen},
        "jc.inverse.pull_back": {
            "bank": w["invertible"], "suffix": chain, "outputs": outputs, "near": None
        },
        "jc.inverse.reach_target": {
            "problem": w["solvable"], "token": token + 2, "hidden": hidden, "step_size": 1.0
        },
        "jc.inverse.target_logits": {"labels": batch.y, "num_classes": 3, "confidence": 0.9},
        "jc.inverse.target_outputs": {
            "outputs": outputs, "y": batch.y, "confidence": 0.9,
            "loss_fn": optax.softmax_cross_entropy_with_integer_labels,
        },
        "jc.pick_best": many | {"data": batch},
        "jc.plot.block_runs": {"changes": np.zeros((2, 2)), "labels": None, "ax": None},
        "jc.plot.chains": {"bank": bank, "chains": chains, "labels": None, "ax": None},
        "jc.plot.curve": {"results": result, "label": None, "ax": None},
        "jc.plot.front": {"results": result, "label": None, "ax": None},
        "jc.plot.policy": {"bank": bank, "probabilities": np.full((3, 3), 0.3), "ax": None},
        "jc.plot.swap_scores": {
            "bank": bank, "chain": chain, "scores": np.zeros((3, 2)), "ax": None
        },
        "jc.predict": on,
        "jc.pretrain_agent": {
            "key": key, "agent": SEARCHES["ActorCritic"], "problems": [problem], "num_steps": 1
        },
        "jc.pretrain_critic": {
            "key": key, "problems": [make_training_set(problem)], "num_steps": 1, "width": 2,
            "learning_rate": 1e-3, "weight_decay": 0.0,
        },
        "jc.run": {"key": key} | running,
        "jc.run_many": {"keys": key[None]} | running,
        "jc.tasks.damage": {"images": np.zeros((1, 8, 8)), "faults": ["skewed"]},
        "jc.tasks.make": {"name": "repair", "seed": 0, "sizes": (40, 20, 20, 20)},
        "jc.tasks.make_repair": {"seed": 0, "faults": None, "sizes": (40, 20, 20, 20)},
        "jc.token_costs": {"bank": bank, "unit": "params", "x": None},
        "observations.compress_loss": {"loss": loss},
        "observations.lowest": {"loss": loss},
        "observations.observe": after,
        "observations.observe_activations": after,
        "observations.observe_gradients": after,
        "observations.observe_chain": {"observe": observations.observe} | on,
        "observations.observe_next": {
            "observe": observations.observe, "problem": problem, "observed": observed,
            "token": token,
        },
        "observations.observe_root": {"observe": observations.observe, "problem": problem},
        "pretrain.make_training_set": {"problem": problem},
        "pretrain.observe_prefixes": {"problem": problem},
        "rewards.compute_rewards": {"reward_fn": plain_rewards, "loss": loss},
        "rewards.log_rewards": {"loss": loss},
        "rewards.plain_rewards": {"loss": loss},
        "rewards.rank_rewards": {"loss": loss},
        "chain.check_max_layers": {"value": 2},
        "chain.check_min_layers": {"value": 1, "max_layers": 2},
        "chain.count_layers": {"chains": chains, "num_layers": 2},
        "chain.describe": {"tokens": [0, 2], "names": ["a", "b", "c"]},
        "chain.pad": {"tokens": [[0, 2]], "max_layers": 2},
        "chain.validate": {
            "chains": chains, "num_layers": 2, "num_heads": 1, "max_layers": 2, "stages": None
        },
        "stats.iqm": {"scores": [[0.1, 0.2, 0.3]], "seed": 0, "num_resamples": 20},
        "stats.probability_of_improvement": {
            "scores": [[0.1, 0.2]], "others": [[0.3, 0.1]], "seed": 0, "num_resamples": 20
        },
        "tabular.entry_features": {"bank": solved.tabular_problem().bank},
        "tabular.make_problem": {
            "bank": bank, "loss": solved.loss["search"], "max_layers": 4, "features": None,
            "min_layers": 0,
        },
        "tabular.tabulate": {"problem": problem, "observe": observations.observe},
        "data.check_lengths": {"data": batch},
        "data.concat": {"batches": [batch, batch]},
        "data.load": {"name": "wine", "seed": 0, "sizes": None, "data_dir": None},
        "data.read_batch": {"data": batch, "array_fn": jnp.asarray},
        "data.split": {
            "x": np.asarray(data.train.x), "y": np.asarray(data.train.y), "seed": 0, "groups": None,
            "name": "mine", "test": None, "sizes": None, "statistics": None,
        },
        "score_cache.add": {"cache": cache, **many, "loss": loss},
        "score_cache.evaluate_cached": {"cache": cache} | many,
        "score_cache.init": {"problem": problem},
        "score_cache.is_cached": {"cache": cache} | many,
        "env.append_heads": on | {"length": token},
        "env.append_layers": on | {"length": token},
        "env.can_continue": {"problem": problem, "prefixes": chains},
        "env.head_loss": {"problem": problem, "head": token + 2, "hidden": hidden},
        "env.head_losses": {"problem": problem, "hidden": hidden},
        "env.legal_actions": {"problem": problem, "prefix": chain},
        "env.neighbors": on,
        "env.reset": {"problem": problem},
        "env.sample_chains": {"key": key, "problem": problem, "num_chains": 2},
        "env.step": {"problem": problem, "state": state, "action": token},
        "layer_report.report_layers": on,
        "trends.init": {"problem": problem},
        "trends.predict_swaps": {"trends": trend, **on, "context": "slot"},
        "trends.stack_weights": {"problem": problem},
        "trends.update": {"trends": trend, **on},
        "recipes.compute_influence": {"bank": bank, "chain": [0, 2], "x": batch.x, "y": batch.y},
        "recipes.compute_losses": many,
        "recipes.drop_contiguous": {"chain": [0, 1, 2], "num": 1},
        "recipes.drop_last": {"chain": [0, 1, 2], "num": 1},
        "recipes.drop_least_influential": {
            "chain": [0, 1, 2], "influence": np.array([0.1, 0.2]), "num": 1
        },
        "recipes.find_chains": {"problem": problem, "parent": [0, 1, 2], "num_layers": 1},
        "recipes.find_starts": {"bank": bank, "max_layers": 2, "min_layers": 0},
        "recipes.repeat_contiguous": {"chain": [0, 1, 2], "num": 1},
        "recipes.score_runs": {"problem": problem, "parent": [0, 1, 2]},
        "target_scores.fit_target_layer": {
            "bank": w["invertible"], "before": hidden, "after": hidden, "ridge": 1e-3
        },
        "target_scores.score_candidates_by_target": solve | {"members": (jnp.array([0, 1]),)},
        "target_scores.score_edits_by_target": solve | {"tokens": None},
        "train.independent": training | {"num_nets": 2},
        "train.make_bank": sized | {"kind": "random"},
        "train.random": sized,
        "train.routed": sized,
        "train.snapshots": training | {"num_snapshots": 2, "num_steps": 2},
        "tune.init": {"bank": bank, "optimizer": optax.sgd(0.1)},
        "tune.train_on": tuned | {"state": tune.init(bank, optax.sgd(0.1)), "chains": chains},
        "tune.training_cost": {
            "num_layers": 2, "num_train": 9, "num_examples": 9, "num_steps": 1
        },
        "tune.tune_chain": tuned | {"chain": chain, "num_steps": 1, "tokens": None},
        "tune.upcast_bank": {"bank": bank},
        "Bank.embed": {"self": bank, "x": batch.x},
        "Bank.describe": {"self": bank, "chain": chain},
        "Bank.validate": {"self": bank, "chains": chains},
        "Bank.stack": stack,
        "Bank.concat": {"banks": [bank, bank]},
        "Bank.blend": {
            "self": bank, "mixes": [(0, 1, 0.5)], "method": "linear", "base": None, "density": 0.2,
        },
        "Bank.scale": {"self": bank, "factors": [(0, 0.5)]},
        "Bank.take": {"self": bank, "layers": [1], "heads": None},
        "Bank.reserve": {"self": bank, "num": 1},
        "Bank.replace": {
            "self": bank, "tokens": [0], "params": [bank.get_params(1)], "names": None,
            "origins": None,
        },
        "Bank.get_params": {"self": bank, "token": 0},
        "Bank.find": {"self": bank, "token": 0},
        "Bank.save": {"self": bank, "path": folder / "saved"},
        "Bank.load": {"path": folder / "bank", "modules": ()},
        "Critic.save": {"self": critic, "path": folder / "critic"},
        "Critic.load": {"cls": jc.Critic, "path": folder / "no critic"},
        "Curve.at": {"self": result.curve, "budgets": [1, 5]},
        "Dataset.standardize": {"self": data, "x": np.asarray(data.train.x)},
        "LayerGroup.apply": {"self": group, "index": 0, "x": batch.x},
        "LayerGroup.apply_params": {
            "self": group, "index": 0, "params": group.take(0), "x": batch.x
        },
        "LayerGroup.take": {"self": group, "index": 0},
        "Problem.read_part": {"self": problem, "start": 0, "size": 2},
        "Problem.with_mesh": {"self": problem, "mesh": jax.make_mesh((1,), ("a",))},
        "Problem.take": {"self": problem, "rows": slice(2)},
        "Problem.with_data": {"self": problem, "data": batch},
        "Problem.relax": {"self": problem, "max_layers": 4},
        "Problem.with_bank": {"self": problem, "bank": bank},
        "Problem.with_examples": {"self": problem, "x": batch.x},
        "Problem.put": {"self": problem, "tree": {"a": loss}},
        "Problem.penalty": {"self": problem, "chains": chains},
        "Problem.head_penalties": {"self": problem, "prefixes": chains},
        "Problem.chain_cost": {"self": problem, "chains": chains},
        "Problem.exceeds_limit": {"self": problem, "cost": loss},
        "Problem.loss_and_accuracy": {"self": problem, "outputs": outputs},
        "Result.from_json": {"text": result.to_json()},
        "SolvedProblem.problem_on": {"self": solved, "split": "search"},
        "SolvedProblem.regret": {"self": solved, "loss": loss},
        "Blocks.count_bytes": {"self": jc.engine.Blocks(2), "problem": problem, "hidden": hidden},
        "DepthFirst.count_bytes": {
            "self": jc.engine.DepthFirst(), "problem": problem, "hidden": hidden
        },
        "Fused.count_bytes": {"self": jc.engine.Fused(), "problem": problem, "hidden": hidden},
        "Blocks.evaluate": {
            "self": jc.engine.Blocks(2), "problem": problem, "hidden": hidden,
            "population": population,
        },
        "DepthFirst.evaluate": {
            "self": jc.engine.DepthFirst(), "problem": problem, "hidden": hidden,
            "population": population,
        },
        "Fused.evaluate": {
            "self": jc.engine.Fused(), "problem": problem, "hidden": hidden, "population": None
        },
        "chainbench.load": {"folder": folder / "solved", "name": "digits-routed-0"},
        "chainbench.make_bank": {"name": "iris", "num_layers": 12, "depth": 4},
        "tabular.look_up_loss": {"outputs": jnp.zeros((6, 2)), "y": jnp.zeros((6, 3, 2))},
        "tabular.observe": after,
        "Critic.gain": {"self": critic, "inputs": jnp.zeros((2, 1))},
        "Task.train_plain_net": {"self": None, "key": key, "num_steps": 0},
        "ChainSpace.count_layers": {"self": space, "chains": chains},
        "ChainSpace.sample": {"self": space, "key": key, "num_chains": 2},
        "ChainSpace.neighbors": {"self": space, "chain": chain},
        "ChainSpace.contains": {"self": space, "chains": chains},
        "ChainSpace.index": {"self": space, "chains": chains},
        "ChainSpace.validate": {"self": space, "chains": chains},
        "UpdatePolicy.run": {"self": jc.updates.Frozen()} | policy_run | saving,
        "UpdatePolicy.check_budget": {"self": jc.updates.Frozen()} | policy_run,
    }  # fmt: skip
    for name, search in {**SEARCHES, "Staged": jc.Staged(jc.LocalSearch())}.items():
        on_split = {"problem": w["solvable"] if name in INVERTIBLE else problem}
        if "-" not in name:
            keyed = {"self": search, "key": key, **on_split}
            calls[f"{name}.init"] = keyed
            calls[f"{name}.step"] = keyed | {"state": None}
            if hasattr(search, "start"):
                calls[f"{name}.start"] = keyed | {"state": None, "chains": chains, "loss": loss}
            if hasattr(search, "value"):
                calls[f"{name}.value"] = {
                    "self": search,
                    **on_split,
                    "state": None,
                    "chains": chains,
                }
            if hasattr(search, "check"):
                calls[f"{name}.check"] = {"self": search, **on_split}
    agent = {"self": jc.ActorCritic(), "state": None, **many}
    calls |= {"ActorCritic.policy": agent, "ActorCritic.refresh": agent}
    policies = (jc.updates.TuneFound(), jc.updates.SharedUpdates(), jc.updates.CloneThenTune())
    for name, policy in [
        ("UpdatePolicy", jc.updates.Frozen()),
        *((type(p).__name__, p) for p in policies),
    ]:
        calls[f"{name}.check"] = calls[f"{name}.apply"] = {"self": policy, "args": None}
    calls["Frozen.apply"] = calls["UpdatePolicy.apply"]
    calls["jc.hub.export"]["bank"] = jc.hub.load(model)
    return calls


def find_function(name):
    """Find a public function by its name, or by the end of its name."""
    found = [value for key, value in CALLABLES.items() if key == name or key.endswith(f".{name}")]
    assert found, name
    return found[0]


def make_wrong_values(w):
    """Return values that most arguments do not allow, and some that would be easy to confuse."""
    plain = [None, "x", b"x", "", -1, -0.5, 2.5, math.nan, math.inf, True, 10**20, 1e30, 1j]
    containers = [[], (), {}, {"a": 1}, [1], ["x"], [None], [[0, 1]], {1}, iter([1])]
    code = [object, object(), len, int, jc, jc.LocalSearch, jc.Bank]
    arrays = [
        np.zeros(0), np.array(["x"]), np.array(None), np.float64(1.5), np.array(math.nan),
        np.arange(3), np.full((2, 2), math.nan), jnp.zeros((1, 2, 3)), jnp.array([True]),
        jax.random.PRNGKey(0), jnp.int32,
    ]  # fmt: skip
    ours = [w[name] for name in ("bank", "problem", "data", "batch", "key", "chains", "result")]
    return [*plain, *containers, *code, *arrays, *ours, jc.LocalSearch(), optax.sgd(0.1)]


def is_allowed(value, hint):
    """Return whether an annotation allows a value, or another form of the same value."""
    forms = [value]
    if type(value) is int:
        forms.append(float(value))
    if type(value) is list:
        forms += [[float(item) for item in value if type(item) is int]]
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind in ("b", "i", "u", "f") and not isinstance(value, type):
        array = np.asarray(value)
        array = array.astype(np.int32) if kind == "u" else array
        forms += [array, jnp.asarray(array), array.tolist()]
    elif kind == "U":
        forms.append(value.tolist())
    return any(is_bearable(form, hint) for form in forms)


def try_value(function, arguments, name, value):
    """Call a function with one wrong value, and describe what happened."""
    try:
        function(**{**arguments, name: value})
    except (ValueError, OSError) as error:
        text = str(error)
        return "refused" if "expected" in text or name in text else f"unclear: {text[:200]}"
    except Exception as error:
        return f"raw: {type(error).__name__}: {str(error)[:200]}"
    return "accepted"


def try_all(is_thorough):
    """Try wrong values for each argument of each function.

    Args:
      is_thorough: whether to try values that the annotation allows, too, such as a negative number,
        which may take long, because some of them are right.
    """
    rows = []
    # Some values are names of files to write.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        world = make_world(Path(folder))
        values = make_wrong_values(world)
        for name, arguments in make_calls(world).items():
            began = time.perf_counter()
            function = find_function(name)
            is_valid = not name.endswith(INVALID)
            hints = typing.get_type_hints(inspect.unwrap(function), None, vars(matplotlib.axes))
            for argument in inspect.signature(function).parameters:
                if argument in ("self", "cls"):
                    continue
                takes_number = is_bearable(0.5, hints[argument]) and not is_bearable(
                    object(), hints[argument]
                )
                for value in values:
                    allowed = is_allowed(value, hints[argument])
                    is_nan = isinstance(value, float) and math.isnan(value) and takes_number
                    if (is_thorough and is_valid) or not allowed or is_nan:
                        start = time.perf_counter()
                        outcome = try_value(function, arguments, argument, value)
                        seconds = time.perf_counter() - start
                        short = repr(value)[:40].replace(folder, "")
                        rows.append([name, argument, short, outcome, allowed, seconds])
            print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    print(json.dumps(try_all(is_thorough="--thorough" in sys.argv)))
