"""Candidates for the demo: kinds of bank for which composing layers might pay off."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import rotate

import jchain as jc

SIDE, DEPTH, NUM_STEPS = 8, 4, 1000
LAYER, HEAD = jc.layers.ResidualMLP(SIDE**2), jc.layers.DenseHead(10)
OPTIONS: dict[str, Any] = {"layer": LAYER, "head": HEAD}
# Drift: the angles at which the net was fine-tuned, and the number of steps at each.
ANGLES, DRIFT_STEPS, DRIFT_DEPTH = (0, 15, 30, 45, 60, 75), 300, 3
# Spare parts: number of fine-tunes, spoiled layers in each, steps, and noise in spoiled weights.
NUM_COPIES, NUM_SPOILED, COPY_STEPS, NOISE = 5, 2, 200, 0.3
DEEP = 12
# Repair: number of faults at once, and copies of each digit with random combinations of faults.
NUM_FAULTS, COMBINED_COPIES = 4, 11
LAYER_COST = 0.002


class Candidate(NamedTuple):
    """The data and the bank of one seed."""

    data: jc.Dataset  # `train` has every labeled example that the bank saw
    bank: jc.Bank
    max_layers: int
    plain_depth: int
    budget: int
    layer_cost: float = 0.0
    reference: tuple[int, ...] = ()

    def problem(self, split: str, max_layers: int | None = None) -> jc.Problem:
        most = self.max_layers if max_layers is None else max_layers
        cost = self.layer_cost if split == "search" else 0.0
        return jc.Problem(self.bank, getattr(self.data, split), most, layer_cost=cost)


def make_repair(seed: int) -> Candidate:
    """Digits with four faults at once, and a bank with a layer for each single fault."""
    task = jc.tasks.make("repair", seed)
    bank = task.make_bank(jax.random.key(seed))
    sizes = task.max_layers, task.plain_depth, 40_000
    return Candidate(task.data, bank, *sizes, reference=task.reference)


def combine_faults(seed: int) -> jc.Batch:
    """Damage each digit of `train` several times, with random combinations of faults.

    A combination has as many faults as the digits of the task.
    """
    clean = jc.tasks.make_repair(seed, faults=[]).data.train
    rng, faults = np.random.default_rng(seed), [*jc.tasks.FAULTS]
    num = len(clean.y) // (1 + len(faults))  # the first block has no faults
    images = np.asarray(clean.x[:num]).reshape(-1, SIDE, SIDE)
    parts = []
    for image in np.tile(images, (COMBINED_COPIES, 1, 1)):
        names = [str(name) for name in rng.choice(faults, NUM_FAULTS, replace=False)]
        parts.append(jc.tasks.damage(image[None], names))
    x = np.concatenate(parts).reshape(-1, SIDE**2)
    return jc.Batch(jnp.asarray(x), jnp.tile(clean.y[:num], COMBINED_COPIES))


def make_drift(seed: int) -> Candidate:
    """A net that was fine-tuned as the digits turned, and digits at another angle."""
    clean = jc.data.load("digits", seed)
    angle = float(np.random.default_rng(seed).uniform(ANGLES[0], ANGLES[-1]))
    data = clean._replace(
        **{name: turn(getattr(clean, name), angle) for name in ("search", "select", "test")}
    )
    key = jax.random.key(seed)
    net = jc.train.independent(
        key, clean.train, num_nets=1, depth=DRIFT_DEPTH, num_steps=NUM_STEPS, **OPTIONS
    )
    seen, banks = [clean.train], [net]
    for i, degrees in enumerate(ANGLES[1:]):
        seen.append(turn(clean.train, degrees))
        step_key = jax.random.fold_in(key, i)
        banks.append(tune(step_key, banks[-1], seen[-1], DRIFT_STEPS))
    bank = name_nets(banks, [f"{degrees} degrees" for degrees in ANGLES])
    bank = set_steps(bank, NUM_STEPS + DRIFT_STEPS * (len(ANGLES) - 1))
    return Candidate(data._replace(train=join(seen)), bank, DRIFT_DEPTH + 1, DRIFT_DEPTH, 20_000)


def make_spare_parts(seed: int) -> Candidate:
    """Fine-tunes of one net, each with two of its four layers spoiled."""
    data = jc.data.load("digits", seed)
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    net = jc.train.independent(
        key, data.train, num_nets=1, depth=DEPTH, num_steps=NUM_STEPS, **OPTIONS
    )
    banks = []
    for i in range(NUM_COPIES):
        copy = tune(jax.random.fold_in(key, i), net, data.train, COPY_STEPS)
        for token in rng.choice(DEPTH, NUM_SPOILED, replace=False):
            spoiled = jax.tree.map(
                lambda leaf: leaf + NOISE * rng.standard_normal(leaf.shape).astype(np.float32),
                copy.get_params(int(token)),
            )
            copy = copy.replace([int(token)], [spoiled])
        banks.append(copy)
    bank = name_nets(banks, [f"copy{i}" for i in range(NUM_COPIES)])
    bank = set_steps(bank, NUM_STEPS + NUM_COPIES * COPY_STEPS)
    return Candidate(data, bank, DEPTH + 1, DEPTH, 20_000)


def make_shallower(seed: int) -> Candidate:
    """A net of 12 layers and a layer penalty.

    Chains have at most half as many layers as the net.
    """
    data = jc.data.load("digits", seed)
    bank = jc.train.independent(
        jax.random.key(seed), data.train, num_nets=1, depth=DEEP, num_steps=NUM_STEPS, **OPTIONS
    )
    return Candidate(data, bank, DEEP // 2, DEEP, 20_000, layer_cost=LAYER_COST)


def make_independent(seed: int) -> Candidate:
    """Three nets that were trained independently."""
    data = jc.data.load("digits", seed)
    bank = jc.train.independent(
        jax.random.key(seed), data.train, num_nets=3, depth=DEPTH, num_steps=NUM_STEPS, **OPTIONS
    )
    return Candidate(data, bank, DEPTH, DEPTH, 20_000)


def make_routed(seed: int) -> Candidate:
    """A supernet of 12 layers, which was the demo in an earlier version."""
    data = jc.data.load("digits", seed)
    bank = jc.train.routed(
        jax.random.key(seed), data.train, num_layers=12, depth=DEPTH, num_steps=NUM_STEPS, **OPTIONS
    )
    return Candidate(data, bank, DEPTH, DEPTH, 20_000)


CANDIDATES: dict[str, Callable[[int], Candidate]] = {
    "repair": make_repair,
    "drift": make_drift,
    "spare parts": make_spare_parts,
    "shallower": make_shallower,
    "nets trained apart": make_independent,
    "supernet": make_routed,
}


def turn(batch: jc.Batch, degrees: float) -> jc.Batch:
    """Turn images around their center."""
    images = np.asarray(batch.x).reshape(-1, SIDE, SIDE)
    turned = rotate(images, degrees, axes=(1, 2), reshape=False, order=1, mode="nearest")
    return jc.Batch(jnp.asarray(turned.reshape(batch.x.shape)), batch.y)


def join(batches: Sequence[jc.Batch]) -> jc.Batch:
    return jc.Batch(*(jnp.concatenate(leaves) for leaves in zip(*batches, strict=True)))


def tune(key: jax.Array, net: jc.Bank, batch: jc.Batch, num_steps: int) -> jc.Bank:
    """Return the bank of one net after more gradient steps."""
    chain = np.array(net.parents[0], np.int32)
    problem = jc.Problem(net, batch, len(chain) - 1)
    return jc.updates.tune.tune_chain(key, problem, chain, num_steps=num_steps)


def name_nets(banks: Sequence[jc.Bank], names: Sequence[str]) -> jc.Bank:
    """Combine several nets in one bank whose layers are named after their nets."""
    renamed = []
    for bank, name in zip(banks, names, strict=True):
        params = [bank.get_params(token) for token in range(bank.num_layers + 1)]
        own = [*(f"{name}/{i}" for i in range(bank.num_layers)), f"{name}/head"]
        renamed.append(
            jc.Bank.stack(LAYER, params[:-1], HEAD, params[-1:], names=own, parents=bank.parents)
        )
    return jc.Bank.concat(renamed)


def set_steps(bank: jc.Bank, num_steps: int) -> jc.Bank:
    """Return the bank with the total number of gradient steps that trained its layers."""
    params = [bank.get_params(token) for token in range(bank.num_layers + bank.num_heads)]
    layers, heads = params[: bank.num_layers], params[bank.num_layers :]
    return jc.Bank.stack(
        LAYER, layers, HEAD, heads, names=bank.names, parents=bank.parents, num_steps=num_steps
    )
