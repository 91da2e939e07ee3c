"""What a controller sees: features of a bank's entries, and encodings of a prefix.

The project asks whether the state is discrete (the chain so far) or continuous (number of layers and weights). Both are
here, and what the prefix does to data, and combinations, as recurrences over tokens: `initial_carry(entries, seen)`,
`advance(carry, token, entries, seen)`, `read(carry)`. None has parameters that depend on the number of layers or heads, so one
controller works for banks of any size.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jchain._typing import Array, Float, Int, PyTree
from jchain.agent.observations import Observe
from jchain.bank import Bank
from jchain.groups import LayerGroup

# Seeds the hashes. Constant, so that features mean the same in every process and a trained controller can be kept.
_HASH_SEED = 0


@runtime_checkable
class Encoding(Protocol):
    """A Flax module that encodes prefixes.

    Attributes:
      features: size of the encoding.
      observe: what is to be seen of the activations of a prefix, as `jchain.agent.observations.observe`; None where nothing is, and
        then `seen` is empty.
    """

    @property
    def features(self) -> int: ...

    @property
    def observe(self) -> Observe | None: ...

    def initial_carry(self, entries: Float[Array, "E D"], seen: Float[Array, "F"]) -> PyTree:
        """The carry of the empty prefix, of which this is seen."""
        ...

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        seen: Float[Array, "F"],
    ) -> PyTree:
        """The carry after one more layer, behind which this is seen."""
        ...

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        """The encoding of the prefix."""
        ...


def entry_features(bank: Bank, size: int = 64) -> Float[Array, "E D"]:
    """Features of each entry of a bank, computed from its weights: `[N + K, size + 2]`.

    A count sketch of the weights (Charikar et al. 2002: each weight index goes to a random place with a random sign, so
    inner products of weights are kept in expectation), the log of their root mean square, and whether it is a head. Both
    are centered and scaled over the layers and over the heads of the bank, as only differences tell entries apart.

    Args:
      bank: the entries.
      size: length of the sketch.
    """
    return _sketch_entries(bank.without_names(), size)


@partial(jax.jit, static_argnames="size")
def _sketch_entries(bank: Bank, size: int) -> Float[Array, "E D"]:
    parts = []
    for is_head, groups in enumerate((bank.layers, bank.heads)):
        offset = bank.num_layers if is_head else 0
        rows = jnp.concatenate([_sketch_group(group, size) for group in groups])
        order = jnp.array([token - offset for group in groups for token in group.tokens])
        rows = jnp.zeros_like(rows).at[order].set(rows)
        rows -= rows.mean(axis=0, keepdims=True)
        sketch, scale = rows[:, :size], rows[:, size:]
        # One scale for the whole sketch keeps its geometry.
        sketch /= jnp.sqrt(jnp.mean(sketch**2)) + 1e-6
        scale /= jnp.sqrt(jnp.mean(scale**2)) + 1e-6
        parts.append(
            jnp.concatenate([sketch, scale, jnp.full((rows.shape[0], 1), float(is_head))], axis=1)
        )
    return jnp.concatenate(parts)


def _sketch_group(group: LayerGroup, size: int) -> Float[Array, "n D"]:
    num_members = len(group.tokens)
    sketch, square, count = jnp.zeros((num_members, size)), jnp.zeros(num_members), 0
    key = jax.random.key(_HASH_SEED)
    for i, leaf in enumerate(jax.tree.leaves(group.params)):
        weights = jnp.nan_to_num(
            leaf.reshape(num_members, -1).astype(jnp.float32), posinf=0, neginf=0
        )
        place_key, sign_key = jax.random.split(jax.random.fold_in(key, i))
        place = jax.random.randint(place_key, weights.shape[1:], 0, size)
        sign = jax.random.rademacher(sign_key, weights.shape[1:], jnp.float32)
        sketch = sketch.at[:, place].add(sign[None] * weights)
        square += jnp.sum(weights**2, axis=1)
        count += weights.shape[1]
    log_rms = 0.5 * jnp.log(square / max(count, 1) + 1e-12)
    return jnp.concatenate([sketch, log_rms[:, None]], axis=1)


class TokenEncoding(nn.Module):
    """Discrete: the tokens of the prefix, in order, through a GRU. It knows which layers, not what they hold.

    Tokens are told apart by random codes, which need no table as long as the bank.

    Attributes:
      features: size of the encoding.
      code_size: length of a token's code.
    """

    features: int = 32
    code_size: int = 32
    observe = None

    def setup(self) -> None:
        # Not orthogonal, as by default: vmapped factorizations that run side by side wait for each other for ever when XLA
        # has no more threads than there are of them (jaxlib's ParallelBatchMap blocks the thread that it waits for).
        self.cell = nn.GRUCell(self.features, recurrent_kernel_init=nn.initializers.lecun_normal())

    def initial_carry(self, entries: Float[Array, "E D"], seen: Float[Array, "F"]) -> PyTree:
        return jnp.zeros(self.features)

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        seen: Float[Array, "F"],
    ) -> PyTree:
        # A constant of the compiled program: drawn anew for each token, the codes cost more than the cell.
        with jax.ensure_compile_time_eval():
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(_HASH_SEED)))(
                jnp.arange(entries.shape[0])
            )
            codes = jax.vmap(lambda key: jax.random.normal(key, (self.code_size,)))(keys)
        return self.cell(carry, codes[token])[0]

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        return carry


class WeightEncoding(nn.Module):
    """Continuous: [number of layers, the weights of the layers so far]. It knows what the layers hold, not their tokens.

    The weights of all layers, one behind the other, are reduced to one sketch of the size of an entry's: each slot adds
    its layer's sketch with its own rotation and signs, which is a count sketch of the concatenation.

    Attributes:
      features: size of the encoding.
    """

    features: int = 32
    observe = None

    def setup(self) -> None:
        self.hidden = nn.Dense(self.features)
        self.out = nn.Dense(self.features)

    def initial_carry(self, entries: Float[Array, "E D"], seen: Float[Array, "F"]) -> PyTree:
        return jnp.array(0), jnp.zeros(entries.shape[1])

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        seen: Float[Array, "F"],
    ) -> PyTree:
        length, sketch = carry
        place_key, sign_key = jax.random.split(
            jax.random.fold_in(jax.random.key(_HASH_SEED), length)
        )
        entry = jnp.roll(entries[token], jax.random.randint(place_key, (), 0, entries.shape[1]))
        return length + 1, sketch + jax.random.rademacher(
            sign_key, entry.shape, entry.dtype
        ) * entry

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        length, sketch = carry
        state = jnp.append(sketch, length.astype(sketch.dtype))
        return nn.tanh(self.out(nn.relu(self.hidden(state))))


class ObservedEncoding(nn.Module):
    """What the prefix does to data: what is seen of its activations, its change from the empty prefix, number of layers.

    It knows neither which layers there are nor what they hold.

    Attributes:
      observe: what is seen, of `jchain.agent.observations`: `observe`, `observe_activations`, `observe_gradients`, or a `Join` of them.
      features: size of the encoding.
    """

    observe: Observe
    features: int = 32

    def setup(self) -> None:
        self.hidden = nn.Dense(self.features)
        # What is seen has many scales.
        self.norm = nn.LayerNorm()
        self.out = nn.Dense(self.features)

    def initial_carry(self, entries: Float[Array, "E D"], seen: Float[Array, "F"]) -> PyTree:
        return jnp.array(0), seen, seen

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        seen: Float[Array, "F"],
    ) -> PyTree:
        length, first, _ = carry
        return length + 1, first, seen

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        length, first, seen = carry
        state = jnp.concatenate([seen, seen - first, length[None].astype(seen.dtype)])
        return nn.tanh(self.out(nn.relu(self.norm(self.hidden(state)))))


class JointEncoding(nn.Module):
    """Several encodings of the same prefix, one behind the other.

    Attributes:
      parts: encodings, of which those that observe do so by one function.
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.parts or len({part.observe for part in self.parts} - {None}) > 1:
            raise ValueError(
                "expected at least one encoding, and those that observe to do so by one function (jchain.agent.observations.Join), got "
                f"{self.parts}"
            )
        super().__post_init__()

    @property
    def features(self) -> int:
        return sum(part.features for part in self.parts)

    @property
    def observe(self) -> Observe | None:
        return next((part.observe for part in self.parts if part.observe is not None), None)

    def initial_carry(self, entries: Float[Array, "E D"], seen: Float[Array, "F"]) -> PyTree:
        return tuple(part.initial_carry(entries, seen) for part in self.parts)

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        seen: Float[Array, "F"],
    ) -> PyTree:
        return tuple(
            part.advance(own, token, entries, seen)
            for part, own in zip(self.parts, carry, strict=True)
        )

    def read(self, carry: PyTree) -> Float[Array, "H"]:
        return jnp.concatenate(
            [part.read(own) for part, own in zip(self.parts, carry, strict=True)]
        )


class ActorCriticNetwork(nn.Module):
    """Actor and critic over an encoding. The actor points: the logit of an entry is its key times the state's query.

    Pointer network (Vinyals et al. 2015, arXiv:1506.03134) over keys made from `entry_features`.

    Attributes:
      encoding: an `Encoding`. Its size is also that of keys and queries.
    """

    encoding: Any

    def setup(self) -> None:
        features = self.encoding.features
        self.key_hidden = nn.Dense(features)
        self.key_out = nn.Dense(features)
        self.query_hidden = nn.Dense(features)
        # Small queries make the first policy nearly uniform.
        self.query_out = nn.Dense(
            features, kernel_init=nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
        )
        self.value_hidden = nn.Dense(features)
        self.value_out = nn.Dense(1)

    def embed(self, entries: Float[Array, "E D"]) -> Float[Array, "E H"]:
        """The key of each entry."""
        return self.key_out(nn.relu(self.key_hidden(entries)))

    def act(
        self, state: Float[Array, "S"], keys: Float[Array, "E H"]
    ) -> tuple[Float[Array, "E"], Float[Array, ""]]:
        """Logits of the next token and value of an encoded prefix."""
        query = self.query_out(nn.relu(self.query_hidden(state)))
        value = self.value_out(nn.relu(self.value_hidden(state)))[0]
        return keys @ query / jnp.sqrt(self.encoding.features), value

    def initial_carry(self, entries: Float[Array, "E D"], seen: Float[Array, "F"]) -> PyTree:
        return self.encoding.initial_carry(entries, seen)

    def advance(
        self,
        carry: PyTree,
        token: Int[Array, ""],
        entries: Float[Array, "E D"],
        seen: Float[Array, "F"],
    ) -> PyTree:
        return self.encoding.advance(carry, token, entries, seen)

    def read(self, carry: PyTree) -> Float[Array, "S"]:
        return self.encoding.read(carry)

    def __call__(
        self, entries: Float[Array, "E D"], seen: Float[Array, "F"]
    ) -> tuple[Float[Array, "E"], Float[Array, ""]]:
        """Logits and value after the first entry: touches every parameter, for `init`."""
        carry = self.advance(self.initial_carry(entries, seen), jnp.array(0), entries, seen)
        return self.act(self.read(carry), self.embed(entries))
