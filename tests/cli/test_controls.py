import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jchain as jc
from jchain.cli import controls
from jchain.cli.config import SearchConfig, resolve
from jchain.cli.context import Context
from jchain.cli.scores import Scorer
from jchain.cli.setup import choose_modules, set_up_trained
from jchain.runs.starts import list_starts


@pytest.fixture(scope="module")
def context():
    given = SearchConfig(data="wine", bank="independent", num_layers=4, depth=2, num_steps=30)
    config = resolve(given)
    data = jc.data.load("wine", 0)
    config, modules = choose_modules(config, data)
    setup = set_up_trained(config, data, modules)
    bank = setup.make_bank(jax.random.key(0))
    problem = setup.make_problem(bank, "search", 3)
    starts = list_starts(problem, "parents")
    return Context(config, setup, bank, problem, 3, 3, starts, Scorer(setup))


def test_the_best_edit_is_the_best_neighbor_on_search(context):
    parent = list(context.original_bank.parents[0])
    edit = controls._find_best_edit(context, parent)
    chain = jnp.asarray(jc.chain.pad([parent], 3)[0])
    rows, is_neighbor = context.problem.space.neighbors(chain)
    losses = np.asarray(jc.evaluate(context.problem, rows[np.asarray(is_neighbor)]).loss)
    own = jc.evaluate(context.problem, jc.chain.pad([edit], 3)).loss[0]
    assert float(own) == pytest.approx(float(losses.min()), rel=1e-6)
    assert controls._find_best_edit(context, [0, 1, 2, 3, 4]) is None


@pytest.mark.slow
def test_a_plain_net_gets_the_steps_of_all_nets(context):
    seen = []

    def make(key, num_steps):
        seen.append(num_steps)
        return jc.train.independent(
            key,
            context.setup.data.train,
            layer=context.original_bank.layers[0].module,
            head=context.original_bank.heads[0].module,
            num_nets=1,
            depth=2,
            num_steps=2,
        )

    quick = context.setup._replace(make_plain_net=make, has_slow_controls=False)
    own = context._replace(setup=quick)
    found = own.score(own.original_bank, [0, 4])
    scored = controls.score_controls(
        jax.random.key(1), own, found, (own.original_bank, [[0, 4]]), jc.RandomSearch()
    )
    assert seen == [60]
    assert set(scored.controls) == {"recipes", "best_parent", "plain_net", "random_chains"}
    assert set(scored.reference_losses) == {"best parent", "plain net", "optimum"}
    out = jc.evaluate_all(own.problem)[1]
    assert scored.optimum.loss == pytest.approx(float(out.loss.min()), rel=1e-6)
    random = scored.controls["random_chains"]
    low, high = random["quartiles"]
    assert low <= random["loss"]["test"] <= high


@pytest.mark.slow
def test_tuning_keeps_the_net_unless_select_prefers_another(context):
    net = controls.Net(context.original_bank, list(context.original_bank.parents[0]))
    tuned = controls._tune(jax.random.key(0), context, net)
    before, after = (context.score(own.bank, own.tokens) for own in (net, tuned))
    assert after.loss["select"].mean() <= before.loss["select"].mean()
    assert after.loss["search"].mean() <= before.loss["search"].mean()


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["budget", "no finite loss"])
def test_a_search_that_finds_nothing_is_no_control(context, capsys, monkeypatch, failure):
    if failure == "budget":
        own = context._replace(config=dataclasses.replace(context.config, budget=1))
    else:
        own, run = context, controls.run
        empty = np.zeros((0, 4), np.int32)
        monkeypatch.setattr(controls, "run", lambda *a, **k: run(*a, **k)._replace(finalists=empty))
    found = context.score(context.original_bank, [0, 4])
    search = jc.LocalSearch()
    key = jax.random.key(0)
    assert controls._run_rival(key, own, found, "local_search", search) is None
    assert "No local search to compare with: " in capsys.readouterr().err
