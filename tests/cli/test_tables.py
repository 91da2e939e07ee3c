from jchain.cli.records import format_loss
from jchain.cli.tables import draw_chain, print_table


def make_record():
    """Make the output of a search with a better recipe, an infinite loss, and a sweep."""
    scores = {
        "loss": {"search": 0.5, "select": 0.25, "test": None},
        "accuracy": {"search": 0.75, "select": 0.5, "test": 0.125},
        "standard_error": {"search": 0.125, "select": 0.0625, "test": None},
    }
    noise = {**scores, "difference": {"mean": 0.5, "standard_error": 0.3}}
    worse = {**scores, "difference": {"mean": -0.5, "standard_error": 0.125}}
    random = {"loss": {"test": 4.0}, "accuracy": {"test": 0.1}, "quartiles": [3.5, None]}
    recipe = {"chain": [0, 4], **scores}
    record = {
        "best_chain": [0, 4],
        "chosen": "last blocks dropped",
        "config": {"fractions": None},
        "layers": ["a", "head"],
        **scores,
        "num_examples": {"search": 360, "select": 305, "test": 1_270},
        "num_chains": 12_345,
        "layer_calls": 1234,
        "update_calls": 34,
        "optimum": 0.125,
        "controls": {
            "best_parent": noise,
            "plain_net": worse,
            "random_chains": random,
            "recipes": {"last blocks dropped": recipe},
        },
        "num_scored": 7,
        "nonfinite_chains": 2,
        "sweep": [
            {"max_layers": 1, "chosen": "search", "recipes": {}, **recipe},
        ],
    }
    return record


def test_print_table_has_all_rows_and_remarks(capsys):
    print_table(make_record())
    shown = " ".join(capsys.readouterr().out.split())
    assert "search, 360 select, 305 test, 1,270" in shown
    cells = "0.500 ± 0.125 (75.0%) 0.250 ± 0.062 (50.0%) not finite"
    assert f"best chain found {cells}" in shown
    assert f"best parent {cells} +0.500 ± 0.300 (noise)" in shown
    assert f"plain net, same steps {cells} -0.500 ± 0.125" in shown
    assert "random chains, median 4.000 (10.0%) quartiles 3.500 to not finite" in shown
    assert "No clear difference on test (95%): best parent" in shown
    assert "optimum of all chains 0.125" in shown
    found = "in 1,234 layer calls, 34 of them gradient steps, among 12,345 chains: a -> head"
    assert found in shown
    assert "This chain is a recipe (last blocks dropped)" in shown
    assert "2 of 7 scored chains had a non-finite loss" in shown


def test_draw_chain_groups_layers_by_origin():
    layers = ["undo it", "net/10", "other/0", "net/2", "net/head"]
    assert draw_chain(layers, "seed 3") == [
        "seed 3   1  2 3 4",
        "undo it  ●  · · ·    ·",
        "net      · 10 · 2 head",
        "other    ·  · 0 ·    ·",
    ]


def test_losses_have_few_decimals():
    assert format_loss(0.12351) == "0.124"
    assert format_loss(0.12351, 4) == "0.1235"
    assert format_loss(None) == "not finite"
