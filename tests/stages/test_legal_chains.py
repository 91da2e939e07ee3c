"""Legal chains: counted, listed, numbered, drawn, and edited as brute force does."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jchain as jc
from jchain.chain import ChainSpace
from jchain.chainbench import tabular
from jchain.engine import prefix_rules
from jchain.stages.legal_chains import count_completions
from jchain.stages.table import StageTable

N, K, D, S = 4, 2, 3, 3
# The stages of the layers, and of the heads.
TABLES = st.tuples(
    st.tuples(*[st.tuples(st.integers(0, S - 1), st.integers(0, S - 1))] * N),
    st.tuples(*[st.integers(0, S - 1)] * K),
)


def list_chains(table, min_layers=0):
    """List the legal chains of up to D layers, by following every product of tokens."""
    chains = []
    for length in range(min_layers, D + 1):
        for tokens in itertools.product(range(N), repeat=length):
            stage = 0
            for token in tokens:
                read, write = table.layer_stages[token]
                stage = write if read == stage else None
            for head in range(K):
                if table.head_stages[head] == stage:
                    chains.append((*tokens, N + head, *[-1] * (D - length)))
    return chains


@settings(max_examples=8, deadline=None)
@given(table=TABLES, min_layers=st.integers(0, D))
def test_space_equals_brute_force(table, min_layers):
    table = StageTable(*table)
    space = ChainSpace(N, K, D, min_layers, table)
    expected = list_chains(table, min_layers)
    assert space.num_chains == len(expected)
    if not expected:
        return
    found = space.enumerate()
    assert found.tolist() == [list(chain) for chain in expected]
    everything = ChainSpace(N, K, D).enumerate()
    is_legal = [tuple(chain) in set(expected) for chain in everything.tolist()]
    assert np.asarray(space.contains(jnp.asarray(everything))).tolist() == is_legal
    whole = ChainSpace(N, K, D, 0, table)
    index = np.asarray(space.index(jnp.asarray(found)))
    assert [list_chains(table)[i] for i in index] == expected
    assert np.asarray(whole.index(jnp.asarray(whole.enumerate()))).tolist() == [
        *range(whole.num_chains)
    ]
    plain = ChainSpace(N, K, D, min_layers)
    for chain in found[:: max(1, len(found) // 3)]:
        rows, is_neighbor = space.neighbors(jnp.asarray(chain))
        others, is_other = plain.neighbors(jnp.asarray(chain))
        near = {tuple(row) for row in np.asarray(rows)[np.asarray(is_neighbor)].tolist()}
        all_near = {tuple(row) for row in np.asarray(others)[np.asarray(is_other)].tolist()}
        assert near == all_near & set(expected)
        edits = table.get_legal_edits(jnp.asarray(chain))
        flat = np.concatenate(
            [
                np.asarray(edits.swap)[:D].T.reshape(-1),
                np.asarray(edits.head),
                np.asarray(edits.insert)[:D].T.reshape(-1),
                np.asarray(edits.delete)[:D],
            ]
        )
        assert (flat & np.asarray(is_other)).tolist() == np.asarray(is_neighbor).tolist()


@pytest.mark.parametrize("min_layers", [0, 2])
def test_chains_are_drawn_uniformly(min_layers):
    table = StageTable(((0, 1), (0, 0), (1, 1), (1, 0)), (0, 1))
    space, num = ChainSpace(N, K, D, min_layers, table), 3000
    drawn = space.sample(jax.random.key(0), num)
    assert space.contains(drawn).all()
    index = np.asarray(space.index(drawn))
    first = ChainSpace(N, K, D, 0, table).num_chains - space.num_chains
    counts = np.bincount(index - first, minlength=space.num_chains)
    expected = num / space.num_chains
    # Five standard deviations of a count.
    assert np.abs(counts - expected).max() <= 5 * expected**0.5


def test_counts_of_large_spaces_are_exact():
    table = StageTable(((0, 0),) * 200 + ((0, 1),) * 3, (1, 1))
    space = ChainSpace(203, 2, 100, 1, table)
    assert space.num_chains == sum(3 * 2 * 200 ** (depth - 1) for depth in range(1, 101))
    drawn = space.sample(jax.random.key(0), 50)
    assert space.contains(drawn).all()
    assert count_completions(table, 2) == ((0, 2), (6, 0), (1200, 0))
    with pytest.raises(ValueError, match=r"expected fewer than 2\^31 chains"):
        space.index(drawn)


def scale(params, x):
    return jnp.tanh(x * params)


def read(params, x):
    return x[:, :3] * params


LAYERS = ((0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (0, 2))
HEADS = (2, 1)
COSTS = np.array([1, 3, 1, 2, 1, 9, 1, 4], np.float32)


@pytest.fixture(scope="module")
def bank():
    """Make a bank of three stages that happen to have one shape."""
    params = [np.float32(0.5 + 0.1 * i) for i in range(len(LAYERS))]
    return jc.Bank.stack(
        scale, params, read, params[:2], stages=list(LAYERS), head_stages=list(HEADS)
    )


def make_problem(bank, max_layers=4, **kwargs):
    x = jax.random.normal(jax.random.key(0), (4, 5))
    return jc.Problem(bank, jc.Batch(x, jnp.array([0, 1, 2, 0])), max_layers, **kwargs)


CASES = [(0, None), (3, None), (2, 9.0)]


@pytest.mark.parametrize(("min_layers", "max_cost"), CASES)
def test_legal_actions_are_the_next_tokens_of_chains(bank, min_layers, max_cost):
    limits = {} if max_cost is None else {"token_costs": COSTS, "max_cost": max_cost}
    problem = make_problem(bank, min_layers=min_layers, **limits)
    followers = {}
    for chain in problem.space.enumerate().tolist():
        tokens = [token for token in chain if token >= 0]
        if max_cost is None or COSTS[tokens].sum() <= max_cost:
            for end, token in enumerate(tokens):
                followers.setdefault(tuple(tokens[:end]), set()).add(token)
    assert followers
    prefixes = np.array([[*prefix, *[-1] * (5 - len(prefix))] for prefix in followers])

    list_actions = jax.vmap(partial(jc.env.legal_actions, problem))
    found = np.asarray(list_actions(jnp.asarray(prefixes)))
    for row, expected in zip(found, followers.values(), strict=True):
        assert set(np.flatnonzero(row)) == expected
    can_continue = np.asarray(jc.env.can_continue(problem, jnp.asarray(prefixes)))
    if max_cost is None:
        expected = [min(tokens) < len(LAYERS) for tokens in followers.values()]
        assert can_continue.tolist() == expected
        return
    drawn = np.asarray(jc.env.sample_chains(jax.random.key(1), problem, 200))
    assert np.asarray(problem.space.contains(jnp.asarray(drawn))).all()
    assert (problem.chain_cost(jnp.asarray(drawn)) <= max_cost).all()


def test_the_stage_of_a_prefix_is_followed(bank):
    problem = make_problem(bank)
    chain = jnp.array([0, 1, 3, 6, -1])
    assert np.asarray(prefix_rules.prefix_stages(problem, chain))[:4].tolist() == [0, 0, 1, 2]
    state = jc.env.reset(problem)
    stage = prefix_rules.first_stage(problem)
    for token in (0, 1, 3):
        state, _ = jc.env.step(problem, state, jnp.array(token))
        stage = prefix_rules.next_stage(problem, stage, jnp.array(token))
    assert int(stage) == int(bank.stages.reached(state.chain)) == 2
    with pytest.raises(ValueError, match=r"illegal action 0 .* in \[4, 6\], which follow stage 2"):
        jc.env.step(problem, state, jnp.array(0))
    _, reward = jc.env.step(problem, state, jnp.array(6))
    np.testing.assert_allclose(-reward, jc.evaluate(problem, [chain]).loss[0], rtol=1e-5)


@pytest.mark.slow
def test_tabular_problems_keep_the_stages(bank):
    problem = make_problem(bank, max_layers=2)
    made = tabular.tabulate(problem, jc.agent.observations.observe)
    chains, out = jc.evaluate_all(problem)
    assert made.space == problem.space
    np.testing.assert_allclose(jc.evaluate(made, chains).loss, out.loss, rtol=1e-5)
    assert tabular.entry_features(made.bank).shape[0] == len(LAYERS) + 2
    with pytest.raises(ValueError, match=f"the losses of all {len(chains)} chains"):
        tabular.make_problem(bank, np.zeros(len(chains) + 1), 2)
