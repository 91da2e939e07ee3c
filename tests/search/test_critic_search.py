import jax
import jax.numpy as jnp
import numpy as np
import reference

import jchain as jc
from jchain.search import critic_search


def test_without_critic_or_learning_it_extends_the_best_child_by_head_loss(problem):
    search = jc.CriticSearch(width=8, ridge=jnp.inf, epsilon=0.0)
    state, prefix = jax.jit(search.init)(jax.random.key(0), problem), []
    step = jax.jit(search.step)
    for length in range(problem.max_layers):
        state, info = step(jax.random.key(0), state, problem)
        stops = {
            n: min(reference.chain_loss(problem, [*prefix, n, head])[0] for head in (4, 5))
            for n in range(4)
        }
        chains = np.asarray(info.chains)[2:]
        assert {tuple(chain[: length + 1]) for chain in chains} == {(*prefix, n) for n in range(4)}
        # The next prefix is one of the last children, so nothing is recomputed.
        assert info.layer_calls == 4
        prefix.append(min(stops, key=stops.get))
    assert not np.any(state.weights)


def test_an_older_prefix_is_computed_again_and_charged(problem):
    search = jc.CriticSearch(width=8, ridge=jnp.inf, epsilon=0.0)
    state = jax.jit(search.init)(jax.random.key(0), problem)
    step = jax.jit(search.step)
    costs, lengths = [], []
    for _ in range(6):
        lengths.append(int(critic_search._choose_length(state)))
        state, info = step(jax.random.key(0), state, problem)
        costs.append(int(info.layer_calls))
    assert lengths == [0, 1, 2, 1, 2, 1]
    assert costs[:4] == [4, 4, 4, 5]
    assert costs[4] in (4, 6)


def test_recursive_least_squares_are_ridge_regression():
    rng = np.random.default_rng(0)
    x, y, ridge = rng.normal(size=(12, 5)), rng.normal(size=12), 1.7
    weights, inverse_gram = jnp.zeros(5), jnp.eye(5)
    for row, target in zip(x, y, strict=True):
        weights, inverse_gram = critic_search._update_least_squares(
            weights, inverse_gram, jnp.asarray(row), jnp.asarray(target), ridge
        )
    expected = np.linalg.solve(x.T @ x + ridge * np.eye(5), x.T @ y)
    np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-5)
    held, _ = critic_search._update_least_squares(
        jnp.zeros(5), jnp.eye(5), jnp.asarray(x[0]), jnp.asarray(y[0]), jnp.inf
    )
    assert not np.any(held)


def test_the_worst_predicted_prefixes_are_evicted(problem):
    search = jc.CriticSearch(width=3)
    state = jax.jit(search.init)(jax.random.key(0), problem)

    def prefixes(values, token):
        candidates = jax.tree.map(
            lambda leaf: jnp.zeros((len(values), *leaf.shape[2:]), leaf.dtype), state.prefixes
        )
        return candidates._replace(
            prior_prediction=jnp.array(values), chains=candidates.chains + token
        )

    for values, token in (([5.0, 1.0], 1), ([3.0, jnp.inf], 2), ([4.0, 2.0], 3)):
        candidates = prefixes(values, token)
        state = critic_search._insert(state, candidates, candidates.prior_prediction, jnp.array(1))
    kept = sorted(
        zip(
            state.prefixes.prior_prediction[1].tolist(),
            state.prefixes.chains[1, :, 0].tolist(),
            strict=True,
        )
    )
    assert kept == [(1.0, 1), (2.0, 3), (3.0, 2)]


def test_a_bank_of_many_layers_has_codes_of_fixed_length(problem):
    bank = jc.Bank.concat([problem.bank] * 17)
    state = jax.eval_shape(
        jc.CriticSearch(width=2).init, jax.random.key(0), jc.Problem(bank, problem.data, 2)
    )
    assert state.weights.shape == (2, 3 * 64 + 25)
