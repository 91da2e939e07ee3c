import numpy as np
import pytest
from scipy.stats import ttest_1samp

from jchain.cli.config import SearchConfig
from jchain.cli.seeds import compare_pairs, summarize
from jchain.cli.tables import print_summary

FOUND = (0.25, 0.5, 0.125)
PARENT = (2.25, 3.5, 1.125)
PLAIN = (0.3, 0.4, 0.2)


def make_scores(loss):
    return {"loss": {"test": loss}, "accuracy": {"test": 0.5}}


def make_records(found=FOUND):
    records = []
    for seed, losses in enumerate(zip(found, PARENT, PLAIN, strict=True)):
        own, parent, plain = map(make_scores, losses)
        controls = {"recipes": {}, "best_parent": parent, "plain_net": plain}
        if seed > 0:  # a control that one seed lacks has no row
            controls["local_search"] = plain
        record = {
            **own,
            "about": f"digits {seed}",
            "layers": ["undo it", "net/0", "net/head"],
            "num_examples": {"test": 749},
            "controls": controls,
            "config": {"seed": 10 + seed},
        }
        records.append(record)
    return records


def test_differences_have_the_interval_of_a_paired_t_test():
    rows = np.array([-0.3, -0.1, -0.45, 0.05])
    bounds = ttest_1samp(rows, 0).confidence_interval()
    found = compare_pairs(rows)
    assert found.mean == pytest.approx(rows.mean())
    assert found.bounds == pytest.approx([bounds.low, bounds.high])
    assert compare_pairs([0.5]) == (0.5, None)


def test_seeds_are_compared_pair_by_pair():
    summary = summarize(SearchConfig(), make_records(), 3.14)
    assert summary["seeds"] == [10, 11, 12]
    rows = summary["rows"]
    assert list(rows) == ["best chain found", "best parent", "plain net, same steps"]
    parent, plain = rows["best parent"], rows["plain net, same steps"]
    assert parent["difference"] == pytest.approx(-2.0)
    assert parent["interval"] == pytest.approx(compare_pairs([-2.0, -3.0, -1.0]).bounds)
    assert (parent["num_lower"], plain["num_lower"]) == (3, 2)
    assert plain["interval"][0] < 0 < plain["interval"][1]
    noise = "(on average no difference beyond noise)"
    assert f"the best parent in 3 of 3 seeds {noise}" in summary["sentence"]
    assert f"and the plain net in 2 of 3 seeds {noise}" in summary["sentence"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        # 2 below the parent in each seed, and 2 above it.
        (
            (0.25, 1.5, -0.875),
            "in 3 of 3 seeds (2.000 lower on average, 95% interval 2.000 to 2.000)",
        ),
        (
            (4.25, 5.5, 3.125),
            "in 0 of 3 seeds (2.000 higher on average, 95% interval 2.000 to 2.000)",
        ),
    ],
)
def test_the_sentence_says_how_sure_a_difference_is(found, said):
    summary = summarize(SearchConfig(), make_records(found=found), 0.0)
    assert f"It beats the best parent {said}" in summary["sentence"]


def test_a_loss_that_is_not_finite_has_no_difference():
    summary = summarize(SearchConfig(), make_records(found=(0.25, None, 0.125)), 0.0)
    row = summary["rows"]["best parent"]
    assert (row["difference"], row["interval"], row["num_lower"]) == (None, None, 2)
    assert summary["rows"]["best chain found"]["mean"] is None


def test_the_summary_is_printed_with_every_chain(capsys):
    summary = summarize(SearchConfig(), make_records(), 0.0)
    print_summary(summary)
    shown = " ".join(capsys.readouterr().out.split())
    assert "seed 11, digits 1: undo it -> net/0 -> net/head" in shown
    assert "test, 749 examples: mean ± standard error over 3 seeds" in shown
    error = np.std(FOUND, ddof=1) / np.sqrt(3)
    assert f"best chain found 0.292 ± {error:.3f} 50.0%" in shown
    low, high = summary["rows"]["plain net, same steps"]["interval"]
    cells = f"0.300 ± 0.058 50.0% -0.008 [{low:+.3f}, {high:+.3f}] (noise) 2 of 3"
    assert f"plain net, same steps {cells}" in shown
    assert summary["sentence"] in shown
