"""Banks, problems, results, and the states of all searches survive being copied and sent."""

import copy
import functools
import pickle

import cloudpickle
import jax
import numpy as np
import orbax.checkpoint
import pytest
from conftest import make_bank, make_batch
from flax import nnx

import jchain as jc

SEARCHES = {
    "RandomSearch": jc.RandomSearch(),
    "LocalSearch": jc.LocalSearch(),
    "Evolution": jc.Evolution(),
    "BeamSearch": jc.BeamSearch(),
    "CriticSearch": jc.CriticSearch(width=8),
    "LinearizedSearch": jc.LinearizedSearch(),
    "TargetPropagation": jc.TargetPropagation(),
    "SuffixBeamSearch": jc.SuffixBeamSearch(width=4, num_candidates=3, num_probes=5),
    "QLearning": jc.QLearning(),
    "MCTS": jc.MCTS(num_simulations=4),
    "ActorCritic": jc.ActorCritic(),
    "ActorCritic-replay": jc.ActorCritic(num_replays=2, replay_size=64),
}
COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": lambda value: cloudpickle.loads(cloudpickle.dumps(value)),
    "deepcopy": copy.deepcopy,
}


def make_problem(name="", **options):
    layer = {"layer": jc.layers.InvertibleDense(5)} if name == "SuffixBeamSearch" else {}
    return jc.Problem(make_bank(4, 2, **layer), make_batch(), 3, **options)


@functools.cache
def take_a_step(name):
    search, problem = SEARCHES[name], make_problem(name)
    state = jax.jit(search.init)(jax.random.key(0), problem)
    return jax.jit(search.step)(jax.random.key(1), state, problem)[0]


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("how", COPIES)
def test_banks_problems_and_results_are_copied(how):
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    stem = jc.layers.ConvStem(4)
    bank = jc.train.random(
        jax.random.key(0),
        jc.Batch(images, make_batch(6).y),
        layer=jc.layers.ConvBlock(4),
        head=jc.layers.PoolHead(3),
        stem=stem,
        stem_params=stem.init(jax.random.key(0), images)["params"],
        num_layers=2,
        depth=1,
        num_steps=0,
    )
    problem = make_problem(layer_cost=0.1, min_layers=1)
    result = jc.run(jax.random.key(0), jc.LocalSearch(), problem, budget=50)
    for value in (bank, problem, result, jc.data.load("wine")):
        assert_equal(COPIES[how](value), value)
    # Programs that were compiled for the problem are those of its copy.
    assert hash(jax.tree.structure(COPIES[how](problem))) == hash(jax.tree.structure(problem))


@pytest.mark.parametrize("how", COPIES)
def test_banks_of_nnx_modules_and_functions_are_copied(how):
    block = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
    head = jc.layers.DenseHead(3)
    head_params = make_bank().get_params(4)
    bank = jc.Bank.stack([block, apply_scale], [None, 2.0 * np.ones((1, 1))], head, [head_params])
    again = COPIES[how](bank)
    x = make_batch().x
    np.testing.assert_array_equal(
        jc.apply_chain(again, [0, 1, 2], x), jc.apply_chain(bank, [0, 1, 2], x)
    )


def apply_scale(params, x):
    return x * params


# By default, a search with a score cache, one that holds activations, and one that learns.
FAST = ("LocalSearch", "CriticSearch", "QLearning")


@pytest.mark.parametrize("how", [*COPIES, "orbax"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SEARCHES],
)
def test_states_of_searches_are_copied(name, how, tmp_path):
    search, state = SEARCHES[name], take_a_step(name)
    if how == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            found = checkpointer.restore(tmp_path / "state", state)
    else:
        found = COPIES[how](state)
        assert_equal(COPIES[how](search), search)
    assert_equal(found, state)
