import numpy as np
from conftest import make_bank

from jchain.cli.records import SearchOutput
from jchain.cli.report import format_loss, print_table
from jchain.search.base import Curve, Result


def make_output():
    """A search whose recipe was better, with an infinite loss and a sweep."""
    scores = {
        "loss": {"search": 0.5, "select": 0.25, "test": None},
        "accuracy": {"search": 0.75, "select": 0.5, "test": 0.125},
    }
    recipe = {"chain": [0, 4], **scores}
    record = {
        "best_chain": [0, 4],
        "chosen": "last blocks dropped",
        "layers": ["a", "head"],
        **scores,
        "layer_calls": 1234,
        "update_calls": 34,
        "optimum": 0.125,
        "controls": {
            "best_parent": scores,
            "random_chain": scores,
            "recipes": {"last blocks dropped": recipe},
        },
        "nonfinite_chains": 2,
        "sweep": [
            {"max_layers": 1, "chosen": "search", "recipes": {}, **recipe},
        ],
    }
    curve = Curve(np.array([1]), np.array([0.5]))
    chain = np.array([0, 4])
    result = Result(chain, 0.5, curve, chain[None], np.array([0.5]), 1234, 7, 2)
    return SearchOutput(record, make_bank(), result, {})


def test_the_table_has_all_rows_and_remarks(capsys):
    print_table(make_output())
    shown = " ".join(capsys.readouterr().out.split())
    assert "0.5000 (75.0%) │ 0.2500 (50.0%) │ not finite" in shown
    assert "plain net, as many steps" in shown
    assert "optimum of all chains │ 0.1250" in shown
    assert "in 1,234 layer calls, 34 of them gradient steps: a -> head" in shown
    assert "It is a recipe, last blocks dropped" in shown
    assert "2 of 7 scored chains had a loss that was not finite" in shown


def test_losses_have_four_decimals():
    assert format_loss(0.12345) == "0.1235"
    assert format_loss(None) == "not finite"
