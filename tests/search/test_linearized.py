import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import make_bank, make_batch

import jchain as jc


@pytest.fixture(scope="module")
def roomy():
    """A problem with chains of up to 5 layers, so that greedy moves can exceed two swaps."""
    return jc.Problem(make_bank(6, 2), make_batch(), max_layers=5)


@pytest.mark.parametrize("num_candidates", [pytest.param(16, marks=pytest.mark.slow), 3])
def test_cost_is_the_start_the_pass_and_new_chains(roomy, num_candidates):
    search = jc.LinearizedSearch(num_candidates=num_candidates, num_single=1, num_pairs=1)
    state = search.init(jax.random.key(0), roomy)
    step = jax.jit(search.step)
    seen, did_joint = set(), False
    for seed in range(80):
        before = state
        state, info = step(jax.random.key(seed), state, roomy)
        rows = [tuple(int(token) for token in chain if token >= 0) for chain in info.chains]
        if before.is_new:
            own, rows = rows[0], rows[1:]
            length = len(own) - 1
            expected = (
                5 * int(before.is_start)
                + (2 + 2) * length
                + min(num_candidates, 6) * min(length + 1, 5)
            )
            assert info.loss[0] == pytest.approx(
                reference.chain_loss(roomy, info.chains[0])[0], rel=1e-5
            )
        else:
            own, rows, expected = (
                tuple(int(token) for token in before.linearized.chain if token >= 0),
                rows[1:],
                0,
            )
        expected += reference.count_calls([row for row in rows if row not in seen], 6)[0]
        seen.update(rows)
        assert info.layer_calls == expected
        did_joint |= any(
            sum(a != b for a, b in zip(row, own, strict=False)) > 2
            for row in rows
            if len(row) == len(own)
        )
    assert did_joint


@pytest.mark.slow
def test_moves_have_the_best_predictions(roomy):
    search = jc.LinearizedSearch(num_single=3, num_pairs=2, num_greedy=0)
    state, info = search.step(jax.random.key(1), search.init(jax.random.key(0), roomy), roomy)
    own = np.asarray(info.chains[0])
    scores, joint = jc.gradient.score_moves(roomy, own, num_best=6, num_pairs=4)
    rows, is_neighbor = roomy.space.neighbors(jnp.asarray(own))
    flat = np.where(np.asarray(is_neighbor), np.asarray(scores.flat), np.inf)
    np.testing.assert_array_equal(info.chains[1:4], np.asarray(rows)[np.argsort(flat)[:3]])
    np.testing.assert_array_equal(info.chains[4:], joint.pairs[:2])
    best = int(np.argmin(info.loss))
    np.testing.assert_array_equal(state.linearized.chain, info.chains[best])
    assert bool(state.is_new) == (best > 0)


@pytest.mark.slow
def test_the_current_chain_is_not_a_move(roomy):
    """This holds even if rounding lowers its loss, or the search would never restart."""
    search = jc.LinearizedSearch(patience=1)
    state, _ = search.step(jax.random.key(1), search.init(jax.random.key(0), roomy), roomy)
    linearized = state.linearized._replace(
        loss=state.linearized.loss + 1.0,
        score=jnp.full_like(state.linearized.score, jnp.inf),
        is_pair=jnp.zeros_like(state.linearized.is_pair),
        is_greedy=jnp.zeros_like(state.linearized.is_greedy),
    )
    after, info = search.step(
        jax.random.key(2), state._replace(linearized=linearized, is_new=jnp.array(False)), roomy
    )
    np.testing.assert_array_equal(
        info.chains[1:], np.broadcast_to(linearized.chain, info.chains[1:].shape)
    )
    assert after.is_start


def test_single_edits_alone_find_the_optimum(problem):
    search = jc.LinearizedSearch(num_pairs=0, num_greedy=0)
    result = jc.run(jax.random.key(0), search, problem, budget=2_000)
    assert result.best_loss == pytest.approx(
        float(jc.evaluate_all(problem)[1].loss.min()), rel=1e-5
    )


@pytest.mark.slow
def test_moves_of_wide_outputs_are_ranked_by_samples():
    """80 squared errors need 17 products."""
    head = jc.layers.DenseHead(80)
    x = jax.random.normal(jax.random.key(0), (30, 5))
    bank = make_bank(5, 1)
    params = [jax.tree.map(lambda leaf, i=i: leaf[i], bank.layers[0].params) for i in range(5)]
    wide = jc.Bank.stack(
        bank.layers[0].module, params, head, [head.init(jax.random.key(1), x)["params"]]
    )
    problem = jc.Problem(
        wide, jc.Batch(x, jnp.zeros((30, 80))), max_layers=3, loss_fn=optax.squared_error
    )
    search = jc.LinearizedSearch(num_single=3, num_pairs=0, num_greedy=0)
    for seed in range(20):
        state, info = search.step(
            jax.random.key(seed), search.init(jax.random.key(0), problem), problem
        )
        own = np.asarray(info.chains[0])
        if (length := int((own >= 0).sum()) - 1) > 0:
            break
    scores = jc.gradient.score_edits(problem, own)
    assert scores.layer_calls == (2 + 17) * length + 5 * min(length + 1, 3)
    rows, is_neighbor = problem.space.neighbors(jnp.asarray(own))
    flat = np.where(np.asarray(is_neighbor), np.asarray(scores.flat), np.inf)
    np.testing.assert_array_equal(info.chains[1:], np.asarray(rows)[np.argsort(flat)[:3]])
    moves = [tuple(int(token) for token in chain if token >= 0) for chain in info.chains[1:]]
    assert info.layer_calls == 3 + scores.layer_calls + reference.count_calls(moves, 5)[0]
    assert state.linearized.layer_calls == 3 + scores.layer_calls


@pytest.mark.slow
def test_a_new_pass_after_a_failure_tries_its_best_pairs(roomy):
    search = jc.LinearizedSearch(
        num_candidates=3, num_single=1, num_pairs=2, num_greedy=0, patience=3
    )
    state, step = search.init(jax.random.key(0), roomy), jax.jit(search.step)
    num_seen = 0
    for seed in range(40):
        before = state
        state, info = step(jax.random.key(seed), state, roomy)
        if before.num_failed > 0:
            assert before.is_new
            for place in range(2):
                expected = (
                    state.linearized.pairs[place]
                    if state.linearized.is_pair[place]
                    else info.chains[0]
                )
                if not state.is_new or np.array_equal(state.linearized.chain, info.chains[0]):
                    np.testing.assert_array_equal(info.chains[2 + place], expected)
            num_seen += 1
    assert num_seen > 3


@pytest.mark.slow
def test_layers_of_each_module_are_scored(two_group_problem):
    search = jc.LinearizedSearch(num_candidates=2)
    state, info = search.step(
        jax.random.key(0), search.init(jax.random.key(1), two_group_problem), two_group_problem
    )
    length = int((info.chains[0] >= 0).sum()) - 1
    assert state.linearized.layer_calls == 3 + (2 + 2) * length + 2 * min(length + 1, 3)


def test_linearized_search_rejects_bad_sizes():
    for sizes in (
        {"num_single": 0},
        {"num_pairs": -1},
        {"num_candidates": 0},
        {"patience": 0},
        {"num_best": 0},
        {"num_products": 0},
    ):
        with pytest.raises(ValueError, match="expected .* at least .*, got"):
            jc.LinearizedSearch(**sizes)
