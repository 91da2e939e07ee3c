"""Monte Carlo tree search with the policy of Gumbel MuZero, as implemented by mctx.

Gumbel MuZero is from Danihelka et al. 2022, ICLR, openreview.net/forum?id=bERaNdoegnO. Here the
model is the decision process itself, and the value of a prefix is minus its lowest head loss.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Key
from jchain.arguments import check_at_least_one, check_numbers, checked
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.prefixes import end_prefixes
from jchain.search.protocol import Info


class Node(NamedTuple):
    """The data of a prefix in the tree."""

    state: env.State
    loss: Float[Array, "K"]  # [K], loss of ending here with each head, with the layer penalty
    is_call: Bool[Array, ""]  # whether making the node cost a layer call


class State(NamedTuple):
    """The prefix at which the next tree is rooted."""

    root: env.State


@pytree_dataclass
class MCTS:
    """Tree search by simulations.

    A step grows one tree and takes the best action at its root. After a head, the next step starts
    again from the empty prefix.

    Attributes:
      num_simulations: number of simulations per step; most of them cost one layer call.
      gumbel_scale: scale of the noise at the root; 0 makes the search deterministic.

    Raises:
      ValueError: if `num_simulations` is less than 1.
    """

    needs_gradient = False
    needs_invertible = False
    reads_activations = True

    num_simulations: int = static(default=32)
    gumbel_scale: float = 1.0

    def __post_init__(self) -> None:
        check_at_least_one(num_simulations=self.num_simulations)
        check_numbers(at_least=0, gumbel_scale=self.gumbel_scale)

    @property
    def is_deterministic(self) -> bool:
        """True if `gumbel_scale` is 0, so that there is no noise at the root."""
        return bool(self.gumbel_scale == 0)

    @checked
    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        """Return the state whose root is the empty prefix."""
        return State(env.reset(problem))

    @checked
    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        """Grow one tree and take the best action at its root."""
        mctx = _import_mctx()
        root = _make_node(problem, state.root, jnp.array(False))
        is_legal = env.legal_actions(problem, state.root.chain)
        output = mctx.gumbel_muzero_policy(
            params=problem,
            rng_key=key,
            root=mctx.RootFnOutput(
                prior_logits=jnp.zeros((1, is_legal.size), jnp.float32),
                value=_value(problem, root)[None],
                embedding=jax.tree.map(lambda leaf: leaf[None], root),
            ),
            recurrent_fn=_recur,
            num_simulations=self.num_simulations,
            invalid_actions=~is_legal[None],
            gumbel_scale=self.gumbel_scale,
        )
        nodes, children = jax.tree.map(
            lambda leaf: leaf[0], (output.search_tree.embeddings, output.search_tree.children_index)
        )
        action = output.action[0]
        taken = jax.tree.map(lambda leaf: leaf[children[0, action]], nodes.state)
        start = env.reset(problem)
        next_root = jax.tree.map(lambda a, b: jnp.where(taken.is_done, a, b), start, taken)

        # An earlier step scored the chains that end the root, unless the root is the empty prefix.
        is_scored = nodes.is_call.at[0].set(state.root.length == 0) & (
            nodes.state.length >= problem.min_layers
        )
        chains, loss = end_prefixes(
            problem, nodes.state.chain, nodes.state.length, nodes.loss, is_scored
        )
        return State(next_root), Info(chains, loss, nodes.is_call.sum())


def _make_node(problem: Problem, state: env.State, is_call: Bool[Array, ""]) -> Node:
    loss = env.head_losses(problem, state.hidden) + problem.head_penalties(state.chain)
    return Node(state, loss, is_call)


def _value(problem: Problem, node: Node) -> Float[Array, ""]:
    """Return minus the lowest loss; nonfinite losses count as 1e6, because mctx averages values.

    The value is 0 if no head reads the stage of the prefix, so that nothing is known about it.
    """
    value = -jnp.min(jnp.where(jnp.isfinite(node.loss), node.loss, 1e6))
    if (stages := problem.space.stages) is None:
        return value
    has_head = stages.get_fitting_heads(node.state.chain).any()
    return jnp.where(has_head, value, 0.0)


def _import_mctx() -> ModuleType:
    """Import mctx untyped, because type checkers do not find its chex dataclasses' constructors."""
    import mctx

    return mctx


def _recur(problem: Problem, key: Array, action: Array, embedding: Node) -> tuple[object, Node]:
    """Take one action in one node; all arrays of mctx have a batch axis, here of size 1."""
    mctx = _import_mctx()
    node = jax.tree.map(lambda leaf: leaf[0], embedding)
    is_call = (action[0] < problem.bank.num_layers) & ~node.state.is_done
    state, reward = env.step(problem, node.state, action[0])
    child = _make_node(problem, state, is_call)
    legal = jnp.where(env.legal_actions(problem, state.chain), 0.0, -1e9)
    output = mctx.RecurrentFnOutput(
        reward=jnp.maximum(reward, -1e6)[None],
        discount=jnp.where(state.is_done, 0.0, 1.0)[None],
        prior_logits=legal[None],
        value=jnp.where(state.is_done, 0.0, _value(problem, child))[None],
    )
    return output, jax.tree.map(lambda leaf: leaf[None], child)
