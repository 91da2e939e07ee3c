"""Train banks: independent nets, one routed supernet, snapshots of one run, or random weights.

Every function takes a PRNG key, the split to train on, and the modules of layers and heads. If
several modules are given, they alternate: layer `i` has module `i % len(layer)`, and the bank has
one group per module. All functions share the training loop in `jchain.training_loop`.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jchain._typing import Array, Key, PyTree
from jchain.arguments import check_at_least_one, check_integers, checked
from jchain.bank import Bank
from jchain.data import Batch, read_batch
from jchain.modules import apply_stem, check_stem
from jchain.pytree import describe_type, pick
from jchain.training_loop import BATCH_SIZE as BATCH_SIZE
from jchain.training_loop import (
    CROSS_ENTROPY,
    NUM_STEPS,
    OPTIMIZER,
    LossFn,
    TrainingConfig,
    check_training,
    train_weights,
    warn_of_divergence,
)
from jchain.training_loop import is_stepwise as is_stepwise

# One module that all layers (or heads) share, or several that alternate.
Modules = nn.Module | Sequence[nn.Module]
# `make_bank` checks the kind itself.
if TYPE_CHECKING:
    BankKind: TypeAlias = Literal["independent", "routed", "snapshots", "random"]
else:
    BankKind: TypeAlias = str


@checked
def independent(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: Modules,
    head: Modules,
    num_nets: int = 3,
    depth: int = 4,
    num_steps: int = NUM_STEPS,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    loss_fn: LossFn = CROSS_ENTROPY,
    batch_size: int = BATCH_SIZE,
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Train `num_nets` nets independently and cut them into layers.

    The bank has `num_nets * depth` layers, `num_nets` heads, and one parent per net. Layer `j` of
    net `i` is named `net{i}/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels, or what `loss_fn` takes.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, or several that alternate; logits `[B, C]` by default.
      num_nets: number of nets to train.
      depth: number of layers in each net.
      num_steps: number of gradient steps per net.
      optimizer: the optax optimizer; AdamW by default.
      loss_fn: function `(outputs, y) -> losses`, as for `jc.Problem`; its mean is minimized.
      batch_size: number of examples per gradient step; all of them if there are fewer.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if a size is not positive, a label is outside the heads' classes, heads differ in
        their number of classes, or a layer changes the shape of its input.
    """
    layers, heads = _as_tuple(layer), _as_tuple(head)
    config = TrainingConfig(
        layers,
        heads,
        num_layers=depth,
        num_heads=1,
        depth=depth,
        num_steps=num_steps,
        optimizer=optimizer,
        loss_fn=loss_fn,
        batch_size=batch_size,
    )
    nets = [f"net{i}" for i in range(num_nets)]
    origin = "nets trained apart"
    return _train_bank(key, data, config, stem, stem_params, nets, origin, num_nets=num_nets)


@checked
def snapshots(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: Modules,
    head: Modules,
    num_snapshots: int = 3,
    depth: int = 4,
    num_steps: int = NUM_STEPS,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    loss_fn: LossFn = CROSS_ENTROPY,
    batch_size: int = BATCH_SIZE,
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Train one net and copy it at `num_snapshots` evenly spaced steps, including the last one.

    The bank has `num_snapshots * depth` layers, `num_snapshots` heads, and one parent per snapshot.
    Layer `j` of the copy after `s` steps is named `step{s}/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels, or what `loss_fn` takes.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, or several that alternate; logits `[B, C]` by default.
      num_snapshots: number of copies of the net.
      depth: number of layers in the net.
      num_steps: number of gradient steps, at least 1; rounded up to a multiple of `num_snapshots`.
      optimizer: the optax optimizer; AdamW by default.
      loss_fn: function `(outputs, y) -> losses`, as for `jc.Problem`; its mean is minimized.
      batch_size: number of examples per gradient step; all of them if there are fewer.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if an argument is invalid; see `independent`.
    """
    check_at_least_one(num_snapshots=num_snapshots, num_steps=num_steps)
    spacing = -(-num_steps // num_snapshots)
    config = TrainingConfig(
        _as_tuple(layer),
        _as_tuple(head),
        num_layers=depth,
        num_heads=1,
        depth=depth,
        num_snapshots=num_snapshots,
        num_steps=spacing * num_snapshots,
        optimizer=optimizer,
        loss_fn=loss_fn,
        batch_size=batch_size,
    )
    nets = [f"step{(i + 1) * spacing}" for i in range(num_snapshots)]
    return _train_bank(key, data, config, stem, stem_params, nets, "one net during its training")


@checked
def routed(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: Modules,
    head: Modules,
    num_layers: int = 12,
    depth: int = 4,
    num_heads: int = 1,
    num_steps: int = NUM_STEPS,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    loss_fn: LossFn = CROSS_ENTROPY,
    batch_size: int = BATCH_SIZE,
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Train one supernet along random routes, so that its layers learn to follow each other.

    Each step trains `depth` random layers, drawn with replacement, and a random head. No net is
    trained on its own, so the bank has no parents. Layer `j` is named `routed/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels, or what `loss_fn` takes.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, or several that alternate; logits `[B, C]` by default.
      num_layers: number of layers in the bank.
      depth: number of layers in each route.
      num_heads: number of heads in the bank.
      num_steps: number of gradient steps.
      optimizer: the optax optimizer; AdamW by default.
      loss_fn: function `(outputs, y) -> losses`, as for `jc.Problem`; its mean is minimized.
      batch_size: number of examples per gradient step; all of them if there are fewer.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if an argument is invalid; see `independent`.
    """
    config = TrainingConfig(
        _as_tuple(layer),
        _as_tuple(head),
        num_layers,
        num_heads,
        depth,
        is_routed=True,
        num_steps=num_steps,
        optimizer=optimizer,
        loss_fn=loss_fn,
        batch_size=batch_size,
    )
    return _train_bank(
        key, data, config, stem, stem_params, ["routed"], "supernet of random routes"
    )


@checked
def random(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: Modules,
    head: Modules,
    num_layers: int = 12,
    depth: int = 4,
    num_heads: int = 1,
    num_steps: int = NUM_STEPS,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    loss_fn: LossFn = CROSS_ENTROPY,
    batch_size: int = BATCH_SIZE,
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Initialize random layers and train only the heads, on random routes of `depth` layers.

    The bank has no parents. Layer `j` is named `random/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels, or what `loss_fn` takes.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, or several that alternate; logits `[B, C]` by default.
      num_layers: number of layers in the bank.
      depth: number of layers in each route.
      num_heads: number of heads in the bank.
      num_steps: number of gradient steps on the heads; 0 leaves them untrained too.
      optimizer: the optax optimizer; AdamW by default.
      loss_fn: function `(outputs, y) -> losses`, as for `jc.Problem`; its mean is minimized.
      batch_size: number of examples per gradient step; all of them if there are fewer.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if an argument is invalid; see `independent`.
    """
    config = TrainingConfig(
        _as_tuple(layer),
        _as_tuple(head),
        num_layers,
        num_heads,
        depth,
        is_routed=True,
        is_layer_trained=False,
        num_steps=num_steps,
        optimizer=optimizer,
        loss_fn=loss_fn,
        batch_size=batch_size,
    )
    return _train_bank(
        key, data, config, stem, stem_params, ["random"], "untrained layers, trained heads"
    )


@checked
def make_bank(
    key: Key[Array, ""],
    data: Batch,
    kind: BankKind,
    *,
    layer: Modules,
    head: Modules,
    num_layers: int = 12,
    depth: int = 4,
    num_heads: int = 1,
    num_steps: int = NUM_STEPS,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    loss_fn: LossFn = CROSS_ENTROPY,
    batch_size: int = BATCH_SIZE,
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Make a bank of the given kind with `num_layers` layers in total.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels, or what `loss_fn` takes.
      kind: name of the function to call: `"independent"`, `"routed"`, `"snapshots"`, or `"random"`.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, or several that alternate; logits `[B, C]` by default.
      num_layers: number of layers in the bank. For independent nets and snapshots, it must be a
        multiple of `depth`.
      depth: number of layers in each net or route.
      num_heads: number of heads in a routed or random bank. Independent nets and snapshots have one
        head per net, so it must be 1 for them.
      num_steps: number of gradient steps; for independent nets, the number per net.
      optimizer: the optax optimizer; AdamW by default.
      loss_fn: function `(outputs, y) -> losses`, as for `jc.Problem`; its mean is minimized.
      batch_size: number of examples per gradient step; all of them if there are fewer.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if the kind is unknown; or if, for independent nets or snapshots, `num_layers` is
        not a multiple of `depth` or `num_heads` is not 1.
    """
    if kind in ("routed", "random"):
        train_fn = routed if kind == "routed" else random
        make = partial(train_fn, num_layers=num_layers, num_heads=num_heads)
    else:
        _check_nets(kind, num_layers, depth, num_heads)
        num_nets = num_layers // depth
        make = partial(independent, num_nets=num_nets)
        if kind == "snapshots":
            make = partial(snapshots, num_snapshots=num_nets)
    return make(
        key,
        data,
        layer=layer,
        head=head,
        depth=depth,
        num_steps=num_steps,
        optimizer=optimizer,
        loss_fn=loss_fn,
        batch_size=batch_size,
        stem=stem,
        stem_params=stem_params,
    )


def _check_nets(kind: str, num_layers: int, depth: int, num_heads: int) -> None:
    """Check the sizes of a bank that is cut from whole nets."""
    if kind not in ("independent", "snapshots"):
        raise ValueError(
            f"expected kind to be independent, routed, snapshots, or random, got {kind!r}"
        )
    check_at_least_one(depth=depth, num_layers=num_layers)
    if num_layers % depth:
        raise ValueError(
            f"expected num_layers to be a multiple of depth for kind {kind!r}, "
            f"got {num_layers} and {depth}"
        )
    if num_heads != 1:
        raise ValueError(
            f"expected num_heads=1 for kind {kind!r}, whose nets have one head each, "
            f"got {num_heads}"
        )


def _as_tuple(modules: object) -> tuple[nn.Module, ...]:
    found = tuple(modules) if isinstance(modules, list | tuple) else (modules,)
    for module in found:
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"expected instances of Flax linen modules to train, got {describe_type(module)}; "
                "train other modules yourself, and pass them to jc.Bank.stack"
            )
    return found  # pyright: ignore[reportReturnType]


def _train_bank(
    key: Array,
    data: object,
    config: TrainingConfig,
    stem: nn.Module | None,
    stem_params: PyTree,
    nets: Sequence[str],
    origin: str,
    num_nets: int = 1,
) -> Bank:
    """Train the weights of a bank and build it; `nets` holds the name of each net or snapshot."""
    num_layers, num_heads = config.num_layers, config.num_heads
    sizes = {"num_nets": num_nets, "num_layers": num_layers, "num_heads": num_heads}
    check_at_least_one(**sizes, depth=config.depth, batch_size=config.batch_size)
    # Drop modules that no layer or head uses.
    config = config._replace(layers=config.layers[:num_layers], heads=config.heads[:num_heads])
    check_integers(at_least=0, num_steps=config.num_steps)
    given = read_batch(data)
    check_stem(stem, stem_params, given.x)
    x = apply_stem(stem, stem_params, given.x)
    batch = Batch(jax.tree.map(jnp.asarray, x), given.y)
    check_training(batch, config)
    weights = train_weights(jax.random.split(key, num_nets), batch, config)
    names, parents = _name_tokens(config, nets)
    warn_of_divergence(weights)
    return Bank.stack(
        _take_turns(config.layers, num_layers) * len(nets),
        _cut(weights.layers, num_layers),
        _take_turns(config.heads, num_heads) * len(nets),
        _cut(weights.heads, num_heads),
        stem=stem,
        stem_params=stem_params,
        names=names,
        origins=[f"{origin}: {name}" for name in names],
        parents=parents,
        num_steps=num_nets * config.num_steps,
    )


def _name_tokens(
    config: TrainingConfig, nets: Sequence[str]
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return the name of each token and the chain of each net."""
    num_layers, num_heads = config.num_layers, config.num_heads
    heads = ["head"] if num_heads == 1 else [f"head{i}" for i in range(num_heads)]
    names = [f"{net}/{j}" for net in nets for j in range(num_layers)]
    names += [f"{net}/{head}" for net in nets for head in heads]
    if config.is_routed:
        return names, []
    first_head = len(nets) * num_layers
    parents = [
        (*range(i * num_layers, (i + 1) * num_layers), first_head + i) for i in range(len(nets))
    ]
    return names, parents


def _take_turns(modules: tuple[nn.Module, ...], num: int) -> list[nn.Module]:
    """Return the module of each of `num` members."""
    return [modules[i % len(modules)] for i in range(num)]


def _cut(stacks: tuple[PyTree, ...], num: int) -> list[PyTree]:
    """Unstack params into the `num` members of each snapshot of each run.

    `stacks` holds one tree per module, whose leaves are `[R, num_snapshots, n, ...]`.
    """
    num_runs, num_snapshots = jax.tree.leaves(stacks)[0].shape[:2]
    indices = (
        (run, snapshot, i)
        for run in range(num_runs)
        for snapshot in range(num_snapshots)
        for i in range(num)
    )
    return [
        pick(stacks[i % len(stacks)], (run, snapshot, i // len(stacks)))
        for run, snapshot, i in indices
    ]
