"""Files that users bring: data, banks, modules, and the options of an earlier result."""

import json

import jax
import numpy as np
import pytest
from command_line import SMALL, fail, search
from sklearn.datasets import load_iris

import jchain as jc
from jchain.__main__ import main

MODULES = """
import flax.linen as nn

class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (1, x.shape[-1]))

def shift(params, x):
    return x + params
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Iris as .npz and .csv, a bank of own modules that fits it, and the modules."""
    path = tmp_path_factory.mktemp("own")
    x, y = load_iris(return_X_y=True)
    np.savez(path / "iris.npz", x=x, y=y)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    lines = [
        "kind,a,b,c,d",
        *(f"{n},{','.join(map(str, row))}" for n, row in zip(names, x, strict=True)),
    ]
    (path / "iris.csv").write_text("\n".join(lines) + "\n")
    (path / "mine.py").write_text(MODULES)
    scope = {"__name__": "mine"}
    exec(MODULES, scope)
    head = jc.layers.DenseHead(3)
    data = jc.data.split(x, y, seed=0)
    scale = scope["Scale"]()
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [scale.init(key, data.train.x)["params"] for key in keys[:2]]
    heads = [head.init(key, data.train.x)["params"] for key in keys[2:]]
    jc.Bank.stack(scale, layers, head, heads, parents=[(0, 1, 2)]).save(path / "bank.safetensors")
    return path


def run(folder, out, *options):
    return main(["search", *options, "--out", str(out), "--budget", "40", "--quick"])


@pytest.mark.slow
def test_files_of_data_give_the_splits_of_their_arrays(folder, tmp_path, capsys):
    losses = []
    for options in (["iris.npz"], ["iris.csv", "--target", "kind"]):
        out = tmp_path / options[0]
        code = main(
            [
                "search",
                "--data",
                str(folder / options[0]),
                *options[1:],
                *SMALL[2:],
                "--search",
                "random",
                "--quick",
                "--out",
                str(out),
            ]
        )
        assert code == 0
        record = json.loads((out / "result.json").read_text())
        losses.append(record["loss"])
        assert record["num_examples"] == {"search": 30, "select": 21, "test": 24}
    assert losses[0] == losses[1]
    # What evaluate scores is the data of the search.
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "iris.csv"), "--split", "test", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chains"][0]["loss"] == pytest.approx(losses[0]["test"], rel=1e-5)


@pytest.mark.slow
def test_a_bank_file_with_modules_is_searched(folder, tmp_path):
    options = ["--bank-file", str(folder / "bank.safetensors"), "--data", str(folder / "iris.npz")]
    out = tmp_path / "out"
    assert run(folder, out, *options, "--modules", str(folder / "mine.py")) == 0
    record = json.loads((out / "result.json").read_text())
    assert record["config"]["max_layers"] == 2
    assert record["layers"][-1] in ("head0", "head1")
    assert "best_parent" in record["controls"]
    assert "plain_net" not in record["controls"]
    assert main(["evaluate", str(out), "--all", "1"]) == 0


@pytest.mark.slow
def test_standard_output_is_only_json(tmp_path, capsys):
    search(tmp_path / "out", "--search", "local", "--quick")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["layers"]
    assert "best chain found" in captured.err
    assert main(["evaluate", str(tmp_path / "out"), "--all", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["chains"]) == 5
    assert captured.err.count("loss ") == 5


@pytest.mark.slow
def test_the_options_of_an_earlier_result_are_overridden(tmp_path):
    search(tmp_path / "a", "--search", "local", "--seed", "3", "--quick")
    again = ["search", "--quick", "--config", str(tmp_path / "a"), "--out"]
    assert main([*again, str(tmp_path / "b")]) == 0
    records = [json.loads((tmp_path / n / "result.json").read_text()) for n in "ab"]
    assert records[0]["best_chain"] == records[1]["best_chain"]
    assert records[0]["loss"] == records[1]["loss"]
    other = [str(tmp_path / "c"), "--seed", "0", "--search", "random"]
    assert main([*again, *other]) == 0
    config = json.loads((tmp_path / "c" / "result.json").read_text())["config"]
    wanted = {**records[0]["config"], "seed": 0, "search": "random"}
    for name, value in wanted.items():
        if name not in ("out", "command"):
            assert config[name] == value
    # The file itself is accepted, too.
    file, out = tmp_path / "a" / "result.json", tmp_path / "d"
    assert main(["search", "--quick", "--config", str(file), "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "@none.npz"], "No such file"),
        (["--data", "@bad.npz"], "expected arrays x and y in"),
        (
            ["--data", "@iris.npz", "--target", "kind"],
            "expected --target only with --data FILE.csv",
        ),
        (["--data", "wine", "--target", "kind"], "expected --target only with --data FILE.csv"),
        (
            ["--data", "@iris.csv", "--target", "knd"],
            "expected --target of kind, a, b, c, d, got 'knd'",
        ),
        (["--data", "@iris.csv"], "got 'setosa' in the column kind"),
        (["--data", "@real.npz"], "expected classes as labels in"),
        (["--data", "@ragged.csv"], "expected as many cells in each line"),
        (["--bank-file", "@none"], "none"),
        (["--bank-file", "@bank.safetensors", "--data", "@iris.npz"], "unknown module 'Scale'"),
        (
            ["--bank-file", "@bank.safetensors", "--depth", "3"],
            "expected no --depth with --bank-file",
        ),
        (
            ["--bank-file", "@bank.safetensors", "--modules", "@none.py"],
            "expected a Python file",
        ),
        (
            ["--bank-file", "@bank.safetensors", "--modules", "@broken.py"],
            "failed with ZeroDiv",
        ),
        (["--modules", "@mine.py"], "expected --bank-file with --modules"),
        (
            ["--task", "repair", "--bank-file", "@bank.safetensors"],
            "expected no --bank-file with",
        ),
        (["--config", "@"], "expected a result folder, or its result.json or summary.json"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(folder, tmp_path, capsys, options, message):
    np.savez(folder / "bad.npz", a=np.ones(2))
    np.savez(folder / "real.npz", x=np.ones((40, 2)), y=np.linspace(0, 1, 40))
    (folder / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (folder / "broken.py").write_text("1 / 0\n")
    filled = [option.replace("@", f"{folder}/") for option in options]
    out = tmp_path / "out"
    assert message in fail(["search", *filled, "--out", str(out)], capsys)
    assert not out.exists()


def test_a_small_budget_for_a_bank_file_leaves_no_folder(folder, tmp_path, capsys):
    options = ["--bank-file", str(folder / "bank.safetensors"), "--data", str(folder / "iris.npz")]
    options += ["--modules", str(folder / "mine.py"), "--search", "beam", "--seeds", "2"]
    out = tmp_path / "new" / "out"
    assert main(["search", *options, "--out", str(out), "--budget", "3"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(
        "costs 2 layer calls here in addition to 2 for the starts, 4 in all, got 3"
    )
    assert list(tmp_path.iterdir()) == []
