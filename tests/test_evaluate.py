import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import HEAD, init_params, make_bank, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc
from jchain.evaluate import count_calls

CHUNKS = [None, 1, 2, 5, 1000]


def sample(problem, num, seed=0):
    """Random chains, plus some of every length, a head at once, and repeats."""
    bank = problem.bank
    rows = jc.chain.sample(jax.random.key(seed), num, bank.num_layers, bank.num_heads, problem.max_layers)
    short = [[*range(depth), bank.num_layers] for depth in range(problem.max_layers + 1)]
    return np.concatenate([rows, jc.chain.pad(short, problem.max_layers), rows[:3]])


def assert_matches_reference(problem, chains, out):
    expected = np.array([reference.chain_loss(problem, chain) for chain in chains])
    np.testing.assert_allclose(out.loss, expected[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.accuracy, expected[:, 1], atol=1e-6)
    assert (out.layer_calls, out.head_calls) == reference.count_calls(chains, problem.bank.num_layers)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_evaluate_matches_a_float64_loop(two_group_problem, chunk_size):
    chains = sample(two_group_problem, 40)
    out = jc.evaluate(two_group_problem, chains, chunk_size=chunk_size)
    assert_matches_reference(two_group_problem, chains, out)


@pytest.mark.parametrize("kind", ["independent", "routed", "snapshots", "random"])
def test_evaluate_matches_a_float64_loop_on_digits(digits, kind):
    sizes = (
        {"num_nets": 3} if kind == "independent" else {"num_snapshots": 3} if kind == "snapshots" else {"num_heads": 3}
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
    # Prefixes: 0, 0-1, 0-1-2, 2, 2-0. The head is no layer call, repeats cost nothing.
    chains = jc.chain.pad([[0, 1, 4], [0, 1, 2, 4], [0, 1, 2, 5], [2, 0, 4], [4], [0, 1, 4]], 3)
    out = jc.evaluate(problem, chains)
    assert (out.layer_calls, out.head_calls) == (5, 5)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_evaluate_all(two_group_problem, chunk_size):
    chains, out = jc.evaluate_all(two_group_problem, chunk_size=chunk_size)
    np.testing.assert_array_equal(chains, jc.chain.enumerate_all(5, 2, 3))
    assert (out.layer_calls, out.head_calls) == (5 + 25 + 125, len(chains))
    shuffled = np.random.default_rng(0).permutation(len(chains))
    again = jc.evaluate(two_group_problem, chains[shuffled])
    np.testing.assert_allclose(again.loss, out.loss[shuffled], rtol=1e-6)
    np.testing.assert_array_equal(again.accuracy, out.accuracy[shuffled])
    some = shuffled[:50]
    np.testing.assert_allclose(
        out.loss[some], [reference.chain_loss(two_group_problem, chain)[0] for chain in chains[some]], rtol=1e-5
    )


def test_evaluate_all_refuses_what_would_never_end(bank):
    problem = jc.Problem(bank, make_batch(), max_layers=30)
    with pytest.raises(ValueError, match="expected at most 4,194,304 chains to evaluate, got 3,074,457"):
        jc.evaluate_all(problem)


@jax.jit
def plain_loss(problem, chain):
    return problem.measure(jc.apply_chain(problem.bank, chain, problem.data.x))[0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), num=st.sampled_from([1, 13]), chunk_size=st.sampled_from([1, 4]))
def test_any_population_matches_apply_chain(problem, seed, num, chunk_size):
    rng = np.random.default_rng(seed)
    tokens = [[*rng.integers(0, 4, rng.integers(0, 4)).tolist(), int(rng.integers(4, 6))] for _ in range(num)]
    chains = jc.chain.pad(tokens, 3)
    out = jc.evaluate(problem, chains, chunk_size=chunk_size)
    expected = [plain_loss(problem, chain) for chain in jnp.asarray(chains)]
    np.testing.assert_allclose(out.loss, expected, rtol=2e-6)
    assert (out.layer_calls, out.head_calls) == reference.count_calls(chains, 4)


@settings(max_examples=4, deadline=None)
@given(st.permutations(range(4)), st.permutations([4, 5]), st.integers(0, 2**31 - 1))
def test_permuting_the_bank_and_relabelling_the_chain_leaves_the_loss(problem, layers, heads, seed):
    order = [*layers, *heads]
    permuted = jc.Problem(problem.bank.take(layers, heads), problem.data, problem.max_layers)
    chains = np.asarray(jc.chain.sample(jax.random.key(seed), 8, 4, 2, 3))
    new = np.array([order.index(token) for token in range(6)] + [-1])
    np.testing.assert_array_equal(jc.evaluate(permuted, new[chains]).loss, jc.evaluate(problem, chains).loss)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_vmap_over_populations_and_over_problems(problem, chunk_size):
    populations = jnp.stack([jnp.asarray(sample(problem, 6, seed)) for seed in range(3)])
    looped = [jc.evaluate(problem, chains, chunk_size=chunk_size) for chains in populations]
    batched = jax.vmap(lambda chains: jc.evaluate(problem, chains, chunk_size=chunk_size))(populations)
    for i, out in enumerate(looped):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), batched, out)
    problems = [jc.Problem(make_bank(seed=seed), problem.data, 3) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    batched = jax.vmap(lambda p, chains: jc.evaluate(p, chains, chunk_size=chunk_size))(stacked, populations)
    for i, one in enumerate(problems):
        np.testing.assert_allclose(batched.loss[i], jc.evaluate(one, populations[i]).loss, rtol=1e-6)


def test_one_trace_for_populations_of_one_size(problem):
    traces = []

    @jax.jit
    def loss_fn(chains):
        traces.append(chains.shape)
        return jc.evaluate(problem, chains).loss

    for seed in range(3):
        loss_fn(jc.chain.sample(jax.random.key(seed), 6, 4, 2, 3))
    assert traces == [(6, 4)]


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_nonfinite_layers_become_inf_and_touch_no_other_chain(chunk_size, bad):
    params = init_params(jc.layers.Dense(5), jax.random.key(0), 3, (5,))
    heads = init_params(HEAD, jax.random.key(1), 1, (5,))
    broken = [*params[:2], jax.tree.map(lambda leaf: jnp.full_like(leaf, bad), params[2])]
    data = make_batch()
    good = jc.Problem(jc.Bank.stack(jc.layers.Dense(5), params[:2], HEAD, heads), data, 2)
    problem = jc.Problem(jc.Bank.stack(jc.layers.Dense(5), broken, HEAD, heads), data, 2)
    chains, out = jc.evaluate_all(problem, chunk_size=chunk_size)
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
        ([[0, 4]], r"shape \[P, 4\]"),
        ([0, 4, -1, -1], r"shape \[P, 4\]"),
        (np.zeros((0, 4), int), "at least one"),
    ],
)
def test_bad_chains_are_refused_before_anything_is_computed(problem, chains, message):
    with pytest.raises(ValueError, match=message):
        jc.evaluate(problem, chains)


def test_shapes_are_checked_when_traced(problem):
    with pytest.raises(ValueError, match=r"expected chains of shape \[P, 4\], at least one, got \[2, 3\]"):
        jax.jit(lambda chains: jc.evaluate(problem, chains))(jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match="chunk_size of at least 1, got 0"):
        jc.evaluate(problem, [[4, -1, -1, -1]], chunk_size=0)
    with pytest.raises(ValueError, match=r"chunk_size of at least 1, got -1"):
        jc.evaluate_all(problem, chunk_size=-1)


def test_apply_chain_is_the_plain_definition(two_group_problem):
    bank, x = two_group_problem.bank, two_group_problem.data.x
    for chain in ([5], [0, 4, 6, -1], [3, 3, 1, 5]):
        expected = reference.chain_logits(bank, [token for token in chain if token >= 0], x)
        np.testing.assert_allclose(jc.apply_chain(bank, chain, x), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.jit(jc.apply_chain)(bank, jnp.array(chain), x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="token 7 at slot 0 is out of range"):
        jc.apply_chain(bank, [7, 5], x)


def test_count_calls_needs_no_evaluation():
    chains = np.asarray(jc.chain.sample(jax.random.key(0), 300, 4, 2, 3))
    assert tuple(map(int, count_calls(jnp.asarray(chains), 4))) == reference.count_calls(chains, 4)
