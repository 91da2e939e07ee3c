"""Edit scores of activations that are pytrees: against differences in float64, and one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_inputs as states

import jchain as jc
from jchain.engine import layer_calls
from jchain.gradient import layer_report

CHAIN = np.array([2, 0, 1, 4])  # three layers, the second head
EPSILON = 1e-5


@pytest.fixture(scope="module")
def problem():
    return states.make_dict_problem()


@pytest.fixture(scope="module")
def pairs():
    return states.make_pair_problem()


def move(state, change, step):
    """Move the floating-point arrays of a state along the difference of two states."""
    before, after = change
    return jax.tree.map(
        lambda leaf, a, b: leaf + step * (b - a) if leaf.dtype.kind == "f" else leaf,
        state,
        before,
        after,
    )


def differentiate(fn):
    return (fn(EPSILON) - fn(-EPSILON)) / (2 * EPSILON)


def find_first_order(problem, slot, change):
    """Compute the first-order change of the outputs if the input of a slot changes."""
    path = states.walk_reference(problem, CHAIN[:slot], states.start_reference(problem))
    return differentiate(
        lambda step: states.walk_reference(problem, CHAIN[slot:], move(path[-1], change, step))[-1]
    )


def find_edits(problem, predict):
    """Compute the swaps, insertions, and deletions that a prediction from outputs gives."""
    path = states.walk_reference(problem, CHAIN[:3], states.start_reference(problem))
    outputs = states.find_outputs(problem, CHAIN)
    swap, delete = np.zeros((3, 3)), np.zeros(3)
    for slot in range(3):
        for token in range(3):
            made = states.walk_reference(problem, [token], path[slot])[-1]
            change = find_first_order(problem, slot + 1, (path[slot + 1], made))
            swap[slot, token] = predict(outputs, change)
        change = find_first_order(problem, slot + 1, (path[slot + 1], path[slot]))
        delete[slot] = predict(outputs, change)
    return swap, delete


def test_scores_by_activations_are_differences_of_losses(problem):
    def predict(outputs, change):
        return differentiate(lambda step: states.find_loss(outputs + step * change))

    swap, delete = find_edits(problem, predict)
    scores = jc.gradient.score_edits(problem, CHAIN, "activations")
    np.testing.assert_allclose(scores.swap[:3], swap, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scores.delete[:3], delete, rtol=1e-3, atol=1e-5)


def test_linearized_scores_are_losses_of_first_order_outputs(problem):
    def predict(outputs, change):
        return states.find_loss(outputs + change) - states.find_loss(outputs)

    swap, delete = find_edits(problem, predict)
    scores = jc.gradient.score_edits(problem, CHAIN)
    np.testing.assert_allclose(scores.swap[:3], swap, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scores.delete[:3], delete, rtol=1e-3, atol=1e-5)


def replace_params(problem, slot, params):
    """Compute the outputs of the chain with other params at one slot."""
    states_ = states.walk_reference(problem, CHAIN[:slot], states.start_reference(problem))
    made = states.apply_reference(states.Modulate(), params, states_[-1])
    return states.walk_reference(problem, CHAIN[slot + 1 :], made)[-1]


@pytest.mark.slow
def test_scores_by_weights_are_differences_of_losses(problem):
    owns = [
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), problem.bank.get_params(token))
        for token in range(3)
    ]
    swap, distance = np.zeros((3, 3)), np.zeros((3, 3))
    for slot in range(3):
        own = owns[CHAIN[slot]]
        for token in range(3):
            change = jax.tree.map(np.subtract, owns[token], own)
            distance[slot, token] = sum(np.sum(leaf**2) for leaf in jax.tree.leaves(change))

            def compute(step, slot=slot, own=own, change=change):
                params = jax.tree.map(lambda a, b: a + step * b, own, change)
                return states.find_loss(replace_params(problem, slot, params))

            swap[slot, token] = differentiate(compute)
    found = jc.swap_scores(problem, CHAIN, "weights")[:3]
    np.testing.assert_allclose(found, swap, rtol=1e-3, atol=1e-5)
    nearest = jc.gradient.score_edits(problem, CHAIN, "nearest", learning_rate=2.0).swap[:3]
    np.testing.assert_allclose(nearest, swap + distance / 4, rtol=1e-3, atol=1e-5)
    gradients = jc.gradient.weight_gradients(problem, CHAIN)
    for slot, report in enumerate(layer_report.report_layers(problem, CHAIN)):
        tensors = [np.ravel(tensor.gradient) for tensor in report.tensors.values()]
        np.testing.assert_allclose(gradients[slot], np.concatenate(tensors), rtol=1e-3, atol=1e-6)
    trends = jc.gradient.trends.update(jc.gradient.trends.init(problem), problem, CHAIN)
    found = jc.gradient.trends.predict_swaps(trends, problem, CHAIN)[:3]
    np.testing.assert_allclose(found, swap, rtol=1e-3, atol=1e-5)


def test_scores_and_moves_are_those_of_one_array(pairs):
    packed = states.make_packed_problem(pairs)
    options = {"num_best": 2, "num_pairs": 4, "num_products": 2}
    found, expected = (
        jc.gradient.score_moves(problem, [2, 0, 3, -1], **options) for problem in (pairs, packed)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_gradients_of_heads_in_parts_are_those_of_all_examples(pairs, monkeypatch):
    whole = jc.swap_scores(pairs, CHAIN, "activations")
    jax.clear_caches()
    monkeypatch.setattr(layer_calls, "_OUTPUT_LIMIT", 4 * 3 * 4)  # four examples of six
    parts = jc.swap_scores(pairs, CHAIN, "activations")
    jax.clear_caches()
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


def test_float16_is_refused_in_any_array():
    bank = jc.Bank.stack(
        lambda params, x: x, [None], lambda params, x: x[0] * params, [jnp.ones((1, 1))]
    )
    x = (jnp.ones((6, 3)), jnp.ones(6, jnp.float16))
    problem = jc.Problem(bank, jc.Batch(x, states.Y), 1)
    with pytest.raises(ValueError, match="bfloat16 or wider for gradients, got float16"):
        jc.swap_scores(problem, [0, 1])
