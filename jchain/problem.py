"""The problem that a search solves: a bank, one split of data, and a loss to minimize."""

import copy
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jchain._typing import Array, Bool, Float, Int, Numbers, OptionalNumbers, PyTree
from jchain.arguments import check_at_least_one, check_fields, checked, read_numbers
from jchain.bank import Bank
from jchain.chain import check_max_layers, check_min_layers
from jchain.cost_limits import find_cheapest, read_limit, read_token_costs
from jchain.data import Batch, check_lengths, read_batch
from jchain.groups import check_keeps_shape, infer_head_output
from jchain.losses import ReadTokens, check_split, count_tokens, find_token_losses, score_outputs
from jchain.modules import check_mean_over_examples, check_output_function, check_stem
from jchain.modules.activations import count_examples, describe_shapes
from jchain.modules.host_batch import HostArrays, HostBatch
from jchain.pytree import is_concrete, pick, pytree_dataclass, replicate, static
from jchain.stages import binding
from jchain.stages.spaces import Space, make_space


@pytree_dataclass
class Problem:
    """A bank, one split of data, a loss to minimize, and the allowed number of layers.

    The loss of a chain is the mean of `loss_fn` over the split, plus the layer penalty, which is
    the sum of `layer_cost` over the layers of the chain.

    Attributes:
      bank: the layers and heads that chains are built from. If the bank has stages, it is bound to
        the data: its stem, layers, and heads then map flat arrays (see `docs/stages.md`).
      data: the data split used by this problem. If its examples have several inputs, they are a
        pytree of arrays, such as a dict; so are labels of several arrays, if the loss takes them.
      max_layers: maximum number of layers in a chain; chains have `L = max_layers + 1` slots.
      loss_fn: function `(outputs [B, ...], y [B, ...]) -> [B, ...]`; its values are averaged over
        all axes, and lower is better. By default softmax cross-entropy with integer labels, in
        nats.
      accuracy_fn: function `(outputs [B, ...], y [B, ...]) -> [B, ...]`; its values are averaged
        like the values of `loss_fn` and reported with the loss. By default its value is 1 if the
        argmax of the outputs equals the label, 0 if it does not, and nan if labels are not
        integers.
      min_layers: minimum number of layers in a chain. If it equals max_layers, all chains have the
        same length. Searches and `evaluate_all` make no shorter chains, but functions that take
        chains accept shorter ones.
      layer_cost: penalty per layer, in units of the loss: one number for all layers, or one number
        per layer, `[N]`. To limit a cost in another unit, use `token_costs` and `max_cost`.
      token_costs: cost of each layer and head, `[N + K]`, in any unit, for example from
        `jchain.token_costs`. The cost of a chain is the sum over its tokens. It does not change the
        loss; results report it, and `max_cost` limits it. If None, the cost of a chain is its
        number of layers.
      max_cost: the maximum cost of a chain, in the unit of `token_costs`. A chain that costs more
        has a loss of `+inf`, so no search returns it. Costs are float32, and a chain that exceeds
        the limit by no more than their rounding error is within the limit. None for no limit.
      batch_size: the number of examples to load at a time, for data that is larger than memory.
        Examples then stay in host memory as NumPy arrays, which may be memory-mapped files, and
        losses are exact means over all parts. Layers must treat examples one by one. None to keep
        all examples on the device.
      mesh: the devices that hold copies of the problem and divide its chains among them, a mesh
        with any axes (see `with_mesh`); None for a single device.
      space: the chains that a search may make. `"chains"`: all. `"subset"`: those that keep the
        order of the parents and repeat no position, so that a search decides which layers stay. Or
        the position of each layer, which must rise along a chain. Other chains are refused, or
        have a loss of `+inf` if they are traced. The attribute is a `ChainSpace`, which does not
        know `max_cost`.

    Raises:
      ValueError: if `max_layers`, `min_layers`, `batch_size`, or `space` is invalid, the split is
        empty, examples or layer costs are not finite, token costs are negative or not finite, no
        chain is within `max_cost`, the stem does not accept the data, a layer changes the structure
        or shape of its input, the space has no chain, heads differ in the shape of their output,
        labels are outside the heads' classes, the loss function fails, or, with `batch_size`, its
        mean over examples is not the mean of its means over parts.
    """

    bank: Bank
    data: Batch | HostBatch
    max_layers: int = static()
    _: dataclasses.KW_ONLY
    loss_fn: Callable[[Array, PyTree], Array] = static(
        default=optax.softmax_cross_entropy_with_integer_labels
    )
    accuracy_fn: Callable[[Array, PyTree], Array] | None = static(default=None)
    min_layers: int = static(default=0)
    layer_cost: Numbers = 0.0  # pyright: ignore[reportAssignmentType]
    token_costs: OptionalNumbers = None  # pyright: ignore[reportAssignmentType]
    max_cost: OptionalNumbers = None  # pyright: ignore[reportAssignmentType]
    batch_size: int | None = static(default=None)
    mesh: Mesh | None = static(default=None)
    space: Space = static(default="chains")
    # How many tokens the loss reads; None if it reads all, or labels are traced.
    read_tokens: ReadTokens | None = dataclasses.field(
        init=False, default=None, metadata={"static": True}
    )

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.data.x) if isinstance(self.data, Batch) else []
        examples = "..."  # JAX may put placeholders into leaves
        if leaves and all(isinstance(leaf, jax.Array) and leaf.ndim > 0 for leaf in leaves):
            x = self.data.x
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), x)
            examples = f"{count_examples(x)} examples {describe_shapes(one)}"
        layers = f"max_layers={self.max_layers}, min_layers={self.min_layers}"
        return f"Problem({self.bank!r}, {examples}, {layers})"

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "max_layers", check_max_layers(self.max_layers))
        object.__setattr__(self, "min_layers", check_min_layers(self.min_layers, self.max_layers))
        object.__setattr__(self, "data", self._read_data())
        object.__setattr__(self, "layer_cost", read_numbers("layer_cost", self.layer_cost))
        if self.layer_cost.shape not in ((), (self.bank.num_layers,)):
            raise ValueError(
                f"expected layer_cost to be a scalar or of shape [{self.bank.num_layers}], got "
                f"shape {list(self.layer_cost.shape)}"
            )
        object.__setattr__(self, "bank", self._bind(self.bank))
        sizes = self.max_layers, self.min_layers
        object.__setattr__(self, "space", make_space(self.space, self.bank, *sizes))
        self._check_costs()
        outputs = self._check_shapes()
        if is_concrete(self.data):
            self._check_values(outputs)
        if self.mesh is not None:
            self._spread(self.mesh)

    def _read_data(self) -> Batch | HostBatch:
        """Check the split, and keep it in host memory if there is a `batch_size`."""
        size, data = self.batch_size, self.data
        if size is None:
            if isinstance(data, HostBatch):
                data = data.source.take(slice(None))
            batch = read_batch(data)
            check_lengths(batch)
            return batch
        check_at_least_one(batch_size=size)
        if self.mesh is not None:
            raise ValueError("expected a problem without a mesh, or without batch_size, got both")
        if isinstance(data, HostBatch):
            return data if data.size == size else HostBatch.make(data.source, int(size))
        if not is_concrete(data):
            raise ValueError("expected examples in host memory with batch_size, got traced arrays")
        batch = read_batch(data, np.asarray)
        check_lengths(batch)
        return HostBatch.make(HostArrays(*batch), int(size))

    def _bind(self, bank: Bank) -> Bank:
        """Bind a bank with stages to the data, and check that there is a chain."""
        if bank.stages is None:
            return bank
        x = self.data.first[0] if isinstance(self.data, HostBatch) else self.data.x
        return binding.bind(bank, x)

    def _check_shapes(self) -> jax.ShapeDtypeStruct:
        """Check all shapes, and return the shape and dtype of the heads' outputs."""
        data = self.data
        x, y = data.first if isinstance(data, HostBatch) else data
        hidden = check_stem(self.bank.stem, self.bank.stem_params, x)
        for group in self.bank.layers:
            check_keeps_shape(group, hidden, self.bank.names)
        names = self.bank.names
        outputs = [infer_head_output(group, hidden, names) for group in self.bank.heads]
        shapes = [list(output.shape) for output in outputs]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"expected heads of one output shape, got {shapes}")
        for name in ("loss_fn", "accuracy_fn"):
            if (function := getattr(self, name)) is not None:
                check_output_function(name, function, outputs[0], y)
        return outputs[0]

    def _check_costs(self) -> None:
        """Convert `token_costs` and `max_cost` to arrays, and check them."""
        if self.token_costs is None:
            if self.max_cost is not None:
                raise ValueError(
                    f"expected token_costs with max_cost, got only max_cost={self.max_cost}; to "
                    "limit the number of layers, use max_layers"
                )
            return
        num_layers = self.bank.num_layers
        costs = read_token_costs(self.token_costs, num_layers, self.bank.num_heads)
        object.__setattr__(self, "token_costs", costs)
        if self.max_cost is None:
            return
        limit = read_limit(self.max_cost)
        object.__setattr__(self, "max_cost", limit)
        if not is_concrete((costs, limit)):
            return
        lengths = self.min_layers, self.max_layers
        cheapest = find_cheapest(costs, num_layers, self.space.stages, lengths)
        if bool(jnp.isnan(limit)) or bool(self.exceeds_limit(cheapest)):
            raise ValueError(
                f"expected a max_cost of at least {float(cheapest):g}, the cost of the cheapest "
                f"chain of at least {self.min_layers} layers and a head, got {float(limit):g}"
            )

    def _check_values(self, outputs: jax.ShapeDtypeStruct) -> None:
        """Check values that are not traced, and count the tokens that the loss reads."""
        if is_concrete(self.layer_cost) and not bool(jnp.isfinite(self.layer_cost).all()):
            raise ValueError("expected a finite layer_cost, got nan or infinity")
        parts = [tuple(self.data)] if isinstance(self.data, Batch) else self.data.iterate()
        labels: list[PyTree] = []
        for x, y in parts:
            check_split(self.loss_fn, x, y, outputs.shape[-1])
            labels.append(y)
        losses = find_token_losses(self.loss_fn, self.accuracy_fn, labels[0], outputs.shape)
        if losses is not None:
            object.__setattr__(self, "read_tokens", count_tokens(losses, labels))
        for name in ("loss_fn", "accuracy_fn"):
            if isinstance(self.data, HostBatch) and (function := getattr(self, name)) is not None:
                check_mean_over_examples(name, function, outputs, self.data.first[1])

    @property
    def num_examples(self) -> int:
        """The number of examples in the split, B."""
        if isinstance(self.data, HostBatch):
            return self.data.num_examples
        return count_examples(self.data.x)

    def first_part(self) -> "Problem":
        """Return the problem on its first `batch_size` examples, held on the device.

        Without `batch_size`, this is the problem itself.
        """
        if not isinstance(self.data, HostBatch):
            return self
        return self._take_part(Batch(*self.data.first))

    @checked
    def read_part(self, start: Int[Array, ""] | int, size: int) -> "Problem":
        """Return the problem on some consecutive examples. Works while tracing.

        Args:
          start: the index of the first example.
          size: the number of examples.
        """
        if isinstance(self.data, HostBatch):
            data = Batch(*self.data.read(start, size))
        else:
            data = jax.tree.map(
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), self.data
            )
        return self._take_part(data)

    def _take_part(self, data: Batch) -> "Problem":
        """Return the problem on some of its examples, held on the device."""
        part = self._replace("data", data)._replace("batch_size", None)
        return part._bound_tokens(may_repeat=False)

    @property
    def named_sizes(self) -> dict[str, int]:
        """The sizes of the axes that the annotations of arrays name."""
        return {"L": self.max_layers + 1}

    @checked
    def with_mesh(self, mesh: Mesh) -> "Problem":
        """Replicate the problem on the devices of a mesh, so that evaluation splits the chains.

        Devices of the mesh may belong to other processes (`jax.distributed`), which must make the
        same calls.

        Args:
          mesh: the mesh of devices, with any axes.
        """
        return self if self.mesh == _flatten(mesh) else dataclasses.replace(self, mesh=mesh)

    def _spread(self, mesh: Mesh) -> None:
        """Flatten the mesh, and copy all leaves to each of its devices."""
        object.__setattr__(self, "mesh", _flatten(mesh))
        for name in ("bank", "data", "layer_cost", "token_costs", "max_cost"):
            object.__setattr__(self, name, self.put(getattr(self, name)))

    @checked
    def put(self, tree: PyTree) -> PyTree:
        """Copy a tree of arrays to each device of this problem's mesh.

        If the problem has no mesh, the leaves only become JAX arrays.

        Args:
          tree: a pytree of arrays; traced leaves are returned unchanged.
        """
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: replicate(leaf, everywhere) if is_concrete(leaf) else leaf, tree
        )

    def without_names(self) -> "Problem":
        """Return the problem with the names of its bank dropped (see `Bank.without_names`)."""
        return self.with_bank(self.bank.without_names())

    @checked
    def take(self, rows: slice | Int[np.ndarray, "b"] | Int[Array, "b"]) -> "Problem":
        """Return the problem with only some of its examples.

        Args:
          rows: the examples to keep, as indices or a slice.
        """
        if isinstance(self.data, HostBatch):
            index = rows if isinstance(rows, slice) else np.asarray(rows)
            data = HostBatch.make(HostArrays(*self.data.source.take(index)), self.data.size)
        else:
            data = Batch(*pick((self.data.x, self.data.y), rows))
        return self._replace("data", data)._bound_tokens(may_repeat=not isinstance(rows, slice))

    def _bound_tokens(self, *, may_repeat: bool) -> "Problem":
        """Bound the number of tokens that the loss reads, after examples were taken."""
        if (given := self.read_tokens) is None:
            return self
        bound = given.of_examples(self.num_examples, may_repeat=may_repeat)
        return self._replace("read_tokens", bound)

    @checked
    def with_data(self, data: Batch) -> "Problem":
        """Return the same problem on another split, such as `data.select`.

        Args:
          data: the examples and labels of the other split.

        Raises:
          ValueError: if the bank or the loss does not accept the examples or labels.
        """
        return dataclasses.replace(self, data=data)

    @checked
    def with_examples(self, x: PyTree) -> "Problem":
        """Return the problem with other examples for the same labels, without checks.

        Args:
          x: the examples, in the shapes of those that they replace.
        """
        return self._replace("data", Batch(x, self.data.y))

    @checked
    def with_bank(self, bank: Bank) -> "Problem":
        """Return the problem with another bank and the same `layer_cost` and `token_costs`.

        Args:
          bank: the new bank. Its layers must keep the same shape, and its tokens must have the same
            costs, which is not checked.
        """
        needs_binding = bank.stages is not None and not binding.is_bound(bank)
        return self._replace("bank", self._bind(bank) if needs_binding else bank)

    @checked
    def relax(self, max_layers: int) -> "Problem":
        """Return the problem with another `max_layers`, and without a limit of the cost.

        Args:
          max_layers: the maximum number of layers in a chain, at least `min_layers`.
        """
        return self._replace("max_layers", check_max_layers(max_layers))._replace("max_cost", None)

    def _replace(self, field: str, value: object) -> "Problem":
        """Replace a field as `dataclasses.replace` does, but without the checks."""
        problem = copy.copy(self)
        object.__setattr__(problem, field, value)
        if field in ("bank", "max_layers"):
            sizes = problem.max_layers, problem.min_layers
            object.__setattr__(problem, "space", make_space(self.space, problem.bank, *sizes))
        return problem

    @checked
    def penalty(self, chains: Int[Array, "*P T"]) -> Float[Array, "*P"]:
        """Compute the layer penalty of each chain, which is added to its loss.

        The penalty is `+inf` if the chain, or the prefix, costs more than `max_cost`, or does not
        follow the stages of the bank or the positions of `space`.

        Args:
          chains: int32 `[..., T]`; the tokens of each chain, or of each prefix, without a head.
        """
        num_layers = self.bank.num_layers
        cost = jnp.broadcast_to(self.layer_cost, (num_layers,))
        is_layer = (chains >= 0) & (chains < num_layers)
        penalty = jnp.sum(jnp.where(is_layer, cost[jnp.where(is_layer, chains, 0)], 0.0), axis=-1)
        if (stages := self.space.stages) is not None:
            penalty = jnp.where(stages.is_legal(chains), penalty, jnp.inf)
        if self.max_cost is None:
            return penalty
        return jnp.where(self.exceeds_limit(self.chain_cost(chains)), jnp.inf, penalty)

    @checked
    def head_penalties(self, prefixes: Int[Array, "*P T"]) -> Float[Array, "*P K"]:
        """Compute the layer penalty of each prefix if it is ended with each head.

        Args:
          prefixes: int32 `[..., T]`; the layers of each prefix, padded with -1.
        """
        shape = (*prefixes.shape[:-1], self.bank.num_heads)
        penalty = jnp.broadcast_to(self.penalty(prefixes)[..., None], shape)
        if (stages := self.space.stages) is not None:
            penalty = jnp.where(stages.get_fitting_heads(prefixes), penalty, jnp.inf)
        if self.max_cost is None:
            return penalty
        heads = jnp.broadcast_to(self.token_costs[self.bank.num_layers :], shape)
        cost = self.chain_cost(prefixes)[..., None] + heads
        return jnp.where(self.exceeds_limit(cost), jnp.inf, penalty)

    @checked
    def chain_cost(self, chains: Int[Array, "*P T"]) -> Float[Array, "*P"]:
        """Compute the cost of each chain: the sum of `token_costs`, or the number of layers.

        Args:
          chains: int32 `[..., T]`; the tokens of each chain, or of each prefix.
        """
        if self.token_costs is None:
            return self.space.count_layers(chains).astype(jnp.float32)
        is_token = chains >= 0
        costs = self.token_costs[jnp.where(is_token, chains, 0)]
        return jnp.sum(jnp.where(is_token, costs, 0.0), axis=-1)

    @checked
    def exceeds_limit(self, cost: Float[Array, "*P"]) -> Bool[Array, "*P"]:
        """Return whether each cost is above `max_cost`; always False if there is no limit.

        Args:
          cost: the costs, in the unit of `token_costs`.
        """
        if self.max_cost is None:
            return jnp.zeros(cost.shape, bool)
        # The rounding error of a sum of L numbers that are not negative.
        error = (self.max_layers + 1) * float(jnp.finfo(jnp.float32).eps)
        return cost > self.max_cost * (1 + error)

    @checked
    def loss_and_accuracy(
        self, outputs: Float[Array, "B ..."]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Compute the loss and the accuracy of one chain's outputs, without the layer penalty.

        By default, the accuracy is the fraction of examples whose largest output is at their label.
        It is nan unless labels are integers, one per row of outputs.

        Args:
          outputs: the outputs of the chain's head, `[B, ...]`.
        """
        return score_outputs(self.loss_fn, self.accuracy_fn, outputs, self.data.y)


def _flatten(mesh: Mesh) -> Mesh:
    """Return a mesh with one axis, whose type lets the compiler shard automatically."""
    return Mesh(mesh.devices.reshape(-1), ("chains",))
