"""The network of an actor-critic, its encodings of a prefix, and features of a bank's entries.

A prefix can be encoded by its tokens (discrete), by its number of layers and their weights
(continuous), by what it does to data, or by a combination of these. An encoding is a recurrence
over tokens with three methods: `init_carry(entries, prefix_features)`, `advance(carry, token,
entries, prefix_features)`, and `read(carry)`. The shapes of its params do not depend on the number
of layers or heads, so one network works for banks of any size.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, PyTree
from jchain.agent.observations import Observe
from jchain.arguments import check_at_least_one, checked
from jchain.bank import Bank
from jchain.engine.draws import draw_signs
from jchain.groups import LayerGroup
from jchain.pytree import describe_type

# The seed of the hashes is constant, so that features are the same in every process and a trained
# network can be saved.
_HASH_SEED = 0
_MAX_WEIGHT = 1e12


@runtime_checkable
class Encoding(Protocol):
    """A Flax module that encodes prefixes.

    Attributes:
      features: size of the encoding, H.
      observe: function that observes the activations of a prefix, such as
        `jchain.agent.observations.observe`; None to observe nothing, in which case
        `prefix_features` are empty.
    """

    @property
    def features(self) -> int: ...

    @property
    def observe(self) -> Observe | None: ...

    def init_carry(
        self, entries: Float[Array, "E D"], prefix_features: Float[Array, "F"]
    ) -> PyTree:
        """Return the carry of the empty prefix, whose features are `prefix_features`, `[F]`."""
        ...

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        prefix_features: Float[Array, "F"],
    ) -> PyTree:
        """Return the carry after appending `token`; the new prefix has `prefix_features`, `[F]`."""
        ...

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        """Return the encoding of the prefix, `[H]`."""
        ...


EntryFeatures = Callable[[Bank], Float[Array, "E D"]]


def get_entries(entry_features: EntryFeatures, bank: Bank) -> Float[Array, "E D"]:
    """Compute the features of the entries of a bank with a user's function.

    Args:
      entry_features: the function, such as `entry_features`.
      bank: the bank.

    Raises:
      ValueError: if the function does not return one row per layer and head.
    """
    features, num_entries = entry_features(bank), bank.num_layers + bank.num_heads
    shape = getattr(features, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != num_entries:
        raise ValueError(
            f"expected entry_features to return shape [{num_entries}, D], got "
            f"{describe_type(features)}"
        )
    return features


@checked
def entry_features(bank: Bank, size: int = 64) -> Float[Array, "E D"]:
    """Compute features of each entry of a bank from its weights: `[N + K, size + 2]`.

    The features are a count sketch of the weights, the log of their root mean square, and whether
    the entry is a head. A count sketch (Charikar et al. 2002) adds each weight to a random bin with
    a random sign, which preserves inner products of weights in expectation. The sketch and the log
    are centered and scaled over the layers of the bank, and separately over its heads, because only
    differences between entries matter.

    Args:
      bank: the bank.
      size: the length of the sketch.
    """
    check_at_least_one(size=size)
    return _sketch_entries(bank.without_names(), size)


@partial(jax.jit, static_argnames="size")
def _sketch_entries(bank: Bank, size: int) -> Float[Array, "E D"]:
    """Compute the sketch, log scale, and is-head flag of each entry, in the order of the tokens."""
    parts = []
    for is_head, groups in enumerate((bank.layers, bank.heads)):
        offset = bank.num_layers if is_head else 0
        rows = jnp.concatenate([_sketch_group(group, size) for group in groups])
        order = jnp.array([token - offset for group in groups for token in group.tokens])
        rows = jnp.zeros_like(rows).at[order].set(rows)
        rows -= rows.mean(axis=0, keepdims=True)
        sketch, scale = rows[:, :size], rows[:, size:]
        # A single scale for the whole sketch preserves its geometry.
        sketch /= jnp.sqrt(jnp.mean(sketch**2)) + 1e-6
        scale /= jnp.sqrt(jnp.mean(scale**2)) + 1e-6
        parts.append(
            jnp.concatenate([sketch, scale, jnp.full((rows.shape[0], 1), float(is_head))], axis=1)
        )
    return jnp.concatenate(parts)


def _sketch_group(group: LayerGroup, size: int) -> Float[Array, "n D"]:
    """Compute the count sketch and log root mean square of the weights of each member."""
    num_members = len(group.tokens)
    sketch, square, count = jnp.zeros((num_members, size)), jnp.zeros(num_members), 0
    key = jax.random.key(_HASH_SEED)
    for i, leaf in enumerate(jax.tree.leaves(group.params)):
        weights = jnp.nan_to_num(
            leaf.reshape(num_members, -1).astype(jnp.float32), posinf=0, neginf=0
        )
        # Squares of larger weights, and their sums, would overflow.
        weights = jnp.clip(weights, -_MAX_WEIGHT, _MAX_WEIGHT)
        place_key, sign_key = jax.random.split(jax.random.fold_in(key, i))
        place = jax.random.randint(place_key, weights.shape[1:], 0, size, jnp.int32)
        sign = draw_signs(sign_key, weights.shape[1:], jnp.float32)
        sketch = sketch.at[:, place].add(sign[None] * weights)
        square += jnp.sum(weights**2, axis=1)
        count += weights.shape[1]
    log_rms = 0.5 * jnp.log(square / max(count, 1) + 1e-12)
    return jnp.concatenate([sketch, log_rms[:, None]], axis=1)


class TokenEncoding(nn.Module):
    """A discrete encoding: a GRU over the tokens of the prefix.

    It knows which layers the prefix has, but not their weights. Each token has a random code
    instead of a learned embedding, so the number of params does not grow with the bank.

    Attributes:
      features: size of the encoding.
      code_size: length of a token's code.
    """

    features: int = 32
    code_size: int = 32
    observe = None

    def setup(self) -> None:
        check_at_least_one(features=self.features, code_size=self.code_size)
        # The default initializer, orthogonal, can deadlock. It factorizes matrices, and vmapped
        # factorizations that run concurrently wait for each other if they occupy all threads of XLA
        # (jaxlib's ParallelBatchMap blocks the thread that it waits for).
        self.cell = nn.GRUCell(self.features, recurrent_kernel_init=nn.initializers.lecun_normal())

    def init_carry(
        self, entries: Float[Array, "E D"], prefix_features: Float[Array, "F"]
    ) -> PyTree:
        return jnp.zeros(self.features)

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        prefix_features: Float[Array, "F"],
    ) -> PyTree:
        # Make the codes constants of the compiled program, because drawing them again for each
        # token would cost more than the cell.
        with jax.ensure_compile_time_eval():
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(_HASH_SEED)))(
                jnp.arange(entries.shape[0])
            )
            codes = jax.vmap(lambda key: jax.random.normal(key, (self.code_size,), jnp.float32))(
                keys
            )
        return self.cell(carry, codes[token])[0]

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        return carry


class WeightEncoding(nn.Module):
    """A continuous encoding: the number of layers and their weights.

    It knows the weights of the layers, but not their tokens. The concatenated weights of all layers
    are reduced to one sketch, which is as long as one entry's sketch: each slot rotates the sketch
    of its layer, multiplies it by random signs, and adds it to the total. The result is a count
    sketch of the concatenation.

    Attributes:
      features: size of the encoding.
    """

    features: int = 32
    observe = None

    def setup(self) -> None:
        check_at_least_one(features=self.features)
        self.hidden = nn.Dense(self.features)
        self.out = nn.Dense(self.features)

    def init_carry(
        self, entries: Float[Array, "E D"], prefix_features: Float[Array, "F"]
    ) -> PyTree:
        return jnp.array(0), jnp.zeros(entries.shape[1])

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        prefix_features: Float[Array, "F"],
    ) -> PyTree:
        length, sketch = carry
        place_key, sign_key = jax.random.split(
            jax.random.fold_in(jax.random.key(_HASH_SEED), length)
        )
        entry = jnp.roll(
            entries[token], jax.random.randint(place_key, (), 0, entries.shape[1], jnp.int32)
        )
        return length + 1, sketch + draw_signs(sign_key, entry.shape, entry.dtype) * entry

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        length, sketch = carry
        state = jnp.append(sketch, length.astype(sketch.dtype))
        return nn.tanh(self.out(nn.relu(self.hidden(state))))


class ObservedEncoding(nn.Module):
    """An encoding of what the prefix does to data.

    It encodes features of the prefix's activations, their change from the empty prefix, and the
    number of layers. It knows neither the tokens of the layers nor their weights.

    Attributes:
      observe: function that computes the features: `observe`, `observe_activations`, or
        `observe_gradients` of `jchain.agent.observations`, or a `Join` of them.
      features: size of the encoding.
    """

    observe: Observe
    features: int = 32

    def setup(self) -> None:
        check_at_least_one(features=self.features)
        self.hidden = nn.Dense(self.features)
        # Normalize, because the features of a prefix differ widely in scale.
        self.norm = nn.LayerNorm()
        self.out = nn.Dense(self.features)

    def init_carry(
        self, entries: Float[Array, "E D"], prefix_features: Float[Array, "F"]
    ) -> PyTree:
        return jnp.array(0), prefix_features, prefix_features

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        prefix_features: Float[Array, "F"],
    ) -> PyTree:
        length, first, _ = carry
        return length + 1, first, prefix_features

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        length, first, last = carry
        state = jnp.concatenate([last, last - first, length[None].astype(last.dtype)])
        return nn.tanh(self.out(nn.relu(self.norm(self.hidden(state)))))


class JointEncoding(nn.Module):
    """A concatenation of several encodings of the same prefix.

    Attributes:
      parts: the encodings. All parts that observe must have the same `observe` function.
    """

    parts: tuple[Encoding, ...]

    def __post_init__(self) -> None:
        if not self.parts or len({part.observe for part in self.parts} - {None}) > 1:
            raise ValueError(
                "expected at least one encoding, and those that observe to use one function "
                f"(jchain.agent.observations.Join), got {self.parts}"
            )
        super().__post_init__()

    @property
    def features(self) -> int:
        return sum(part.features for part in self.parts)

    @property
    def observe(self) -> Observe | None:
        return next((part.observe for part in self.parts if part.observe is not None), None)

    def init_carry(
        self, entries: Float[Array, "E D"], prefix_features: Float[Array, "F"]
    ) -> PyTree:
        return tuple(part.init_carry(entries, prefix_features) for part in self.parts)

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        prefix_features: Float[Array, "F"],
    ) -> PyTree:
        return tuple(
            part.advance(own, token, entries, prefix_features)
            for part, own in zip(self.parts, carry, strict=True)
        )

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        return jnp.concatenate(
            [part.read(own) for part, own in zip(self.parts, carry, strict=True)]
        )


class ActorCriticNetwork(nn.Module):
    """The actor and the critic on top of an encoding.

    The logit of an entry is the scaled inner product of its key and the prefix's query. The actor
    is thus a pointer network (Vinyals et al. 2015, arXiv:1506.03134) over keys that are computed
    from `entry_features`.

    Attributes:
      encoding: encoding of prefixes; keys and queries have the same size as the encoding.
    """

    encoding: Encoding

    def setup(self) -> None:
        features = self.encoding.features
        self.key_hidden = nn.Dense(features)
        self.key_out = nn.Dense(features)
        self.query_hidden = nn.Dense(features)
        # Small queries make the initial policy nearly uniform.
        self.query_out = nn.Dense(
            features, kernel_init=nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
        )
        self.value_hidden = nn.Dense(features)
        self.value_out = nn.Dense(1)

    def embed(self, entries: Float[Array, "E D"]) -> Float[Array, "E H"]:
        """Compute the key of each entry, `[N + K, H]`."""
        return self.key_out(nn.relu(self.key_hidden(entries)))

    def act(
        self, encoded: Float[Array, "S"], keys: Float[Array, "E H"]
    ) -> tuple[Float[Array, "E"], Float[Array, ""]]:
        """Compute the logits of the next token, `[N + K]`, and the value of an encoded prefix."""
        query = self.query_out(nn.relu(self.query_hidden(encoded)))
        value = self.value_out(nn.relu(self.value_hidden(encoded)))[0]
        return keys @ query / jnp.sqrt(self.encoding.features), value

    def init_carry(
        self, entries: Float[Array, "E D"], prefix_features: Float[Array, "F"]
    ) -> PyTree:
        """Return the carry of the empty prefix; see `Encoding.init_carry`."""
        return self.encoding.init_carry(entries, prefix_features)

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        prefix_features: Float[Array, "F"],
    ) -> PyTree:
        """Return the carry after appending a token; see `Encoding.advance`."""
        return self.encoding.advance(carry, token, entries, prefix_features)

    def read(self, carry: PyTree) -> Float[Array, "S"]:
        """Return the encoding of the prefix; see `Encoding.read`."""
        return self.encoding.read(carry)

    def __call__(
        self, entries: Float[Array, "E D"], prefix_features: Float[Array, "F"]
    ) -> tuple[Float[Array, "E"], Float[Array, ""]]:
        """Compute logits and value after the first entry; `init` calls this to make all params."""
        carry = self.init_carry(entries, prefix_features)
        carry = self.advance(carry, jnp.array(0), entries, prefix_features)
        return self.act(self.read(carry), self.embed(entries))
