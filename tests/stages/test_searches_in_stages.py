"""Searches, and what they are made of, on a bank with stages: no chain is ever illegal."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_searches
from conftest import HEAD, init_params, make_batch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jchain as jc

# Layers in stages cannot be inverted.
SEARCHES = {
    name: small_searches.SEARCHES[name]
    for name in small_searches.SEARCHES
    if name not in ("SuffixBeamSearch", "ActorCritic-replay", "ActorCritic-weights")
} | {
    "ActorCritic-observing": jc.ActorCritic(
        encoding=jc.ObservedEncoding(jc.agent.observations.observe, 8), num_chains=6
    ),
}
# By default, a few searches on one of the two banks; the rest with `-m slow`.
FAST = [("LocalSearch", "heads-2"), ("BeamSearch", "heads-1-2")]
STAGES = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 2), (2, 2), (0, 2)]
SIZES = (5, 4, 3)
# The first head reads the last stage; the second one reads stage 1.
HEADS = (2, 1)


class Narrow(nn.Module):
    """A dense layer with tanh that may change the number of features."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(self.features)(x))


def make_bank(head_stages):
    keys = jax.random.split(jax.random.key(0), len(STAGES) + 2)
    modules = [Narrow(SIZES[write]) for _, write in STAGES]
    params = [
        init_params(module, key, 1, (SIZES[read],))[0]
        for module, key, (read, _) in zip(modules, keys, STAGES, strict=False)
    ]
    heads = [
        init_params(HEAD, key, 1, (SIZES[stage],))[0]
        for key, stage in zip(keys[-2:], head_stages, strict=True)
    ]
    return jc.Bank.stack(modules, params, [HEAD] * 2, heads, stages=STAGES, head_stages=head_stages)


@pytest.fixture(scope="module")
def two_heads():
    return jc.Problem(make_bank(HEADS), make_batch(), max_layers=4)


@pytest.fixture(scope="module")
def problems(two_heads):
    last = jc.Problem(make_bank((2, 2)), make_batch(), max_layers=4)
    return {"heads-1-2": two_heads, "heads-2": last}


CASES = [
    pytest.param(name, bank, marks=() if (name, bank) in FAST else pytest.mark.slow)
    for name in SEARCHES
    for bank in ("heads-1-2", "heads-2")
]


@pytest.mark.parametrize(("name", "bank"), CASES)
def test_no_search_returns_an_illegal_chain(name, bank, problems):
    problem = problems[bank]
    result = jc.run(jax.random.key(3), SEARCHES[name], problem, budget=400)
    assert result.num_invalid == 0
    assert result.num_scored > 0
    assert problem.space.contains(jnp.asarray(result.finalists)).all()
    loss = jc.evaluate(problem, result.finalists).loss
    np.testing.assert_allclose(result.finalist_losses, loss, rtol=1e-4, atol=1e-5)
    assert np.isfinite(loss).all()


def scale(params, x):
    return jnp.tanh(x * params)


def read(params, x):
    return x[:, :3] * params


STAGE = st.integers(0, 2)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    more=st.tuples(*[st.tuples(STAGE, STAGE)] * 3),
    heads=st.tuples(STAGE, STAGE),
    min_layers=st.integers(0, 2),
    name=st.sampled_from(["LocalSearch", "Evolution", "BeamSearch", "CriticSearch", "QLearning"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_search_returns_an_illegal_chain_for_any_stages(more, heads, min_layers, name, seed):
    stages = [(0, 1), (1, 2), *more]
    params = [np.float32(0.5 + 0.1 * i) for i in range(5)]
    bank = jc.Bank.stack(scale, params, read, params[:2], stages=stages, head_stages=heads)
    batch = jc.Batch(jax.random.normal(jax.random.key(0), (4, 5)), jnp.array([0, 1, 2, 0]))
    assume(jc.chain.ChainSpace(5, 2, 3, min_layers, bank.stages).num_chains > 0)
    problem = jc.Problem(bank, batch, max_layers=3, min_layers=min_layers)
    result = jc.run(jax.random.key(seed), SEARCHES[name], problem, budget=60)
    assert result.num_invalid == 0
    assert problem.space.contains(jnp.asarray(result.finalists)).all()
    for chain in result.finalists.tolist():
        stage = 0
        for token in itertools.takewhile(lambda token: token < len(stages), chain):
            assert stages[token][0] == stage
            stage = stages[token][1]


def test_beam_search_finds_the_best_chain_when_it_is_wide(problems):
    problem = problems["heads-2"]
    search = jc.BeamSearch(width=512, max_width=512)
    result = jc.run(jax.random.key(0), search, problem, budget=5000)
    np.testing.assert_allclose(result.best_loss, jc.evaluate_all(problem)[1].loss.min(), rtol=1e-5)
    # The first pass extends every legal prefix that can be completed, by the layers that follow.
    prefixes = set()
    chains = problem.space.enumerate().tolist()
    for chain in chains:
        length = sum(0 <= token < len(STAGES) for token in chain)
        prefixes |= {tuple(chain[:end]) for end in range(length)}
    num_calls = 0
    for prefix in prefixes:
        stage = STAGES[prefix[-1]][1] if prefix else 0
        num_calls += sum(read == stage for read, _ in STAGES)
    assert num_calls in result.curve.layer_calls


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SEARCHES if name != "ActorCritic-scores"])
def test_searches_keep_their_contract(name, two_heads):
    jc.check_search(SEARCHES[name], two_heads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BeamSearch", "MCTS", "QLearning", "ActorCritic", "LocalSearch"])
def test_limits_of_cost_and_of_layers_are_kept(name):
    costs = np.arange(1.0, 11.0, dtype=np.float32)
    problem = jc.Problem(
        make_bank(HEADS), make_batch(), 4, min_layers=2, token_costs=costs, max_cost=22.0
    )
    result = jc.run(jax.random.key(3), SEARCHES[name], problem, budget=300)
    assert result.num_invalid == 0
    assert problem.space.contains(jnp.asarray(result.finalists)).all()
    assert (problem.chain_cost(jnp.asarray(result.finalists)) <= 22.001).all()


def test_a_search_that_reports_illegal_chains_is_counted(two_heads):
    @jc.pytree_dataclass
    class Illegal(jc.RandomSearch):
        def step(self, key, state, problem):
            state, info = jc.RandomSearch.step(self, key, state, problem)
            return state, info._replace(chains=info.chains.at[0].set(jnp.array([3, 8, -1, -1, -1])))

    result = jc.run(jax.random.key(0), Illegal(num_chains=4), two_heads, budget=60)
    assert result.num_invalid > 0
    assert two_heads.space.contains(jnp.asarray(result.finalists)).all()


@pytest.mark.slow
def test_edit_scores_predict_legal_edits_only(two_heads):
    chain = jnp.array([0, 2, 3, 9, -1])
    scores = jc.gradient.score_edits(two_heads, chain)
    rows, is_neighbor = two_heads.space.neighbors(chain)
    known = ~np.isnan(np.asarray(scores.flat))
    is_neighbor = np.asarray(is_neighbor)
    assert not (known & ~is_neighbor & ~_is_own(rows, chain)).any()
    assert known[is_neighbor].all()
    # Swaps of the last layer before an affine head are predicted exactly for each example.
    own = jc.evaluate(two_heads, chain[None]).loss[0]
    swapped = jc.evaluate(two_heads, chain.at[2].set(4)[None]).loss[0]
    np.testing.assert_allclose(scores.swap[2, 4], swapped - own, rtol=1e-3, atol=1e-5)


def _is_own(rows, chain):
    """Find rows that are the chain itself, or repeat an edit that another row makes."""
    rows = np.asarray(rows)
    own = (rows == np.asarray(chain)).all(axis=1)
    seen, repeats = set(), []
    for row in map(tuple, rows.tolist()):
        repeats.append(row in seen)
        seen.add(row)
    return own | np.array(repeats)


def test_methods_that_invert_layers_refuse_stages(two_heads):
    bank, x = two_heads.bank, two_heads.data.x
    outputs = jnp.zeros((9, 3))
    calls = [
        lambda: jc.pull_back(bank, [6, 8], outputs),
        lambda: jc.meet_in_the_middle(bank, x, outputs, depth=2),
        lambda: jc.inverse.condition_numbers(bank, [0, 2], x),
        lambda: jc.inverse.target_scores.fit_target_layer(bank, x, x),
        lambda: jc.run(jax.random.key(0), jc.SuffixBeamSearch(), two_heads, budget=99),
        lambda: jc.pretrain_critic(jax.random.key(0), [two_heads]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected a bank without stages for .*") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_chain_of_stages_is_tuned(two_heads):
    chain = jnp.array([0, 2, 5, 8, -1])
    before = float(jc.evaluate(two_heads, chain[None]).loss[0])
    tuned = jc.updates.tune.tune_chain(jax.random.key(0), two_heads, chain, num_steps=30)
    after = jc.evaluate(two_heads.with_bank(tuned), chain[None]).loss[0]
    assert float(after) < before
    assert tuned.stages == two_heads.bank.stages


def test_banks_without_stages_are_not_wrapped():
    plain = jc.Bank.stack(
        HEAD, [{"kernel": jnp.ones((3, 3))}] * 2, HEAD, [{"kernel": jnp.ones((3, 3))}]
    )
    assert plain.stages is None
    assert "stage" not in repr(plain)
