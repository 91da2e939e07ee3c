"""The loop that trains banks on random minibatches.

The loss is softmax cross-entropy unless the config specifies another. The examples of a minibatch
are distinct if the split has at most 1,024 examples. In a larger split they are drawn with
replacement, because drawing distinct examples would take most of the time of a step.

Each gradient step trains a *route*: some layers and a head. An ordinary net always trains the same
route, and a supernet trains a random one at each step (Guo et al. 2020, arXiv:1904.00420). If a
module has a method `project`, each step ends by replacing the weights of its layers with what that
method returns (see `jchain.invertible`).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain._typing import Activations, Array, Float, Int, Key, PyTree
from jchain.data import Batch, check_lengths
from jchain.modules import (
    apply_module,
    check_is_array,
    check_output_function,
    check_same_shapes,
    describe_input,
    describe_module,
)
from jchain.modules.activations import is_floating, put_floating, take_floating
from jchain.pytree import get_first_line, is_concrete, pick

OPTIMIZER = optax.adamw(1e-3, weight_decay=0.1)
BATCH_SIZE = 128
LossFn = Callable[[Array, Array], Array]
CROSS_ENTROPY: LossFn = optax.softmax_cross_entropy_with_integer_labels
NUM_STEPS = 1000
# Minibatches of larger splits are drawn with replacement.
MAX_DISTINCT_EXAMPLES = 1024
# The number of axes of a stacked kernel of a convolution with one spatial axis. Kernels of other
# convolutions have more axes.
_CONV_NDIM = 5


class Weights(NamedTuple):
    """The params of all layers and heads, stacked by module."""

    layers: tuple[PyTree, ...]  # one per module, leaves [n, ...]
    heads: tuple[PyTree, ...]


class TrainingConfig(NamedTuple):
    """What one run trains, as a hashable static argument of the jitted loop."""

    layers: tuple[nn.Module, ...]  # layer i has module i % len(layers)
    heads: tuple[nn.Module, ...]
    num_layers: int
    num_heads: int
    depth: int
    is_routed: bool = False
    is_layer_trained: bool = True
    num_snapshots: int = 1
    num_steps: int = NUM_STEPS
    optimizer: optax.GradientTransformation = OPTIMIZER
    loss_fn: LossFn = CROSS_ENTROPY
    batch_size: int = BATCH_SIZE


class _Carry(NamedTuple):
    """The state that each step passes to the next one."""

    weights: Weights
    opt_state: optax.OptState


class _Draw(NamedTuple):
    """The random choices of one step."""

    x: Activations  # [b, ...F], the minibatch, or a pytree of such arrays
    labels: Array  # [b]
    route: Int[Array, "D"]  # [D], the layers in order
    head: Int[Array, ""]


def is_stepwise(params: PyTree) -> bool:
    """Return whether each gradient step on stacked params should be a separate program.

    It should for convolutions on CPU, whose gradient is about 50 times slower inside a loop.

    Args:
      params: the stacked params, with leaves `[n, ...]`.
    """
    return (
        jax.default_backend() == "cpu"
        and max((leaf.ndim for leaf in jax.tree.leaves(params)), default=0) >= _CONV_NDIM
    )


def train_weights(keys: Key[Array, "R"], data: Batch, config: TrainingConfig) -> Weights:
    """Train one run per key.

    Args:
      keys: one PRNG key per run, `[R]`; consumed by this call.
      data: the split to train on, with the stem already applied.
      config: what each run trains.

    Returns:
      The weights of each run at each of its snapshots, with leaves `[R, num_snapshots, n, ...]`.
    """
    if jax.default_backend() != "cpu":
        return train_in_one_program(keys, data, config, keys.shape[0])
    start = jax.eval_shape(partial(_init, config=config), keys[0], data)[0]
    # If keys are traced, for example to infer the shapes of a bank, the host cannot take the steps.
    if not is_stepwise(start) or not is_concrete(keys):
        return train_in_one_program(keys, data, config, 1)
    runs = [_train_step_by_step(key, data, config) for key in keys]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


@partial(jax.jit, static_argnames=("config", "batch_size"))
def train_in_one_program(
    keys: Key[Array, "R"], data: Batch, config: TrainingConfig, batch_size: int
) -> Weights:
    """Train `batch_size` runs at a time, all in one program.

    On CPU, runs are trained one at a time, because products of vmapped weights are slow there.
    """

    def train_one(key: Array) -> Weights:
        carry, step_keys = _init(key, data, config)

        def train_until_snapshot(carry: _Carry, keys: Array) -> tuple[_Carry, Weights]:
            carry, _ = jax.lax.scan(
                lambda carry, key: (_step(carry, key, data, config), None), carry, keys
            )
            return carry, carry.weights

        return jax.lax.scan(train_until_snapshot, carry, step_keys)[1]

    return jax.lax.map(train_one, keys, batch_size=batch_size)


def _train_step_by_step(key: Array, data: Batch, config: TrainingConfig) -> Weights:
    """Train one run with one or more programs per step (see `is_stepwise`)."""
    carry, step_keys = jax.jit(_init, static_argnames="config")(key, data, config)
    # Runs that differ only in their number of steps share a program.
    step_config = config._replace(num_steps=0, num_snapshots=1)
    has_branches = config.is_routed and max(len(config.layers), len(config.heads)) > 1
    step = _step_in_parts if has_branches else _step_once
    snapshots = []
    for keys in step_keys:
        for step_key in keys:
            carry = step(carry, step_key, data, step_config)
        # Copy the weights, because the next step donates its carry.
        snapshots.append(jax.tree.map(jnp.copy, carry.weights))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *snapshots)


def _init(key: Array, data: Batch, config: TrainingConfig) -> tuple[_Carry, Key[Array, "S T"]]:
    """Return the initial carry, and the keys of the steps that lead to each snapshot."""
    layer_key, head_key, step_key = jax.random.split(key, 3)
    layers, heads = (
        tuple(
            jax.vmap(partial(_init_params, module, data.x))(keys[i :: len(modules)])
            for i, module in enumerate(modules)
        )
        for modules, keys in (
            (config.layers, jax.random.split(layer_key, config.num_layers)),
            (config.heads, jax.random.split(head_key, config.num_heads)),
        )
    )
    weights = Weights(layers, heads)
    keys = jax.random.split(step_key, config.num_steps).reshape(config.num_snapshots, -1)
    return _Carry(weights, config.optimizer.init(weights)), keys


def _init_params(module: nn.Module, x: Activations, key: Array) -> PyTree:
    return module.init(key, pick(x, slice(1))).get("params", {})


def _step(carry: _Carry, key: Array, data: Batch, config: TrainingConfig) -> _Carry:
    """Take one gradient step."""
    return _update(carry, jax.grad(_compute_loss)(carry.weights, key, data, config), config)


def _update(carry: _Carry, gradient: Weights, config: TrainingConfig) -> _Carry:
    weights, opt_state = carry
    updates, opt_state = config.optimizer.update(gradient, opt_state, weights)
    new: PyTree = optax.apply_updates(weights, updates)
    layers = weights.layers
    if config.is_layer_trained:
        layers = tuple(
            _project(layer, own) for layer, own in zip(config.layers, new.layers, strict=True)
        )
    return _Carry(Weights(layers, new.heads), opt_state)


_step_once = jax.jit(_step, static_argnames="config", donate_argnums=0)
_update_once = jax.jit(_update, static_argnames="config", donate_argnums=0)


def _project(layer: nn.Module, params: PyTree) -> PyTree:
    """Return the stacked weights, projected if the module has a method `project`."""
    project = getattr(layer, "project", None)
    return params if project is None else jax.vmap(project)(params)


def _draw(key: Array, data: Batch, config: TrainingConfig) -> _Draw:
    """Draw the minibatch, the layers, and the head of one step."""
    batch_key, layer_key, head_key = jax.random.split(key, 3)
    num_examples = data.y.shape[0]
    if num_examples > MAX_DISTINCT_EXAMPLES:
        rows = jax.random.randint(batch_key, (config.batch_size,), 0, num_examples, jnp.int32)
    else:
        size = min(config.batch_size, num_examples)
        rows = jax.random.choice(batch_key, num_examples, (size,), replace=False)
    route, head = jnp.arange(config.depth), jnp.array(0)
    if config.is_routed:
        route = jax.random.randint(layer_key, (config.depth,), 0, config.num_layers, jnp.int32)
        head = jax.random.randint(head_key, (), 0, config.num_heads, jnp.int32)
    x, labels = pick((data.x, data.y), rows)
    return _Draw(x, labels, route, head)


_draw_once = jax.jit(_draw, static_argnames="config")


def _compute_loss(
    weights: Weights, key: Array, data: Batch, config: TrainingConfig
) -> Float[Array, ""]:
    """Compute the mean loss of one minibatch along one route."""
    hidden, labels, route, head = _draw(key, data, config)
    # This loop is unrolled, because the gradient of a convolution in a loop is far slower on CPU.
    for slot, member in enumerate(route):
        turn = (member if config.is_routed else slot) % len(config.layers)
        hidden = _apply_member(config.layers, weights.layers, turn, member, hidden)
    turn = head % len(config.heads) if config.is_routed else 0
    outputs = _apply_member(config.heads, weights.heads, turn, head, hidden)
    return jnp.mean(config.loss_fn(outputs, labels))


def _apply_member(
    modules: tuple[nn.Module, ...],
    params: tuple[PyTree, ...],
    turn: Array | int,
    member: Array,
    x: Activations,
) -> PyTree:
    """Apply a member of module number `turn`, without a branch if `turn` is a Python int."""

    def make_branch(module: nn.Module, stack: PyTree) -> Callable[[Array, PyTree], PyTree]:
        return lambda index, x: apply_module(module, pick(stack, index), None, x)

    branches = [make_branch(*pair) for pair in zip(modules, params, strict=True)]
    index = member // len(modules)
    if isinstance(turn, int):
        return branches[turn](index, x)
    return branches[0](index, x) if len(branches) == 1 else jax.lax.switch(turn, branches, index, x)


def _step_in_parts(carry: _Carry, key: Array, data: Batch, config: TrainingConfig) -> _Carry:
    """Take one gradient step with one program per layer call, which the host chooses.

    This compiles one program per module instead of one per route.
    """
    weights = carry.weights
    hidden, labels, route, head = _draw_once(key, data, config)
    calls = []
    for member in route.tolist():
        index, turn = divmod(member, len(config.layers))
        hidden, pull_fn = _call(config.layers[turn], weights.layers[turn], index, hidden)
        calls.append((turn, index, pull_fn))
    index, turn = divmod(int(head), len(config.heads))
    layers, heads = map(list, _make_zeros(weights))
    heads[turn], hidden_gradient = _call_head(
        config.heads[turn], config.loss_fn, weights.heads[turn], heads[turn], index, hidden, labels
    )
    for turn, index, pull_fn in reversed(calls):
        layers[turn], hidden_gradient = _pull(pull_fn, hidden_gradient, layers[turn], index)
    return _update_once(carry, Weights(tuple(layers), tuple(heads)), config)


# A function from the gradient of a call's output to the gradients of its weights and input.
_PullFn = Callable[[PyTree], tuple[PyTree, PyTree]]


@partial(jax.jit, static_argnames="module")
def _call(
    module: nn.Module, params: PyTree, index: Array | int, x: Activations
) -> tuple[PyTree, _PullFn]:
    """Return the output of one member of a stack, and the function that pulls its gradient back.

    The gradients of activations are those of their floating-point leaves.
    """

    def apply(params: PyTree, floating: PyTree) -> tuple[PyTree, PyTree]:
        out = apply_module(module, params, None, put_floating(x, floating))
        return take_floating(out), out

    floating, pull_fn, out = jax.vjp(apply, pick(params, index), take_floating(x), has_aux=True)
    return put_floating(out, floating), pull_fn


@partial(jax.jit, static_argnames=("module", "loss_fn"), donate_argnames="gradient")
def _call_head(
    module: nn.Module,
    loss_fn: Callable[[Array, Array], Array],
    params: PyTree,
    gradient: PyTree,
    index: Array | int,
    x: Activations,
    labels: Array,
) -> tuple[PyTree, PyTree]:
    """Add the gradient of the head's weights to its stack's, and return the gradient of `x`."""

    def compute_loss(params: PyTree, floating: PyTree) -> Array:
        outputs = apply_module(module, params, None, put_floating(x, floating))
        return jnp.mean(loss_fn(outputs, labels))

    own = pick(params, index), take_floating(x)
    params_gradient, x_gradient = jax.grad(compute_loss, (0, 1))(*own)
    return _add_at(gradient, index, params_gradient), x_gradient


@partial(jax.jit, donate_argnames="gradient")
def _pull(
    pull_fn: _PullFn, output_gradient: PyTree, gradient: PyTree, index: Array | int
) -> tuple[PyTree, PyTree]:
    """Add the gradient of a call's weights to its stack's, and return its input's gradient."""
    params_gradient, input_gradient = pull_fn(output_gradient)
    return _add_at(gradient, index, params_gradient), input_gradient


def _add_at(stack: PyTree, index: Array | int, member: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, added: leaf.at[index].add(added), stack, member)


@jax.jit
def _make_zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def check_training(data: Batch, config: TrainingConfig) -> None:
    """Check that a config can be trained on data.

    Args:
      data: the split to train on, after the stem.
      config: the modules, and how they are trained.

    Raises:
      ValueError: if there are no modules or no examples, a module does not take the data or has
        other collections than params, a layer changes the shape or dtype, heads differ in their
        output shape, or the loss does not take the outputs and labels.
    """
    if not config.layers or not config.heads:
        raise ValueError(
            f"expected at least one layer module and one head module, "
            f"got {len(config.layers)} and {len(config.heads)}"
        )
    check_lengths(data)
    x, y = data
    floating = [leaf for leaf in jax.tree.leaves(data) if is_floating(leaf)]
    if is_concrete(floating) and not all(np.isfinite(leaf).all() for leaf in floating):
        raise ValueError("expected finite examples and targets to train on, got nan or infinity")
    for layer in config.layers:
        check_same_shapes(_init_output(layer, x, "layer"), x, f"layer {describe_module(layer)}")
    outputs = [_init_output(head, x, "head") for head in config.heads]
    for head, out in zip(config.heads, outputs, strict=True):
        check_is_array(out, f"head {describe_module(head)}")
    if len({out.shape for out in outputs}) != 1:
        raise ValueError(
            f"expected heads of one output shape, got {[list(out.shape) for out in outputs]}"
        )
    if config.loss_fn is not CROSS_ENTROPY:
        check_output_function("loss_fn", config.loss_fn, outputs[0], y)
        return
    num_classes = outputs[0].shape[-1]
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"expected integer labels for the default loss, got {y.dtype}: pass loss_fn= for "
            "other targets, for example optax.squared_error"
        )
    if not is_concrete(data):
        return
    labels = np.asarray(y)  # NumPy computes the range also while something else is traced
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, the head's classes, "
            f"got {labels.min()}..{labels.max()}"
        )


def warn_of_divergence(weights: Weights) -> None:
    """Warn if trained weights are not finite.

    Args:
      weights: the weights.
    """
    leaves = jax.tree.leaves(weights)
    if is_concrete(leaves) and not all(np.isfinite(leaf).all() for leaf in leaves):
        warnings.warn(
            "training diverged: some weights of the bank are nan or infinite, so chains of these "
            "layers have a loss of +inf. Try a lower learning rate",
            stacklevel=4,
        )


def _init_output(module: nn.Module, x: Activations, kind: str) -> PyTree:
    """Return the shapes and dtypes of a new module's output."""
    name = f"{kind} {describe_module(module)}"
    try:
        out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(
            f"{name} does not take {describe_input(x)}: {get_first_line(error)}"
        ) from None
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(
            f"{name} has the collection {others[0]!r}, but only params are trained: train it "
            "yourself, and pass all of its variables to jc.Bank.stack"
        )
    return out
