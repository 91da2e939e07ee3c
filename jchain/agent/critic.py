"""A critic of prefixes that transfers between banks: its inputs are features of activations."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jchain._typing import Array, Float, PyTree
from jchain.agent.observations import NUM_FEATURES
from jchain.arguments import checked
from jchain.files import read_arrays, write_arrays
from jchain.pytree import is_concrete, pytree_dataclass, static

NUM_INPUTS = 3 * NUM_FEATURES + 2
_KIND = "critic of prefixes"


class Network(nn.Module):
    """A network of two hidden layers and one output.

    Attributes:
      width: number of units in each of the two hidden layers.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*P I"]) -> Float[Array, "*P"]:
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.relu(nn.Dense(self.width)(x))
        # Small initial weights make the initial prediction a gain of about 0.
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(0.01))(x)[..., 0]


@pytree_dataclass
class Critic:
    """A predictor of how far the loss can fall if a prefix is extended rather than ended.

    Losses are compressed by `jchain.agent.observations.compress_loss`. Predicting the difference
    from the loss of stopping now amounts to reward shaping with that loss as the potential (Ng,
    Harada, and Russell 1999).

    Attributes:
      params: params of the network.
      mean: mean of the inputs over the prefixes that the critic was trained on, `[I]`.
      scale: standard deviation of these inputs, `[I]`.
      width: number of units in each hidden layer of the network.
    """

    params: PyTree
    mean: Float[Array, "I"]
    scale: Float[Array, "I"]
    width: int = static()

    @checked
    def gain(self, inputs: Float[Array, "*P I"]) -> Float[Array, "*P"]:
        """Predict by how much the compressed loss can fall, `[...P]`.

        Args:
          inputs: the inputs from `make_inputs`, `[...P, I]`.
        """
        mean, scale = (jnp.broadcast_to(row, inputs.shape) for row in (self.mean, self.scale))
        scaled = jnp.clip((inputs - mean) / scale, -5.0, 5.0)
        out: PyTree = Network(self.width).apply({"params": self.params}, scaled)
        return out

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the critic to a safetensors file.

        Args:
          path: the path of the file.
        """
        leaves = jax.tree.leaves((self.params, self.mean, self.scale))
        header = {"kind": _KIND, "num_inputs": int(self.mean.shape[0]), "width": self.width}
        write_arrays(path, header, {f"{i:03}": leaf for i, leaf in enumerate(leaves)})

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> "Critic":
        """Read a critic from a file that `save` wrote.

        Args:
          path: the path of the file.

        Raises:
          FileNotFoundError: if the file does not exist.
          ValueError: if the file is damaged, does not hold a critic, or holds a critic that was
            trained on other features.
        """
        from jchain.files.headers import CriticHeader, check_header

        header, arrays = read_arrays(path)
        if header.get("kind") != _KIND:
            raise ValueError(
                f"{path}: expected a {_KIND}, got {header.get('kind', 'another kind of file')!r}"
            )
        if header.get("num_inputs") != NUM_INPUTS:
            raise ValueError(
                f"{path}: expected a critic of {NUM_INPUTS} inputs, {NUM_FEATURES} features of a "
                f"prefix, got one of {header.get('num_inputs')}"
            )
        check_header(CriticHeader, header, path)
        width = header["width"]
        vector = jax.ShapeDtypeStruct((NUM_INPUTS,), jnp.float32)
        params = jax.eval_shape(Network(width).init, jax.random.key(0), vector)["params"]
        expected, structure = jax.tree.flatten((params, vector, vector))
        leaves = [arrays[name] for name in sorted(arrays)]
        found, wanted = ([(a.shape, a.dtype) for a in given] for given in (leaves, expected))
        if found != wanted:
            raise ValueError(
                f"{path}: expected the arrays of a network of width {width}, got other shapes or "
                "dtypes"
            )
        params, mean, scale = jax.tree.unflatten(structure, leaves)
        return cls(params, mean, scale, width)


def make_inputs(
    features: Float[Array, "*P F"],
    change: Float[Array, "*P F"],
    mean_features: Float[Array, "F"],
    length: ArrayLike,
    max_layers: int,
) -> Float[Array, "*P I"]:
    """Make the inputs of a critic for prefixes, `[...P, NUM_INPUTS]`.

    Args:
      features: the features from `jchain.agent.observations.observe`, `[...P, F]`.
      change: the features minus the features of the prefix without its last layer, `[...P, F]`.
      mean_features: the mean features of the prefixes of one layer, `[F]`.
      length: the number of layers of each prefix, less than `max_layers`; one number or `[...P]`.
      max_layers: the maximum number of layers of a chain.
    """
    length = jnp.broadcast_to(jnp.asarray(length), features.shape[:-1])
    place = jnp.stack([length / max_layers, jnp.log(max_layers - length)], axis=-1)
    centered = features - jnp.broadcast_to(mean_features, features.shape)
    return jnp.concatenate([features, change, centered, place.astype(features.dtype)], axis=-1)


def check(critic: object) -> None:
    """Check a `critic` argument.

    Args:
      critic: the value to check, which must be a `Critic` or None.

    Raises:
      ValueError: if the value is neither, or the critic was trained on other features or has
        numbers that are not finite.
    """
    if critic is not None and not (
        isinstance(critic, Critic) and np.shape(critic.mean)[-1:] == (NUM_INPUTS,)
    ):
        got = (
            f"one of {np.shape(critic.mean)} inputs"
            if isinstance(critic, Critic)
            else type(critic).__name__
        )
        raise ValueError(f"expected a critic of {NUM_INPUTS} inputs or None, got {got}")
    if isinstance(critic, Critic) and is_concrete(critic):
        numbers = [np.asarray(leaf) for leaf in jax.tree.leaves(critic)]
        if not all(np.isfinite(leaf).all() for leaf in numbers) or np.min(critic.scale) <= 0:
            raise ValueError(
                "expected a critic of finite numbers and a scale above 0, got others: it was "
                "trained on losses that are not finite, or changed"
            )
