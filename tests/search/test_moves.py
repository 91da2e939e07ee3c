"""Moves of a chain, against lists made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.search.moves import check_kinds, draw_move, join_moves, list_moves, read_kinds

N, D = 5, 5
PARENT = (0, 1, 2, 3, 4, 5)


def make_problem(max_layers=D, **kwargs):
    return jc.Problem(make_bank(N, 1, parents=(PARENT,)), make_batch(), max_layers, **kwargs)


def pad(layers, max_layers=D):
    return (*layers, N, *[-1] * (max_layers - len(layers)))


def find(problem, chain, kind):
    rows, mask = list_moves(problem, jnp.array(chain), (kind,))[0]
    return [tuple(row) for row in np.asarray(rows)[np.asarray(mask)].tolist()]


def switch(layers):
    """Drop each layer, and put each other layer where its position is."""
    found = set()
    for i in range(len(layers)):
        rest = [*layers[:i], *layers[i + 1 :]]
        for token in set(range(N)) - set(layers):
            place = sum(other < token for other in rest)
            if place != i:
                found.add((*rest[:place], token, *rest[place:]))
    return found


@pytest.mark.parametrize("layers", [(), (2,), (0, 1, 2), (1, 3, 4), (0, 2, 4), PARENT[:-1]])
def test_switches_drop_a_layer_and_add_another_at_its_place(layers):
    found = find(make_problem(), pad(layers), "switches")
    assert len(found) == len(set(found))
    assert set(found) == {pad(chain) for chain in switch(layers)}


@pytest.mark.parametrize("min_layers", [0, 2])
@pytest.mark.parametrize("layers", [(), (2,), (1, 3), (3, 1, 0), (0, 1, 2, 3), PARENT[:-1]])
def test_runs_are_dropped_and_repeated(layers, min_layers):
    problem = make_problem(min_layers=min_layers)
    if len(layers) < min_layers:
        return
    expected = []
    for i in range(len(layers)):
        for j in range(i + 2, len(layers) + 1):
            if len(layers) - (j - i) >= min_layers:
                expected.append((*layers[:i], *layers[j:]))
            if len(layers) + (j - i) <= D:
                expected.append((*layers[:j], *layers[i:]))
    assert sorted(find(problem, pad(layers), "runs")) == sorted(map(pad, expected))


def test_moves_stay_in_the_space_and_within_the_limit():
    subset = make_problem(space="subset")
    assert not find(subset, pad((1, 3)), "switches")  # its edits are switches
    rows = find(subset, pad((0, 1, 2)), "edits")
    assert {pad(chain) for chain in switch((0, 1, 2))} < set(rows)
    # A repeated run does not keep the order.
    assert find(subset, pad((0, 1)), "runs") == [pad(())]
    costs = np.array([1, 1, 1, 1, 9, 0], np.float32)
    cheap = make_problem(token_costs=costs, max_cost=4)
    switched = {pad(chain) for chain in switch((0, 2)) if 4 not in chain}
    assert set(find(cheap, pad((0, 2)), "switches")) == switched
    assert pad((0, 1, 0, 1)) in find(cheap, pad((0, 1)), "runs")
    assert pad((0, 1, 2, 0, 1, 2)[:D]) not in find(cheap, pad((0, 1, 2)), "runs")


def test_kinds_are_drawn_equally_often():
    problem = make_problem()
    chain = jnp.array(pad((0, 1, 3)))
    kinds = ("edits", "switches", "runs")
    keys = jax.random.split(jax.random.key(0), 3000)
    draw = jax.jit(jax.vmap(lambda key: draw_move(key, problem, chain, kinds)))
    drawn = [tuple(row) for row in np.asarray(draw(keys)).tolist()]
    moved = [set(find(problem, chain, kind)) for kind in kinds]
    shares = [np.mean([row in rows for row in drawn]) for rows in moved]
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)
    # A chain that no move leaves stays.
    alone = jc.Problem(make_bank(1, 1), make_batch(), 1, min_layers=1)
    stays = draw_move(jax.random.key(0), alone, jnp.array([0, 1]), kinds[:1] + kinds[2:])
    assert stays.tolist() == [0, 1]


def test_local_search_tries_kinds_equally_early_and_all_moves_once():
    problem = make_problem()
    kinds = ("edits", "switches", "runs")
    search = jc.LocalSearch(num_chains=1, moves=kinds)
    chain = jnp.array(pad((0, 1, 3)))
    rows, mask = join_moves(problem, chain, kinds)
    size = [int(part.sum()) for _, part in list_moves(problem, chain, kinds)]
    state = search.init(jax.random.key(0), problem)
    start = jax.jit(
        jax.vmap(lambda key: search.start(key, state, problem, chain[None], jnp.zeros(1)).order)
    )
    orders = np.asarray(start(jax.random.split(jax.random.key(1), 3000)))
    assert (np.sort(orders) == np.arange(len(rows))).all()
    assert np.asarray(mask)[orders[:, : sum(size)]].all()
    first = orders[:, 0]
    ends = np.cumsum([part.shape[0] for _, part in list_moves(problem, chain, kinds)])
    shares = np.bincount(np.searchsorted(ends, first, side="right"), minlength=3) / len(first)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)


def test_wrong_moves_are_refused():
    for wrong in ("edits", (), ("edits", "edits"), ("swaps",)):
        with pytest.raises(ValueError, match="expected moves to be some of edits, switches, runs"):
            read_kinds(wrong)
    with pytest.raises(ValueError, match="expected moves to be some of"):
        jc.Evolution(moves=("swap",))
    bank = make_bank(N, 1, parents=(PARENT[:3] + PARENT[-1:],))
    problem = jc.Problem(bank, make_batch(), D)
    with pytest.raises(ValueError, match="position"):
        jc.LocalSearch(moves=("switches",)).check(problem)
    check_kinds(problem, ("edits", "runs"))
