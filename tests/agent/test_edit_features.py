import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jchain as jc
from jchain.agent.edit_features import (
    empty_edit_features,
    read_edit_features,
    update_edit_features,
)
from jchain.agent.encoding import ActorCriticNetwork
from jchain.agent.policy import Policy, evaluate_actions

CHAIN = np.array([2, 0, 5, -1])


def test_features_are_gains_in_units_of_the_median(problem):
    found, layer_calls = update_edit_features(
        empty_edit_features(problem), problem, jnp.asarray(CHAIN), "activations"
    )
    scores = jc.gradient.score_edits(problem, CHAIN, "activations")
    assert layer_calls == scores.layer_calls
    np.testing.assert_array_equal(found.chain, CHAIN)
    known = [scores.swap[0, b] for b in (0, 1, 3)] + [scores.swap[1, b] for b in (1, 2, 3)]
    known += [scores.head[0], *np.asarray(scores.insert[:3]).reshape(-1)]
    unit = np.median(np.abs(known))
    features = np.asarray(found.features)
    expected = np.zeros((4, 6, 3))
    expected[[0, 1, 2], [2, 0, 5], 0] = 1
    expected[:2, :4, 1] = np.clip(-np.asarray(scores.swap)[:2] / unit, -3, 3)
    expected[2, 4, 1] = np.clip(-scores.head[0] / unit, -3, 3)
    expected[:3, :4, 2] = np.clip(-np.asarray(scores.insert)[:3] / unit, -3, 3)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-6)


def test_edit_features_score_each_chain_once_and_skip_empty_chains(problem):
    nothing = empty_edit_features(problem)
    same, layer_calls = update_edit_features(nothing, problem, jnp.full(4, -1), "linearized")
    assert layer_calls == 0
    jax.tree.map(np.testing.assert_array_equal, same, nothing)
    known, layer_calls = update_edit_features(nothing, problem, jnp.asarray(CHAIN), "linearized")
    assert layer_calls > 0
    again, layer_calls = update_edit_features(known, problem, jnp.asarray(CHAIN), "linearized")
    assert layer_calls == 0
    jax.tree.map(np.testing.assert_array_equal, again, known)


def test_edit_features_count_twice_on_the_same_prefix(problem):
    known, _ = update_edit_features(
        empty_edit_features(problem), problem, jnp.asarray(CHAIN), "linearized"
    )
    on, off = (
        np.asarray(read_edit_features(known, jnp.array(1), jnp.array(is_same)))
        for is_same in (True, False)
    )
    np.testing.assert_array_equal(on, np.concatenate([known.features[1]] * 2, axis=1))
    np.testing.assert_array_equal(off[:, :3], known.features[1])
    assert (off[:, 3:] == 0).all()


def test_an_actor_adds_gains_only_along_the_edited_chain(problem):
    search = jc.ActorCritic(score_kind="linearized", num_chains=6)
    state = search.init(jax.random.key(0), problem)
    known, _ = update_edit_features(
        empty_edit_features(problem), problem, jnp.asarray(CHAIN), "linearized"
    )
    inputs = state.inputs._replace(edit_features=known)

    def logits_of(inputs, chain):
        policy = Policy(ActorCriticNetwork(search.encoding), state.params, inputs)
        nothing = jnp.zeros((len(chain), 0))
        return np.asarray(evaluate_actions(policy, jnp.asarray(chain), nothing, problem)[0])

    for chain, is_on_chain in (
        (CHAIN, [True, True, True]),
        (np.array([2, 1, 5, -1]), [True, True, False]),
    ):
        extra = logits_of(inputs, chain) - logits_of(state.inputs, chain)
        for slot in range(3):
            gains = np.asarray(known.features[slot, :, 1:].sum(axis=1))
            np.testing.assert_allclose(extra[slot], gains * is_on_chain[slot], atol=1e-5)


@pytest.mark.slow
def test_each_new_best_chain_is_charged_once(problem):
    search = jc.ActorCritic(num_chains=6, score_kind="linearized")
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    num_products = jc.gradient.edit_scores.choose_products(problem)
    known, scored, num_passes = set(), None, 0
    for seed in range(8):
        best = tuple(int(token) for token in state.elite.chains[0])
        state, info = step(jax.random.key(seed), state, problem)
        rows = [tuple(int(token) for token in chain if token >= 0) for chain in info.chains]
        expected = reference.count_calls([row for row in rows if row not in known], 4)[0]
        known.update(rows)
        if best[0] >= 0 and best != scored:
            scored, num_passes = best, num_passes + 1
            scores = jc.gradient.score_edits(problem, np.array(best), num_products=num_products)
            expected += int(scores.layer_calls)
        assert info.layer_calls == expected
    assert 1 <= num_passes < 7


def test_edit_features_reject_unknown_kinds_and_missing_gradients(problem):
    with pytest.raises(
        ValueError, match="expected a score_kind of linearized, .* or None, got 'hessian'"
    ):
        jc.ActorCritic(score_kind="hessian")
    table = jc.chainbench.tabular.make_problem(
        problem.bank, np.asarray(jc.evaluate_all(problem)[1].loss), 3
    )
    search = jc.ActorCritic(
        score_kind="linearized", num_chains=6, entry_features=jc.chainbench.tabular.entry_features
    )
    with pytest.raises(
        ValueError, match="expected floating-point activations, which have a gradient, got int32"
    ):
        jc.run(jax.random.key(0), search, table, budget=100)
