"""The estimate of how long an evaluation takes, with a clock that follows a known rule."""

import jax
import numpy as np
import pytest

import jchain as jc
from jchain.engine import timing

LAYER, HEAD = 2.0, 16.0  # in milliseconds per example


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock: a call takes its time per example, and nothing else takes time."""
    seen, speed = [], [1.0]

    def count(problem, chains, num_examples, options):
        seen.append((len(chains), num_examples))
        layer_calls, head_calls = timing._count(problem, chains)
        return speed[0] * 1e-3 * num_examples * (LAYER * layer_calls + HEAD * head_calls)

    monkeypatch.setattr(timing, "_time", count)
    return seen, speed


def test_slow_layers_are_timed_by_one_chain_on_few_examples(problem, clock):
    seen, speed = clock
    speed[0] = 100.0
    chains = np.asarray(jc.env.sample_chains(jax.random.key(0), problem, 40))
    found = jc.explain_plan(problem, chains, measure=True)
    calls = found.layer_calls * LAYER + found.head_calls * HEAD
    assert found.seconds == pytest.approx(0.1 * problem.num_examples * calls)
    assert seen == [(1, 4), (1, 4)]  # a chain, and a head alone
    assert f"and about {found.seconds:,.2g} s" in str(found)


def test_fast_layers_are_timed_by_more_chains_on_all_examples(problem, clock):
    seen, speed = clock
    speed[0] = 0.01
    chains = np.asarray(jc.env.sample_chains(jax.random.key(0), problem, 3000))
    found = jc.explain_plan(problem, chains, measure=True)
    calls = found.layer_calls * LAYER + found.head_calls * HEAD
    assert found.seconds == pytest.approx(1e-5 * problem.num_examples * calls, rel=0.2)
    assert [examples for _, examples in seen] == [4, problem.num_examples, problem.num_examples]
    assert 100 < seen[-1][0] < 3000


def test_the_time_of_one_head_is_its_own(problem, clock):
    found = jc.explain_plan(problem, [[problem.bank.num_layers]], measure=True)
    assert found.seconds == pytest.approx(1e-3 * problem.num_examples * HEAD)


def test_layers_and_heads_are_measured_apart(problem, clock):
    row = np.array([0, 1, problem.bank.num_layers, -1])
    found = timing.measure_calls(problem, row[: problem.max_layers + 1])
    assert found == pytest.approx([1e-3 * problem.num_examples * ms for ms in (LAYER, HEAD)])


def test_nothing_is_timed_unless_asked(problem, clock):
    found = jc.explain_plan(problem, [0, problem.bank.num_layers])
    assert found.seconds is None
    assert "about" in str(found)
    assert not clock[0]


def test_a_real_clock_gives_a_time(problem):
    chains = np.asarray(jc.env.sample_chains(jax.random.key(0), problem, 5))
    assert jc.explain_plan(problem, chains, measure=True).seconds > 0
