"""experiments/README.md agrees with the results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("experiments_report", FOLDER / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_figures_match_the_results(report):
    text = report.render((FOLDER / "questions.md").read_text(), FOLDER / "results")
    assert text == (FOLDER / "README.md").read_text(), "run python experiments/report.py --write"


def test_no_figure_in_the_answers_is_typed_by_hand():
    # Outside of code, links, and filled-in figures, no number has a decimal point or percent sign.
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\[\[.+?\]\]", "", (FOLDER / "questions.md").read_text())
    assert re.findall(r"\d+\.\d+|\d+%", text) == []


def test_every_question_has_its_figure_and_its_command():
    sections = (FOLDER / "README.md").read_text().split("\n## ")[1:]
    assert len(sections) >= 8
    assert sections.pop().startswith("Other scripts\n")
    for section in sections:
        title = section.splitlines()[0]
        (figure,) = re.findall(r"!\[.*\]\((results/.*\.png)\)", section)
        (script,) = set(re.findall(r"`python experiments/(\w+\.py)`", section))
        assert (FOLDER / figure).exists(), title
        assert (FOLDER / script).exists(), title
        assert re.search(r"\d+ seeds", section), title


def test_the_report_runs_every_script_of_an_experiment(report):
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {
        "byte_models",
        "calibration",
        "candidates",
        "fronts",
        "records",
        "report",
    }
    assert scripts == set(report.SCRIPTS)


def test_render_names_a_missing_value(report, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"b": {"c, d": [0.125, 2]}, "seconds": 130}))
    assert (
        report.render("x [[a > b > c, d > 0 | .2f]] [[a > seconds | minutes]]", tmp_path)
        == "x 0.12 2 minutes"
    )
    for place in ("a > b > e", "a > b > c, d > 7", "other > b", "a > b > c, d > 0 > z"):
        with pytest.raises(ValueError, match=r"for \[\["):
            report.render(f"[[{place} | .2f]]", tmp_path)
