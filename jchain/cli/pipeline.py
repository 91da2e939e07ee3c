"""The main job: bank, search, re-ranking, controls."""

import contextlib
import dataclasses
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jchain
from jchain import chain, train
from jchain.bank import Bank
from jchain.cli import checkpoints as jobs
from jchain.cli.checkpoints import price_layers
from jchain.data import EVALUATION_SPLITS, Dataset
from jchain.engine.evaluate import evaluate, evaluate_all
from jchain.hub import recipes
from jchain.problem import Problem
from jchain.search.base import Result, Search, run
from jchain.search.local_search import LocalSearch
from jchain.updates.policies import Policy

# Chains whose optimum is looked up by evaluating them all: about half a minute on two cores.
MAX_OPTIMUM_CHAINS = 200_000


class Job(NamedTuple):
    """Everything a search leaves behind."""

    result: dict[str, Any]  # result.json
    bank: Bank
    run: Result
    levels: dict[
        str, float
    ]  # losses on search to compare the curve with, the price of layers included


class Setting(NamedTuple):
    """What is searched, but for the search."""

    data: Dataset
    make_bank: Callable[[Any], Bank]  # from a key
    make_plain: (
        Callable[[Any, int], Bank] | None
    )  # from a key and gradient steps, where a bank has no parents
    options: Mapping[str, Any]  # of `Problem`: how chains are judged
    layer_cost: float = 0.0
    max_optimum_chains: int = MAX_OPTIMUM_CHAINS

    def pose(self, bank: Bank, split: str, max_layers: int, **options: Any) -> Problem:
        """The problem on one split."""
        return Problem(bank, getattr(self.data, split), max_layers, **self.options, **options)

    def price(self, bank: Bank, split: str, max_layers: int, **options: Any) -> Problem:
        """The same with the price of layers in the loss, as it is searched."""
        return self.pose(
            bank, split, max_layers, layer_cost=price_layers(bank, self.layer_cost), **options
        )


def train_setting(config: Mapping[str, Any], data: Dataset, modules: Mapping[str, Any]) -> Setting:
    """A bank that is trained.

    Args:
      config: options of `jchain search`, by name.
      data: the splits.
      modules: `layer`, `head`, and what else `jchain.train` takes of modules.
    """

    def make_plain(key: Any, num_steps: int) -> Bank:
        sizes: Any = {"num_nets": 1, "depth": config["depth"], "num_steps": num_steps}
        return train.independent(key, data.train, **sizes, **modules)

    def make(key: Any) -> Bank:
        _say(
            f"Making a bank of {config['num_layers']} layers ({config['bank']}) on {data.name} ..."
        )
        return train.make_bank(
            key,
            data.train,
            config["bank"],
            num_layers=config["num_layers"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            num_steps=config["num_steps"],
            **modules,
        )

    return Setting(data, make, make_plain, {}, config["layer_cost"])


def checkpoint_setting(config: Mapping[str, Any]) -> Setting:
    """A bank of pretrained blocks.

    Args:
      config: options of `jchain search --checkpoint`, by name.

    Raises:
      As `jchain.cli.checkpoints.load_task`.
    """
    task = jobs.load_task(config)

    def make(key: Any) -> Bank:
        _say(f"Reading {', '.join(config['checkpoint'])} ...")
        return jobs.load_bank(config)

    # All chains are no more than what the search itself may cost.
    return Setting(task.data, make, None, task.options, config["layer_cost"], config["budget"])


def search(config: Mapping[str, Any], setting: Setting, method: Search, policy: Policy) -> Job:
    """Make the bank, search on `search`, re-rank the finalists on `select`, open `test` once for the report.

    Of checkpoints the recipes that people use by hand, and the model as it was, are re-ranked among the finalists.

    Args:
      config: options of `jchain search`, by name.
      setting: bank, data and loss.
      method: the search.
      policy: when weights of the bank are updated. The bank that is kept has them as they are at the end; controls are of the
        bank as it was made.

    Raises:
      ValueError: sizes do not fit each other, the budget is smaller than one step, or no chain has a finite loss.
    """
    start = time.perf_counter()
    bank_key, control_key, search_key, chain_key = jax.random.split(
        jax.random.key(config["seed"]), 4
    )
    made = setting.make_bank(bank_key)
    max_layers = config["max_layers"]
    if max_layers is None:
        max_layers = max(len(parent) - 1 for parent in made.parents)
    check_sweep(config.get("sweep"), max_layers)
    problem = setting.price(made, "search", max_layers, min_layers=config["min_layers"])
    # Updates may change what tokens stand for.
    is_frozen = config["update"] == "never"
    if is_frozen and config.get("checkpoint"):
        method = begin_at_models(method, problem)
    bank, found, update_calls = policy.run(
        search_key, method, problem, setting.data.train, budget=config["budget"], progress=True
    )
    if len(found.finalists) == 0:
        raise ValueError(f"no chain has a finite loss: {found.num_chains} were scored")
    _say("Re-ranking the finalists, scoring the controls ...")
    width = max(max_layers, *(len(parent) - 1 for parent in made.parents), config["depth"])
    parent, parent_price = _score_best_parent(control_key, setting, made, width)
    by_hand = _score_recipes(setting, problem, width) if config.get("checkpoint") else {}
    # Weights that were updated are compared with the models as they were, not with these after the updates.
    tokens, chosen = _pick(setting, bank, found.finalists, by_hand if is_frozen else {}, problem)
    scores = _score(setting, bank, tokens, width)
    random_chain = _score_random_chain(chain_key, setting, made, len(tokens) - 1, width)
    count = chain.count(made.num_layers, made.num_heads, max_layers, min_layers=problem.min_layers)
    optimum, optimum_price = None, 0.0
    if count <= setting.max_optimum_chains:
        _say(f"Evaluating all {count:,} chains for the optimum ...")
        chains, out = evaluate_all(problem)
        best = int(out.loss.argmin())
        optimum_price = float(problem.layer_penalty(jnp.asarray(chains[best])))
        optimum = finite_or_none(out.loss[best] - optimum_price)
    result = {
        "best_chain": tokens,
        "chosen": chosen,
        "layers": [bank.names[token] for token in tokens],
        **scores,
        "layer_calls": found.layer_calls,
        "update_calls": update_calls,
        "seconds": 0.0,
        "optimum": optimum,
        "controls": {
            "best_parent": parent,
            "random_chain": random_chain,
            "recipes": by_hand,
        },
        "nonfinite_chains": found.num_nonfinite,
        "config": dict(config),
        "versions": _versions(),
    }
    if config.get("sweep") is not None:
        result["sweep"] = [
            _search_at(num, search_key, config, setting, method, made, width)
            for num in range(config["sweep"], max_layers)
        ]
        last = {
            "max_layers": max_layers,
            "chain": tokens,
            "chosen": chosen,
            **scores,
            "recipes": by_hand,
        }
        result["sweep"].append(last)
    result["seconds"] = round(time.perf_counter() - start, 1)
    known = {
        "best parent": (parent["loss"]["search"], parent_price),
        "optimum": (optimum, optimum_price),
    }
    levels = {name: loss + price for name, (loss, price) in known.items() if loss is not None}
    return Job(result, bank, found, levels)


def check_sweep(sweep: int | None, max_layers: int) -> None:
    """Refuse a sweep that begins where it should end.

    Raises:
      ValueError: it does.
    """
    if sweep is not None and sweep >= max_layers:
        raise ValueError(
            f"expected --sweep below the most layers of a chain, {max_layers}, got {sweep}"
        )


def _search_at(
    max_layers: int,
    key: Any,
    config: Mapping[str, Any],
    setting: Setting,
    method: Search,
    bank: Bank,
    width: int,
) -> dict[str, Any]:
    """What is found where chains have at most so many layers, beside recipes for as many."""
    _say(f"Searching chains of at most {max_layers} layers ...")
    problem = setting.price(
        bank, "search", max_layers, min_layers=min(config["min_layers"], max_layers)
    )
    found = run(
        key, begin_at_models(method, problem), problem, budget=config["budget"], progress=True
    )
    by_hand = _score_recipes(setting, problem, width)
    tokens, chosen = _pick(setting, bank, found.finalists, by_hand, problem)
    scores = _score(setting, bank, tokens, width)
    return {
        "max_layers": max_layers,
        "chain": tokens,
        "chosen": chosen,
        **scores,
        "recipes": by_hand,
    }


def begin_at_models(method: Search, problem: Problem) -> Search:
    """The search, from the models as they were, or brought to as many layers by hand, where it can begin at chains that are given."""
    if not isinstance(method, LocalSearch):
        return method
    starts = recipes.find_starts(problem.bank, problem.max_layers, min_layers=problem.min_layers)
    return dataclasses.replace(method, starts=starts if len(starts) else None)


def _score_recipes(setting: Setting, problem: Problem, width: int) -> dict[str, Any]:
    """Recipes that bring a model to the most layers of the problem, or where it has no more the model itself: of each recipe that of
    the model with the lowest loss on `select`."""
    scored: dict[str, list[dict[str, Any]]] = {}
    for parent in problem.bank.parents:
        for name, tokens in recipes.find_chains(problem, parent, problem.max_layers).items():
            row = {"chain": tokens, **_score(setting, problem.bank, tokens, width)}
            scored.setdefault(name, []).append(row)
    return {name: min(rows, key=_read_select) for name, rows in scored.items()}


def _read_select(row: Mapping[str, Any]) -> float:
    loss = row["loss"]["select"]
    return math.inf if loss is None else loss


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _score(setting: Setting, bank: Bank, tokens: list[int], width: int) -> dict[str, Any]:
    """Loss, without the price of layers, and accuracy of one chain by split.

    Chains of one `width`, layers at most, share compiled programs.
    """
    chains = chain.pad([tokens], width)
    outs = {name: evaluate(setting.pose(bank, name, width), chains) for name in EVALUATION_SPLITS}
    return {
        "loss": {name: finite_or_none(out.loss[0]) for name, out in outs.items()},
        "accuracy": {name: float(out.accuracy[0]) for name, out in outs.items()},
    }


def _pick_on_select(setting: Setting, bank: Bank, chains: np.ndarray) -> list[int]:
    """The tokens of the chain with the lowest loss on `select`, the price of layers included."""
    out = evaluate(setting.price(bank, "select", chains.shape[1] - 1), chains)
    return _strip(chains[int(np.argmin(out.loss))])


def _pick(
    setting: Setting,
    bank: Bank,
    finalists: np.ndarray,
    by_hand: Mapping[str, Any],
    problem: Problem,
) -> tuple[list[int], str]:
    """The lowest on `select` of what the search found and of the recipes that are long enough, and where it comes from."""
    chains = {name: tuple(row["chain"]) for name, row in by_hand.items()}
    named = {tokens: name for name, tokens in chains.items() if len(tokens) > problem.min_layers}
    named |= {tuple(_strip(row)): "search" for row in finalists}
    tokens = _pick_on_select(setting, bank, chain.pad([*named]))
    return tokens, named[tuple(tokens)]


def _strip(row: np.ndarray) -> list[int]:
    return [int(token) for token in row if token != chain.PADDING]


def _score_best_parent(
    key: Any, setting: Setting, bank: Bank, width: int
) -> tuple[dict[str, Any], float]:
    """The best net that the bank was cut from, or without one a plain net of as many layers and gradient steps; and the price of
    its layers."""
    if not bank.parents and setting.make_plain is not None:
        bank = setting.make_plain(key, bank.num_steps)
    tokens = _pick_on_select(setting, bank, chain.pad(bank.parents))
    price = setting.price(bank, "search", width).layer_penalty(
        jnp.asarray(chain.pad([tokens], width))
    )
    return _score(setting, bank, tokens, width), float(price[0])


def _score_random_chain(
    key: Any, setting: Setting, bank: Bank, num_layers: int, width: int
) -> dict[str, Any]:
    layer_key, head_key = jax.random.split(key)
    layers = jax.random.randint(layer_key, (num_layers,), 0, bank.num_layers)
    head = bank.num_layers + jax.random.randint(head_key, (), 0, bank.num_heads)
    return _score(setting, bank, [*map(int, layers), int(head)], width)


def finite_or_none(loss: Any) -> float | None:
    """A loss for JSON, which has no infinity."""
    return float(loss) if np.isfinite(loss) else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "jchain": jchain.__version__}
    for name in ("jax", "flax", "optax", "rlax", "numpy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
