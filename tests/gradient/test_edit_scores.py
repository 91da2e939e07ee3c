"""Scores against finite differences, exact losses and joint JVPs."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import HEAD, init_params, make_bank, make_batch

import jchain as jc
from jchain.engine import layer_calls as calls
from jchain.engine.layer_calls import apply_token, find_part
from jchain.gradient import edit_scores as gradient

CHAIN = np.array([2, 0, 3, 5])  # three layers, the second head


def to_float64(problem):
    """The same weights and data, twice as precise. A loss that keeps that precision comes with it."""

    def cast(leaf):
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    bank, data = jax.tree.map(cast, (problem.bank, problem.data))
    return jc.Problem(bank, data, problem.max_layers, problem.loss_fn, problem.layer_cost)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def exact_changes(problem, chain):
    """Change of loss of each neighbor, nan for rows that are none."""
    bank = problem.bank
    rows, is_neighbor = (
        np.array(a) for a in jc.chain.neighbors(jnp.asarray(chain), bank.num_layers, bank.num_heads)
    )
    change = np.full(len(rows), np.nan)
    loss = jc.evaluate(problem, np.concatenate([chain[None], rows[is_neighbor]])).loss
    change[is_neighbor] = loss[1:] - loss[0]
    return change, is_neighbor


@pytest.fixture(scope="module")
def affine():
    """Layers that are affine and do not keep the activation, so that what follows a slot is."""
    layer, head = nn.Dense(5), jc.layers.DenseHead(3)
    keys = jax.random.split(jax.random.key(0))
    bank = jc.Bank.stack(
        layer, init_params(layer, keys[0], 4, (5,)), head, init_params(head, keys[1], 2, (5,))
    )
    return jc.Problem(bank, make_batch(), max_layers=3, layer_cost=jnp.array([0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize("chain", [CHAIN, np.array([1, 4, -1, -1]), np.array([5, -1, -1, -1])])
def test_linearized_scores_are_exact_where_the_rest_is_affine(affine, chain, x64):
    problem = to_float64(affine)
    change, is_neighbor = exact_changes(problem, chain)
    scores = jc.gradient.score_edits(problem, chain)
    np.testing.assert_allclose(np.asarray(scores.flat)[is_neighbor], change[is_neighbor], atol=1e-5)
    assert scores.loss == pytest.approx(float(jc.evaluate(problem, chain[None]).loss[0]), abs=1e-6)


def test_no_layer_is_deleted_of_a_chain_that_is_as_short_as_may_be(affine):
    problem = jc.Problem(affine.bank, affine.data, 3, min_layers=2)
    short, long = (jc.gradient.score_edits(problem, row) for row in ([1, 0, 4, -1], [1, 0, 2, 4]))
    assert np.isnan(short.delete).all()
    assert not np.isnan(long.delete[:3]).any()


@pytest.fixture(scope="module")
def deep(affine):
    """Orthogonal layers, so that nothing grows or fades along the chain."""
    params = affine.bank.layers[0].params
    kernels = jnp.linalg.qr(params["kernel"])[0]
    layers = [
        {"kernel": kernel, "bias": bias}
        for kernel, bias in zip(kernels, params["bias"], strict=True)
    ]
    heads = [jax.tree.map(lambda leaf, i=i: leaf[i], affine.bank.heads[0].params) for i in range(2)]
    return jc.Problem(
        jc.Bank.stack(nn.Dense(5), layers, jc.layers.DenseHead(3), heads),
        affine.data,
        max_layers=64,
    )


def test_chains_of_64_slots_are_scored_exactly_where_the_rest_is_affine(deep, x64):
    deep = to_float64(deep)
    chain = np.append(np.random.default_rng(0).integers(0, 4, 64), 5)
    change, is_neighbor = exact_changes(deep, chain)
    scores = jc.gradient.score_edits(deep, chain)
    np.testing.assert_allclose(np.asarray(scores.flat)[is_neighbor], change[is_neighbor], atol=1e-5)
    assert scores.layer_calls == (2 + 2) * 64 + 4 * 64
    assert np.ptp(change[is_neighbor]) > 0.1


def test_activation_scores_are_the_directional_derivative(problem, x64):
    problem = to_float64(problem)
    scores = jc.swap_scores(problem, CHAIN, "activations")
    hidden, behind = walk(problem, CHAIN)
    for slot in range(3):
        for token in range(4):
            step = problem.bank.layers[0].apply(token, hidden[slot]) - hidden[slot + 1]
            ahead, back = (
                problem.compute_metrics(behind(slot + 1, hidden[slot + 1] + sign * 1e-6 * step))[0]
                for sign in (1, -1)
            )
            np.testing.assert_allclose(
                scores[slot, token], (ahead - back) / 2e-6, rtol=1e-4, atol=1e-8
            )


@pytest.mark.parametrize("kind", ["weights", "nearest"])
def test_weight_scores_are_the_directional_derivative(kind, two_group_problem, x64):
    """To 1e-4, and nan for layers of another module."""
    problem = to_float64(two_group_problem)
    chain = np.array([1, 4, 2, 6])
    scores = jc.gradient.score_edits(problem, chain, kind, learning_rate=0.5)
    for slot in range(3):
        for token in range(5):
            expected = push_weights(problem, chain, slot, token, 0.5 if kind == "nearest" else None)
            np.testing.assert_allclose(scores.swap[slot, token], expected, rtol=1e-4, atol=1e-8)
    assert np.isnan(scores.insert).all()
    assert np.isnan(scores.delete).all()


def push_weights(problem, chain, slot, token, learning_rate):
    """Change of loss from the weights of a slot towards those of a layer, by central differences; nan for another module."""
    group, other = (
        next(g for g in problem.bank.layers if t in g.tokens) for t in (chain[slot], token)
    )
    if group is not other:
        return np.nan
    own, new = (
        jax.tree.map(lambda leaf, i=i: leaf[i], group.params)
        for i in map(group.tokens.index, (int(chain[slot]), token))
    )
    hidden, behind = walk(problem, chain)

    def loss(size):
        params = jax.tree.map(lambda a, b: a + size * (b - a), own, new)
        return problem.compute_metrics(
            behind(slot + 1, group.module.apply({"params": params}, hidden[slot]))
        )[0]

    square = sum(
        jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (own, new)), strict=True)
    )
    return (loss(1e-6) - loss(-1e-6)) / 2e-6 + (
        0.0 if learning_rate is None else square / (2 * learning_rate)
    )


def walk(problem, chain):
    """What each slot reads, and the function from a slot and what it reads to the outputs."""
    bank = problem.bank
    tokens = [int(token) for token in chain if token >= 0]
    hidden = [bank.embed(problem.data.x)]
    for token in tokens[:-1]:
        hidden.append(apply_token(bank.layers, jnp.array(token), hidden[-1]))

    def behind(slot, activation):
        for token in tokens[slot:-1]:
            activation = apply_token(bank.layers, jnp.array(token), activation)
        return apply_token(bank.heads, jnp.array(tokens[-1]), activation)

    return hidden, behind


def test_joint_changes_sum_to_a_joint_jvp(problem, x64):
    cost = np.array([0.1, 0.5, 0.9, 1.3])
    problem = to_float64(jc.Problem(problem.bank, problem.data, 3, layer_cost=jnp.asarray(cost)))
    scores, joint = jc.gradient.score_moves(problem, CHAIN, num_best=2, num_pairs=5)
    hidden, _ = walk(problem, CHAIN)
    layers = problem.bank.layers[0]
    steps = [layers.apply(int(joint.token[t, 0]), hidden[t]) - hidden[t + 1] for t in range(3)]

    def outputs(pushes):
        activation = hidden[0]
        for token, push in zip(CHAIN[:3], pushes, strict=True):
            activation = layers.apply(int(token), activation) + push
        return problem.bank.heads[0].apply(1, activation)

    plain, expected = jax.jvp(outputs, ([jnp.zeros_like(step) for step in steps],), (steps,))
    # Of a softmax only what other classes have more than the label counts; the likeliest come first.
    rivals = [
        [c for c in np.argsort(-z) if c != y] for z, y in zip(plain, problem.data.y, strict=True)
    ]
    margins = [
        moved[c] - moved[y]
        for moved, c, y in zip(np.asarray(expected), rivals, problem.data.y, strict=True)
    ]
    np.testing.assert_allclose(joint.change[:3, 0].sum(axis=0), margins, atol=1e-6)
    predicted = problem.compute_metrics(plain + expected)[0] - problem.compute_metrics(plain)[0]
    # Each slot has its best swaps, without the layer that is there, and the first move is the best of all.
    others = np.where(np.arange(4) == CHAIN[:3, None], np.inf, scores.swap[:3])
    np.testing.assert_array_equal(joint.token[:3], np.argsort(others, axis=1)[:, :2])
    np.testing.assert_allclose(joint.greedy_score[0], others.min(), atol=1e-6)
    np.testing.assert_array_equal(
        joint.greedy[0] != CHAIN, np.arange(4) == others.min(axis=1).argmin()
    )
    assert np.isnan(joint.greedy_score[3])
    # All pairs, by hand: the two swaps with the lowest loss of added outputs.
    changes = np.asarray(joint.change)
    padded = np.zeros((*changes.shape[:3], 3))
    np.put_along_axis(padded, np.broadcast_to(rivals, changes.shape), changes, axis=3)
    found = {
        (s, i, t, j): float(
            problem.compute_metrics(plain + padded[s, i] + padded[t, j])[0]
            - problem.compute_metrics(plain)[0]
        )
        + sum(cost[joint.token[slot, k]] - cost[CHAIN[slot]] for slot, k in ((s, i), (t, j)))
        for s in range(3)
        for t in range(s + 1, 3)
        for i in range(2)
        for j in range(2)
    }
    best = sorted(found, key=found.__getitem__)[:5]
    np.testing.assert_allclose(joint.pair_score, [found[pair] for pair in best], atol=1e-6)
    for row, (s, i, t, j) in zip(joint.pairs, best, strict=True):
        swapped = CHAIN.copy()
        swapped[[s, t]] = joint.token[s, i], joint.token[t, j]
        np.testing.assert_array_equal(row, swapped)
    assert predicted == pytest.approx(
        float(
            problem.compute_metrics(plain + padded[:3, 0].sum(axis=0))[0]
            - problem.compute_metrics(plain)[0]
        ),
        abs=1e-6,
    )


def test_joint_moves_of_many_examples_are_predicted_on_some(problem):
    """Of 300 every third: 128 is the most."""
    x = jax.random.normal(jax.random.key(4), (300, 5))
    y = jax.random.randint(jax.random.key(5), (300,), 0, 3)
    whole, some = (
        jc.Problem(problem.bank, jc.Batch(x, y), 3),
        jc.Problem(problem.bank, jc.Batch(x[::3], y[::3]), 3),
    )
    scores, joint = jc.gradient.score_moves(whole, CHAIN, num_best=3, num_pairs=27)
    np.testing.assert_allclose(scores.swap, jc.swap_scores(whole, CHAIN), rtol=1e-4, atol=1e-6)
    # With all swaps of each slot the pairs do not hang on which of them are best.
    expected = jc.gradient.score_moves(some, CHAIN, num_best=3, num_pairs=27)[1]
    found, wanted = (
        dict(zip(map(tuple, np.asarray(j.pairs).tolist()), np.asarray(j.pair_score), strict=True))
        for j in (joint, expected)
    )
    assert len(found) == 27
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", gradient.KINDS)
def test_scores_of_bfloat16_are_not_rounded_to_it(problem, kind):
    """Activations are; the scores that are read off them are not, and joint moves are predicted."""
    low = jax.tree.map(
        lambda leaf: (
            leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        ),
        problem,
    )
    found, expected = jc.swap_scores(low, CHAIN, kind), jc.swap_scores(problem, CHAIN, kind)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found[:3], expected[:3], atol=0.05 * float(jnp.abs(expected[:3]).max())
    )
    if kind == "linearized":
        scores, joint = jc.gradient.score_moves(low, CHAIN)
        assert scores.swap.dtype == joint.pair_score.dtype == jnp.float32
        exact = jc.gradient.score_moves(problem, CHAIN)[1].pair_score
        np.testing.assert_allclose(
            joint.pair_score[0], exact[0], atol=0.05 * float(jnp.abs(exact[0]))
        )


def test_layers_that_are_left_out_are_nan(problem):
    scores, joint = jc.gradient.score_moves(
        problem, CHAIN, members=(jnp.array([3, 1]),), num_best=1
    )
    whole = jc.gradient.score_edits(problem, CHAIN)
    np.testing.assert_allclose(scores.swap[:3, 1], whole.swap[:3, 1], rtol=1e-5)
    assert np.isnan(scores.swap[0, 0])
    assert np.isin(joint.token[:3], [1, 3]).all()
    assert scores.layer_calls == 3 * 2 + (2 + 2) * 3


def test_what_scores_cost(problem):
    """Two forward passes, a product each for 2 of 3 classes, 4 candidates at 3 slots; a chain with room has one place more."""
    assert jc.gradient.score_edits(problem, CHAIN).layer_calls == (2 + 2) * 3 + 4 * 3
    assert jc.gradient.score_edits(problem, CHAIN, "activations").layer_calls == (2 + 1) * 3 + 4 * 3
    assert jc.gradient.score_edits(problem, CHAIN, "weights").layer_calls == 4 * 3
    assert (
        jc.gradient.score_edits(problem, np.array([1, 4, -1, -1])).layer_calls
        == (2 + 2) * 1 + 4 * 2
    )


@pytest.mark.parametrize("kind", gradient.KINDS)
def test_zero_for_what_is_there_and_the_same_under_jit_and_vmap(kind, two_group_problem):
    problem = two_group_problem
    chains = np.array([[1, 4, 2, 6], [3, 5, -1, -1], [0, 0, 4, 5]])
    score = partial(jc.gradient.score_edits, kind=kind)
    alone = [score(problem, chain) for chain in chains]
    for scores, chain in zip(alone, chains, strict=True):
        length = int((chain >= 0).sum()) - 1
        assert (np.asarray(scores.swap)[np.arange(length), chain[:length]] == 0).all()
        assert np.isnan(scores.swap[length:]).all()
        assert scores.head[chain[length] - 5] == 0
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    mapped = jax.jit(jax.vmap(score, (None, 0)))(problem, jnp.asarray(chains))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mapped, stacked
    )


class TokensHead(nn.Module):
    """Four labels of 25 classes for each example, as a language model has."""

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


def find_moved_outputs(problem, chain, slot, token):
    """Outputs of a chain, and what the swap changes in them to first order."""
    hidden, behind = walk(problem, chain)
    change = problem.bank.layers[0].apply(token, hidden[slot]) - hidden[slot + 1]
    return jax.jvp(partial(behind, slot + 1), (hidden[slot + 1],), (change,))


@pytest.mark.parametrize(
    "num_products", [pytest.param(1, marks=pytest.mark.slow), 2, 5, 98, 99, None]
)
def test_with_few_products_the_likeliest_classes_stand_alone(num_products):
    """Of 100 classes all others move as one, by the mean of their changes, weighted by their probabilities."""
    label = jax.random.randint(jax.random.key(3), (40,), 0, 100)
    problem = wide_problem(optax.softmax_cross_entropy_with_integer_labels, label)
    num_single = (num_products or 17) - 1 if num_products != 99 else 99
    chain = np.array([2, 0, 3, 4])
    scores = jc.gradient.score_edits(problem, chain, num_products=num_products)
    for slot, token in ((0, 1), (1, 3), (2, 0)):
        outputs, moved = map(np.asarray, find_moved_outputs(problem, chain, slot, token))
        change = []
        for z, dz, y in zip(outputs.astype(float), moved.astype(float), label, strict=True):
            rest = [c for c in np.argsort(-z) if c != y][num_single:]
            if rest:
                weight = np.exp(z[rest] - z[rest].max())
                dz[rest] = dz[rest] @ weight / weight.sum()
            find_loss = lambda z, y=y: np.log(np.exp(z).sum()) - z[y]  # noqa: E731
            change.append(find_loss(z + dz) - find_loss(z))
        assert scores.swap[slot, token] == pytest.approx(np.mean(change), rel=1e-3, abs=1e-6)
    assert scores.layer_calls == (2 + (num_products or 17)) * 3 + 4 * 3


def make_sampled(is_softmax):
    """Of which no output is read by itself."""
    key = jax.random.key(3)
    if is_softmax:
        labels = jax.random.randint(key, (400, 4), 0, 25)
        return wide_problem(optax.softmax_cross_entropy_with_integer_labels, labels, TokensHead())
    return wide_problem(optax.squared_error, jax.random.normal(key, (400, 100)))


@pytest.fixture(params=[400, 150], ids=["whole", "in parts"])
def part_size(request, monkeypatch):
    """So many examples of 100 outputs go through a head at a time; of 150 there are two and a rest."""
    jax.clear_caches()
    parts = -(-400 // request.param)
    monkeypatch.setattr(calls, "_OUTPUT_LIMIT", -(-400 * 400 // parts))
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("is_softmax", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_other_wide_outputs_are_sampled(is_softmax, part_size):
    """More samples come closer to the loss to second order, which for squared errors is the loss itself."""
    problem, chain = make_sampled(is_softmax), np.array([2, 0, 3, 4])
    assert find_part(problem, problem.data.x, 1) == (400 if part_size == 400 else 133)

    def expand(slot, token):
        outputs, moved = find_moved_outputs(problem, chain, slot, token)
        loss = lambda size: problem.compute_metrics(outputs + size * moved)[0]  # noqa: E731
        return jax.grad(loss)(0.0) + 0.5 * jax.grad(jax.grad(loss))(0.0)

    expected = np.array([[expand(slot, token) for token in range(4)] for slot in range(3)])
    errors = [
        np.abs(jc.gradient.score_edits(problem, chain, num_products=n).swap[:3] - expected).mean()
        for n in (5, 129)
    ]
    assert errors[1] < 0.1 * np.abs(expected).mean()
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("kind", ["activations", "weights"])
def test_gradients_of_wide_outputs_do_not_depend_on_parts(kind, monkeypatch):
    problem, chain = make_sampled(True), np.array([2, 0, 3, 4])
    found = []
    for limit in (400 * 400, 400 * 150):
        jax.clear_caches()
        monkeypatch.setattr(calls, "_OUTPUT_LIMIT", limit)
        found.append(jc.gradient.score_edits(problem, chain, kind=kind))
    jax.clear_caches()
    for whole, parts in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-7)


class Rounded(nn.Module):
    """Has a derivative of 0 almost everywhere."""

    @nn.compact
    def __call__(self, x):
        return jnp.round(nn.Dense(5)(x))


class Looped(nn.Module):
    """Cannot be differentiated in reverse."""

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


@pytest.mark.parametrize("kind", gradient.KINDS)
def test_nothing_is_said_of_slots_before_one_without_a_gradient(kind):
    problem = mixed_problem(Rounded())
    swap = np.asarray(jc.swap_scores(problem, np.array([1, 3, 2, 4]), kind))
    assert np.isnan(np.delete(swap[0], 1)).all()
    assert np.isfinite(swap[2, :3]).all()
    assert np.isfinite(swap[1, :3]).all() == (kind in ("linearized", "activations"))


def test_a_layer_that_is_not_finite_has_no_score(problem):
    params = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.inf), problem.bank.layers[0].params)
    bank = problem.bank
    broken = jc.Bank.stack(
        bank.layers[0].module,
        [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(4)],
        HEAD,
        [jax.tree.map(lambda leaf, i=i: leaf[i], bank.heads[0].params) for i in range(2)],
    )
    broken_problem = jc.Problem(broken, problem.data, 3)
    scores = jc.gradient.score_edits(broken_problem, CHAIN)
    expected = jc.gradient.score_edits(problem, CHAIN)
    assert np.isnan(scores.swap[:3, 1]).all()
    np.testing.assert_allclose(
        np.delete(scores.swap, 1, 1), np.delete(expected.swap, 1, 1), rtol=1e-5
    )
    lost = jc.gradient.score_edits(broken_problem, np.array([1, 0, 3, 5]))
    assert np.isnan(np.delete(lost.swap[0], 1)).all()
    assert not np.isfinite(lost.loss)


def test_bad_input_is_refused(problem):
    with pytest.raises(
        ValueError,
        match="expected a kind of linearized, activations, weights, nearest, got 'hessian'",
    ):
        jc.swap_scores(problem, CHAIN, "hessian")
    with pytest.raises(ValueError, match="token 9 at slot 1 is out of range"):
        jc.swap_scores(problem, np.array([2, 9, 3, 5]))
    with pytest.raises(ValueError, match=r"expected one chain of shape \[4\], got \[2, 4\]"):
        jc.swap_scores(problem, np.stack([CHAIN, CHAIN]))
    with pytest.raises(ValueError, match="expected a positive learning_rate, got 0.0"):
        jc.gradient.score_edits(problem, CHAIN, learning_rate=0.0)
    with pytest.raises(ValueError, match="expected places in 0..3, got 1..4"):
        jc.gradient.score_moves(problem, CHAIN, members=(jnp.array([1, 4]),), num_best=1)
    with pytest.raises(ValueError, match="for each of 1 groups of layers, got 2 arrays"):
        jc.gradient.score_moves(
            problem, CHAIN, members=(jnp.array([1]), jnp.array([1])), num_best=1
        )
    with pytest.raises(ValueError, match="expected num_products of at least 1, got 0"):
        jc.gradient.score_edits(problem, CHAIN, num_products=0)
    squares = wide_problem(optax.squared_error, jnp.zeros((40, 100)))
    with pytest.raises(
        ValueError, match="expected num_products of at least 3 for outputs like these, got 2"
    ):
        jc.gradient.score_edits(squares, np.array([2, 0, 3, 4]), num_products=2)
    with pytest.raises(ValueError, match="Looped cannot be differentiated: Reverse-mode"):
        jc.swap_scores(mixed_problem(Looped()), np.array([1, 0, 2, 4]))
    table = jc.chainbench.tabular.make_problem(
        problem.bank, np.asarray(jc.evaluate_all(problem)[1].loss), 3
    )
    with pytest.raises(
        ValueError, match="expected floating-point activations, which have a gradient, got int32"
    ):
        jc.swap_scores(table, CHAIN)


def test_gradients_of_float16_are_refused(problem):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (problem.bank, problem.data.x))
    posed = jc.Problem(half[0], jc.Batch(half[1], problem.data.y), problem.max_layers)
    with pytest.raises(
        ValueError, match="expected activations of bfloat16 or wider for gradients, got float16"
    ):
        jc.gradient.score_edits(posed, np.array([0, 1, 4, -1]))
