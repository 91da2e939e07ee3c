"""The choice between finalists, recipes, and the models as they are."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

import jchain as jc
from jchain.cli import finalists, pipeline, scores
from jchain.cli.choices import UPDATES, make_search
from jchain.cli.config import SearchConfig, resolve
from jchain.cli.finalists import Found
from jchain.cli.setup import set_up_checkpoints


@pytest.fixture(scope="module")
def context(models_folder):
    config = resolve(
        SearchConfig(
            checkpoint=(str(models_folder / "m0"),),
            text=(str(models_folder / "text.txt"),),
            length=8,
            sizes=(4, 6, 5, 4),
            pinned=(0, 0),
            max_layers=3,
            budget=60,
        )
    )
    return pipeline.make(jax.random.key(0), config, set_up_checkpoints(config))


@pytest.fixture(scope="module")
def found(context):
    search = make_search(context.config)
    return pipeline.search_chains(jax.random.key(1), context, search, UPDATES["frozen"]())


def test_fewer_layers_are_searched_as_subsets(context):
    setup, bank = context.setup, context.original_bank
    assert context.problem.space.positions == (0, 1, 2, 3)
    for space, max_layers, is_subset in [
        (None, 4, False),
        ("chains", 3, False),
        ("subset", 4, True),
    ]:
        config = dataclasses.replace(context.config, space=space, max_layers=max_layers)
        own = pipeline._make_context(config, setup, bank)
        assert (own.problem.space.positions is not None) == is_subset


def test_the_search_moves_in_all_ways(context):
    assert make_search(context.config).moves == ("edits", "switches", "runs")
    edits = dataclasses.replace(context.config, search="evolution", moves=("edits",))
    assert make_search(edits).moves == ("edits",)


def test_each_chain_is_scored_once_per_split(context, found, monkeypatch):
    fresh = context._replace(scorer=scores.Scorer(context.setup))
    seen, together = Counter(), scores._score_together

    def count(problem, chains, advance):
        seen.update((problem.num_examples, tokens) for tokens in chains)
        return together(problem, chains, advance)

    monkeypatch.setattr(scores, "_score_together", count)
    monkeypatch.setattr(finalists, "evaluate_in_parts", lambda *a: pytest.fail("scored twice"))
    picked = finalists.choose(fresh, context.problem, found)
    assert set(seen.values()) == {1}
    chains = {tuple(row["chain"]) for row in picked.recipes.values()} | {tuple(picked.tokens)}
    parent = context.original_bank.parents[0]
    # On `search` and `test`, with 6 and 4 examples, only what the report shows is scored.
    for num_examples in (6, 4):
        assert {row for num, row in seen if num == num_examples} == chains | {parent}
    assert {row for num, row in seen if num == 5} > chains
    before = sum(seen.values())
    fresh.score(context.original_bank, parent)
    assert sum(seen.values()) == before


def test_the_lowest_loss_on_select_is_picked(context, found):
    picked = finalists.choose(context, context.problem, found)
    on_select = context.setup.make_problem(context.original_bank, "select", 3)
    rows = [
        *found.result.finalists,
        *jc.chain.pad([r["chain"] for r in picked.recipes.values()], 3),
    ]
    losses = np.asarray(jc.evaluate(on_select, np.stack(rows)).loss)
    own = jc.evaluate(on_select, jc.chain.pad([picked.tokens], 3)).loss[0]
    assert float(own) == pytest.approx(float(losses.min()), rel=1e-5)
    np.testing.assert_allclose(
        picked.finalist_losses, losses[: len(found.result.finalists)], rtol=1e-5
    )
    assert set(picked.recipes) == {
        "last blocks dropped",
        "blocks of least influence dropped",
        "best run of blocks dropped",
    }


def test_a_run_without_records_scores_the_recipes(context, found):
    bare = found.result._replace(scored=None)
    chains = finalists.find_recipes(context, context.problem, found.result)
    assert finalists.find_recipes(context, context.problem, bare) == chains
    picked = [
        finalists.choose(context, context.problem, Found(*(found[0], r, 0)))
        for r in (found[1], bare)
    ]
    assert picked[0].tokens == picked[1].tokens
