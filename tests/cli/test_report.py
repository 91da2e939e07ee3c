"""`jchain report` writes one page that holds the figures of the results."""

import json
import re
import shutil
import subprocess

import pytest
from command_line import fail

from jchain.__main__ import main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def read_page(path):
    text = path.read_text()
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)  # nothing is loaded
    return text


def list_figures(page):
    return re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="([^"]*)">', page)


@pytest.fixture(scope="module")
def page_of_checkpoints(checkpoint_result, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(checkpoint_result), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_a_page_of_several_results_holds_their_figures(result_folder, tmp_path, capsys):
    for i in range(3):
        folder = shutil.copytree(result_folder, tmp_path / f"r{i}")
        record = json.loads((folder / "result.json").read_text())
        record["loss"] = {"search": 0.5 + i, "select": 2.5 - i, "test": 1.0 + 0.5 * i}
        record["config"] |= {"seed": i}
        if i == 2:
            record["config"] |= {"search": "local", "bank": "<b>"}
        (folder / "result.json").write_text(json.dumps(record))
    out = tmp_path / "report.html"
    folders = [str(tmp_path / f"r{i}") for i in range(3)]
    assert main(["report", *folders, "--out", str(out)]) == 0
    assert f"Wrote {out}" in capsys.readouterr().out
    page = read_page(out)
    # The comparison: the mean of seeds 0 and 1 on test, and the only loss of the other search.
    assert re.search(r"<td[^>]*>r0</td><td>2</td>.*<td>1\.250 \[[^<]*\]</td>", page)
    assert re.search(r"<td[^>]*>r2</td><td>1</td>.*<td>2\.000</td>", page)
    finalist = json.loads((tmp_path / "r2" / "result.json").read_text())["finalists"][0]
    assert f"<td>{finalist['search_loss']:.4f}</td><td>{finalist['deciding_loss']:.4f}</td>" in page
    assert "On test, the best chain found has a mean loss of 1.250" in page
    assert "What follows is the result of seed 1" in page  # the lowest loss on select
    # Options that differ come first, and text is escaped.
    options = page[page.index("Options, those that differ first") :]
    differing = [options.index(f">{name}</td>") for name in ("search", "bank")]
    assert max(differing) < options.index(">data</td>")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert list_figures(page) == [
        "Best loss on search over the cost",
        "Lowest loss by number of layers",
        "Chains of r0",
        "Swaps in the best chain of r0",
        "Chains of r2",
        "Swaps in the best chain of r2",
    ]


def test_a_page_of_checkpoints_has_maps_of_runs_of_blocks(page_of_checkpoints):
    page = read_page(page_of_checkpoints)
    figures = list_figures(page)
    for model in ("m0", "m1"):
        for what in ("repeated", "dropped"):
            assert f"Blocks i to j of {model}, {what}" in figures
    assert page.count("Loss on search minus that of the unchanged model") == 4


def test_older_results_and_missing_files_are_said(result_folder, tmp_path, capsys):
    folder = shutil.copytree(result_folder, tmp_path / "old")
    (folder / "search.json").unlink()
    (folder / "bank.safetensors").unlink()
    out = tmp_path / "report.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    assert "No heat maps of old: " in capsys.readouterr().err
    page = read_page(out)
    assert "its curve and its front are missing" in page
    assert "Heat maps are missing: " in page
    assert main(["report", str(folder), "--out", str(out), "--no-maps"]) == 0
    assert "Heat maps are missing" not in read_page(out)
    err = fail(["report", str(folder), "--out", str(tmp_path / "none" / "r.html")], capsys)
    assert "expected a file in a folder that exists, got" in err
    (tmp_path / "empty").mkdir()
    before = out.read_bytes()
    err = fail(["report", str(tmp_path / "empty"), "--out", str(out)], capsys)
    assert "expected a result folder, got" in err
    assert out.read_bytes() == before


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_the_tables_without_errors(
    page_of_checkpoints, checkpoint_result, tmp_path
):
    assert BROWSER is not None
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --dump-dom"
    options += f" --enable-logging=stderr --virtual-time-budget=2000 --user-data-dir={tmp_path}"
    command = [BROWSER, *options.split(), page_of_checkpoints.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", done.stdout)
    record = json.loads((checkpoint_result / "result.json").read_text())
    assert any(cell.startswith(f"{record['loss']['test']:.3f}") for cell in cells)
    for row in record["finalists"]:
        assert f"{row['search_loss']:.4f}" in cells
        assert " -&gt; ".join(row["layers"]) in cells
