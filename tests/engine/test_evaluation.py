import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import HEAD, init_params, make_bank, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc

PLANS = [
    jc.engine.DepthFirst(),
    jc.engine.Blocks(1),
    jc.engine.Blocks(5, (1, 2), head_widths=(1, 3)),
    jc.engine.Blocks(1000, (1, 2, 8), head_widths=(1, 4, 16)),
    jc.engine.Blocks(5, (1, 3), share=jc.engine.Share.NOTHING),
    jc.engine.Blocks(1000, (1, 4), share=jc.engine.Share.NOTHING, head_widths=(1, 8)),
    jc.engine.Blocks(5, (1, 2), share=jc.engine.Share.INPUT),
    jc.engine.Blocks(1000, (1, 3), share=jc.engine.Share.INPUT, head_widths=(1, 2)),
]


def sample(problem, num, seed=0):
    """Sample random chains, and add some of every length, a head alone, and repeats."""
    bank = problem.bank
    rows = jc.chain.ChainSpace(bank.num_layers, bank.num_heads, problem.max_layers).sample(
        jax.random.key(seed), num
    )
    short = [[*range(depth), bank.num_layers] for depth in range(problem.max_layers + 1)]
    return np.concatenate([rows, jc.chain.pad(short, problem.max_layers), rows[:3]])


def assert_matches_reference(problem, chains, out):
    expected = np.array([reference.chain_loss(problem, chain) for chain in chains])
    np.testing.assert_allclose(out.loss, expected[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.accuracy, expected[:, 1], atol=1e-6)
    assert (out.layer_calls, out.head_calls) == reference.count_calls(
        chains, problem.bank.num_layers
    )


@pytest.mark.parametrize("plan", [None, *PLANS], ids=str)
def test_evaluate_matches_a_float64_loop(two_group_problem, plan):
    chains = sample(two_group_problem, 40)
    out = jc.evaluate(two_group_problem, chains, plan=plan)
    assert_matches_reference(two_group_problem, chains, out)


@pytest.mark.parametrize(
    "kind",
    [
        "independent",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("routed", "snapshots", "random")),
    ],
)
def test_evaluate_matches_a_float64_loop_on_digits(digits, kind):
    sizes = (
        {"num_nets": 3}
        if kind == "independent"
        else {"num_snapshots": 3}
        if kind == "snapshots"
        else {"num_heads": 3}
    )
    make = getattr(jc.train, kind)
    bank = make(
        jax.random.key(0),
        digits.train,
        layer=jc.layers.ResidualMLP(64),
        head=jc.layers.DenseHead(10),
        num_steps=60,
        **sizes,
    )
    problem = jc.Problem(bank, digits.search, max_layers=4)
    chains = sample(problem, 200)
    out = jc.evaluate(problem, chains)
    assert bank.num_heads == 3
    assert_matches_reference(problem, chains, out)


def test_layer_calls_by_hand(problem):
    # The prefixes are 0, 0-1, 0-1-2, 2, and 2-0. Heads are no layer calls, and repeats are free.
    chains = jc.chain.pad([[0, 1, 4], [0, 1, 2, 4], [0, 1, 2, 5], [2, 0, 4], [4], [0, 1, 4]], 3)
    out = jc.evaluate(problem, chains)
    assert (out.layer_calls, out.head_calls) == (5, 5)


@pytest.mark.parametrize("plan", [None, jc.engine.Blocks(7, (1, 2))], ids=str)
def test_evaluate_all(two_group_problem, plan):
    chains, out = jc.evaluate_all(two_group_problem, plan=plan)
    np.testing.assert_array_equal(chains, jc.chain.ChainSpace(5, 2, 3).enumerate())
    assert (out.layer_calls, out.head_calls) == (5 + 25 + 125, len(chains))
    shuffled = np.random.default_rng(0).permutation(len(chains))
    again = jc.evaluate(two_group_problem, chains[shuffled])
    np.testing.assert_allclose(again.loss, out.loss[shuffled], rtol=1e-6)
    np.testing.assert_array_equal(again.accuracy, out.accuracy[shuffled])
    some = shuffled[:50]
    np.testing.assert_allclose(
        out.loss[some],
        [reference.chain_loss(two_group_problem, chain)[0] for chain in chains[some]],
        rtol=1e-5,
    )


def test_evaluate_all_refuses_too_many_chains(bank):
    problem = jc.Problem(bank, make_batch(), max_layers=30)
    with pytest.raises(
        ValueError, match="expected at most 4,194,304 chains to evaluate, got 3,074,457"
    ):
        jc.evaluate_all(problem)


STEM = jc.layers.DenseHead(5)


def draw_problem(draw):
    """Draw one or two groups of layers, one to three heads of one or two modules, maybe a stem."""
    seed = draw(st.integers(0, 2**16))
    banks = [make_bank(draw(st.integers(1, 3)), draw(st.integers(1, 2)), seed=seed)]
    if draw(st.booleans()):
        banks.append(make_bank(2, 1, seed=seed + 1, layer=jc.layers.Dense(5)))
    data = make_batch(seed=seed)
    if draw(st.booleans()):
        (stem_params,) = init_params(STEM, jax.random.key(seed), 1, (2, 2))
        banks = [dataclasses.replace(bank, stem=STEM, stem_params=stem_params) for bank in banks]
        data = jc.Batch(data.x[:, :4].reshape(-1, 2, 2), data.y)
    return jc.Problem(
        jc.Bank.concat(banks),
        data,
        draw(st.integers(0, 4)),
        layer_cost=draw(st.sampled_from([0.0, 0.5])),
    )


def draw_chains(draw, problem):
    """Draw one or more chains of any length, with repeats and heads alone."""
    num_layers, num_heads = problem.bank.num_layers, problem.bank.num_heads
    layers = st.lists(st.integers(0, num_layers - 1), max_size=problem.max_layers)
    head = st.integers(num_layers, num_layers + num_heads - 1)
    some = draw(st.lists(st.tuples(layers, head), min_size=1, max_size=12))
    rows = [[*layers, head] for layers, head in some + some[: draw(st.integers(0, 2))]]
    return jc.chain.pad(rows, problem.max_layers)


@pytest.mark.parametrize(
    "plan",
    [None, *PLANS[::2], *(pytest.param(plan, marks=pytest.mark.slow) for plan in PLANS[1::2])],
    ids=str,
)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_evaluate_with_every_plan_and_dtype_on_random_problems(plan, data):
    problem = draw_problem(data.draw)
    chains = draw_chains(data.draw, problem)
    assert_matches_reference(problem, chains, jc.evaluate(problem, chains, plan=plan))
    # bfloat16 keeps 8 bits: the error is a few percent of the loss, or of the logits.
    out = jc.evaluate(problem, chains, plan=plan, dtype=jnp.bfloat16)
    expected = np.array([reference.chain_loss(problem, chain)[0] for chain in chains])
    assert out.loss.dtype == jnp.float32
    np.testing.assert_allclose(out.loss, expected, rtol=0.05, atol=0.1)
    assert (out.layer_calls, out.head_calls) == reference.count_calls(
        chains, problem.bank.num_layers
    )


@pytest.mark.parametrize(
    ("layer", "shape", "shares"),
    [
        (jc.layers.ConvBlock(3, depth=2), (4, 4, 3), tuple(jc.engine.Share)),
        pytest.param(
            jc.layers.TransformerBlock(4, 2),
            (3, 4),
            (jc.engine.Share.LAYER,),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["images", "sequences"],
)
def test_evaluate_on_images_and_sequences(layer, shape, shares):
    data = jc.Batch(jax.random.normal(jax.random.key(0), (6, *shape)), jnp.arange(6) % 3)
    layers, heads = (
        init_params(layer, jax.random.key(1), 4, shape),
        init_params(HEAD, jax.random.key(2), 1, shape),
    )
    problem = jc.Problem(jc.Bank.stack(layer, layers, HEAD, heads), data, 2)
    chains, out = jc.evaluate_all(problem)
    assert_matches_reference(problem, chains, out)
    for share in shares:
        forced = jc.evaluate(problem, chains, plan=jc.engine.Blocks(16, (1, 4), share))
        np.testing.assert_allclose(forced.loss, out.loss, rtol=1e-5)


@pytest.mark.slow
def test_evaluate_prefixes_scores_every_head_for_free(two_group_problem):
    chains = sample(two_group_problem, 12)
    out = jc.evaluate_prefixes(two_group_problem, chains)
    assert out.loss.shape == out.accuracy.shape == (*chains.shape, 2)
    assert out.layer_calls == jc.evaluate(two_group_problem, chains).layer_calls
    assert out.head_calls == 2 * len(
        {tuple(row[:t]) for row in chains.tolist() for t in range(1 + sum(0 <= x < 5 for x in row))}
    )
    for row, loss, accuracy in zip(chains, out.loss, out.accuracy, strict=True):
        layers = [token for token in row if 0 <= token < 5]
        for t in range(4):
            for k in range(2):
                if t <= len(layers):
                    expected = reference.chain_loss(two_group_problem, [*layers[:t], 5 + k])
                    np.testing.assert_allclose(
                        (loss[t, k], accuracy[t, k]), expected, rtol=1e-5, atol=1e-5
                    )
                else:
                    assert (loss[t, k], accuracy[t, k]) == (np.inf, 0)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.permutations(range(4)), st.permutations([4, 5]), st.integers(0, 2**31 - 1))
def test_permuting_the_bank_and_relabelling_the_chain_leaves_the_loss(problem, layers, heads, seed):
    order = [*layers, *heads]
    permuted = jc.Problem(problem.bank.take(layers, heads), problem.data, problem.max_layers)
    chains = np.asarray(jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(seed), 8))
    new = np.array([order.index(token) for token in range(6)] + [-1])
    np.testing.assert_allclose(
        jc.evaluate(permuted, new[chains]).loss, jc.evaluate(problem, chains).loss, rtol=1e-6
    )


@pytest.mark.parametrize(
    "plan",
    [None, jc.engine.Blocks(4, (1, 2)), jc.engine.Blocks(9, (1, 4), share=jc.engine.Share.NOTHING)],
    ids=str,
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_nonfinite_layers_become_inf_and_touch_no_other_chain(plan, bad):
    params = init_params(jc.layers.Dense(5), jax.random.key(0), 3, (5,))
    heads = init_params(HEAD, jax.random.key(1), 1, (5,))
    broken = [*params[:2], jax.tree.map(lambda leaf: jnp.full_like(leaf, bad), params[2])]
    data = make_batch()
    good = jc.Problem(jc.Bank.stack(jc.layers.Dense(5), params[:2], HEAD, heads), data, 2)
    problem = jc.Problem(jc.Bank.stack(jc.layers.Dense(5), broken, HEAD, heads), data, 2)
    chains, out = jc.evaluate_all(problem, plan=plan)
    is_broken = (chains == 2).any(axis=1)
    deep = (chains == 2).sum(axis=1) == 2
    assert np.all(out.loss[deep] == np.inf)
    assert np.all(out.accuracy[deep] == 0)
    assert out.num_nonfinite == np.sum(np.isinf(out.loss)) >= deep.sum()
    assert np.all(np.isfinite(out.loss[~is_broken]))
    relabelled = np.where(chains[~is_broken] == 3, 2, chains[~is_broken])
    np.testing.assert_array_equal(out.loss[~is_broken], jc.evaluate(good, relabelled).loss)


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ([[0, 1, 999, -1]], "token 999"),
        ([[0, 1, 2, 3]], "no head"),
        ([[0, 4, 1, -1]], "tokens after its head"),
        (np.array([[0, 4]]), r"shape \[P, 4\]"),
        (np.zeros((0, 4), int), "at least one"),
    ],
)
def test_evaluate_rejects_bad_chains_before_computing(problem, chains, message):
    with pytest.raises(ValueError, match=message):
        jc.evaluate(problem, chains)


def test_explain_describes_what_evaluate_does(two_group_problem):
    chains = sample(two_group_problem, 40)
    said = jc.explain_plan(two_group_problem, chains)
    out = jc.evaluate(two_group_problem, chains)
    assert (said.num_chains, said.layer_calls, said.head_calls) == (
        len(chains),
        out.layer_calls,
        out.head_calls,
    )
    assert said.unshared_layer_calls == sum(0 <= token < 5 for row in chains for token in row)
    assert (said.plan, said.num_devices) == (
        jc.engine.Blocks(32, (1, 4, 16), head_widths=(1, 4, 16)),
        1,
    )
    assert 0 < said.num_bytes < said.memory_limit
    assert "47 chains" in str(said)
    assert "layer calls" in str(said)
    assert (
        jc.explain_plan(two_group_problem, chains, plan=jc.engine.DepthFirst()).plan
        == jc.engine.DepthFirst()
    )
    half = jc.explain_plan(
        two_group_problem, chains, plan=jc.engine.DepthFirst(), dtype=jnp.bfloat16
    )
    assert (
        half.num_bytes
        < jc.explain_plan(two_group_problem, chains, plan=jc.engine.DepthFirst()).num_bytes
    )


@pytest.mark.slow
def test_a_memory_limit_makes_blocks_smaller_until_one_node_is_left(problem):
    chains = sample(problem, 100)
    free = jc.explain_plan(problem, chains)
    least = jc.explain_plan(problem, chains, plan=jc.engine.DepthFirst()).num_bytes
    limits = np.linspace(least, free.num_bytes, 6).astype(int).tolist()
    plans = [jc.explain_plan(problem, chains, memory_limit=limit) for limit in limits]
    assert all(said.num_bytes <= limit for said, limit in zip(plans, limits, strict=True))
    assert plans[0].plan == jc.engine.DepthFirst()
    assert {said.plan for said in plans[:-1]} > {jc.engine.DepthFirst()}
    np.testing.assert_allclose(
        jc.evaluate(problem, chains, memory_limit=least).loss,
        jc.evaluate(problem, chains).loss,
        rtol=1e-6,
    )
    with pytest.raises(
        ValueError, match=f"at least {least:,} bytes, to evaluate .* got {least - 1:,}"
    ):
        jc.evaluate(problem, chains, memory_limit=least - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": jnp.int8}, "expected a dtype of jnp.bfloat16 or jnp.float32, got .*int8"),
        ({"dtype": jnp.float16}, "expected a dtype of jnp.bfloat16 or jnp.float32, got .*float16"),
        ({"memory_limit": 0}, "expected memory_limit to be at least 1, got 0"),
        (
            {"memory_limit": 100},
            "expected a memory_limit of .* one chain at a time .* got 100",
        ),
        (
            {"memory_limit": 100, "plan": jc.engine.DepthFirst()},
            r"expected a plan of at most 100 bytes, but DepthFirst\(\) needs",
        ),
    ],
)
@pytest.mark.parametrize("function", [jc.evaluate, jc.evaluate_prefixes, jc.explain_plan])
def test_evaluate_rejects_bad_options(problem, function, options, message):
    with pytest.raises(ValueError, match=message):
        function(problem, [[0, 4, -1, -1]], **options)


@pytest.mark.parametrize(
    "function", [jc.evaluate, jc.evaluate_all, jc.evaluate_prefixes, jc.explain_plan]
)
def test_evaluate_names_a_misspelled_argument(problem, function):
    inputs = [problem] if function is jc.evaluate_all else [problem, [[0, 4, -1, -1]]]
    with pytest.raises(TypeError, match="unexpected keyword argument 'memory_limt'"):
        function(*inputs, memory_limt=1)


def test_evaluate_checks_shapes_when_traced(problem):
    with pytest.raises(
        ValueError, match=r"expected chains of shape \[P, 4\], at least one, got \[2, 3\]"
    ):
        jax.jit(lambda chains: jc.evaluate(problem, chains))(jnp.zeros((2, 3), int))


def test_apply_chain_is_the_plain_definition(two_group_problem):
    bank, x = two_group_problem.bank, two_group_problem.data.x
    for chain in ([5], [0, 4, 6, -1], [3, 3, 1, 5]):
        expected = reference.chain_logits(bank, [token for token in chain if token >= 0], x)
        np.testing.assert_allclose(jc.apply_chain(bank, chain, x), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            jax.jit(jc.apply_chain)(bank, jnp.array(chain), x), expected, rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="token 7 at slot 0 is out of range"):
        jc.apply_chain(bank, [7, 5], x)


def test_evaluate_pads_lists_of_chains_of_different_lengths(problem):
    chains = [[0, 1, 4], [5], [2, 4]]
    found = jc.evaluate(problem, chains)
    expected = jc.evaluate(problem, jc.chain.pad(chains, 3))
    np.testing.assert_array_equal(found.loss, expected.loss)


def test_lists_of_tokens_are_padded_wherever_chains_are_taken(problem):
    row, x = jc.chain.pad([[0, 4]], 3)[0], problem.data.x
    np.testing.assert_array_equal(problem.space.validate([0, 4]), row)
    np.testing.assert_array_equal(problem.space.validate([[0, 4]]), row[None])
    np.testing.assert_array_equal(problem.space.validate([row, np.array([5])])[0], row)
    np.testing.assert_array_equal(jc.predict(problem, [0, 4]), jc.predict(problem, row))
    expected = jc.apply_chain(problem.bank, row, x)
    np.testing.assert_array_equal(jc.apply_chain(problem.bank, [0, 4], x), expected)
    np.testing.assert_array_equal(jc.swap_scores(problem, [0, 4]), jc.swap_scores(problem, row))
    reports = [jc.gradient.layer_report.report_layers(problem, chain) for chain in ([0, 4], row)]
    assert [len(one) for one in reports] == [1, 1]
    assert jc.cost(problem.bank, [0, 4]).params == jc.cost(problem.bank, row).params
    with pytest.raises(ValueError, match="at most 3 layers and a head, got one of 5 tokens"):
        jc.swap_scores(problem, [0, 1, 2, 3, 4])


def test_one_chain_has_a_scalar_loss_and_accuracy(two_group_problem):
    chains = sample(two_group_problem, 3)
    expected = jc.evaluate(two_group_problem, chains)
    tokens = [int(token) for token in chains[0] if token >= 0]
    evaluate = jax.jit(jc.evaluate)
    for out in (
        jc.evaluate(two_group_problem, chains[0]),
        jc.evaluate(two_group_problem, tokens),
        evaluate(two_group_problem, jnp.asarray(chains[0])),
    ):
        assert out.loss.shape == out.accuracy.shape == ()
        np.testing.assert_allclose(out.loss, expected.loss[0], rtol=1e-6)
        np.testing.assert_allclose(out.accuracy, expected.accuracy[0])
        assert (out.layer_calls, out.head_calls) == (len(tokens) - 1, 1)
    found = jax.vmap(jc.evaluate, (None, 0))(two_group_problem, jnp.asarray(chains))
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    assert jc.explain_plan(two_group_problem, tokens).num_chains == 1
    with pytest.raises(ValueError, match=r"expected chains of shape \[P, .\], at least one"):
        jc.evaluate_prefixes(two_group_problem, chains[0])


def test_pick_best_returns_the_chain_with_the_lowest_loss_on_a_split(problem):
    data = make_batch(seed=5)
    other = problem.with_data(data)
    assert (other.max_layers, other.bank) == (problem.max_layers, problem.bank)
    chains = problem.space.sample(jax.random.key(0), 20)
    loss = jc.evaluate(other, chains).loss
    assert loss.argmin() != jc.evaluate(problem, chains).loss.argmin()
    np.testing.assert_array_equal(jc.pick_best(problem, chains, data), chains[loss.argmin()])
    rows = [[int(token) for token in row if token >= 0] for row in np.asarray(chains)]
    np.testing.assert_array_equal(jc.pick_best(problem, rows, data), chains[loss.argmin()])
    costly = dataclasses.replace(problem, token_costs=np.ones(6, np.float32), max_cost=1.0)
    with pytest.raises(ValueError, match="expected a chain of finite loss, got 1 that have none"):
        jc.pick_best(costly, [[0, 4]], data)


def test_a_split_of_another_form_is_refused(problem):
    with pytest.raises(ValueError, match="labels in 0..2"):
        problem.with_data(jc.Batch(problem.data.x, problem.data.y + 9))
