import jax
import numpy as np
import pytest
import reference

import jchain as jc


def plain_beam(problem, width):
    """Compute the best loss and the layer calls of one pass with plain lists."""
    num_layers, heads = problem.bank.num_layers, range(4, 6)

    def stop(prefix):
        return min(reference.chain_loss(problem, [*prefix, head])[0] for head in heads)

    beam, best, calls = [()], stop(()), 0
    for _ in range(problem.max_layers):
        children = sorted(
            (stop((*prefix, token)), *prefix, token)
            for prefix in beam
            for token in range(num_layers)
        )
        calls += len(children)
        best = min(best, children[0][0])
        beam = [tuple(child[1:]) for child in children[:width]]
    return best, calls


def test_each_pass_is_a_plain_beam_search_twice_as_wide(problem):
    search = jc.BeamSearch(width=1, max_width=4)
    state, step = search.init(jax.random.key(0), problem), jax.jit(search.step)
    for width in (1, 2, 4):
        assert state.width == width
        best, calls = np.inf, 0
        while state.width == width:
            state, info = step(jax.random.key(0), state, problem)
            best, calls = min(best, float(info.loss.min())), calls + int(info.layer_calls)
        expected = plain_beam(problem, width)
        assert (best, calls) == (pytest.approx(expected[0], rel=1e-5), expected[1])
    # After the last pass, steps do nothing.
    _, info = step(jax.random.key(0), state, problem)
    assert info.layer_calls == 0
    assert np.isinf(info.loss).all()
    assert (np.asarray(info.chains) == -1).all()


def test_beam_search_includes_the_layer_penalty(problem):
    penalized = jc.Problem(problem.bank, problem.data, 3, layer_cost=100.0)
    result = jc.run(jax.random.key(0), jc.BeamSearch(max_width=1), penalized, budget=100)
    assert (result.best_chain >= 0).sum() == 1
    assert result.best_loss == pytest.approx(
        float(jc.evaluate_all(penalized)[1].loss.min()), rel=1e-5
    )


def test_chains_with_a_loss_that_is_not_finite_are_no_finalists(problem):
    x = problem.data.x * 1e37
    bad = jc.Problem(problem.bank, jc.Batch(x, problem.data.y), 3)
    result = jc.run(jax.random.key(0), jc.BeamSearch(max_width=2), bad, budget=1000)
    finite = np.isfinite(jc.evaluate_all(bad)[1].loss).sum()
    assert 0 < len(result.finalists) <= finite
    assert result.num_nonfinite > 0
