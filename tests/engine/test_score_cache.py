import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jchain as jc
from jchain.engine import score_cache


def test_score_cache_repeats_are_free(problem):
    cache = score_cache.init(problem)
    chains = jnp.array([[0, 1, 4, -1], [0, 2, 5, -1], [0, 1, 4, -1], [5, -1, -1, -1]])
    cache, loss, layer_calls = score_cache.evaluate_cached(cache, problem, chains)
    assert layer_calls == 3
    cache, again, layer_calls = score_cache.evaluate_cached(cache, problem, chains[::-1])
    assert layer_calls == 0
    np.testing.assert_array_equal(again, loss[::-1])
    # Another head on a known prefix is a new chain, and its prefix is computed again.
    assert score_cache.evaluate_cached(cache, problem, jnp.array([[0, 1, 5, -1]]))[2] == 2


@pytest.mark.parametrize("size", [2**15, 16])
def test_score_cache_equals_a_dictionary(problem, monkeypatch, size):
    monkeypatch.setattr(score_cache, "_SIZE", size)
    score = jax.jit(score_cache.evaluate_cached)
    cache, known, spent, expected = score_cache.init(problem), set(), 0, 0
    for seed in range(12):
        chains = jc.chain.ChainSpace(4, 2, 2).sample(jax.random.key(seed), 20)
        chains = jnp.pad(chains, ((0, 0), (0, 1)), constant_values=-1)
        cache, loss, layer_calls = score(cache, problem, chains)
        np.testing.assert_allclose(loss, jc.evaluate(problem, chains).loss, rtol=1e-6)
        rows = [tuple(row) for row in np.asarray(chains).tolist()]
        expected += reference.count_calls([row for row in rows if row not in known], 4)[0]
        known.update(rows)
        spent += int(layer_calls)
    if size == 16:
        # The cache evicts chains and pays for them again, but less than without a cache.
        assert expected < spent
        assert int(cache.num_stored.max()) > 8
    else:
        assert spent == expected
        assert int(cache.num_stored.sum()) == len(known)


def test_score_cache_evicts_the_oldest_chain_of_a_full_set(problem, monkeypatch):
    monkeypatch.setattr(score_cache, "_SIZE", 8)
    cache = score_cache.init(problem)
    chains = jc.chain.ChainSpace(4, 2, 3).enumerate()[:9]
    for chain in chains:
        cache, _, _ = score_cache.evaluate_cached(cache, problem, jnp.asarray(chain[None]))
    is_known = [bool((np.asarray(cache.chains) == chain).all(axis=-1).any()) for chain in chains]
    assert is_known == [False] + [True] * 8


def test_score_cache_accepts_more_new_chains_than_a_set_holds(problem, monkeypatch):
    monkeypatch.setattr(score_cache, "_SIZE", 8)
    chains = jnp.asarray(jc.chain.ChainSpace(4, 2, 3).enumerate()[:20])
    cache, loss, _ = score_cache.evaluate_cached(score_cache.init(problem), problem, chains)
    np.testing.assert_array_equal(cache.chains[0], chains[:8])
    np.testing.assert_array_equal(cache.loss[0], loss[:8])


def test_score_cache_keeps_nonfinite_losses(problem):
    x = jnp.full_like(problem.data.x, 1e38)
    bad = jc.Problem(problem.bank, jc.Batch(x, problem.data.y), 3)
    chains = jnp.array([[0, 1, 2, 4], [1, 1, 1, 5]])
    cache, loss, _ = score_cache.evaluate_cached(score_cache.init(bad), bad, chains)
    _, again, layer_calls = score_cache.evaluate_cached(cache, bad, chains)
    assert np.isinf(loss).all()
    assert np.isinf(again).all()
    assert layer_calls == 0


@pytest.mark.slow
def test_score_cache_vmapped_equals_looped(problem):
    chains = jnp.stack(
        [jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(s), 6) for s in range(3)]
    )
    many = jax.vmap(lambda c: score_cache.evaluate_cached(score_cache.init(problem), problem, c))(
        chains
    )
    for i in range(3):
        one = score_cache.evaluate_cached(score_cache.init(problem), problem, chains[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), many, one)


def test_score_cache_never_returns_losses_of_older_weights(problem):
    score = jax.jit(score_cache.evaluate_cached)
    chains = jnp.array([[0, 1, 4, -1], [2, 1, 4, -1], [2, 3, 5, -1], [4, -1, -1, -1]])
    cache, old, _ = score(score_cache.init(problem), problem, chains)
    bank = problem.bank
    for changed, is_stale in ((0, [True, False, False, False]), (4, [True, True, False, True])):
        params = jax.tree.map(lambda leaf: 1.5 * leaf, bank.get_params(changed))
        now = problem.with_bank(bank.replace([changed], [params]))
        np.testing.assert_array_equal(~score_cache.is_cached(cache, now, chains), is_stale)
        again, loss, layer_calls = score(cache, now, chains)
        np.testing.assert_allclose(loss, jc.evaluate(now, chains).loss, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(loss) != np.asarray(old), is_stale)
        stale = [
            row
            for row, changed in zip(np.asarray(chains).tolist(), is_stale, strict=True)
            if changed
        ]
        assert layer_calls == reference.count_calls(stale, 4)[0]
        # The loss is cached now. Restored weights are a third version, which does not reuse it.
        assert score(again, now, chains)[2] == 0
        back = problem.with_bank(now.bank.replace([changed], [bank.get_params(changed)]))
        _, loss, layer_calls = score(again, back, chains)
        np.testing.assert_allclose(loss, old, rtol=1e-6)
        assert layer_calls == reference.count_calls(stale, 4)[0]
