import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted_search import Scripted, make_scripted

import jchain as jc
from jchain.engine import score_cache
from jchain.pytree import pytree_dataclass, static

COUNTER = itertools.count(1)


@pytree_dataclass
class Sampling:
    """A correct search that can be broken in several ways."""

    fault: str = static(default="none")

    def init(self, key, problem):
        # A group of layers equals only itself, not its copy in the next state.
        return jnp.zeros((), jnp.int32), problem.bank.layers

    def step(self, key, state, problem):
        chains = problem.space.sample(key, 4)
        out = jc.evaluate(problem, chains)
        loss, calls, count = out.loss, out.layer_calls, state[0] + 1
        if self.fault == "headless":
            chains = chains.at[0].set(jnp.array([0, 1, 2, 3]))
        if self.fault == "out of range":
            chains = chains.at[1].set(jnp.array([99, 99, 99, 99]))
        if self.fault == "head in front":
            chains = chains.at[1].set(jnp.array([4, 0, 5, -1]))
        if self.fault == "loss":
            loss = loss.at[2].multiply(0.5)
        if self.fault == "cost":
            calls = jnp.zeros((), jnp.int32)
        if self.fault == "state":
            count = count.astype(jnp.float32)
        if self.fault == "memory":
            # Each trace adds a different number.
            loss = loss + next(COUNTER)
        return (count, state[1]), jc.Info(chains, loss, calls)


@pytree_dataclass
class Returning:
    """A search whose step returns a wrong type."""

    form: str = static(default="tuple")

    def init(self, key, problem):
        return ()

    def step(self, key, state, problem):
        chains = problem.space.sample(key, 4)
        out = jc.evaluate(problem, chains)
        return {
            "tuple": ((), (chains, out.loss, out.layer_calls)),
            "info alone": jc.Info(chains, out.loss, out.layer_calls),
            "evaluation": ((), out),
            "short chains": ((), jc.Info(chains[:, :2], out.loss, out.layer_calls)),
            "float chains": ((), jc.Info(chains * 1.0, out.loss, out.layer_calls)),
            "one loss": ((), jc.Info(chains, out.loss[0], out.layer_calls)),
            "calls per chain": ((), jc.Info(chains, out.loss, out.loss)),
        }[self.form]


def test_check_search_accepts_a_correct_search(problem):
    jc.check_search(Sampling(), problem)
    jc.check_search(jc.LocalSearch(num_chains=3), problem, key=jax.random.key(3))


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("headless", r"step 0 reports \[0, 1, 2, 3\], which is not a chain of 0 to 3 layers"),
        ("out of range", r"step 0 reports \[99, 99, 99, 99\], which is not a chain"),
        ("head in front", r"step 0 reports \[4, 0, 5, -1\], which is not a chain"),
        ("loss", "step 0 reports a loss of .* but its loss is "),
        ("cost", "step 0 costs 0 layer calls, but .* at least [1-9]"),
        ("state", "step 0 changes the shapes or dtypes of the state"),
        ("memory", "without jit, step 0 returns a different loss"),
    ],
)
def test_check_search_finds_each_fault(problem, fault, finding):
    with pytest.raises(ValueError, match=f"Sampling breaks the contract.*\n(.*\n)*- {finding}"):
        jc.check_search(Sampling(fault), problem)


@pytest.mark.parametrize("run", [jc.check_search, None], ids=["check_search", "run"])
@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("tuple", "to return a jc.Info after the state, got tuple of 3"),
        ("info alone", r"to return \(state, jc.Info\), got Info of 3"),
        ("evaluation", "to return a jc.Info after the state, got Evaluation of 4"),
        ("short chains", r"to return integer chains \[P, 4\], got int32\[4, 2\]"),
        ("float chains", r"to return integer chains \[P, 4\], got float32\[4, 4\]"),
        ("one loss", r"to return float losses \[4\], one per chain, got float32\[\]"),
        ("calls per chain", r"to return layer_calls as an integer scalar, got float32\[4\]"),
    ],
)
def test_step_with_a_wrong_return_type_is_named(problem, form, message, run):
    run = run or (lambda *args: jc.run(jax.random.key(0), *args, budget=100))
    with pytest.raises(ValueError, match=f"expected Returning.step {message}"):
        run(Returning(form), problem)


@pytest.mark.parametrize("num_runs", [1, 2])
def test_rows_that_are_not_chains_never_become_the_best_chain(problem, num_runs):
    rows = [[4, 0, 5, -1], [0, 1, 2, 3], [99, 99, 99, 99], [0, -1, 4, -1], [-2, 4, -1, -1]]
    chains = jnp.array([[*rows, [1, 5, -1, -1], [-1, -1, -1, -1]]], jnp.int32)
    loss = jnp.array([[*(-float(i) for i in range(5)), 3.0, -9.0]])
    search = Scripted(chains, loss)
    keys = jax.random.split(jax.random.key(0), num_runs)
    for result in jc.run_many(keys, search, problem, budget=5):
        np.testing.assert_array_equal(result.best_chain, [1, 5, -1, -1])
        assert (result.best_loss, result.num_scored, result.num_invalid) == (3.0, 1, 5)
        assert result.finalists.tolist() == [[1, 5, -1, -1]]


def test_chains_that_are_too_short_are_not_in_the_space(bank, problem):
    search = make_scripted([[(0, 1.0)]])  # chains of one layer
    assert jc.run(jax.random.key(0), search, problem, budget=5).num_invalid == 0
    longer = jc.Problem(bank, problem.data, 3, min_layers=2)
    result = jc.run(jax.random.key(0), search, longer, budget=5)
    assert (result.num_invalid, result.best_loss) == (1, np.inf)


def change(problem, what):
    rows = slice(0, 4)
    return {
        "rows": lambda: problem.take(rows),
        "order": lambda: problem.take(np.arange(len(problem.data.y))[::-1].copy()),
        "labels": lambda: jc.Problem(
            problem.bank, jc.Batch(problem.data.x, (problem.data.y + 1) % 3), 3
        ),
        "loss": lambda: jc.Problem(
            problem.bank, problem.data, 3, loss_fn=lambda out, y: jnp.abs(out).sum(-1)
        ),
        "layer cost": lambda: jc.Problem(problem.bank, problem.data, 3, layer_cost=0.1),
        "bank": lambda: problem.with_bank(jax.tree.map(lambda leaf: leaf * 1.5, problem.bank)),
    }[what]()


@pytest.mark.parametrize("what", ["rows", "order", "labels", "loss", "layer cost", "bank"])
def test_cached_losses_of_another_problem_are_not_used(problem, what):
    chains = jnp.array([[0, 1, 4, -1], [2, 5, -1, -1]])
    cache, _, _ = score_cache.evaluate_cached(score_cache.init(problem), problem, chains)
    other = change(problem, what)
    cache, loss, layer_calls = score_cache.evaluate_cached(cache, other, chains)
    assert layer_calls == 3
    np.testing.assert_allclose(loss, jc.evaluate(other, chains).loss, rtol=1e-6)
    # The losses of both problems stay in the cache.
    assert score_cache.evaluate_cached(cache, problem, chains)[2] == 0
    assert score_cache.evaluate_cached(cache, other, chains)[2] == 0


@pytest.mark.slow
def test_a_search_that_continues_on_other_examples_pays_for_them(problem):
    search, key = jc.Evolution(population_size=6, num_chains=6), jax.random.key(0)
    first, second = problem.take(slice(0, 4)), problem.take(slice(4, 9))
    state, info = search.step(key, search.init(key, first), first)
    _, again = search.step(key, state, first)
    _, info = search.step(key, state, second)
    assert info.layer_calls >= again.layer_calls
    np.testing.assert_allclose(info.loss, jc.evaluate(second, info.chains).loss, rtol=1e-6)
