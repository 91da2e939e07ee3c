"""Train banks: independent nets, one routed supernet, snapshots of one run, or random weights.

Every function takes a PRNG key, the split to train on, and the modules of layers and heads. If
several modules are given, they alternate: layer `i` has module `i % len(layer)`, and the bank has
one group per module. All functions share the training loop in `jchain.training_loop`.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jchain._typing import Array, Key, PyTree
from jchain.bank import Bank
from jchain.data import Batch, check_lengths
from jchain.groups import apply_module, check_stem, pick
from jchain.pytree import is_concrete
from jchain.training_loop import BATCH_SIZE as BATCH_SIZE
from jchain.training_loop import NUM_STEPS, OPTIMIZER, Recipe, train_weights
from jchain.training_loop import is_stepwise as is_stepwise

# One module that all layers (or heads) share, or several that alternate.
Modules = nn.Module | Sequence[nn.Module]


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
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Train `num_nets` nets independently and cut them into layers.

    The bank has `num_nets * depth` layers, `num_nets` heads, and one parent per net. Layer `j` of
    net `i` is named `net{i}/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, which return logits `[B, C]`, or several that alternate.
      num_nets: number of nets to train.
      depth: number of layers in each net.
      num_steps: number of gradient steps per net.
      optimizer: the optax optimizer; AdamW by default.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if a size is not positive, a label is outside the heads' classes, heads differ in
        their number of classes, or a layer changes the shape of its input.
    """
    layers, heads = _as_tuple(layer), _as_tuple(head)
    recipe = Recipe(layers, heads, depth, 1, depth, num_steps=num_steps, optimizer=optimizer)
    nets = [f"net{i}" for i in range(num_nets)]
    origin = "nets trained apart"
    return _train_bank(key, data, recipe, stem, stem_params, nets, origin, num_nets=num_nets)


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
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Train one net and copy it at `num_snapshots` evenly spaced steps, including the last one.

    The bank has `num_snapshots * depth` layers, `num_snapshots` heads, and one parent per snapshot.
    Layer `j` of the copy after `s` steps is named `step{s}/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, which return logits `[B, C]`, or several that alternate.
      num_snapshots: number of copies of the net.
      depth: number of layers in the net.
      num_steps: number of gradient steps, at least 1; rounded up to a multiple of `num_snapshots`.
      optimizer: the optax optimizer; AdamW by default.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if an argument is invalid; see `independent`.
    """
    _check_sizes(num_snapshots=num_snapshots, num_steps=num_steps)
    spacing = -(-num_steps // num_snapshots)
    recipe = Recipe(
        _as_tuple(layer),
        _as_tuple(head),
        num_layers=depth,
        num_heads=1,
        depth=depth,
        num_snapshots=num_snapshots,
        num_steps=spacing * num_snapshots,
        optimizer=optimizer,
    )
    nets = [f"step{(i + 1) * spacing}" for i in range(num_snapshots)]
    return _train_bank(key, data, recipe, stem, stem_params, nets, "one net during its training")


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
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Train one supernet along random routes, so that its layers learn to follow each other.

    Each step trains `depth` random layers, drawn with replacement, and a random head. No net is
    trained on its own, so the bank has no parents. Layer `j` is named `routed/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, which return logits `[B, C]`, or several that alternate.
      num_layers: number of layers in the bank.
      depth: number of layers in each route.
      num_heads: number of heads in the bank.
      num_steps: number of gradient steps.
      optimizer: the optax optimizer; AdamW by default.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if an argument is invalid; see `independent`.
    """
    recipe = Recipe(
        _as_tuple(layer),
        _as_tuple(head),
        num_layers,
        num_heads,
        depth,
        is_routed=True,
        num_steps=num_steps,
        optimizer=optimizer,
    )
    return _train_bank(
        key, data, recipe, stem, stem_params, ["routed"], "supernet of random routes"
    )


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
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Initialize random layers and train only the heads, on random routes of `depth` layers.

    The bank has no parents. Layer `j` is named `random/{j}`.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, which return logits `[B, C]`, or several that alternate.
      num_layers: number of layers in the bank.
      depth: number of layers in each route.
      num_heads: number of heads in the bank.
      num_steps: number of gradient steps on the heads; 0 leaves them untrained too.
      optimizer: the optax optimizer; AdamW by default.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if an argument is invalid; see `independent`.
    """
    recipe = Recipe(
        _as_tuple(layer),
        _as_tuple(head),
        num_layers,
        num_heads,
        depth,
        is_routed=True,
        is_layer_trained=False,
        num_steps=num_steps,
        optimizer=optimizer,
    )
    return _train_bank(
        key, data, recipe, stem, stem_params, ["random"], "untrained layers, trained heads"
    )


def make_bank(
    key: Key[Array, ""],
    data: Batch,
    kind: str,
    *,
    layer: Modules,
    head: Modules,
    num_layers: int = 12,
    depth: int = 4,
    num_heads: int = 1,
    num_steps: int = NUM_STEPS,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """Make a bank of the given kind with `num_layers` layers in total.

    Args:
      key: the PRNG key; consumed by this call.
      data: the split to train on: examples and integer labels.
      kind: name of the function to call: `"independent"`, `"routed"`, `"snapshots"`, or `"random"`.
      layer: the Flax module of all layers, or several modules that alternate.
      head: the Flax module of all heads, which return logits `[B, C]`, or several that alternate.
      num_layers: number of layers in the bank. For independent nets and snapshots, it must be a
        multiple of `depth`.
      depth: number of layers in each net or route.
      num_heads: number of heads in a routed or random bank. Independent nets and snapshots have one
        head per net, so it must be 1 for them.
      num_steps: number of gradient steps; for independent nets, the number per net.
      optimizer: the optax optimizer; AdamW by default.
      stem: a module, never trained, that maps raw input to the shape that layers keep; None for the
        identity.
      stem_params: params of the stem.

    Raises:
      ValueError: if the kind is unknown; or if, for independent nets or snapshots, `num_layers` is
        not a multiple of `depth` or `num_heads` is not 1.
    """
    if kind in ("routed", "random"):
        return (routed if kind == "routed" else random)(
            key,
            data,
            layer=layer,
            head=head,
            num_layers=num_layers,
            depth=depth,
            num_heads=num_heads,
            num_steps=num_steps,
            optimizer=optimizer,
            stem=stem,
            stem_params=stem_params,
        )
    if kind not in ("independent", "snapshots"):
        raise ValueError(
            f"expected kind to be independent, routed, snapshots or random, got {kind!r}"
        )
    if depth < 1 or num_layers < depth or num_layers % depth:
        raise ValueError(
            f"expected num_layers to be a multiple of depth for bank {kind}, "
            f"got {num_layers} and {depth}"
        )
    if num_heads != 1:
        raise ValueError(
            f"expected no num_heads for bank {kind}, which has one per net, got {num_heads}"
        )
    num_nets = num_layers // depth
    if kind == "independent":
        make = partial(independent, num_nets=num_nets)
    else:
        make = partial(snapshots, num_snapshots=num_nets)
    return make(
        key,
        data,
        layer=layer,
        head=head,
        depth=depth,
        num_steps=num_steps,
        optimizer=optimizer,
        stem=stem,
        stem_params=stem_params,
    )


def _as_tuple(modules: Modules) -> tuple[nn.Module, ...]:
    return (modules,) if isinstance(modules, nn.Module) else tuple(modules)


def _train_bank(
    key: Array,
    data: Batch,
    recipe: Recipe,
    stem: nn.Module | None,
    stem_params: PyTree,
    nets: Sequence[str],
    origin: str,
    num_nets: int = 1,
) -> Bank:
    """Train the weights of a bank and build it; `nets` holds the name of each net or snapshot."""
    num_layers, num_heads = recipe.num_layers, recipe.num_heads
    # Drop modules that no layer or head uses.
    recipe = recipe._replace(layers=recipe.layers[:num_layers], heads=recipe.heads[:num_heads])
    _check_sizes(num_nets=num_nets, num_layers=num_layers, num_heads=num_heads, depth=recipe.depth)
    if recipe.num_steps < 0:
        raise ValueError(f"expected num_steps of at least 0, got {recipe.num_steps}")
    check_stem(stem, stem_params, data.x)
    x = data.x if stem is None else apply_module(stem, stem_params, data.x)
    data = Batch(jnp.asarray(x), jnp.asarray(data.y))
    _check_data(data, recipe)
    weights = train_weights(jax.random.split(key, num_nets), data, recipe)
    names, parents = _name_tokens(recipe, nets)
    return Bank.stack(
        _take_turns(recipe.layers, num_layers) * len(nets),
        _cut(weights.layers, num_layers),
        _take_turns(recipe.heads, num_heads) * len(nets),
        _cut(weights.heads, num_heads),
        stem=stem,
        stem_params=stem_params,
        names=names,
        origins=[f"{origin}: {name}" for name in names],
        parents=parents,
        num_steps=recipe.num_steps,
    )


def _name_tokens(recipe: Recipe, nets: Sequence[str]) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return the name of each token and the chain of each net."""
    num_layers, num_heads = recipe.num_layers, recipe.num_heads
    heads = ["head"] if num_heads == 1 else [f"head{i}" for i in range(num_heads)]
    names = [f"{net}/{j}" for net in nets for j in range(num_layers)]
    names += [f"{net}/{head}" for net in nets for head in heads]
    if recipe.is_routed:
        return names, []
    first_head = len(nets) * num_layers
    parents = [
        (*range(i * num_layers, (i + 1) * num_layers), first_head + i) for i in range(len(nets))
    ]
    return names, parents


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} of at least 1, got {size}")


def _take_turns(modules: tuple[nn.Module, ...], num: int) -> list[nn.Module]:
    """Return the module of each of `num` members."""
    return [modules[i % len(modules)] for i in range(num)]


def _check_data(data: Batch, recipe: Recipe) -> None:
    if not recipe.layers or not recipe.heads:
        raise ValueError(
            f"expected at least one layer module and one head module, "
            f"got {len(recipe.layers)} and {len(recipe.heads)}"
        )
    check_lengths(data)
    x, key = data.x, jax.random.key(0)
    try:
        outs = [jax.eval_shape(layer.init_with_output, key, x)[0] for layer in recipe.layers]
        logits = [jax.eval_shape(head.init_with_output, key, x)[0] for head in recipe.heads]
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"layer or head does not take data of shape {list(x.shape)}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    for layer, out in zip(recipe.layers, outs, strict=True):
        if out.shape != x.shape or out.dtype != x.dtype:
            raise ValueError(
                f"layer {type(layer).__name__} must keep the shape of its input: "
                f"expected {x.dtype}{list(x.shape)}, got {out.dtype}{list(out.shape)}"
            )
    if len({out.shape for out in logits}) != 1:
        raise ValueError(
            f"expected heads of one output shape, got {[list(out.shape) for out in logits]}"
        )
    num_classes = logits[0].shape[-1]
    if is_concrete(data) and not (int(data.y.min()) >= 0 and int(data.y.max()) < num_classes):
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, the head's classes, "
            f"got {int(data.y.min())}..{int(data.y.max())}"
        )


def _cut(stacks: tuple[PyTree, ...], num: int) -> list[PyTree]:
    """Unstack params into the `num` members of each snapshot of each run.

    `stacks` holds one tree per module, whose leaves are `[R, num_snapshots, n, ...]`.
    """
    num_runs, num_snapshots = jax.tree.leaves(stacks)[0].shape[:2]
    places = (
        (run, snapshot, i)
        for run in range(num_runs)
        for snapshot in range(num_snapshots)
        for i in range(num)
    )
    return [
        pick(stacks[i % len(stacks)], (run, snapshot, i // len(stacks)))
        for run, snapshot, i in places
    ]
