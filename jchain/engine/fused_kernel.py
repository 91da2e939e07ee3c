"""A fused kernel for banks of small layers.

For small layers, an accelerator is limited by the traffic of activations between layers. This
kernel avoids that traffic, because a tile of examples stays on the chip through a whole chain, but
it does not share prefixes. **Its speed on an accelerator is not known yet**: it has only run in
Pallas' interpreter on CPU, which is slow. `choose_plan` therefore never chooses it; pass it as
`plan=`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jchain._typing import Activations, Array, PyTree
from jchain.arguments import check_at_least_one, checked
from jchain.engine.layer_calls import nbytes
from jchain.engine.prefix_sharing import SortedChains, pad_to_multiple
from jchain.modules import apply_module
from jchain.modules.activations import check_one_array
from jchain.problem import Problem


@dataclass(frozen=True)
class Fused:
    """A plan that runs one Pallas program for each chain and tile of examples.

    The bank must have one group of layers, on features `[B, F]`, and one group of heads. Each
    program receives the weights of the whole bank and reads the weights of its tokens.

    Attributes:
      tile: the number of examples in a program; use a power of two on GPUs.
      block_size: the number of chains whose last activations are kept for the heads.

    Raises:
      ValueError: if tile or block_size is less than 1.
    """

    tile: int = 128
    block_size: int = 64

    def __post_init__(self) -> None:
        check_at_least_one(tile=self.tile, block_size=self.block_size)

    @checked
    def count_bytes(self, problem: Problem, hidden: PyTree) -> int:
        """Estimate the size of activations in bytes."""
        del problem
        return 2 * self.block_size * nbytes(hidden)

    @checked
    def evaluate(
        self, problem: Problem, hidden: Activations, population: SortedChains
    ) -> tuple[Array, Array]:
        """Compute loss, without the layer penalty, and accuracy of sorted chains, `[P]` each.

        Raises:
          ValueError: if the bank has more than one group of layers or heads, or features are not
            one array `[B, F]`.
        """
        check_one_array(activations=hidden)
        groups = (len(problem.bank.layers), len(problem.bank.heads))
        if groups != (1, 1) or hidden.ndim != 2:
            raise ValueError(
                "expected one group of layers on features [B, F] and one of heads for a fused "
                f"kernel, got {groups[0]} and {groups[1]} on {list(hidden.shape)}"
            )
        head_group = problem.bank.heads[0]
        num_chains = population.chains.shape[0]
        size = min(self.block_size, num_chains)
        chains, length, _ = pad_to_multiple(population, size)
        head = jnp.take_along_axis(chains, length[:, None], axis=1)[:, 0] - problem.bank.num_layers
        # With one group, the indices in the group are a permutation of the tokens.
        member_of = jnp.argsort(jnp.asarray(head_group.tokens))
        blocks = [a.reshape(-1, size, *a.shape[1:]) for a in (chains, length, member_of[head])]

        def evaluate_block(block: list[Array]) -> tuple[Array, Array]:
            chains, length, head = block
            last = _run_chains(self.tile, problem, hidden, chains, length)
            return jax.vmap(lambda head, h: problem.loss_and_accuracy(head_group.apply(head, h)))(
                head, last
            )

        return jax.tree.map(
            lambda a: a.reshape(-1)[:num_chains], jax.lax.map(evaluate_block, blocks)
        )


def _run_chains(tile: int, problem: Problem, hidden: Array, chains: Array, length: Array) -> Array:
    """Compute the activations after the last layer of each chain, `[C, B, F]`."""
    from jax.experimental import pallas as pl

    group = problem.bank.layers[0]
    member_of = jnp.argsort(jnp.asarray(group.tokens)).astype(jnp.int32)
    leaves, structure = jax.tree.flatten((group.params, group.state))
    num_examples, num_features = hidden.shape
    tile = min(tile, num_examples)
    num_chains, num_slots = chains.shape
    padded = jnp.pad(hidden, ((0, -num_examples % tile), (0, 0)))

    def run(*refs: Any) -> None:  # Pallas has no public type for its references
        chain_ref, length_ref, x_ref, *weight_refs, out_ref = refs

        def call(t: Array, h: Array) -> Array:
            read = [ref[chain_ref[0, t]] for ref in weight_refs]
            params, state = jax.tree.unflatten(structure, read)
            return apply_module(group.module, params, state, h)

        out_ref[0] = jax.lax.fori_loop(0, length_ref[0], call, x_ref[...])

    out = pl.pallas_call(
        run,
        grid=(num_chains, padded.shape[0] // tile),
        in_specs=[
            pl.BlockSpec((1, num_slots), lambda i, j: (i, 0)),
            pl.BlockSpec((1,), lambda i, j: (i,)),
            pl.BlockSpec((tile, num_features), lambda i, j: (j, 0)),
            *(
                pl.BlockSpec(leaf.shape, lambda i, j, leaf=leaf: (0,) * leaf.ndim)
                for leaf in leaves
            ),
        ],
        out_specs=pl.BlockSpec((1, tile, num_features), lambda i, j: (i, j, 0)),
        out_shape=jax.ShapeDtypeStruct((num_chains, *padded.shape), hidden.dtype),
        interpret=jax.default_backend() == "cpu",
    )(
        member_of[jnp.where(chains < problem.bank.num_layers, chains, 0)],
        length.astype(jnp.int32),
        padded,
        *leaves,
    )
    return out[:, :num_examples]
