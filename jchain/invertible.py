"""Invertible layers, whose `module.invert(params)` returns the module and params of the inverse.

`jchain.inverse` treats any module with such a method as invertible. If a module also has a method
`project(params)`, training keeps the module invertible: after each step, `jchain.train` replaces
its weights with what that method returns.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jchain._typing import Array, Float, PyTree
from jchain.pytree import is_concrete, multiply_children

_MAX_ITERATIONS = 1000


class InvertibleDense(nn.Module):
    """A square affine map, then a leaky ReLU: `leaky_relu(x W + b)`.

    The inverse amplifies noise in the outputs by up to `condition / negative_slope`, where
    `condition` is the condition number of `W`.

    Attributes:
      features: size of the last axis of the input and the output.
      use_bias: whether to add the bias `b`.
      negative_slope: slope of the leaky ReLU below 0, which must be positive; 1 for a linear layer.
      max_condition: largest condition number of `W` that training allows.
      is_inverse: whether this is the inverse layer, `(leaky_relu^-1(x) - b) W`.
    """

    features: int
    use_bias: bool = True
    negative_slope: float = 0.5
    max_condition: float = 10.0
    is_inverse: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B *F"]:
        if not self.negative_slope > 0:
            raise ValueError(
                f"expected a positive negative_slope, to be invertible, got {self.negative_slope}"
            )
        if not self.max_condition >= 1:
            raise ValueError(f"expected a max_condition of at least 1, got {self.max_condition}")
        kernel = self.param(
            "kernel", nn.initializers.orthogonal(), (self.features, self.features), jnp.float32
        )
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            if self.use_bias
            else jnp.zeros_like(kernel[0])
        )
        if self.is_inverse:
            return (self.invert_activation(x) - _lift(bias, x)) @ kernel
        return self.apply_activation(x @ kernel + _lift(bias, x))

    def apply_activation(self, x: Array) -> Array:
        """Apply the leaky ReLU to `x`."""
        return nn.leaky_relu(x, self.negative_slope)

    def invert_activation(self, y: Array) -> Array:
        """Return the input whose leaky ReLU is `y`."""
        return nn.leaky_relu(y, 1.0 / self.negative_slope)

    def invert(self, params: PyTree) -> tuple[nn.Module, PyTree]:
        """Return the module and the params of the inverse.

        `W` is inverted in float64, unless it is traced.

        Args:
          params: the params of this layer.

        Raises:
          ValueError: if `W` is singular to the precision of its dtype.
        """
        return self.clone(is_inverse=not self.is_inverse), {
            **params,
            "kernel": _invert_matrix(params["kernel"]),
        }

    def project(self, params: PyTree) -> PyTree:
        """Raise small singular values of `W` to at least the largest one / `max_condition`."""
        left, values, right = jnp.linalg.svd(params["kernel"])
        values = jnp.maximum(values, values[0] / self.max_condition)
        return {**params, "kernel": (left * values[None]) @ right}


class AdditiveCoupling(nn.Module):
    """A reversible residual block: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    `x1` and `x2` are the two halves of the features, and `f` and `g` are MLPs (Gomez et al. 2017,
    arXiv:1707.04585). The block is exactly invertible for any weights: `x2 = y2 - g(y1)`,
    `x1 = y1 - f(x2)`.

    Attributes:
      features: size of the last axis of the input and the output, at least 2. If it is odd, `x2`
        has one more feature than `x1`.
      hidden: number of hidden units of each MLP; `features` if None.
      activation: elementwise function; ReLU by default.
      is_inverse: whether this is the inverse layer.
    """

    features: int
    hidden: int | None = None
    activation: Callable[[Array], Array] = nn.relu
    is_inverse: bool = False

    def setup(self) -> None:
        if self.features < 2:
            raise ValueError(
                f"expected at least 2 features to split in halves, got {self.features}"
            )
        half = self.features // 2
        hidden = self.features if self.hidden is None else self.hidden
        self.f = [nn.Dense(hidden), nn.Dense(half)]
        self.g = [nn.Dense(hidden), nn.Dense(self.features - half)]

    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B *F"]:
        first, second = jnp.split(x, [self.features // 2], axis=-1)
        if self.is_inverse:
            second = second - self._apply(self.g, first)
            first = first - self._apply(self.f, second)
        else:
            first = first + self._apply(self.f, second)
            second = second + self._apply(self.g, first)
        return jnp.concatenate([first, second], axis=-1)

    def _apply(self, denses: Sequence[nn.Dense], x: Array) -> Array:
        return denses[1](self.activation(denses[0](x)))

    def invert(self, params: PyTree) -> tuple[nn.Module, PyTree]:
        """Return the module of the inverse, and its params, which are the same.

        Args:
          params: the params of this layer.
        """
        return self.clone(is_inverse=not self.is_inverse), params


class InvertibleResidual(nn.Module):
    """A residual block with a spectral bound: `x + activation(x W1 + b1) W2 + b2`, `|W1| |W2| < 1`.

    This is the block of Behrmann et al. 2019, arXiv:1811.00995. The term that is added to `x`,
    `g(x)`, is a contraction, so the input is the fixed point of `x = y - g(x)`. At most 1,000
    iterations find it up to rounding. The inverse amplifies noise in the outputs by up to
    `1 / (1 - bound)`.

    Attributes:
      features: size of the last axis of the input and the output.
      hidden: number of units between the two maps; `features` if None.
      activation: elementwise function with slopes in -1..1; ReLU by default.
      bound: largest `|W1| |W2|` (spectral norms) that training allows, below 1.
      is_inverse: whether this is the inverse layer.
    """

    features: int
    hidden: int | None = None
    activation: Callable[[Array], Array] = nn.relu
    bound: float = 0.9
    is_inverse: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B *F"]) -> Float[Array, "B *F"]:
        if not 0 < self.bound < 1:
            raise ValueError(f"expected a bound between 0 and 1, got {self.bound}")
        kernel_init = nn.initializers.orthogonal(self.bound**0.5)
        hidden = self.features if self.hidden is None else self.hidden
        inner = nn.Dense(hidden, kernel_init=kernel_init)
        outer = nn.Dense(self.features, kernel_init=kernel_init)

        def add(x: Array) -> Array:
            return outer(self.activation(inner(x)))

        if not self.is_inverse:
            return x + add(x)
        if self.is_initializing():
            return x - add(x)
        return _find_fixed_point(lambda guess: x - add(guess), x)

    def invert(self, params: PyTree) -> tuple[nn.Module, PyTree]:
        """Return the module of the inverse, and its params, which are the same.

        Args:
          params: the params of this layer.

        Raises:
          ValueError: if the term that the layer adds to its input is not a contraction.
        """
        if is_concrete(params):
            norm = np.prod(
                [
                    np.linalg.norm(np.asarray(params[d]["kernel"], np.float64), 2)
                    for d in ("Dense_0", "Dense_1")
                ]
            )
            slope = float(
                jnp.abs(
                    jax.vmap(jax.grad(lambda x: self.activation(x)))(
                        jnp.linspace(-30.0, 30.0, 6001)
                    )
                ).max()
            )
            if not norm * slope < 1:
                raise ValueError(
                    f"{type(self).__name__} has no inverse: expected spectral norms and "
                    f"largest slope of the activation with a product below 1, "
                    f"got {norm:.3g} and {slope:.3g}"
                )
        return self.clone(is_inverse=not self.is_inverse), params

    def scale_branch(self, params: PyTree, factor: float) -> PyTree:
        """Return the params with which the added term is multiplied by a factor.

        Args:
          params: the params of this layer.
          factor: the factor. The layer has no inverse if it makes the term too large.
        """
        return multiply_children(params, factor, "Dense_1")

    def project(self, params: PyTree) -> PyTree:
        """Scale down both matrices equally if they exceed the bound."""
        norm = jnp.prod(
            jnp.stack(
                [jnp.linalg.norm(params[name]["kernel"], 2) for name in ("Dense_0", "Dense_1")]
            )
        )
        scale = jnp.sqrt(jnp.minimum(1.0, self.bound / norm))
        return {
            name: {**dense, "kernel": scale * dense["kernel"]} for name, dense in params.items()
        }


def _lift(bias: Array, x: Array) -> Array:
    return bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _invert_matrix(kernel: Array) -> Array:
    if not is_concrete(kernel):
        # jnp.linalg.inv does not accept 16-bit floats.
        return jnp.linalg.inv(kernel.astype(jnp.promote_types(jnp.float32, kernel.dtype))).astype(
            kernel.dtype
        )
    exact = np.asarray(kernel, np.float64)
    condition, limit = np.linalg.cond(exact), 1 / float(jnp.finfo(kernel.dtype).eps)
    if not condition < limit:
        raise ValueError(
            f"singular layer has no inverse: expected a condition number below {limit:.3g} "
            f"in {kernel.dtype}, got {condition:.3g}"
        )
    return jnp.asarray(np.linalg.inv(exact), kernel.dtype)


def _find_fixed_point(
    step: Callable[[Array], Array], start: Float[Array, "B *F"]
) -> Float[Array, "B *F"]:
    """Iterate until no example changes by more than rounding error."""
    tolerance = 2 * jnp.finfo(start.dtype).eps

    def max_norm(x: Array) -> Float[Array, "B"]:
        return jnp.max(jnp.abs(x).reshape(x.shape[0], -1), axis=1)

    def is_moving(carry: tuple[Array, Array, Array]) -> Array:
        _, is_moved, i = carry
        return is_moved.any() & (i < _MAX_ITERATIONS)

    def move(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, _, i = carry
        new = step(x)
        return new, max_norm(new - x) > tolerance * max_norm(new), i + 1

    first = (start, jnp.ones(start.shape[0], bool), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(is_moving, move, first)[0]
