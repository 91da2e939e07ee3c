"""Building blocks of descent searches: start chains, candidate layers, and the next move."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jchain import env
from jchain._typing import Array, Bool, Float, Int, Key, PyTree
from jchain.chain import PADDING
from jchain.engine.layer_calls import apply_token
from jchain.problem import Problem


class Move(NamedTuple):
    """The result of evaluating one batch of chains."""

    best: Int[Array, ""]  # the index of the best chain in the batch
    is_better: Bool[Array, ""]  # whether it is better than the current chain
    is_stuck: Bool[Array, ""]  # whether the descent must restart
    chain: Int[Array, "L"]  # [L], the current chain after the batch
    loss: Float[Array, ""]  # the loss of `chain`
    num_failed: Int[Array, ""]  # consecutive batches without a better chain; 0 after a restart


def choose_move(
    chain: Int[Array, "L"],
    own_loss: Float[Array, ""],
    chains: Int[Array, "P L"],
    loss: Float[Array, "P"],
    is_move: Bool[Array, "P"],
    num_failed: Int[Array, ""],
    patience: int,
    has_more: Bool[Array, ""],
) -> Move:
    """Move to the best chain of a batch if it is better than the current chain.

    The descent is stuck after `patience` consecutive batches without a better chain, or if such a
    batch leaves no candidates.

    Args:
      chain: the current chain, `[L]`.
      own_loss: the loss of the current chain.
      chains: the chains of the batch, `[P, L]`.
      loss: the losses of these chains, `[P]`.
      is_move: a mask of the chains that differ from the current chain, `[P]`.
      num_failed: the number of consecutive batches without a better chain before this one.
      patience: the number of consecutive failed batches after which the descent restarts.
      has_more: whether there are candidates left to evaluate.
    """
    best = jnp.argmin(jnp.where(is_move, loss, jnp.inf))
    is_better = is_move[best] & (loss[best] < own_loss)
    num_failed = jnp.where(is_better, 0, num_failed + 1)
    is_stuck = ~is_better & ((num_failed >= patience) | ~has_more)
    return Move(
        best,
        is_better,
        is_stuck,
        jnp.where(is_better, chains[best], chain),
        jnp.where(is_better, loss[best], own_loss),
        jnp.where(is_stuck, 0, num_failed).astype(jnp.int32),
    )


def allocate_candidates(problem: Problem, num_candidates: int) -> list[int]:
    """Allocate candidate layers to groups in proportion to their sizes, at least one to each.

    Args:
      problem: the problem whose bank holds the groups of layers.
      num_candidates: the approximate total number of candidates; each group gets at least one and
        at most its size.
    """
    sizes = [len(group.tokens) for group in problem.bank.layers]
    return [min(size, max(1, num_candidates * size // sum(sizes))) for size in sizes]


def sample_candidates(
    key: Key[Array, ""], problem: Problem, num_per_group: list[int]
) -> tuple[Array, ...]:
    """Sample candidate layers: for each group, positions in the group, without replacement.

    Args:
      key: the PRNG key; consumed by this call.
      problem: the problem whose bank holds the groups of layers.
      num_per_group: the number of candidates for each group. If it is the size of the group, all
        layers are returned in order.
    """

    def sample(key: Array, size: int, num: int) -> Array:
        places = jnp.arange(size)
        return places if num == size else jax.random.choice(key, places, (num,), replace=False)

    groups = problem.bank.layers
    keys = jax.random.split(key, len(groups))
    return tuple(
        sample(group_key, len(group.tokens), num)
        for group_key, group, num in zip(keys, groups, num_per_group, strict=True)
    )


def sample_start(key: Key[Array, ""], problem: Problem) -> Int[Array, "L"]:
    """Sample a start chain: the best prefix of a chain of random layers, with its best head.

    The prefix has at least `min_layers` layers. Sampling costs `max_layers` layer calls.

    Args:
      key: the PRNG key; consumed by this call.
      problem: the bank, the split of data, and the loss.
    """
    bank, slots = problem.bank, jnp.arange(problem.max_layers + 1)
    tokens = jax.random.randint(key, slots.shape, 0, bank.num_layers, jnp.int32).at[-1].set(PADDING)
    if problem.max_cost is not None or problem.space.stages is not None:
        # If a chain is within the limit and follows the stages, so are its prefixes.
        chain = env.sample_chains(key, problem, 1)[0]
        tokens = jnp.where(slots < problem.space.count_layers(chain), chain, tokens)

    def extend(hidden: PyTree, token: Array) -> tuple[PyTree, Array]:
        outputs = apply_token(bank.layers, token, hidden)
        return outputs, env.head_losses(problem, outputs)

    hidden = bank.embed(problem.data.x)
    losses = jax.lax.scan(extend, hidden, tokens[:-1])[1]
    losses = jnp.concatenate([env.head_losses(problem, hidden)[None], losses])
    prefixes = jnp.where(slots[None] < slots[:, None], tokens[None], PADDING)
    losses = (losses + problem.head_penalties(prefixes))[problem.min_layers :]
    row, head = jnp.divmod(
        jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf)), bank.num_heads
    )
    length = problem.min_layers + row
    return prefixes[length].at[length].set((bank.num_layers + head).astype(jnp.int32))
