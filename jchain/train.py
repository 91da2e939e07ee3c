"""Making banks: nets trained apart, one routed supernet, snapshots of one run, random weights. One training loop for all.

The loop minimizes softmax cross-entropy on random minibatches of 128 examples. Each gradient step takes a *route*, some
layers and a head: always the same one for an ordinary net, a random one for a supernet (Guo et al. 2020,
arXiv:1904.00420). Layers of a module with a method `project` are replaced by what it returns after each step.

All functions here take a key, the split to train on, the module of all layers or several, the module of all heads or several
(to logits `[B, C]`), sizes, and `Settings`. Of several modules layer `i` takes the `i`-th, and so on from the first again, so a
bank has a group for each. All raise ValueError when a size is not positive, a label is outside the heads' classes, heads disagree
about these, or a layer does not keep the shape of the data.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jchain._typing import Array, Float, Key, PyTree
from jchain.bank import Bank, check_stem
from jchain.data import Batch, check_lengths
from jchain.groups import pick
from jchain.pytree import is_concrete

OPTIMIZER = optax.adamw(1e-3, weight_decay=0.1)
BATCH_SIZE = 128
# Axes of a stack of kernels of a convolution, of one spatial axis and more.
_CONV_NDIM = 5


class Settings(TypedDict, total=False):
    """Keyword arguments of every function that makes a bank.

    Attributes:
      num_steps: gradient steps, by default 1000.
      optimizer: any optax transformation, by default AdamW at a rate of 1e-3 with a weight decay of 0.1.
      stem: fixed map from raw input to the shape that layers keep; never trained.
      stem_params: its params.
    """

    num_steps: int
    optimizer: optax.GradientTransformation
    stem: nn.Module | None
    stem_params: PyTree


# The module of all, or several that take turns.
_Modules = nn.Module | Sequence[nn.Module]


class _Weights(NamedTuple):
    layers: tuple[PyTree, ...]  # for each module, leaves [n, ...]
    heads: tuple[PyTree, ...]


class _Recipe(NamedTuple):
    """What one run trains. Hashable: a static argument of the jitted loop."""

    layers: tuple[nn.Module, ...]
    heads: tuple[nn.Module, ...]
    num_layers: int
    num_heads: int
    depth: int
    is_routed: bool = False
    is_layer_trained: bool = True
    num_snapshots: int = 1
    num_steps: int = 1000
    optimizer: optax.GradientTransformation = OPTIMIZER


def independent(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: _Modules,
    head: _Modules,
    num_nets: int = 3,
    depth: int = 4,
    **settings: Unpack[Settings],
) -> Bank:
    """`num_nets` nets of `depth` layers trained apart, `num_steps` each: layer `j` of net `i` is called `net{i}/{j}`.

    The bank has `num_nets * depth` layers, `num_nets` heads and as many parents.
    """
    nets = [f"net{i}" for i in range(num_nets)]
    recipe = {"num_layers": depth, "num_heads": 1, "depth": depth}
    return _train_bank(
        key, data, layer, head, recipe, settings, nets, "nets trained apart", num_nets=num_nets
    )


def snapshots(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: _Modules,
    head: _Modules,
    num_snapshots: int = 3,
    depth: int = 4,
    **settings: Unpack[Settings],
) -> Bank:
    """One net of `depth` layers copied at `num_snapshots` even distances of its training, the last time at its end.

    Layer `j` after `s` steps is called `step{s}/{j}`. The bank has `num_snapshots * depth` layers, `num_snapshots` heads
    and as many parents. `num_steps` is rounded up to a multiple of `num_snapshots`.
    """
    num_steps = settings.get("num_steps", _Recipe._field_defaults["num_steps"])
    _check_sizes(num_snapshots=num_snapshots, num_steps=num_steps)
    distance = -(-num_steps // num_snapshots)
    settings["num_steps"] = distance * num_snapshots
    nets = [f"step{(i + 1) * distance}" for i in range(num_snapshots)]
    recipe = {"num_layers": depth, "num_heads": 1, "depth": depth, "num_snapshots": num_snapshots}
    return _train_bank(
        key, data, layer, head, recipe, settings, nets, "one net during its training"
    )


def routed(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: _Modules,
    head: _Modules,
    num_layers: int = 12,
    depth: int = 4,
    num_heads: int = 1,
    **settings: Unpack[Settings],
) -> Bank:
    """One supernet: each step trains `depth` random layers (with replacement) and a head, so layers learn to follow others.

    No net was trained alone, so the bank has no parents.
    """
    recipe = {"num_layers": num_layers, "num_heads": num_heads, "depth": depth, "is_routed": True}
    return _train_bank(
        key, data, layer, head, recipe, settings, ["routed"], "supernet of random routes"
    )


def random(
    key: Key[Array, ""],
    data: Batch,
    *,
    layer: _Modules,
    head: _Modules,
    num_layers: int = 12,
    depth: int = 4,
    num_heads: int = 1,
    **settings: Unpack[Settings],
) -> Bank:
    """Untrained layers. Only the heads are trained, behind random routes of `depth` layers; not at all at `num_steps=0`.

    The bank has no parents.
    """
    recipe = {
        "num_layers": num_layers,
        "num_heads": num_heads,
        "depth": depth,
        "is_routed": True,
        "is_layer_trained": False,
    }
    return _train_bank(
        key, data, layer, head, recipe, settings, ["random"], "untrained layers, trained heads"
    )


def make_bank(
    key: Key[Array, ""],
    data: Batch,
    kind: str,
    *,
    layer: _Modules,
    head: _Modules,
    num_layers: int = 12,
    depth: int = 4,
    num_heads: int = 1,
    num_steps: int = 1000,
    stem: nn.Module | None = None,
    stem_params: PyTree = None,
) -> Bank:
    """A bank of the given kind with `num_layers` layers in all.

    Args:
      key: consumed.
      data: the split to train on.
      kind: `"independent"`, `"routed"`, `"snapshots"`, or `"random"`: the function of this module to call.
      layer: module of all layers, or several that take turns.
      head: module of all heads, or several that take turns.
      num_layers: layers in the bank; a multiple of `depth` for independent nets and snapshots.
      depth: layers of each net or route that is trained.
      num_heads: heads of a routed or random bank; independent nets and snapshots have one per net.
      num_steps: gradient steps.
      stem: fixed map from raw input to the shape that layers keep.
      stem_params: its params.

    Raises:
      ValueError: the kind is unknown, `num_layers` is not a multiple of `depth` for a bank of nets, or `num_heads` is given for one.
    """
    settings: Settings = {"num_steps": num_steps, "stem": stem, "stem_params": stem_params}
    if kind in ("routed", "random"):
        make = routed if kind == "routed" else random
        return make(
            key,
            data,
            layer=layer,
            head=head,
            num_layers=num_layers,
            depth=depth,
            num_heads=num_heads,
            **settings,
        )
    if kind not in ("independent", "snapshots"):
        raise ValueError(
            f"expected a kind of bank of independent, routed, snapshots or random, got {kind!r}"
        )
    if depth < 1 or num_layers < depth or num_layers % depth:
        raise ValueError(
            f"expected num_layers to be a multiple of depth for bank {kind}, got {num_layers} and {depth}"
        )
    if num_heads != 1:
        raise ValueError(
            f"expected no num_heads for bank {kind}, which has one per net, got {num_heads}"
        )
    num_nets = num_layers // depth
    if kind == "independent":
        return independent(
            key, data, layer=layer, head=head, num_nets=num_nets, depth=depth, **settings
        )
    return snapshots(
        key, data, layer=layer, head=head, num_snapshots=num_nets, depth=depth, **settings
    )


def _train_bank(
    key: Array,
    data: Batch,
    layer: _Modules,
    head: _Modules,
    sizes: dict[str, Any],
    settings: Settings,
    nets: Sequence[str],
    origin: str,
    num_nets: int = 1,
) -> Bank:
    """Train and cut into layers and heads; `nets` names each net, or state of a net, that the weights are cut from."""
    stem, stem_params = settings.pop("stem", None), settings.pop("stem_params", None)
    options: dict[str, Any] = {**sizes, **settings}
    layers, heads = ((m,) if isinstance(m, nn.Module) else tuple(m) for m in (layer, head))
    # No module without a member.
    recipe = _Recipe(layers[: sizes["num_layers"]], heads[: sizes["num_heads"]], **options)
    num_layers, num_heads = recipe.num_layers, recipe.num_heads
    _check_sizes(num_nets=num_nets, num_layers=num_layers, num_heads=num_heads, depth=recipe.depth)
    if recipe.num_steps < 0:
        raise ValueError(f"expected num_steps of at least 0, got {recipe.num_steps}")
    check_stem(stem, stem_params, data.x)
    x: Any = data.x if stem is None else stem.apply({"params": stem_params or {}}, data.x)
    data = Batch(jnp.asarray(x), jnp.asarray(data.y))
    _check_data(data, recipe)
    weights = _train(jax.random.split(key, num_nets), data, recipe)
    cut_layers, cut_heads = _cut(weights.layers, num_layers), _cut(weights.heads, num_heads)
    head_names = ["head"] if num_heads == 1 else [f"head{i}" for i in range(num_heads)]
    names = [f"{net}/{j}" for net in nets for j in range(num_layers)] + [
        f"{net}/{name}" for net in nets for name in head_names
    ]
    first_head = len(nets) * num_layers
    return Bank.stack(
        _take_turns(recipe.layers, num_layers) * len(nets),
        cut_layers,
        _take_turns(recipe.heads, num_heads) * len(nets),
        cut_heads,
        stem=stem,
        stem_params=stem_params,
        names=names,
        origins=[f"{origin}: {name}" for name in names],
        parents=[]
        if recipe.is_routed
        else [
            (*range(i * num_layers, (i + 1) * num_layers), first_head + i) for i in range(len(nets))
        ],
        num_steps=recipe.num_steps,
    )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} of at least 1, got {size}")


def _take_turns(modules: tuple[nn.Module, ...], num: int) -> list[nn.Module]:
    """The module of each of so many members."""
    return [modules[i % len(modules)] for i in range(num)]


def _check_data(data: Batch, recipe: _Recipe) -> None:
    if not recipe.layers or not recipe.heads:
        raise ValueError(
            f"expected at least one layer module and one head module, got {len(recipe.layers)} and {len(recipe.heads)}"
        )
    check_lengths(data)
    key = jax.random.key(0)
    try:
        outs = [jax.eval_shape(layer.init_with_output, key, data.x)[0] for layer in recipe.layers]
        logits = [jax.eval_shape(head.init_with_output, key, data.x)[0] for head in recipe.heads]
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"layer or head does not take data of shape {list(data.x.shape)}: {str(error).splitlines()[0]}"
        ) from None
    for layer, out in zip(recipe.layers, outs, strict=True):
        if out.shape != data.x.shape or out.dtype != data.x.dtype:
            raise ValueError(
                f"layer {type(layer).__name__} must keep the shape of its input: expected {data.x.dtype}"
                f"{list(data.x.shape)}, got {out.dtype}{list(out.shape)}"
            )
    if len({out.shape for out in logits}) != 1:
        raise ValueError(
            f"expected heads of one output shape, got {[list(out.shape) for out in logits]}"
        )
    num_classes = logits[0].shape[-1]
    if is_concrete(data) and not (int(data.y.min()) >= 0 and int(data.y.max()) < num_classes):
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, the head's classes, got {int(data.y.min())}..{int(data.y.max())}"
        )


def _add_at(tree: PyTree, index: Any, member: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, added: leaf.at[index].add(added), tree, member)


def _cut(trees: tuple[PyTree, ...], num: int) -> list[PyTree]:
    """Params of each of `num` members of each snapshot of each run, out of leaves `[R, num_snapshots, n, ...]`."""
    num_runs, num_snapshots = jax.tree.leaves(trees)[0].shape[:2]
    places = (
        (run, snapshot, i)
        for run in range(num_runs)
        for snapshot in range(num_snapshots)
        for i in range(num)
    )
    return [
        pick(trees[i % len(trees)], (run, snapshot, i // len(trees))) for run, snapshot, i in places
    ]


def is_stepwise(params: PyTree) -> bool:
    """Whether gradient steps on these stacked params must be programs of their own: the gradient of a convolution in a loop is
    some 50 times slower on CPU."""
    return (
        jax.default_backend() == "cpu"
        and max((leaf.ndim for leaf in jax.tree.leaves(params)), default=0) >= _CONV_NDIM
    )


def _train(keys: Key[Array, "R"], data: Batch, recipe: _Recipe) -> _Weights:
    """Weights of each run at each of its snapshots, leaves `[R, num_snapshots, n, ...]`."""
    if jax.default_backend() != "cpu":
        return _train_together(keys, data, recipe, keys.shape[0])
    start = jax.eval_shape(partial(_init, recipe=recipe), keys[0], data)[0]
    if not is_stepwise(start):
        return _train_together(keys, data, recipe, 1)
    runs = [_train_step_by_step(key, data, recipe) for key in keys]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


@partial(jax.jit, static_argnames=("recipe", "batch_size"))
def _train_together(
    keys: Key[Array, "R"], data: Batch, recipe: _Recipe, batch_size: int
) -> _Weights:
    """All in one program. On CPU one run after another, where vmapped weights make products slow."""

    def train_one(key: Array) -> _Weights:
        carry, step_keys = _init(key, data, recipe)

        def train_until_snapshot(carry: Any, keys: Array) -> Any:
            carry, _ = jax.lax.scan(
                lambda carry, key: (_step(carry, key, data, recipe), None), carry, keys
            )
            return carry, carry[0]

        return jax.lax.scan(train_until_snapshot, carry, step_keys)[1]

    return jax.lax.map(train_one, keys, batch_size=batch_size)


def _train_step_by_step(key: Array, data: Batch, recipe: _Recipe) -> _Weights:
    """One program for each step, or several: the gradient of a convolution in a loop or branch is some 50 times slower on CPU."""
    carry, step_keys = jax.jit(_init, static_argnames="recipe")(key, data, recipe)
    # One step is like another, whatever their number.
    step_recipe = recipe._replace(num_steps=0, num_snapshots=1)
    has_branches = recipe.is_routed and max(len(recipe.layers), len(recipe.heads)) > 1
    step = _step_in_parts if has_branches else _step_once
    snapshots = []
    for keys in step_keys:
        for step_key in keys:
            carry = step(carry, step_key, data, step_recipe)
        # The next step writes over its own.
        snapshots.append(jax.tree.map(jnp.copy, carry[0]))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *snapshots)


def _init(
    key: Array, data: Batch, recipe: _Recipe
) -> tuple[tuple[_Weights, Any], Key[Array, "S T"]]:
    """Weights and optimizer state at the start, and a key for each step up to each snapshot."""
    layer_key, head_key, step_key = jax.random.split(key, 3)
    layers, heads = (
        tuple(
            jax.vmap(lambda k, module=module: module.init(k, data.x[:1]).get("params", {}))(
                keys[i :: len(modules)]
            )
            for i, module in enumerate(modules)
        )
        for modules, keys in (
            (recipe.layers, jax.random.split(layer_key, recipe.num_layers)),
            (recipe.heads, jax.random.split(head_key, recipe.num_heads)),
        )
    )
    weights = _Weights(layers, heads)
    keys = jax.random.split(step_key, recipe.num_steps).reshape(recipe.num_snapshots, -1)
    return (weights, recipe.optimizer.init(weights)), keys


def _step(
    carry: tuple[_Weights, Any], key: Array, data: Batch, recipe: _Recipe
) -> tuple[_Weights, Any]:
    """One gradient step."""
    return _update(carry, jax.grad(_route_loss)(carry[0], key, data, recipe), recipe)


def _update(
    carry: tuple[_Weights, Any], gradient: _Weights, recipe: _Recipe
) -> tuple[_Weights, Any]:
    weights, opt_state = carry
    updates, opt_state = recipe.optimizer.update(gradient, opt_state, weights)
    new: Any = optax.apply_updates(weights, updates)
    layers = weights.layers
    if recipe.is_layer_trained:
        layers = tuple(
            _project(layer, own) for layer, own in zip(recipe.layers, new.layers, strict=True)
        )
    return _Weights(layers, new.heads), opt_state


_step_once = jax.jit(_step, static_argnames="recipe", donate_argnums=0)
_update_once = jax.jit(_update, static_argnames="recipe", donate_argnums=0)


def _step_in_parts(
    carry: tuple[_Weights, Any], key: Array, data: Batch, recipe: _Recipe
) -> tuple[_Weights, Any]:
    """As `_step`, each call of a layer a program of its own, chosen here: there is one for each module, not for each route."""
    weights = carry[0]
    hidden, labels, route, last = _draw_once(key, data, recipe)
    calls = []
    for member in route.tolist():
        turn, place = member % len(recipe.layers), member // len(recipe.layers)
        hidden, pull_fn = _call(recipe.layers[turn], weights.layers[turn], place, hidden)
        calls.append((turn, place, pull_fn))
    turn, place = int(last) % len(recipe.heads), int(last) // len(recipe.heads)
    layers, heads = map(list, _make_zeros(weights))
    heads[turn], pulled = _end(
        recipe.heads[turn], weights.heads[turn], heads[turn], place, hidden, labels
    )
    for turn, place, pull_fn in reversed(calls):
        layers[turn], pulled = _pull(pull_fn, pulled, layers[turn], place)
    return _update_once(carry, _Weights(tuple(layers), tuple(heads)), recipe)


@partial(jax.jit, static_argnames="module")
def _call(module: nn.Module, params: PyTree, place: Array | int, x: Array) -> tuple[Any, Any]:
    """Output of a member of a stack, and the function that pulls a gradient back to its weights and input."""
    return jax.vjp(lambda own, x: module.apply({"params": own}, x), pick(params, place), x)


@partial(jax.jit, static_argnames="module", donate_argnames="gradient")
def _end(
    module: nn.Module, params: PyTree, gradient: PyTree, place: Array | int, x: Array, labels: Array
) -> tuple[Any, Array]:
    """The gradient of the loss behind a head: that of its weights, added to the stack's, and that of its input."""

    def loss_fn(own: PyTree, x: Array) -> Array:
        logits: Any = module.apply({"params": own}, x)
        return _mean_loss(logits, labels)

    own, pulled = jax.grad(loss_fn, (0, 1))(pick(params, place), x)
    return _add_at(gradient, place, own), pulled


@partial(jax.jit, donate_argnames="gradient")
def _pull(pull_fn: Any, pulled: Array, gradient: PyTree, place: Array | int) -> tuple[Any, Array]:
    own, pulled = pull_fn(pulled)
    return _add_at(gradient, place, own), pulled


@jax.jit
def _make_zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def _project(layer: Any, params: PyTree) -> PyTree:
    """Weights that a module can be undone with, where it says how to keep them so (`jchain.invertible`)."""
    return jax.vmap(layer.project)(params) if hasattr(layer, "project") else params


def _draw(key: Array, data: Batch, recipe: _Recipe) -> tuple[Array, Array, Any, Any]:
    """One minibatch, the layers and the head of one step."""
    batch_key, layer_key, head_key = jax.random.split(key, 3)
    batch = jax.random.choice(
        batch_key, data.y.shape[0], (min(BATCH_SIZE, data.y.shape[0]),), replace=False
    )
    route, last = jnp.arange(recipe.depth), jnp.array(0)
    if recipe.is_routed:
        route = jax.random.randint(layer_key, (recipe.depth,), 0, recipe.num_layers)
        last = jax.random.randint(head_key, (), 0, recipe.num_heads)
    return data.x[batch], data.y[batch], route, last


_draw_once = jax.jit(_draw, static_argnames="recipe")


def _route_loss(weights: _Weights, key: Array, data: Batch, recipe: _Recipe) -> Float[Array, ""]:
    """Mean cross-entropy of one minibatch along one route."""
    hidden, labels, route, last = _draw(key, data, recipe)
    # Unrolled: the gradient of a convolution in a loop is far slower on CPU.
    for slot, member in enumerate(route):
        turn = (member if recipe.is_routed else slot) % len(recipe.layers)
        hidden = _apply(recipe.layers, weights.layers, turn, member, hidden)
    turn = last % len(recipe.heads) if recipe.is_routed else 0
    return _mean_loss(_apply(recipe.heads, weights.heads, turn, last, hidden), labels)


def _mean_loss(logits: Array, labels: Array) -> Float[Array, ""]:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _apply(
    modules: tuple[nn.Module, ...],
    params: tuple[PyTree, ...],
    turn: Array | int,
    member: Array,
    x: Array,
) -> Any:
    """One member, whose module is that of its turn: no branch where the turn is known."""

    def make_branch(module: nn.Module, own: PyTree) -> Any:
        return lambda place, x: module.apply({"params": pick(own, place)}, x)

    branches = [make_branch(*pair) for pair in zip(modules, params, strict=True)]
    place = member // len(modules)
    if isinstance(turn, int):
        return branches[turn](place, x)
    return branches[0](place, x) if len(branches) == 1 else jax.lax.switch(turn, branches, place, x)
