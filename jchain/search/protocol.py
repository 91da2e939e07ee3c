"""The protocol of searches.

To add a search, write a frozen dataclass with `jchain.pytree.pytree_dataclass`. Declare the fields
that set array shapes as `static`, and leave other numbers plain. Then define two methods:

- `init(key, problem) -> state` returns the first state: a NamedTuple of what `step` needs to know.
- `step(key, state, problem) -> (state, Info)` scores some chains. `Info` holds the chains, their
  losses, and the cost of scoring them, in layer calls.

Both must work under `jit` and `vmap`. The state and the losses must keep their shapes and dtypes.
`jchain.runs.driver` keeps track of the budget, the best chains, the loss curve, the counts, and
the progress line. A search may also define the optional members that `Search` lists.
`jchain.check_search` tests a search against this protocol, and so does
`tests/search/test_contract.py`, for the searches of jchain.
`jchain.search.random_search` is the shortest example.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from jchain._typing import Array, Float, Int, Key, PyTree
from jchain.problem import Problem
from jchain.pytree import describe_type


class Info(NamedTuple):
    """The chains that one step scored, their losses, and the cost of the step.

    Attributes:
      chains: the tokens of the chains, `[P, L]`; a row of -1 holds no chain.
      loss: the loss of each chain, `[P]`, with the layer penalty; `+inf` if it is not finite or the
        row holds no chain.
      layer_calls: the cost of this step in layer calls on the whole split: an integer or, if the
        search `charges_fractions`, a float. The driver rounds it to whole examples, and adds these
        up without error.
    """

    chains: Int[Array, "P L"]
    loss: Float[Array, "P"]
    layer_calls: Int[Array, ""] | Float[Array, ""]


@runtime_checkable
class Search(Protocol):
    """The interface of a search: a frozen dataclass with `init` and `step`.

    It is registered as a pytree (`jchain.pytree_dataclass`). Fields that determine array shapes are
    static; all other hyperparameters are leaves.

    Both methods must work under `jit`, and under `vmap` over keys and states. The members below are
    optional. The first five are flags. The functions of the same names in this module read them,
    and return False if a search does not define the flag.

    - `is_deterministic`: the key does not affect which chains the search scores.
    - `needs_gradient`: the search takes gradients through layers.
    - `needs_invertible`: the layers of the bank must be invertible.
    - `reads_activations`: the search reads activations or gradients, not only losses. If the
      examples are read in parts, it is given the first part alone (`jchain.runs.rescoring`).
    - `charges_fractions`: `Info.layer_calls` is a float, because some chains are scored on a part
      of the examples. Chains that were not scored on the whole split have a loss of `+inf`.
    - `check(problem)`: raises ValueError if the search cannot run on the problem (`Checked`).
    - `start(key, state, problem, chains, loss)`: begins at given chains (`Startable`).
    - `refresh(state, problem, chains)`: adapts the state to changed weights (`Refreshable`).
    """

    def init(self, key: Key[Array, ""], problem: Problem) -> PyTree:
        """Return the first state, which holds only what `step` needs.

        Args:
          key: the PRNG key; consumed by this call.
          problem: the problem to search.
        """
        ...

    def step(self, key: Key[Array, ""], state: PyTree, problem: Problem) -> tuple[PyTree, Info]:
        """Score some chains and advance the state.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` or the last step returned.
          problem: the problem to search.

        Returns:
          The next state, with the same shapes and dtypes, and the chains that were scored.
        """
        ...


@runtime_checkable
class Startable(Protocol):
    """A search that can begin at chains that were scored before its first step.

    Other searches can be given such chains too: the driver scores them and keeps the best ones, but
    the search does not know them.
    """

    def start(
        self,
        key: Key[Array, ""],
        state: PyTree,
        problem: Problem,
        chains: Int[Array, "C L"],
        loss: Float[Array, "C"],
    ) -> PyTree:
        """Return a first state that uses the starts. Must work under `jit` and `vmap`.

        Args:
          key: the PRNG key; consumed by this call.
          state: the state that `init` returned.
          problem: the problem to search.
          chains: the starts, chains of the problem's space, `[C, L]`.
          loss: their losses, `[C]`.
        """
        ...


@runtime_checkable
class Refreshable(Protocol):
    """A search that can continue after weights of the bank have changed (`jchain.updates`)."""

    def refresh(
        self, state: PyTree, problem: Problem, chains: Int[Array, "Q L"]
    ) -> tuple[PyTree, Int[Array, ""]]:
        """Recompute all stored losses; return the new state and the cost in layer calls.

        Args:
          state: the state before the weights changed.
          problem: the problem with the new weights.
          chains: other good chains to store, `[Q, L]`; a row of -1 holds no chain.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """A search that accepts only some problems."""

    def check(self, problem: Problem) -> None:
        """Check a problem on the host before anything is computed.

        Args:
          problem: the problem that `init` and `step` will be given.

        Raises:
          ValueError: if the search does not accept the problem.
        """
        ...


def is_deterministic(search: Search) -> bool:
    """Return True if the key does not affect what a search scores, so that one run is enough.

    Args:
      search: the search.
    """
    return bool(getattr(search, "is_deterministic", False))


def needs_gradient(search: Search) -> bool:
    """Return True if a search takes gradients through layers.

    Args:
      search: the search.
    """
    return bool(getattr(search, "needs_gradient", False))


def needs_invertible(search: Search) -> bool:
    """Return True if a search needs a bank of invertible layers.

    Args:
      search: the search.
    """
    return bool(getattr(search, "needs_invertible", False))


def reads_activations(search: Search) -> bool:
    """Return True if a search reads activations or gradients, not only losses.

    Args:
      search: the search.
    """
    return bool(getattr(search, "reads_activations", False))


def charges_fractions(search: Search) -> bool:
    """Return True if the cost of a step is a float, because some layer calls are on fewer examples.

    Args:
      search: the search.
    """
    return bool(getattr(search, "charges_fractions", False))


def check_step(search: Search, out: object, problem: Problem) -> tuple[PyTree, Info]:
    """Check that a step returned a state and an `Info` of the right shapes. Works while tracing.

    Args:
      search: the search, whose class is named in errors.
      out: what `step` returned.
      problem: the problem that was searched.

    Raises:
      ValueError: if the output has another form.
    """
    name = f"{type(search).__name__}.step"
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"expected {name} to return (state, jc.Info), got {describe_type(out)}")
    state, info = out
    if not isinstance(info, Info):
        raise ValueError(
            f"expected {name} to return a jc.Info after the state, got {describe_type(info)}"
        )
    chains, loss = jnp.asarray(info.chains), jnp.asarray(info.loss)
    num_slots = problem.max_layers + 1
    if (
        chains.ndim != 2
        or chains.shape[1] != num_slots
        or not jnp.issubdtype(chains.dtype, jnp.integer)
    ):
        raise ValueError(
            f"expected {name} to return integer chains [P, {num_slots}], got "
            f"{chains.dtype}{list(chains.shape)}"
        )
    if loss.shape != chains.shape[:1] or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"expected {name} to return float losses [{chains.shape[0]}], one per chain, got "
            f"{loss.dtype}{list(loss.shape)}"
        )
    layer_calls = jnp.asarray(info.layer_calls)
    kind = "a float" if charges_fractions(search) else "an integer"
    dtype = jnp.floating if charges_fractions(search) else jnp.integer
    if layer_calls.shape or not jnp.issubdtype(layer_calls.dtype, dtype):
        raise ValueError(
            f"expected {name} to return layer_calls as {kind} scalar, got "
            f"{layer_calls.dtype}{list(layer_calls.shape)}; it is a float if charges_fractions of "
            "the search is True"
        )
    return state, Info(chains, loss, layer_calls)
