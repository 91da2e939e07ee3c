import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import make_bank, make_batch

import jchain as jc
from jchain.inverse import target_scores as target
from jchain.inverse.pullback import invert_layers, target_logits


def make_problem(slope=0.5, max_layers=4, num_layers=4, layer=None, **options):
    bank = make_bank(
        num_layers, 2, layer=layer or jc.layers.InvertibleDense(5, negative_slope=slope)
    )
    return jc.Problem(bank, make_batch(), max_layers, **options)


def test_ideal_layer_of_a_layers_outputs_is_that_layer():
    bank = make_problem().bank
    before = jax.random.normal(jax.random.key(0), (40, 5))
    found = jc.inverse.target_scores.fit_target_layer(
        bank, before, bank.layers[0].apply(2, before), ridge=0.0
    )
    params = jax.tree.map(lambda leaf: leaf[2], bank.layers[0].params)
    np.testing.assert_allclose(found.kernel, params["kernel"], atol=1e-4)
    np.testing.assert_allclose(found.bias, params["bias"], atol=1e-4)
    assert found.residual < 1e-4
    assert (found.nearest_by_weights, found.nearest_by_outputs) == (2, 2)
    distances = [
        np.sqrt(
            sum(
                np.sum((np.asarray(leaf[b]) - np.asarray(own)) ** 2)
                for leaf, own in zip(
                    jax.tree.leaves(bank.layers[0].params), jax.tree.leaves(params), strict=True
                )
            )
        )
        for b in range(4)
    ]
    np.testing.assert_allclose(found.by_weights, distances, atol=1e-3)


def test_fit_target_layer_fits_an_affine_map_to_other_layers():
    bank = make_problem(layer=jc.layers.ResidualMLP(5)).bank
    before, after = (jax.random.normal(jax.random.key(i), (30, 5)) for i in (0, 1))
    found = jc.inverse.target_scores.fit_target_layer(bank, before, after, ridge=0.0)
    rows = np.concatenate([np.asarray(before, np.float64), np.ones((30, 1))], axis=1)
    wanted, *_ = np.linalg.lstsq(rows, np.asarray(after, np.float64), rcond=None)
    np.testing.assert_allclose(np.concatenate([found.kernel, found.bias[None]]), wanted, atol=1e-3)
    gaps = [bank.layers[0].apply(b, before) - after for b in range(4)]
    size = np.linalg.norm(after)
    np.testing.assert_allclose(
        found.by_outputs, [np.linalg.norm(gap) / size for gap in gaps], rtol=1e-4
    )
    np.testing.assert_allclose(
        found.residual, np.linalg.norm(rows @ wanted - after) / size, rtol=1e-3
    )
    assert np.isnan(found.by_weights).all()
    assert found.nearest_by_weights == -1
    # A ridge shrinks the fit.
    assert np.linalg.norm(
        jc.inverse.target_scores.fit_target_layer(bank, before, after, ridge=1.0).kernel
    ) < np.linalg.norm(found.kernel)


@pytest.mark.parametrize("is_projected", [False, True])
def test_scores_are_distances_to_the_targets_of_inverse_layers(is_projected):
    """If the layers are inverted exactly, the targets can be computed by hand."""
    plain = make_problem()
    cost = np.array([0.3, 0.0, 0.1, 0.2])
    problem = jc.Problem(plain.bank, plain.data, 4, layer_cost=cost)
    chain = np.array([1, 3, 0, 4, -1], np.int32)
    scores = jc.inverse.target_scores.score_edits_by_target(
        problem, chain, step_size=0.3, is_exact=True, is_projected=is_projected
    )
    x, bank = np.asarray(problem.data.x, np.float64), problem.bank
    hidden = [x]
    for token in chain[:3]:
        hidden.append(reference.apply(*reference._find(bank.layers, token), hidden[-1]))
    outputs = reference.chain_logits(bank, [1, 3, 0, 4], x)
    goal = outputs + 0.3 * (np.asarray(target_logits(problem.data.y, 3)) - outputs)
    wanted = {
        3: np.asarray(
            jc.pull_back(
                bank, [4], jnp.asarray(goal, jnp.float32), near=jnp.asarray(hidden[3], jnp.float32)
            ).activations
        )
    }
    for t in (2, 1, 0):
        wanted[t] = np.asarray(
            jc.pull_back(bank, [chain[t]], jnp.asarray(wanted[t + 1], jnp.float32)).activations
        )

    # This is what the targeted outputs would save.
    log_odds = [out - np.log(np.exp(out).sum(axis=1, keepdims=True)) for out in (outputs, goal)]
    losses = [-np.mean(rows[np.arange(len(x)), problem.data.y]) for rows in log_odds]
    saving = losses[0] - losses[1]

    def compare(made, here, wanted):
        way = wanted - here
        length = np.linalg.norm(way, axis=1)
        if not is_projected:
            nearer = np.sum((made - wanted) ** 2) - np.sum((here - wanted) ** 2)
        else:
            along = np.sum((made - here) * way, axis=1) / length
            nearer = np.sum((along - length) ** 2 - length**2)
        return saving * nearer / np.sum(length**2)

    def make(token, t):
        return reference.apply(*reference._find(bank.layers, token), hidden[t])

    own = cost[chain[:3]]
    swap = [
        [compare(make(b, t), hidden[t + 1], wanted[t + 1]) + cost[b] - own[t] for b in range(4)]
        for t in range(3)
    ]
    insert = [
        [compare(make(b, t), hidden[t], wanted[t]) + cost[b] for b in range(4)] for t in range(4)
    ]
    delete = [compare(hidden[t], hidden[t + 1], wanted[t + 1]) - own[t] for t in range(3)]
    tolerance = {"rtol": 2e-3, "atol": 2e-3 * np.abs(swap).max()}
    np.testing.assert_allclose(scores.swap[:3], swap, **tolerance)
    np.testing.assert_allclose(scores.insert[:4], insert, **tolerance)
    np.testing.assert_allclose(scores.delete[:3], delete, **tolerance)
    assert (np.asarray(scores.swap)[np.arange(3), chain[:3]] == 0).all()
    assert np.isnan(scores.swap[3:]).all()
    losses = [reference.chain_loss(plain, [1, 3, 0, head])[0] for head in (4, 5)]
    np.testing.assert_allclose(scores.head, [0.0, losses[1] - losses[0]], rtol=1e-4)
    assert scores.loss == pytest.approx(reference.chain_loss(plain, chain)[0] + own.sum(), rel=1e-5)
    # Forward and backward through three layers, and four layers at four slots.
    assert scores.layer_calls == 3 + 3 + 16


@pytest.mark.slow
def test_local_least_squares_stand_in_for_an_inverse():
    """With one step per dimension and no damping, they invert a linear layer."""
    problem = make_problem(slope=1.0)
    chain = np.array([1, 3, 4, -1, -1], np.int32)
    exact = jc.inverse.target_scores.score_edits_by_target(
        problem, chain, step_size=0.1, is_exact=True
    )
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(target, "_NUM_CG_STEPS", 30)
        patch.setattr(target, "_DAMPING", 1e-9)
        # This is not jitted because a compiled program would not see other constants.
        patch.setattr(target, "_score", target._score.__wrapped__)
        local = jc.inverse.target_scores.score_edits_by_target(problem, chain, step_size=0.1)
    np.testing.assert_allclose(
        local.swap[:2], exact.swap[:2], rtol=0.05, atol=0.02 * np.abs(exact.swap[:2]).max()
    )
    assert local.layer_calls == 2 + 2 * (2 * 31 + 2) + 4 * 3


@pytest.mark.slow
def test_some_layers_alone_are_scored_and_losses_need_a_target():
    problem = make_problem()
    chain = np.array([1, 4, -1, -1, -1], np.int32)
    few = jc.inverse.target_scores.score_edits_by_target(problem, chain, tokens=[0, 2])
    whole = jc.inverse.target_scores.score_edits_by_target(problem, chain)
    np.testing.assert_allclose(few.swap[0, [0, 2]], whole.swap[0, [0, 2]], rtol=1e-5)
    assert np.isnan(few.swap[0, 3])
    assert few.layer_calls == whole.layer_calls - 2 * 2
    copying = jc.Problem(
        problem.bank, jc.Batch(problem.data.x, jnp.ones((9, 3))), 4, loss_fn=optax.squared_error
    )
    assert np.isfinite(jc.inverse.target_scores.score_edits_by_target(copying, chain).swap[0]).all()
    other = jc.Problem(
        problem.bank,
        jc.Batch(problem.data.x, jnp.ones(9)),
        4,
        loss_fn=lambda out, y: (out.sum(1) - y) ** 2,
    )
    with pytest.raises(ValueError, match=r"targets of the shape of the outputs, \[9, 3\]"):
        jc.inverse.target_scores.score_edits_by_target(other, chain)


def test_inverse_layers_have_no_matrix_before_their_activation():
    bank = make_problem().bank
    undone = dataclasses.replace(bank, layers=invert_layers(bank))
    before = jax.random.normal(jax.random.key(0), (40, 5))
    found = jc.inverse.target_scores.fit_target_layer(
        undone, before, undone.layers[0].apply(1, before), ridge=0.0
    )
    assert found.nearest_by_outputs == 1
    assert np.isnan(found.by_weights).all()


@pytest.mark.slow
def test_bfloat16_weights_are_scored_and_searched():
    problem = make_problem()
    half = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, problem.bank
    )
    half = jc.Problem(half, jc.Batch(problem.data.x.astype(jnp.bfloat16), problem.data.y), 4)
    chain = np.array([1, 3, 4, -1, -1], np.int32)
    scores, exact = (
        np.asarray(jc.inverse.target_scores.score_edits_by_target(p, chain).swap[:2])
        for p in (half, problem)
    )
    np.testing.assert_allclose(scores, exact, atol=0.2 * np.abs(exact).max())
    for search in (jc.TargetPropagation(), jc.SuffixBeamSearch(width=4, num_probes=5)):
        assert np.isfinite(jc.run(jax.random.key(0), search, half, budget=200).best_loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "name"), [(jc.TargetPropagation, "step_size"), (jc.SuffixBeamSearch, "temperature")]
)
def test_rates_can_be_vmapped(cls, name):
    problem = make_problem()

    def run(search):
        state, _ = search.step(jax.random.key(1), search.init(jax.random.key(0), problem), problem)
        return search.step(jax.random.key(2), state, problem)[1].loss

    searches = [cls(**{name: rate}) for rate in (0.1, 1.0)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *searches)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(run))(stacked), [jax.jit(run)(one) for one in searches], rtol=1e-4
    )


def test_ideal_layer_rejects_bad_input():
    bank, x = make_problem().bank, jnp.ones((4, 5))
    with pytest.raises(ValueError, match=r"one shape .*, got \[4, 5\] and \[4, 3\]"):
        jc.inverse.target_scores.fit_target_layer(bank, x, x[:, :3])
    with pytest.raises(ValueError, match="ridge of at least 0, got -1"):
        jc.inverse.target_scores.fit_target_layer(bank, x, x, ridge=-1.0)
