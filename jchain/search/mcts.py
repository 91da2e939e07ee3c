"""Monte Carlo tree search by mctx: Gumbel MuZero's policy (Danihelka et al. 2022, ICLR, openreview.net/forum?id=bERaNdoegnO).

The model is the decision process itself. A prefix is worth what its best head gives: minus its lowest loss.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Key
from jchain.chain import PADDING
from jchain.problem import Problem
from jchain.pytree import pytree_dataclass, static
from jchain.search.base import Info


class Node(NamedTuple):
    """What the tree keeps of a prefix."""

    state: env.State
    loss: Float[Array, "K"]  # [K], of stopping here by each head
    is_call: Bool[Array, ""]  # it cost a layer call


class State(NamedTuple):
    """The prefix at which the next tree is rooted."""

    root: env.State


@pytree_dataclass
class MCTS:
    """A step grows one tree, then takes the action that it prefers; behind a head the next chain starts.

    Attributes:
      num_simulations: nodes of a tree, most of which cost a layer call.
      gumbel_scale: of the noise at the root; 0 makes it deterministic.
    """

    num_simulations: int = static(default=32)
    gumbel_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_simulations < 1:
            raise ValueError(f"expected num_simulations of at least 1, got {self.num_simulations}")

    def init(self, key: Key[Array, ""], problem: Problem) -> State:
        return State(env.reset(problem))

    def step(self, key: Key[Array, ""], state: State, problem: Problem) -> tuple[State, Info]:
        mctx = _import_mctx()
        root = _observe(problem, state.root, jnp.array(False))
        is_legal = env.legal_actions(problem, state.root.length)
        output = mctx.gumbel_muzero_policy(
            params=problem,
            rng_key=key,
            root=mctx.RootFnOutput(
                prior_logits=jnp.zeros((1, is_legal.size)),
                value=_value(root)[None],
                embedding=jax.tree.map(lambda leaf: leaf[None], root),
            ),
            recurrent_fn=_recur,
            num_simulations=self.num_simulations,
            invalid_actions=~is_legal[None],
            gumbel_scale=self.gumbel_scale,
        )
        tree = jax.tree.map(
            lambda leaf: leaf[0], (output.search_tree.embeddings, output.search_tree.children_index)
        )
        nodes, children = tree
        action = output.action[0]
        taken = jax.tree.map(lambda leaf: leaf[children[0, action]], nodes.state)
        start = env.reset(problem)
        next_root = jax.tree.map(lambda a, b: jnp.where(taken.is_done, a, b), start, taken)

        # The root's own chains were scored when it was a node, but for the empty prefix.
        is_scored = nodes.is_call.at[0].set(state.root.length == 0) & (
            nodes.state.length >= problem.min_layers
        )
        stops = jax.vmap(lambda state: env.append_heads(problem, state.chain, state.length))(
            nodes.state
        )
        chains = jnp.where(is_scored[:, None, None], stops, PADDING).reshape(
            -1, problem.max_layers + 1
        )
        loss = jnp.where(
            is_scored[:, None] & jnp.isfinite(nodes.loss), nodes.loss, jnp.inf
        ).reshape(-1)
        return State(next_root), Info(chains, loss, nodes.is_call.sum())


def _observe(problem: Problem, state: env.State, is_call: Bool[Array, ""]) -> Node:
    return Node(
        state, env.head_losses(problem, state.hidden) + problem.layer_penalty(state.chain), is_call
    )


def _value(node: Node) -> Float[Array, ""]:
    """Minus the lowest loss; a loss that is not finite counts as a very high one, as mctx averages values."""
    return -jnp.min(jnp.where(jnp.isfinite(node.loss), node.loss, 1e6))


def _import_mctx() -> Any:
    # Its chex dataclasses have no constructor that a type checker sees.
    import mctx

    return mctx


def _recur(problem: Problem, key: Array, action: Array, embedding: Any) -> Any:
    mctx = _import_mctx()
    node = jax.tree.map(lambda leaf: leaf[0], embedding)
    is_call = (action[0] < problem.bank.num_layers) & ~node.state.is_done
    state, reward = env.step(problem, node.state, action[0])
    child = _observe(problem, state, is_call)
    legal = jnp.where(env.legal_actions(problem, state.length), 0.0, -1e9)
    output = mctx.RecurrentFnOutput(
        reward=jnp.maximum(reward, -1e6)[None],
        discount=jnp.where(state.is_done, 0.0, 1.0)[None],
        prior_logits=legal[None],
        value=jnp.where(state.is_done, 0.0, _value(child))[None],
    )
    return output, jax.tree.map(lambda leaf: leaf[None], child)
