"""Methods whose mathematics needs one array refuse pytrees in one line, before they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_inputs as states

import jchain as jc
from jchain.hub import recipes
from jchain.inverse import target_scores

CHAIN = np.array([0, 1, 2, 4])
WORDS = r"expected activations of one array, got a dict: \{'side': \(float32\[6, 2\], bool\[6\], "


@pytest.fixture(scope="module")
def problem():
    return states.make_dict_problem()


CALLS = {
    "score_edits_by_target": lambda p: target_scores.score_edits_by_target(p, CHAIN),
    "fit_target_layer": lambda p: target_scores.fit_target_layer(p.bank, p.data.x, p.data.x),
    "reach_target": lambda p: jc.inverse.reach_target(p, jnp.array(3), p.data.x),
    "condition_numbers": lambda p: jc.inverse.condition_numbers(p.bank, [0], p.data.x),
    "meet_in_the_middle": lambda p: jc.meet_in_the_middle(p.bank, p.data.x, jnp.zeros((6, 4)), 2),
    "TargetPropagation": lambda p: jc.TargetPropagation().check(p),
    "SuffixBeamSearch": lambda p: jc.SuffixBeamSearch().check(p),
    "compute_influence": lambda p: recipes.compute_influence(p.bank, CHAIN, p.data.x),
    "Fused": lambda p: jc.evaluate(p, CHAIN[None], plan=jc.engine.Fused()),
}


@pytest.mark.parametrize("name", CALLS)
def test_pytrees_are_refused(name, problem):
    with pytest.raises(ValueError, match=WORDS):
        CALLS[name](problem)


def test_a_run_refuses_before_its_first_step():
    problem = states.make_pair_problem()
    words = r"expected activations of one array, got a tuple: \(float32\[6, 3, 2\], float32\[6\]\)"
    for search in (jc.TargetPropagation(), jc.SuffixBeamSearch()):
        with pytest.raises(ValueError, match=words):
            jc.run(jax.random.key(0), search, problem, budget=100)
