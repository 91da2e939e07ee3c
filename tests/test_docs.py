"""The examples of the documentation run."""

import re
from pathlib import Path

import pytest
from api_tables import update
from checkpoints import make_model_and_text
from conftest import optimizations

import jchain as jc

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    str(path.relative_to(DOCS).with_suffix("")): path.read_text()
    for path in sorted(DOCS.rglob("*.md"))
}
EXAMPLES = {
    name: examples
    for name, text in PAGES.items()
    if (examples := re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}


# These compute more than they compile.
COSTLY = {"start", "api/tasks"}
# These take the longest, and other tests cover what they use.
SLOW = {
    "api/agent",
    "api/chainbench",
    "api/plot",
    "api/tasks",
    "choose-a-search",
    "cost",
    "large-data",
    "own-data",
    "own-layers",
    "runs",
    "stages",
    "start",
    "write-a-search",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in sorted(set(EXAMPLES) - {"transformers"})
    ],
)
def test_examples_run(name, capsys):
    scope = {}
    with optimizations(name in COSTLY):
        for example in EXAMPLES[name]:
            exec(compile(example, f"{name}.md", "exec"), scope)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_transformers_runs(tmp_path, monkeypatch):
    """Leave out the block that needs transformers; tests/hub/test_parity.py runs them all."""
    monkeypatch.chdir(tmp_path)
    make_model_and_text(tmp_path)
    scope = {}
    for example in EXAMPLES["transformers"]:
        if "import transformers" not in example:
            exec(compile(example, "transformers.md", "exec"), scope)
    assert jc.hub.load("shallower").num_layers <= 4 + 2


def test_tables_of_results_are_those_of_the_experiments():
    results = DOCS.parent / "experiments" / "results"
    for page, name in [
        ("choose-a-search", "arena"),
        ("results", "arena"),
        ("results", "arena_large"),
        ("results", "transformer_depth"),
    ]:
        assert (results / f"{name}.md").read_text().rstrip() in PAGES[page]


def test_tables_of_the_api_are_up_to_date():
    for name, page in PAGES.items():
        if name.startswith("api/"):
            assert update(page) == page, f"{name}: run python tests/api_tables.py"


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    for path in DOCS.rglob("*.md"):
        assert str(path.relative_to(DOCS)) in navigation


def test_every_search_is_on_the_page_that_compares_them():
    for name in jc.__all__:
        value = getattr(jc, name)
        if hasattr(value, "init") and hasattr(value, "step") and name not in ("Search", "env"):
            assert f"`jc.{name}`" in PAGES["choose-a-search"]
            assert f"jchain.{name}\n" in (DOCS / "api" / "searches.md").read_text()
