"""Chains, problems, and slow references for tests of edit scores."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from conftest import HEAD, init_params, make_bank, make_batch

import jchain as jc
from jchain.engine.layer_calls import apply_token

CHAIN = np.array([2, 0, 3, 5])  # three layers, the second head


def to_float64(problem):
    """Convert the weights and data of a problem to float64."""

    def cast(leaf):
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    bank, data = jax.tree.map(cast, (problem.bank, problem.data))
    return jc.Problem(
        bank, data, problem.max_layers, loss_fn=problem.loss_fn, layer_cost=problem.layer_cost
    )


def use_float64():
    """Enable float64; modules that need it make this a fixture."""
    with jax.enable_x64(True):
        yield


def exact_changes(problem, chain):
    """Compute the change in loss of each neighbor; nan for rows that are not neighbors."""
    rows, is_neighbor = (np.array(a) for a in problem.space.neighbors(jnp.asarray(chain)))
    change = np.full(len(rows), np.nan)
    loss = jc.evaluate(problem, np.concatenate([chain[None], rows[is_neighbor]])).loss
    change[is_neighbor] = loss[1:] - loss[0]
    return change, is_neighbor


def walk(problem, chain):
    """Return the input of each slot, and a function from a slot and its input to the outputs."""
    bank = problem.bank
    tokens = [int(token) for token in chain if token >= 0]
    hidden = [bank.embed(problem.data.x)]
    for token in tokens[:-1]:
        hidden.append(apply_token(bank.layers, jnp.array(token), hidden[-1]))

    def apply_rest(slot, activation):
        for token in tokens[slot:-1]:
            activation = apply_token(bank.layers, jnp.array(token), activation)
        return apply_token(bank.heads, jnp.array(tokens[-1]), activation)

    return hidden, apply_rest


def find_moved_outputs(problem, chain, slot, token):
    """Compute the outputs of a chain, and their first-order change by a swap."""
    hidden, apply_rest = walk(problem, chain)
    change = problem.bank.layers[0].apply(token, hidden[slot]) - hidden[slot + 1]
    return jax.jvp(partial(apply_rest, slot + 1), (hidden[slot + 1],), (change,))


class TokensHead(nn.Module):
    """A head for four labels of 25 classes per example, as in a language model."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(100)(x).reshape(-1, 4, 25)


def wide_problem(loss_fn, y, head=jc.layers.DenseHead(100)):  # noqa: B008
    x = jax.random.normal(jax.random.key(1), (len(y), 5))
    bank = make_bank(4, 1)
    wide = jc.Bank.stack(
        jc.layers.ResidualMLP(5, hidden=7),
        [jax.tree.map(lambda leaf, i=i: 0.1 * leaf[i], bank.layers[0].params) for i in range(4)],
        head,
        init_params(head, jax.random.key(2), 1, (5,)),
    )
    return jc.Problem(wide, jc.Batch(x, y), max_layers=3, loss_fn=loss_fn)


class Rounded(nn.Module):
    """A layer whose derivative is 0 almost everywhere."""

    @nn.compact
    def __call__(self, x):
        return jnp.round(nn.Dense(5)(x))


class Looped(nn.Module):
    """A layer without a reverse-mode derivative."""

    @nn.compact
    def __call__(self, x):
        nn.Dense(5)(x)
        return jax.lax.while_loop(lambda x: x.sum() > 1e9, lambda x: x / 2, x)


def mixed_problem(module):
    bank = make_bank(3, 1)
    other = jc.Bank.stack(
        module,
        init_params(module, jax.random.key(0), 1, (5,)),
        HEAD,
        init_params(HEAD, jax.random.key(0), 1, (5,)),
    )
    return jc.Problem(jc.Bank.concat([bank, other]), make_batch(), max_layers=3)
