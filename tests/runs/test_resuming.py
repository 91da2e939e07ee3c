"""A run that was stopped and continued equals one that was never stopped, to the bit."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_searches
from conftest import make_bank, make_batch
from stopping import BUDGET, ENVIRONMENT, assert_equal, run_in_parts

import jchain as jc
from jchain.runs.result import Result

FAST = ("LocalSearch", "QLearning", "CriticSearch")


def lowest_loss(state, info):
    return {"lowest": info.loss.min()}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in small_searches.SEARCHES
    ],
)
def test_a_run_that_was_stopped_gives_the_same_bits(name, problem, tmp_path):
    if name == "SuffixBeamSearch":
        bank = make_bank(layer=jc.layers.InvertibleDense(5))
        problem = jc.Problem(bank, make_batch(), max_layers=3)
    search, key = small_searches.SEARCHES[name], jax.random.key(1)
    options = {"record_fn": lowest_loss, "record": "chains"}
    whole = jc.run(
        key, search, problem, budget=BUDGET, checkpoint_dir=tmp_path / "whole", **options
    )
    assert whole.is_complete
    assert whole.stopped_by is None
    found, num_calls = run_in_parts(tmp_path / "parts", key, search, problem, **options)
    assert num_calls > 1 or len(whole.curve.layer_calls) == 1
    assert_equal(found, whole)
    logs = [(tmp_path / name / "chains.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    # Without files, the steps are the same.
    plain = jc.run(key, search, problem, budget=BUDGET)
    np.testing.assert_array_equal(plain.best_chain, whole.best_chain)
    np.testing.assert_allclose(plain.best_loss, whole.best_loss, rtol=1e-5)


def test_a_larger_budget_extends_a_run_that_was_over(problem, tmp_path):
    search, key = jc.LocalSearch(num_chains=3), jax.random.key(1)
    whole = jc.run(key, search, problem, budget=BUDGET)
    for budget in (20, 21, 60, 60, BUDGET):
        found = jc.run(key, search, problem, budget=budget, checkpoint_dir=tmp_path)
        assert found.is_complete
        assert found.layer_calls <= budget
    assert_equal(found, whole)
    with pytest.raises(ValueError, match=rf"expected a budget of at least {found.layer_calls}"):
        jc.run(key, search, problem, budget=50, checkpoint_dir=tmp_path)


def test_a_target_that_is_out_of_reach_extends_a_run(problem, tmp_path):
    search, key = jc.RandomSearch(num_chains=6), jax.random.key(1)
    whole = jc.run(key, search, problem, budget=BUDGET)
    target = float(whole.curve.best_loss[0])
    first = jc.run(key, search, problem, budget=BUDGET, checkpoint_dir=tmp_path, target_loss=target)
    assert len(first.curve.layer_calls) == 1
    assert_equal(jc.run(key, search, problem, budget=BUDGET, checkpoint_dir=tmp_path), whole)


@pytest.mark.slow
def test_several_runs_are_continued_together(problem, tmp_path):
    search, keys = (
        jc.Evolution(population_size=12, num_chains=6),
        jax.random.split(jax.random.key(0), 3),
    )
    options = {"budget": BUDGET, "record": "chains", "record_fn": lowest_loss}
    whole = jc.run_many(keys, search, problem, **options)
    seen = []

    def stop_at_times(progress):
        seen.append([one.layer_calls for one in progress])
        return len(seen) % 3 == 0

    for _ in range(100):
        found = jc.run_many(
            keys, search, problem, checkpoint_dir=tmp_path, callback=stop_at_times, **options
        )
        if all(result.is_complete for result in found):
            break
    assert len(seen) > 2
    for one, other in zip(found, whole, strict=True):
        assert_equal(one, other)


def test_starts_are_charged_and_logged_once(problem, tmp_path):
    search, starts = jc.LocalSearch(num_chains=3), [[0, 1, 4], [2, 5]]
    whole = jc.run(
        jax.random.key(0), search, problem, budget=BUDGET, starts=starts, record="chains"
    )
    found, _ = run_in_parts(
        tmp_path, jax.random.key(0), search, problem, starts=starts, record="chains"
    )
    assert_equal(found, whole)
    is_start = found.scored.step == 0
    np.testing.assert_array_equal(
        found.scored.chains[is_start], jc.chain.pad(starts, problem.max_layers)
    )
    assert found.scored.layer_calls[0] == found.curve.layer_calls[0]


def test_the_log_holds_every_scored_chain(problem, tmp_path):
    result = jc.run(
        jax.random.key(0),
        jc.RandomSearch(num_chains=6),
        problem,
        budget=BUDGET,
        checkpoint_dir=tmp_path,
        record="chains",
    )
    scored = result.scored
    assert len(scored.loss) == result.num_scored
    out = jc.evaluate(problem, scored.chains)
    np.testing.assert_allclose(scored.loss, out.loss, rtol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "chains.jsonl").read_text().splitlines()]
    assert [row["chain"] for row in rows] == [list(row[row >= 0]) for row in scored.chains]
    assert [row["loss"] for row in rows] == scored.loss.tolist()
    assert [row["layer_calls"] for row in rows] == scored.layer_calls.tolist()
    # Steps are numbered from 1, and the costs are those of the curve.
    np.testing.assert_array_equal(scored.layer_calls, result.curve.layer_calls[scored.step - 1])
    frame = scored.to_frame()
    assert frame["chain"].iloc[0] == tuple(rows[0]["chain"])
    assert frame["loss"].min() == pytest.approx(result.best_loss)


def test_records_have_a_row_for_each_counted_step(problem):
    result = jc.run(
        jax.random.key(0),
        jc.LocalSearch(num_chains=3),
        problem,
        budget=BUDGET,
        record_fn=lambda state, info: (info.layer_calls, info.loss),
    )
    calls, loss = result.records
    np.testing.assert_array_equal(np.cumsum(calls), result.curve.layer_calls)
    lowest = np.minimum.accumulate(loss.min(axis=1))
    np.testing.assert_array_equal(lowest, result.curve.best_loss)


@pytest.mark.parametrize("is_saved", [True, False])
def test_the_state_is_that_after_the_last_counted_step(problem, tmp_path, is_saved):
    """A step that costs more than the budget leaves is undone, also if other runs go on."""
    search, keys = jc.LocalSearch(num_chains=3), jax.random.split(jax.random.key(1), 4)
    one, many = (
        {"checkpoint_dir": tmp_path / name} if is_saved else {"keep_state": True}
        for name in ("one", "many")
    )
    results = jc.run_many(keys, search, problem, budget=BUDGET, **many)
    assert len({len(result.curve.layer_calls) for result in results}) > 1
    results.append(jc.run(keys[0], search, problem, budget=BUDGET, **one))
    init, step = jax.jit(search.init), jax.jit(search.step)
    for key, result in zip([*keys, keys[0]], results, strict=True):
        key, init_key = jax.random.split(key)
        state = init(init_key, problem)
        for _ in result.curve.layer_calls:
            key, step_key = jax.random.split(key)
            state, _ = step(step_key, state, problem)
        for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    assert jc.run(keys[0], search, problem, budget=BUDGET).state is None


def test_a_callback_sees_how_far_the_run_is(problem):
    seen = []
    result = jc.run(
        jax.random.key(0),
        jc.RandomSearch(num_chains=6),
        problem,
        budget=BUDGET,
        callback=lambda progress: seen.append(progress),
    )
    assert result.is_complete
    assert sum(len(progress.loss) for progress in seen) == result.num_scored
    last = seen[-1]
    assert (last.layer_calls, last.best_loss) == (result.layer_calls, result.best_loss)
    np.testing.assert_array_equal(last.best_chain, result.best_chain)
    assert [one.seconds for one in seen] == sorted(one.seconds for one in seen)


def test_a_run_is_saved_before_an_error_of_its_callback_is_raised(problem, tmp_path):
    def fail(progress):
        raise RuntimeError("from the callback")

    search, key = jc.LocalSearch(num_chains=3), jax.random.key(1)
    with pytest.raises(RuntimeError, match="from the callback"):
        jc.run(key, search, problem, budget=BUDGET, checkpoint_dir=tmp_path, callback=fail)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    whole = jc.run(key, search, problem, budget=BUDGET)
    assert_equal(jc.run(key, search, problem, budget=BUDGET, checkpoint_dir=tmp_path), whole)


def test_a_run_stops_after_its_seconds(problem):
    result = jc.run(
        jax.random.key(0), jc.LocalSearch(num_chains=3), problem, budget=10**6, max_seconds=1e-9
    )
    assert (result.is_complete, result.stopped_by) == (False, "max_seconds")
    assert len(result.curve.layer_calls) == 1


@pytest.mark.slow
def test_a_run_of_64_bits_continues_in_64_bits_only(tmp_path):
    code = """if True:
        import sys
        sys.path.append("tests")
        import jax
        import jchain as jc
        import stopping
        jax.config.update("jax_enable_x64", True)
        key, data = jax.random.key(1), jc.data.load("wine", seed=0)
        layer, head = jc.layers.ResidualMLP(13), jc.layers.DenseHead(3)
        bank = jc.train.random(key, data.train, layer=layer, head=head, num_layers=4, num_steps=0)
        problem, search = jc.Problem(bank, data.search, 3), jc.LocalSearch(num_chains=3)
        whole = jc.run(key, search, problem, budget=60, record="chains")
        args = (sys.argv[1], key, search, problem, 60)
        found, calls = stopping.run_in_parts(*args, record="chains")
        assert calls > 1
        stopping.assert_equal(found, whole)
        jax.config.update("jax_enable_x64", False)
        try:
            stopping.run_in_parts(*args)
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert "jax_enable_x64: True there, False here" in done.stdout


def test_a_result_is_written_as_json_and_read(problem):
    result = jc.run(
        jax.random.key(0),
        jc.LocalSearch(num_chains=3),
        problem,
        budget=BUDGET,
        record="chains",
        record_fn=lambda state, info: {"inf": jnp.inf, "rows": (info.chains, [info.loss])},
    )
    found = Result.from_json(result.to_json())
    assert_equal(found, result._replace(state=None))
    nothing = result._replace(best_loss=np.inf, best_cost=float("nan"), records=None, scored=None)
    assert_equal(Result.from_json(nothing.to_json()), nothing._replace(state=None))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"best_chain": 3}', '{"best_chain": {"x": 1}}'])
def test_text_that_is_not_a_result_is_refused(text):
    with pytest.raises(ValueError, match="expected the JSON"):
        Result.from_json(text)


def test_records_of_unknown_types_are_not_written_as_json(problem):
    result = jc.run(
        jax.random.key(0),
        jc.RandomSearch(num_chains=6),
        problem,
        budget=60,
        record_fn=lambda state, info: info,
    )
    with pytest.raises(ValueError, match="expected results of arrays, .* got Info"):
        result.to_json()
