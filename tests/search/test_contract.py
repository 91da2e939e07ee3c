"""One contract for all searches. `small_searches.py` must list each search that jchain exports."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import several_inputs
from conftest import assert_trees_close, make_bank, make_batch
from small_searches import INVERTIBLE, ORDERED, SEARCHES

import jchain as jc

RATES = {
    "ActorCritic": {"learning_rate": 0.1, "restart_rate": 0.9},
    "ActorCritic-weights": {"entropy_weight": 1.0},
    "ActorCritic-replay": {"lambda_": 0.5},
    "ActorCritic-observing": {"restart_rate": 0.9},
    "QLearning": {"learning_rate": 0.5, "min_epsilon": 0.2},
    "MCTS": {"gumbel_scale": 0.5},
    "TargetPropagation": {"step_size": 0.5},
    "SuffixBeamSearch": {"temperature": 0.5},
    "CriticSearch": {"ridge": 5.0, "epsilon": 0.2},
}
# These continue from the activations of a prefix, and pay for each layer that they apply.
STEPPING = ("BeamSearch", "MCTS")
DETERMINISTIC = ("BeamSearch", "RemovalSearch")
# These apply layers while they sample chains, and pay for all chains of each step.
OBSERVING = ("ActorCritic-observing",)
# These also pay for other passes, which their own tests recount.
PASSING = ("LinearizedSearch", "ActorCritic-scores", "TargetPropagation", "SuffixBeamSearch")
# These need activations that are one array.
ONE_ARRAY = ("SuffixBeamSearch", "TargetPropagation")


def choose(*names):
    """Choose the searches that run by default; the rest run with `-m slow`."""
    return [
        pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in SEARCHES
    ]


VMAPPED = choose("LocalSearch")
RUN = choose("LocalSearch", "QLearning", "BeamSearch", "CriticSearch")
TRACED = choose("LocalSearch", "Evolution", "CriticSearch", "ActorCritic")
# By default, one search for each way of making chains.
SHORT = choose("LocalSearch", "BeamSearch", "QLearning")
# By default, those that hold activations, and those that refuse several arrays.
HOLDING = choose(*STEPPING, *ONE_ARRAY, "CriticSearch")
EAGER = choose("LocalSearch", "BeamSearch", "QLearning")


def test_every_exported_search_is_in_the_contract():
    exported = {
        name
        for name, cls in vars(jc).items()
        if inspect.isclass(cls)
        and hasattr(cls, "init")
        and hasattr(cls, "step")
        and cls is not jc.Search
    }
    # tests/search/test_staged.py puts `Staged` around each of them.
    assert exported == {type(search).__name__ for search in SEARCHES.values()} | {"Staged"}


# Variants of one search that take long to compile; tests/search/test_actor_critic.py tests them.
SLOW = ("ActorCritic-scores", "ActorCritic-weights", "ActorCritic-replay", "ActorCritic-observing")


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SEARCHES
    ],
    scope="module",
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def search(name):
    return SEARCHES[name]


def make_problem(name, num_layers=4, max_layers=3, seed=0, min_layers=0):
    options = {"layer": jc.layers.InvertibleDense(5)} if name in INVERTIBLE else {}
    return jc.Problem(
        make_bank(num_layers, 2, seed=seed, **options),
        make_batch(),
        max_layers,
        min_layers=min_layers,
        space=range(num_layers) if name in ORDERED else "chains",
    )


@pytest.fixture(scope="module")
def problem(name):
    return make_problem(name)


# All tests share these programs, because searches are pytrees.
JIT_INIT = jax.jit(lambda key, search, problem: search.init(key, problem))
JIT_STEP = jax.jit(lambda key, search, state, problem: search.step(key, state, problem))


def jit_step(search):
    return lambda key, state, problem: JIT_STEP(key, search, state, problem)


def steps(search, problem, seed=0, num=2, step=None):
    step = step or search.step
    state = JIT_INIT(jax.random.key(seed), search, problem)
    infos = []
    for key in jax.random.split(jax.random.key(seed + 100), num):
        state, info = step(key, state, problem)
        infos.append(info)
    return state, infos


assert_close = partial(assert_trees_close, rtol=2e-3, atol=1e-5)


def test_losses_indices_and_cost_are_exact(name, search, problem):
    _, infos = steps(search, problem, num=8, step=jit_step(search))
    scored, parent = set(), None
    for info in infos:
        is_chain = np.asarray(info.chains)[:, 0] >= 0
        chains = np.asarray(info.chains)[is_chain]
        problem.space.validate(chains)
        expected = [reference.chain_loss(problem, chain)[0] for chain in chains]
        np.testing.assert_allclose(np.asarray(info.loss)[is_chain], expected, rtol=1e-5, atol=1e-5)
        assert np.isinf(np.asarray(info.loss)[~is_chain]).all()
        rows = [tuple(map(int, chain)) for chain in chains]
        if name in STEPPING:
            # Each layer call gives a prefix, which every head scores.
            assert info.layer_calls == len({row[: row.index(max(row))] for row in rows} - {()})
        elif name == "CriticSearch":
            # The step scores all children of one prefix. That prefix is computed again unless it
            # is a child of the last one.
            before, parent = parent, max((row[: row.index(max(row))] for row in rows), key=len)[:-1]
            assert len({row[: row.index(max(row))] for row in rows} - {()}) == 4
            assert info.layer_calls == 4 + (len(parent) if parent[:-1] != before else 0)
        elif name in OBSERVING:
            assert info.layer_calls == reference.count_calls(rows, 4)[0]
        elif name not in PASSING:
            assert (
                info.layer_calls
                == reference.count_calls([row for row in rows if row not in scored], 4)[0]
            )
        scored.update(rows)


@pytest.mark.parametrize("name", HOLDING, indirect=True)
def test_searches_run_on_several_inputs(name, search):
    """Those that need activations of one array refuse; tests/inverse/test_one_array.py tests it."""
    problem = several_inputs.make_dict_problem(num_layers=2, num_heads=1, max_layers=2)
    if name in ONE_ARRAY:
        with pytest.raises(ValueError, match="expected activations of one array"):
            search.check(problem)
        return
    _, infos = steps(search, problem, num=3, step=jit_step(search))
    chains, loss = (
        np.concatenate(rows) for rows in zip(*(info[:2] for info in infos), strict=True)
    )
    is_chain = chains[:, 0] >= 0
    rows, inverse = np.unique(chains[is_chain], axis=0, return_inverse=True)
    made = (several_inputs.find_outputs(problem, row) for row in rows)
    expected = np.array([several_inputs.find_loss(outputs) for outputs in made])
    assert len(rows) > 1
    np.testing.assert_allclose(loss[is_chain], expected[inverse], rtol=2e-5)


@pytest.mark.parametrize("name", EAGER, indirect=True)
def test_jit_equals_eager_and_the_key_determines_the_result(name, search, problem):
    step = jit_step(search)
    jitted = steps(search, problem, step=step)
    assert_close(steps(search, problem), jitted)
    again, other = (steps(search, problem, seed, step=step) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, jitted, again)
    is_same = all(
        np.array_equal(a.chains, b.chains) for a, b in zip(jitted[1], other[1], strict=True)
    )
    assert is_same == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", VMAPPED, indirect=True)
def test_vmapped_seeds_equal_looped(search, problem):
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.jit(jax.vmap(search.init, in_axes=(0, None)))(keys, problem)
    _, infos = jax.jit(jax.vmap(search.step, in_axes=(0, 0, None)))(keys, states, problem)
    step = jit_step(search)
    for i, key in enumerate(keys):
        _, info = step(key, JIT_INIT(key, search, problem), problem)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], infos), info)


@pytest.mark.slow
def test_scan_over_steps_of_vmapped_seeds_compiles(search, problem):
    def run_one(key):
        def body(state, key):
            state, info = search.step(key, state, problem)
            return state, info.loss.min()

        return jax.lax.scan(body, search.init(key, problem), jax.random.split(key, 4))[1]

    assert jax.jit(jax.vmap(run_one))(jax.random.split(jax.random.key(0), 2)).shape == (2, 4)


@pytest.mark.parametrize("name", TRACED, indirect=True)
def test_one_trace_for_all_steps_problems_and_rates(name, search, problem):
    traces = []

    @jax.jit
    def step(key, search, state, problem):
        traces.append(0)
        return search.step(key, state, problem)

    other = make_problem(name, seed=7)
    rates = type(search)(
        **({f: getattr(search, f) for f in search.__dataclass_fields__} | RATES.get(name, {}))
    )
    for variant, on in [(search, problem), (search, other), (rates, problem)]:
        state = JIT_INIT(jax.random.key(0), variant, on)
        for seed in range(2):
            state, _ = step(jax.random.key(seed), variant, state, on)
    assert len(traces) == 1


def test_the_first_state_has_the_types_of_later_states(search, problem):
    key = jax.random.key(0)
    state = jax.eval_shape(search.init, key, problem)
    after = jax.eval_shape(search.step, key, state, problem)[0]
    # Weak types must be equal too, or the first step is compiled separately.
    assert str(jax.tree.leaves(state)) == str(jax.tree.leaves(after))


@pytest.mark.parametrize("name", RUN, indirect=True)
def test_searches_find_the_optimum_of_a_tiny_problem(name, search):
    problem = make_problem(name, 3, 2, seed=3)
    optimum = jc.evaluate_all(problem)[1].loss.min()
    result = jc.run(jax.random.key(0), search, problem, budget=600)
    assert result.best_loss == pytest.approx(float(optimum), rel=1e-5)


@pytest.mark.parametrize("name", SHORT, indirect=True)
@pytest.mark.parametrize("min_layers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_no_chain_is_shorter_than_min_layers(name, search, min_layers):
    problem = make_problem(name, 3, 2, seed=3, min_layers=min_layers)
    # Call steps directly, because a run keeps only its best chains.
    _, infos = steps(search, problem, num=40, step=jit_step(search))
    chains, loss = (
        np.concatenate([getattr(info, field) for info in infos]) for field in ("chains", "loss")
    )
    is_chain = chains[:, 0] >= 0
    assert np.isinf(loss[~is_chain]).all()
    all_chains, out = jc.evaluate_all(problem)
    losses = dict(zip(map(tuple, all_chains.tolist()), np.asarray(out.loss), strict=True))
    expected = [losses[tuple(row)] for row in chains[is_chain].tolist()]
    np.testing.assert_allclose(loss[is_chain], expected, rtol=1e-4, atol=1e-5)
    assert loss.min() == pytest.approx(float(out.loss.min()), rel=1e-4)


@pytest.mark.parametrize("name", RUN, indirect=True)
def test_searches_run_over_heads_alone(name, search):
    problem = make_problem(name, 3, 0)
    if name in ORDERED:  # begins at chains of all layers
        return
    result = jc.run(jax.random.key(0), search, problem, budget=10)
    assert result.layer_calls == 0
    assert len(result.finalists) == 2


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (jc.RandomSearch, {"num_chains": 0}),
        (jc.ActorCritic, {"num_chains": 1}),
        (jc.ActorCritic, {"num_epochs": 0}),
        (jc.ActorCritic, {"num_elites": 0}),
        (jc.ActorCritic, {"num_replays": -1}),
        (jc.ActorCritic, {"num_replays": 4, "replay_size": 8}),
        (jc.LocalSearch, {"num_chains": 0}),
        (jc.Evolution, {"tournament_size": 0}),
        (jc.Evolution, {"population_size": 4, "num_chains": 5}),
        (jc.BeamSearch, {"width": 0}),
        (jc.BeamSearch, {"width": 8, "max_width": 4}),
        (jc.QLearning, {"num_replays": 0}),
        (jc.QLearning, {"replay_size": 8, "num_chains": 16}),
        (jc.MCTS, {"num_simulations": 0}),
        (jc.CriticSearch, {"width": 0}),
        (jc.TargetPropagation, {"num_chains": 0}),
        (jc.SuffixBeamSearch, {"width": 0}),
        (jc.SuffixBeamSearch, {"max_suffix_layers": -1}),
    ],
)
def test_sizes_out_of_range_raise_for_each_search(cls, sizes):
    with pytest.raises(ValueError, match="expected .* at (least|most) .*, got"):
        cls(**sizes)


@pytest.mark.slow
def test_stacked_rates_vmap_over_a_bank_of_two_groups(two_group_problem):
    searches = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *[jc.ActorCritic(jc.TokenEncoding(8), 6, 1, rate) for rate in (1e-3, 1e-2)],
    )

    def first_loss(search):
        state = search.init(jax.random.key(0), two_group_problem)
        state, _ = search.step(jax.random.key(0), state, two_group_problem)
        return search.step(jax.random.key(1), state, two_group_problem)[1].loss

    losses = jax.jit(jax.vmap(first_loss))(searches)
    assert losses.shape == (2, 6)


@pytest.mark.parametrize("name", SHORT, indirect=True)
def test_a_key_draws_the_same_chains_with_64_bit_numbers(name, search, problem):
    def make_chains():
        # A new function, as the programs of jax.jit(search.step) have only one mode.
        step = jax.jit(lambda key, state: search.step(key, state, problem))
        state, chains = JIT_INIT(jax.random.key(0), search, problem), []
        for key in jax.random.split(jax.random.key(1), 3):
            state, info = step(key, state)
            chains.append(np.asarray(info.chains))
        return chains

    expected = make_chains()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(make_chains(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES, indirect=True)
def test_searches_run_with_64_bit_numbers(name, search, problem):
    with jax.enable_x64(True):
        result = jc.run(jax.random.key(0), search, problem, budget=300)
        assert np.isfinite(result.best_loss)
        np.testing.assert_allclose(
            jc.evaluate(problem, result.best_chain[None]).loss, result.best_loss, rtol=1e-5
        )


def limit_cost(name, min_layers=0):
    """Make a problem in which 3 of 10 chains are within the limit, and find its optimum."""
    problem = make_problem(name, 4, 3, seed=3, min_layers=min_layers)
    cost = np.array([0.7, 1.9, 1.2, 0.5, 0.6, 1.1], np.float32)
    chains, out = jc.evaluate_all(problem)
    chain_cost = np.where(chains >= 0, cost[chains], 0).sum(axis=1)
    limit = np.quantile(chain_cost, 0.3)
    limited = jc.Problem(
        problem.bank,
        problem.data,
        3,
        min_layers=min_layers,
        token_costs=cost,
        max_cost=limit,
        space=problem.space,
    )
    return limited, float(np.min(np.asarray(out.loss)[chain_cost <= limit * (1 + 1e-6)]))


# These score all children of a prefix, also those over a limit of the cost.
WASTEFUL = ("BeamSearch", "CriticSearch", "MCTS")


@pytest.mark.parametrize("name", choose("LocalSearch", "MCTS"), indirect=True)
@pytest.mark.parametrize("min_layers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_searches_find_the_best_chain_within_a_limit_of_the_cost(name, search, min_layers):
    problem, optimum = limit_cost(name, min_layers)
    results = jc.run_many(jax.random.split(jax.random.key(0), 3), search, problem, budget=400)
    # Searches draw at random, so one run may miss the optimum.
    best_loss = min(result.best_loss for result in results)
    assert best_loss == pytest.approx(optimum, rel=1e-5)
    for result in results:
        costs = np.append(result.finalist_costs, jc.front(result).cost)
        assert (costs <= float(problem.max_cost) * (1 + 1e-6)).all()
        assert (result.num_nonfinite > 0) == (name in WASTEFUL)
        assert len(result.finalists) <= result.num_scored - result.num_nonfinite


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES, indirect=True)
def test_searches_keep_the_contract_within_a_limit_of_the_cost(name, search):
    # This module compiles many programs, and a process can hold only so many (see conftest.py).
    jax.clear_caches()
    problem, _ = limit_cost(name)
    # The chains of the first passes of a removal are over the limit.
    jc.check_search(search, problem, num_steps=12 if name in ORDERED else 3)
    step = jit_step(search)
    state, infos = steps(search, problem, num=20, step=step)
    for leaf in jax.tree.leaves((state, infos)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert not np.isnan(np.asarray(leaf)).any()
