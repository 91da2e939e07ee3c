import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.engine.backend import _programs
from jchain.engine.population import Options, evaluate_population


def sample(problem, num, seed=0):
    """Sample random chains, and add some of every length, a head alone, and repeats."""
    bank = problem.bank
    rows = problem.space.sample(jax.random.key(seed), num)
    short = [[*range(depth), bank.num_layers] for depth in range(problem.max_layers + 1)]
    return np.concatenate([rows, jc.chain.pad(short, problem.max_layers), rows[:3]])


class Float32Only(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, dtype=jnp.float32)(x)


@pytest.mark.slow
def test_bfloat16_is_used_from_the_stem_on(problem):
    chains = sample(problem, 10)
    exact, rounded = jc.evaluate(problem, chains), jc.evaluate(problem, chains, dtype=jnp.bfloat16)
    assert np.all(rounded.loss[:10] != exact.loss[:10])
    same = jc.evaluate(problem, chains, dtype=jnp.float32)
    np.testing.assert_array_equal(same.loss, exact.loss)


@pytest.mark.parametrize(
    "plan", [pytest.param(None, marks=pytest.mark.slow), jc.engine.Blocks(3, (1, 2))], ids=str
)
def test_vmap_over_populations_and_over_problems(problem, plan):
    populations = jnp.stack([jnp.asarray(sample(problem, 6, seed)) for seed in range(3)])
    looped = [jc.evaluate(problem, chains, plan=plan) for chains in populations]
    batched = jax.vmap(lambda chains: jc.evaluate(problem, chains, plan=plan))(populations)
    for i, out in enumerate(looped):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), batched, out)
    problems = [jc.Problem(make_bank(seed=seed), problem.data, 3) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    batched = jax.vmap(lambda p, chains: jc.evaluate(p, chains, plan=plan))(stacked, populations)
    for i, one in enumerate(problems):
        np.testing.assert_allclose(
            batched.loss[i], jc.evaluate(one, populations[i]).loss, rtol=1e-6
        )


def test_one_trace_for_a_hundred_populations_of_one_size(problem):
    jc.clear_caches()  # the first size has a program of its own
    calls = []

    def counted(outputs, labels):
        calls.append(outputs.shape)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    own = jc.Problem(problem.bank, problem.data, 3, loss_fn=counted)
    populations = [
        np.asarray(jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(seed), 16))
        for seed in range(100)
    ]
    jc.evaluate(own, populations[0])
    num_calls = len(calls)
    for chains in populations[1:]:
        jc.evaluate(own, chains)
    assert len(calls) == num_calls


def test_one_trace_inside_jit(problem):
    traces = []

    @jax.jit
    def loss_fn(chains):
        traces.append(chains.shape)
        return jc.evaluate(problem, chains).loss

    for seed in range(3):
        loss_fn(jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(seed), 6))
    assert traces == [(6, 4)]


def test_population_rejects_layers_that_ignore_the_dtype():
    layer = Float32Only()
    bank = make_bank(2, 1, layer=layer)
    with pytest.raises(
        ValueError, match=r"Float32Only.* must keep the dtype .* expected bfloat16, got float32"
    ):
        jc.evaluate(jc.Problem(bank, make_batch(), 1), [[0, 2]], dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    "plan", [jc.engine.DepthFirst(), jc.engine.Blocks(4, (1, 2)), jc.engine.Blocks(64)], ids=str
)
@pytest.mark.parametrize("num", [1, 2, 5, 12, 40])
def test_a_padded_population_has_the_same_bits(problem, monkeypatch, plan, num):
    chains = np.asarray(sample(problem, num))[:num]
    monkeypatch.setattr("jchain.engine.evaluation.has_own_program", lambda size: False)
    found = jc.evaluate(problem, chains, plan=plan)
    options = Options(None, None, plan, "cpu")
    exact = evaluate_population(problem.without_names(), jnp.asarray(chains), options=options)
    jax.tree.map(np.testing.assert_array_equal, found, exact)
    assert found.loss.shape == (num,)


@pytest.mark.slow
def test_many_sizes_share_few_programs(problem):
    chains = np.asarray(problem.space.sample(jax.random.key(0), 70))
    jc.clear_caches()
    losses = [jc.evaluate(problem, chains[:num]).loss for num in range(1, 71)]
    assert _programs.number == 8  # of 1, 2, 3, 7, 15, 31, 63, and 127 chains
    for num, loss in enumerate(losses, 1):
        np.testing.assert_allclose(loss, losses[-1][:num], rtol=1e-6)
    jc.clear_caches()
    assert _programs.number == 0


def test_a_size_that_is_used_often_gets_its_own_program(problem):
    jc.clear_caches()
    chains = np.asarray(problem.space.sample(jax.random.key(0), 12))
    jc.evaluate(problem, chains[:1])
    jc.evaluate(problem, chains[:2])
    for _ in range(15):
        jc.evaluate(problem, chains)
    assert _programs.number == 3  # of 1, 2, and 15 chains
    for _ in range(5):
        jc.evaluate(problem, chains)
    assert _programs.number == 4


def test_programs_are_dropped_before_there_are_too_many(problem, monkeypatch):
    monkeypatch.setattr("jchain.engine.backend._MAX_PROGRAMS", 3)
    jc.clear_caches()
    chains = np.asarray(problem.space.sample(jax.random.key(0), 20))
    for num in (1, 3, 7, 15):
        jc.evaluate(problem, chains[:num])
    assert _programs.number == 1


def test_rows_that_are_no_chains_have_an_infinite_loss_under_jit(problem):
    rows = jnp.array(
        [
            [0, 1, 4, -1],
            [4, -1, -1, -1],
            [0, 1, 2, 3],  # no head
            [-1, 0, 4, -1],  # padding first
            [0, 99, 4, -1],  # out of range
            [0, -2, 4, -1],
            [0, 4, 5, -1],  # two heads
            [0, 4, 1, -1],  # a layer after the head
        ]
    )
    loss = jax.jit(lambda rows: jc.evaluate(problem, rows).loss)(rows)
    assert np.isfinite(loss).tolist() == [True, True] + 6 * [False]
    assert np.isposinf(loss[2:]).all()
    np.testing.assert_allclose(loss[:2], jc.evaluate(problem, rows[:2]).loss, rtol=1e-6)
