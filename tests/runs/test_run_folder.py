"""The folder of a run: what it refuses, and what it survives."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import make_bank, make_batch
from stopping import ENVIRONMENT, assert_equal

import jchain as jc

SEARCH, KEY, BUDGET = jc.LocalSearch(num_chains=3), jax.random.key(1), 60


def run(problem, folder, search=SEARCH, key=KEY, **kwargs):
    return jc.run(key, search, problem, checkpoint_dir=folder, **{"budget": BUDGET} | kwargs)


def stop_after(num_parts):
    """Return a callback that stops a run after some parts."""
    seen = []

    def callback(progress):
        seen.append(progress)
        return len(seen) >= num_parts

    return callback


@pytest.fixture
def folder(problem, tmp_path):
    """The folder of a run that was stopped twice, so that it has two checkpoints."""
    for _ in range(2):
        assert not run(problem, tmp_path / "run", callback=stop_after(1)).is_complete
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(problem):
    return jc.run(KEY, SEARCH, problem, budget=BUDGET)


def test_another_run_is_refused_and_what_differs_is_named(problem, folder, whole):
    batch, other_bank = make_batch(), make_bank(seed=9)
    changes = {
        r"search\.num_chains: 3 there, 4 here": {"search": jc.LocalSearch(num_chains=4)},
        r"search\.class: jchain\.\S* there, jchain\.\S*RandomSearch here": {
            "search": jc.RandomSearch()
        },
        r"keys: \S* uint32\[1, 2\] \[\[0, 1\]\] there": {"key": jax.random.key(0)},
        r"data: \w+ there": {"problem": jc.Problem(problem.bank, make_batch(seed=4), 3)},
        r"bank\.layers\[0\]\.weights: \w+ there": {"problem": jc.Problem(other_bank, batch, 3)},
        r"problem\.max_layers: 3 there, 2 here": {"problem": jc.Problem(problem.bank, batch, 2)},
        r"problem\.loss_fn: softmax_cross_entropy\w* \w+ there, squared_loss \w+ here": {
            "problem": jc.Problem(problem.bank, batch, 3, loss_fn=squared_loss)
        },
        r"problem\.layer_cost: float32\[\] 0\.0 there, float32\[\] 0\.5 here": {
            "problem": jc.Problem(problem.bank, batch, 3, layer_cost=0.5)
        },
        r"problem\.min_layers: 0 there, 1 here": {
            "problem": jc.Problem(problem.bank, batch, 3, min_layers=1)
        },
        r"num_finalists: 16 there, 3 here": {"num_finalists": 3},
        r"starts: \[\] there, \[\[0, 4, -1, -1\]\] here": {"starts": [[0, 4]]},
        r"record_fn: None there, find_lowest \w+ here": {"record_fn": find_lowest},
    }
    before = sorted(path.name for path in folder.rglob("*"))
    for words, change in changes.items():
        with pytest.raises(ValueError, match="got another one: .*" + words):
            run(**{"problem": problem, "folder": folder} | change)
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert_equal(run(problem, folder), whole)


def find_lowest(state, info):
    return info.loss.min()


def squared_loss(x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x, y) ** 2


def test_names_and_copies_of_the_same_arrays_make_no_difference(problem, folder, whole):
    renamed = jc.Bank.stack(
        problem.bank.layers[0].module,
        [problem.bank.get_params(token) for token in range(4)],
        problem.bank.heads[0].module,
        [problem.bank.get_params(token) for token in (4, 5)],
        names=list("abcdef"),
    )
    copied = jc.Batch(np.array(problem.data.x), np.array(problem.data.y))
    assert_equal(run(jc.Problem(renamed, copied, max_layers=3), folder), whole)


def test_a_folder_of_something_else_is_refused(problem, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected an empty folder, .* which holds notes.txt"):
        run(problem, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="expected a folder for the run, got the file"):
        run(problem, tmp_path / "notes.txt")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "jchain run 9"}', '{"identity": {}}'])
def test_a_damaged_description_is_refused(problem, folder, text):
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*run.json"):
        run(problem, folder)


def damage(path):
    """Change bytes in the middle of the largest file of a folder."""
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2 :] = bytes(byte ^ 255 for byte in data[len(data) // 2 :])
    largest.write_bytes(data)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(problem, folder, whole):
    damage(folder / "checkpoints" / "2")
    with pytest.warns(UserWarning, match=r"checkpoint 2 of .* is damaged, so an earlier one"):
        assert_equal(run(problem, folder), whole)


def test_a_checkpoint_of_which_a_part_is_missing_is_replaced_by_the_one_before(
    problem, folder, whole
):
    for path in (folder / "checkpoints" / "2" / "arrays").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.warns(UserWarning, match="checkpoint 2 of .* is damaged"):
        assert_equal(run(problem, folder), whole)


def test_without_any_whole_checkpoint_the_run_begins_anew(problem, folder, whole):
    for number in "12":
        damage(folder / "checkpoints" / number)
    with pytest.warns(UserWarning, match="checkpoint . of .* is damaged") as warned:
        assert_equal(run(problem, folder), whole)
    assert [str(one.message).partition(" of ")[0] for one in warned] == [
        "checkpoint 2",
        "checkpoint 1",
    ]


def test_a_log_that_was_changed_is_refused(problem, folder):
    log = folder / "chains.jsonl"
    log.write_text(log.read_text().replace("0", "1", 1))
    with pytest.raises(ValueError, match="expected the first .* bytes of .* got a file that was"):
        run(problem, folder)


def test_lines_after_the_checkpoint_are_cut(problem, folder, whole):
    with (folder / "chains.jsonl").open("a") as file:
        file.write('{"run": 0, "step": 99, "chain": [0')
    result = run(problem, folder, record="chains")
    assert_equal(result._replace(scored=None), whole)
    rows = [json.loads(line) for line in (folder / "chains.jsonl").read_text().splitlines()]
    assert len(rows) == result.num_scored


def test_only_two_checkpoints_are_kept(problem, folder):
    run(problem, folder, callback=stop_after(1))
    run(problem, folder)
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_a_folder_in_use_is_refused(problem, folder):
    def call_again(progress):
        run(problem, folder)

    with pytest.raises(ValueError, match=r"expected a folder that is free, .* process \d+ on "):
        run(problem, folder, callback=call_again)
    run(problem, folder)  # it is free again


CHILD = """if True:
    import signal
    import sys
    # A process that starts in the background may ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import jax
    import jchain as jc
    key, data = jax.random.key(1), jc.data.load("wine", seed=0)
    layer, head = jc.layers.ResidualMLP(13), jc.layers.DenseHead(3)
    bank = jc.train.random(key, data.train, layer=layer, head=head, num_layers=4, num_steps=0)
    result = jc.run(
        key, jc.RandomSearch(), jc.Problem(bank, data.search, 12), budget=10**9,
        checkpoint_dir=sys.argv[1], callback=lambda progress: print("part", flush=True),
    )
    print(result.is_complete, result.stopped_by, result.layer_calls > 0, flush=True)
"""


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_and_saves_it(tmp_path, name):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with process:
        assert process.stdout.readline() == "part\n"
        process.send_signal(getattr(signal, name))
        try:
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert out.splitlines()[-1] == f"False {name} True"
    assert any((tmp_path / "checkpoints").iterdir())


@pytest.fixture
def limit_files():
    """A function that limits the size of files, as a disk that is full does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# orbax leaves an event loop behind if its write fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_does_not_lose_the_run(problem, whole, tmp_path, limit_files):
    num_parts = []

    def fill(progress):
        num_parts.append(1)
        limit_files(200)

    folder = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"run cannot be written: .*\. The run goes on, but"):
        result = run(problem, folder, callback=fill, save_every=1e-3)
    assert len(num_parts) > 1
    assert result.is_complete
    assert_equal(result._replace(state=None), whole)
    limit_files(2**40)
    # With room again, the same call takes the steps that were not saved.
    assert_equal(run(problem, folder)._replace(state=None), whole)
    assert len((folder / "chains.jsonl").read_text().splitlines()) == whole.num_scored


def test_lines_that_were_half_written_are_written_again(problem, whole, tmp_path, limit_files):
    sizes = iter([200, 2**40, 300, 2**40])

    def change_limit(progress):
        limit_files(next(sizes, 2**40))

    with pytest.warns(UserWarning, match="cannot be written"):
        run(problem, tmp_path / "run", callback=change_limit)
    run(problem, tmp_path / "other")
    log, expected = ((tmp_path / name / "chains.jsonl").read_text() for name in ("run", "other"))
    assert log == expected
