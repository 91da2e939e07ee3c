"""The policy of an actor-critic: its network, the inputs of the network, and its predictions."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain._typing import Array, Bool, Float, Int, PyTree
from jchain.agent.edit_features import EditFeatures, read_edit_features
from jchain.agent.encoding import ActorCriticNetwork
from jchain.engine import prefix_rules
from jchain.problem import Problem

# The keys in the params of a policy. They cannot change, because saved params use them.
NETWORK, EDIT_WEIGHTS = "controller", "advice"
# The logit of a token that is not allowed; finite, because a logit of -inf has a nan entropy.
_ILLEGAL_LOGIT = -1e9


class NetworkInputs(NamedTuple):
    """The inputs of the network other than the prefix."""

    entries: Float[Array, "E D"]  # [N + K, D], features of the bank's layers and heads
    edit_features: EditFeatures | None  # edit features of the best chain before this step


class PolicyCarry(NamedTuple):
    """The state of the policy after a prefix."""

    encoding: PyTree  # carry of the encoding
    keys: Float[Array, "E H"]  # [N + K, H], keys of the entries that the actor points at
    is_on_edited_chain: Bool[Array, ""]  # whether the edited chain starts with this prefix


@dataclass(frozen=True)
class Policy:
    """A network with its params and its inputs.

    Attributes:
      network: network of the actor and the critic.
      params: params of the network, under `NETWORK`, and weights of the edit features, under
        `EDIT_WEIGHTS`.
      inputs: inputs of the network other than the prefix.
    """

    network: ActorCriticNetwork
    params: PyTree
    inputs: NetworkInputs

    def init_carry(self, prefix_features: Float[Array, "F"]) -> PolicyCarry:
        """Return the carry of the empty prefix, given its features."""
        params, entries = self.params[NETWORK], self.inputs.entries
        encoding = self.network.apply(params, entries, prefix_features, method="init_carry")
        keys: PyTree = self.network.apply(params, entries, method="embed")
        return PolicyCarry(encoding, keys, jnp.array(True))

    def advance(
        self,
        carry: PolicyCarry,
        slot: Int[Array, ""],
        token: Int[Array, ""],
        prefix_features: Float[Array, "F"],
    ) -> PolicyCarry:
        """Return the carry after one more token.

        Args:
          carry: the carry of the prefix before the token.
          slot: the slot of the token.
          token: the token of a layer or a head.
          prefix_features: the features of the prefix after the token, `[F]`.
        """
        params, inputs = self.params[NETWORK], self.inputs
        encoding = self.network.apply(
            params, carry.encoding, token, inputs.entries, prefix_features, method="advance"
        )
        is_on_edited_chain = carry.is_on_edited_chain
        if inputs.edit_features is not None:
            is_on_edited_chain &= inputs.edit_features.chain[slot] == token
        return PolicyCarry(encoding, carry.keys, is_on_edited_chain)

    def predict(
        self, carry: PolicyCarry, slot: Int[Array, ""], is_legal: Bool[Array, "E"]
    ) -> tuple[Float[Array, "E"], Float[Array, ""]]:
        """Predict the logits of the next token and the value of the prefix.

        Args:
          carry: the carry of the prefix.
          slot: the slot of the next token.
          is_legal: a mask of the tokens that are allowed, `[N + K]`.
        """
        params, edit_features = self.params[NETWORK], self.inputs.edit_features
        encoded = self.network.apply(params, carry.encoding, method="read")
        out: PyTree = self.network.apply(params, encoded, carry.keys, method="act")
        logits, value = out
        if edit_features is not None:
            features = read_edit_features(edit_features, slot, carry.is_on_edited_chain)
            logits += features @ self.params[EDIT_WEIGHTS]
        return jnp.where(is_legal, logits, _ILLEGAL_LOGIT), value


def evaluate_actions(
    policy: Policy, chain: Int[Array, "L"], features: Float[Array, "L F"], problem: Problem
) -> tuple[Float[Array, "L E"], Float[Array, "L"]]:
    """Compute the logits and the value before each token of a chain, without applying any layer.

    Rows after the head token are undefined.

    Args:
      policy: the network with its params and inputs.
      chain: the chain, `[L]`.
      features: the features of the prefix before each token, `[L, F]`, from
        `jchain.agent.observations.observe_chain`.
      problem: the problem, which determines which tokens are allowed.
    """

    def act(
        carry: PolicyCarry, slot: tuple[Array, Array, Array, Array, Array | None]
    ) -> tuple[PolicyCarry, tuple[Array, Array]]:
        t, token, after, cost, stage = slot
        out = policy.predict(carry, t, prefix_rules.legal_actions(problem, t, cost, stage))
        return policy.advance(carry, t, jnp.maximum(token, 0), after), out

    after = jnp.concatenate([features[1:], features[-1:]])
    slots = (
        jnp.arange(chain.shape[0]),
        chain,
        after,
        prefix_rules.prefix_costs(problem, chain),
        prefix_rules.prefix_stages(problem, chain),
    )
    return jax.lax.scan(act, policy.init_carry(features[0]), slots)[1]


def cast_params(given: PyTree, like: PyTree) -> PyTree:
    """Cast `given` to the dtypes of `like`.

    Raises:
      ValueError: if structures or shapes differ, which means that the networks differ.
    """
    got, expected = (
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (given, like))
    )
    wrong = sorted(name for name in got | expected if got.get(name) != expected.get(name))
    if wrong:
        raise ValueError(
            f"expected params of this encoding's network, with {wrong[0]} of shape "
            f"{expected.get(wrong[0])}, got {got.get(wrong[0])}"
        )
    if jax.tree.structure(given) != jax.tree.structure(like):
        raise ValueError(
            f"expected params of the structure {jax.tree.structure(like)}, "
            f"got {jax.tree.structure(given)}"
        )
    return jax.tree.map(lambda leaf, fresh: jnp.asarray(leaf, fresh.dtype), given, like)
