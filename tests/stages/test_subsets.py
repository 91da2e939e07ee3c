"""Spaces of chains that keep the order of a model, against lists made by hand."""

import dataclasses
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain import env
from jchain.chain import ChainSpace
from jchain.runs.checking import check_search
from jchain.stages.table import StageTable

K, D = 2, 4
POSITIONS = {"one model": (0, 1, 2, 3, 4), "two models": (0, 1, 2, 0, 1, 2), "one layer": (0,)}
FAST = [jc.LocalSearch(num_chains=4), jc.BeamSearch()]
SLOW = [
    jc.RandomSearch(num_chains=4),
    jc.Evolution(population_size=8, tournament_size=3, num_chains=4),
    jc.ActorCritic(),
    jc.QLearning(),
    jc.MCTS(num_simulations=8),
    jc.CriticSearch(),
    jc.LinearizedSearch(),
]
SEARCHES = [*FAST, *(pytest.param(search, marks=pytest.mark.slow) for search in SLOW)]


def list_subsets(positions, min_layers, max_layers):
    """List every chain in the order of the positions, by brute force."""
    chains = []
    for length in range(min_layers, max_layers + 1):
        subsets = [
            tuple(sorted(tokens, key=lambda token: positions[token]))
            for tokens in combinations(range(len(positions)), length)
            if len({positions[token] for token in tokens}) == length
        ]
        for tokens in sorted(subsets):
            for head in range(len(positions), len(positions) + K):
                chains.append((*tokens, head, *[-1] * (max_layers - length)))
    return chains


def make_space(positions, min_layers=0, max_layers=D):
    table = StageTable.from_positions(positions, K)
    return ChainSpace(len(positions), K, max_layers, min_layers, table)


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("min_layers", [0, 1])
def test_a_space_of_positions_holds_the_subsets(positions, min_layers):
    space = make_space(positions, min_layers)
    expected = list_subsets(positions, min_layers, D)
    assert [tuple(row) for row in space.enumerate().tolist()] == expected
    assert space.num_chains == len(expected)
    every = ChainSpace(len(positions), K, D).enumerate()
    is_legal = [tuple(row) in set(expected) for row in every.tolist()]
    assert np.asarray(space.contains(jnp.asarray(every))).tolist() == is_legal
    whole = make_space(positions).enumerate()
    assert np.asarray(space.index(jnp.asarray(whole))).tolist() == [*range(len(whole))]
    assert space.positions == positions
    assert ChainSpace(len(positions), K, D).positions is None


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_neighbors_differ_by_one_layer(positions):
    space = make_space(positions, 1, 3)
    chains = list_subsets(positions, 1, 3)
    for chain in chains:
        rows, is_neighbor = space.neighbors(jnp.array(chain))
        found = [tuple(row) for row in np.asarray(rows)[np.asarray(is_neighbor)].tolist()]
        assert len(found) == len(set(found))
        assert set(found) == {other for other in chains if is_near(chain, other, positions)}


def is_near(chain, other, positions):
    """Return whether one layer was added, removed, or exchanged, or else the head."""
    num_layers = len(positions)
    own, theirs = ({token for token in row if 0 <= token < num_layers} for row in (chain, other))
    heads = [next(token for token in row if token >= num_layers) for row in (chain, other)]
    if own == theirs:
        return heads[0] != heads[1]
    return heads[0] == heads[1] and max(len(own - theirs), len(theirs - own)) == 1


def test_samples_are_uniform():
    space, num = make_space(POSITIONS["two models"], 1), 6000
    chains = np.asarray(space.sample(jax.random.key(0), num))
    first = make_space(POSITIONS["two models"]).num_chains - space.num_chains
    counts = np.bincount(np.asarray(space.index(jnp.asarray(chains))) - first)
    assert len(counts) == space.num_chains
    expected = num / space.num_chains
    # Chi-squared of 51 degrees of freedom is below 100 with a probability of 0.9999.
    assert ((counts - expected) ** 2 / expected).sum() < 100


def make_problem(**options):
    return jc.Problem(make_bank(5), make_batch(), 3, space="subset", **options)


def test_legal_actions_lead_to_the_chains_of_the_space_alone():
    problem = make_problem(min_layers=2)
    expected = {row for row in list_subsets(range(5), 2, 3)}
    found, prefixes = set(), [()]
    while prefixes:
        prefix = prefixes.pop()
        padded = jnp.array([*prefix, *[-1] * (4 - len(prefix))])
        for token in np.flatnonzero(env.legal_actions(problem, padded)).tolist():
            chain = (*prefix, token)
            if token < 5:
                prefixes.append(chain)
            else:
                found.add((*chain, *[-1] * (4 - len(chain))))
    assert found == expected


def test_other_chains_have_an_infinite_loss():
    problem, plain = make_problem(), jc.Problem(make_bank(5), make_batch(), 3)
    every, out = jc.evaluate_all(plain)
    loss = np.asarray(jax.jit(lambda rows: jc.evaluate(problem, rows).loss)(every))
    is_legal = np.asarray(problem.space.contains(jnp.asarray(every)))
    np.testing.assert_allclose(loss, np.where(is_legal, out.loss, np.inf), rtol=1e-5)
    chains, own = jc.evaluate_all(problem)
    assert len(chains) == 2 * (1 + 5 + 10 + 10)
    np.testing.assert_allclose(own.loss, loss[is_legal], rtol=1e-5)
    with pytest.raises(ValueError, match="chain 0: expected layers in the order of the model"):
        jc.evaluate(problem, every[~is_legal])


def test_positions_come_from_the_parents_or_are_given():
    bank = jc.Bank.concat([make_bank(3, 1), make_bank(3, 1, seed=1)])
    parents = dataclasses.replace(bank, parents=((0, 1, 2, 6), (3, 4, 5, 7)))
    assert jc.Problem(parents, make_batch(), 3, space="subset").space.positions == (0, 1, 2) * 2
    # A parent may begin with a layer for its embeddings.
    longer = dataclasses.replace(bank, parents=((0, 1, 6), (2, 3, 4, 5, 7)))
    assert jc.Problem(longer, make_batch(), 3, space="subset").space.positions == (2, 3, 0, 1, 2, 3)
    given = jc.Problem(bank, make_batch(), 3, space=[5, 4, 3, 2, 1, 0])
    assert given.space.enumerate()[2].tolist() == [0, 6, -1, -1]
    assert given.space.contains(jnp.array([[2, 1, 0, 6]])).all()
    assert jc.Problem(bank, make_batch(), 3).space.positions is None
    again = dataclasses.replace(given, max_layers=2)
    assert (again.space.max_layers, again.space.positions) == (2, (5, 4, 3, 2, 1, 0))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "all",
            "expected space to be 'chains', 'subset', or the position of each layer, got 'all'",
        ),
        (3, "expected space to be 'chains', 'subset', or the position of each layer, got 3"),
        ([0, 1], "expected space to hold the positions of 5 layers, integers from 0 to 32,767"),
        ([0, 1, 2, 3, -1], "expected space to hold the positions of 5 layers"),
        ([0, 1, 2, 3, 4.0], "expected space to hold the positions of 5 layers"),
    ],
)
def test_wrong_spaces_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        jc.Problem(make_bank(5), make_batch(), 3, space=space)


def test_layers_without_a_position_are_refused():
    bank = dataclasses.replace(make_bank(3, 1), parents=((0, 1, 3),))
    with pytest.raises(ValueError, match="got layer 'layer2' in none: pass the position"):
        jc.Problem(bank, make_batch(), 3, space="subset")
    bank = dataclasses.replace(make_bank(2, 1), parents=((0, 1, 0, 2),))
    with pytest.raises(ValueError, match=r"got layer 'layer0' at slots \[0, 2\]"):
        jc.Problem(bank, make_batch(), 3, space="subset")
    with pytest.raises(ValueError, match="expected a chain of 6 to 6 layers at rising positions"):
        jc.Problem(make_bank(5), make_batch(), 6, min_layers=6, space="subset")


def test_a_chain_in_another_order_is_refused_by_name():
    space = make_problem().space
    with pytest.raises(ValueError, match="expected layers in the order of the model, each at most"):
        space.validate([2, 1, 5, -1])


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: type(search).__name__)
def test_searches_stay_in_the_space(search):
    problem = make_problem(min_layers=2)
    check_search(search, problem)
    result = jc.run(jax.random.key(0), search, problem, budget=400)
    assert bool(problem.space.contains(jnp.asarray(result.best_chain)))
    if not isinstance(search, jc.LinearizedSearch | jc.CriticSearch | jc.QLearning | jc.MCTS):
        assert result.best_loss == jc.evaluate_all(problem)[1].loss.min()
