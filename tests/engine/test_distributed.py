"""Several devices and processes. Each test starts processes with a fixed number of devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jchain as jc
from jchain.__main__ import main

TESTS = Path(__file__).parent
START = (
    "import os, sys; import jax, jax.numpy as jnp, numpy as np; import jchain as jc\n"
    "from conftest import *\n"
    "from several_inputs import make_dict_problem\n"
)
MESH = """
problem = jc.Problem(make_bank(), make_batch(), 3)
mesh = jax.make_mesh((2, 4), ("a", "b"))
for num in (1, 45):
    chains = jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(num), num)
    # The order of sums is the same where nodes are called one by one, whatever a device has.
    plans = ((jc.engine.DepthFirst(), 0), (jc.engine.Blocks(4, (1,)), 0), (None, 1e-6))
    for plan, tolerance in plans if num > 1 else plans[:1]:
        one, many = (jc.evaluate(problem, chains, plan=plan, mesh=m) for m in (None, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance), one, many)
        assert len(many.loss.devices()) == 8
assert jc.explain_plan(problem, chains, mesh=mesh).num_devices == 8
one, many = jc.evaluate_prefixes(problem, chains), jc.evaluate_prefixes(problem, chains, mesh=mesh)
np.testing.assert_allclose(one.loss, many.loss, rtol=1e-6)
one, many = jc.evaluate_all(problem)[1], jc.evaluate_all(problem, mesh=mesh)[1]
np.testing.assert_allclose(one.loss, many.loss, rtol=1e-6)
spread = problem.with_mesh(mesh)
assert spread.with_mesh(mesh) is spread
made = jc.Problem(make_bank(), make_batch(), 3, mesh=mesh)
assert made.mesh == spread.mesh and made.with_mesh(mesh) is made
for other in (made, made.with_data(make_batch())):
    assert all(len(leaf.devices()) == 8 for leaf in jax.tree.leaves(other))
one, many = jc.evaluate(problem, chains), jc.evaluate(made, chains)
np.testing.assert_allclose(one.loss, many.loss, rtol=1e-6)
populations = jnp.stack([chains, chains[::-1]])
losses = jax.jit(jax.vmap(lambda chains: jc.evaluate(spread, chains).loss))(populations)
np.testing.assert_allclose(losses[1], jc.evaluate(problem, chains[::-1]).loss, rtol=1e-6)
key, search = jax.random.key(0), jc.RandomSearch(16)
results = [jc.run(key, search, problem, budget=150, mesh=m) for m in (None, mesh)]
np.testing.assert_array_equal(results[0].best_chain, results[1].best_chain)
np.testing.assert_allclose(results[0].curve.best_loss, results[1].curve.best_loss, rtol=1e-6)
import stopping, tempfile
options = {"mesh": mesh, "record": "chains"}
whole = jc.run(key, search, problem, budget=150, **options)
found, calls = stopping.run_in_parts(tempfile.mkdtemp(), key, search, problem, 150, **options)
assert calls > 1
stopping.assert_equal(found, whole)
several = make_dict_problem(num_layers=4)
one, many = (jc.evaluate(several, chains[:9], mesh=m) for m in (None, mesh))
np.testing.assert_allclose(one.loss, many.loss, rtol=1e-6)
first, second = jax.devices()[:2]
apart = jc.Problem(jax.device_put(problem.bank, first), jax.device_put(problem.data, second), 3)
try:
    jc.evaluate(apart, chains)
except ValueError as error:
    assert "expected bank, data, and chains on the same devices, got them on" in str(error), error
else:
    raise AssertionError("devices that differ were accepted")
print("passed")
"""
TWO_DEVICES = """
problem = jc.Problem(make_bank(), make_batch(), 3)
mesh = jax.make_mesh((2,), ("a",))
chains = problem.space.sample(jax.random.key(0), 45)
one, many = (jc.evaluate(problem, chains, mesh=m) for m in (None, mesh))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, many)
assert len(many.loss.devices()) == 2
print("passed")
"""
TWO_PROCESSES = """
jc.engine.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
problem = jc.Problem(make_bank(), make_batch(), 3)
chains = np.asarray(jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(0), 45))
mesh = jc.engine.distributed.make_mesh()
assert jax.process_count() == 2 and mesh.size == 2
for plan, tolerance in ((jc.engine.DepthFirst(), 0), (None, 1e-6)):
    one, many = (jc.evaluate(problem, chains, plan=plan, mesh=m) for m in (None, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance), one, many)
key, search = jax.random.key(0), jc.RandomSearch(16)
results = [jc.run(key, search, problem, budget=150, mesh=m) for m in (None, mesh)]
np.testing.assert_array_equal(results[0].best_chain, results[1].best_chain)
np.testing.assert_allclose(results[0].best_loss, results[1].best_loss, rtol=1e-6)
# If one process stops, all do.
ask = lambda progress: jax.process_index() == 1
stopped = jc.run(key, search, problem, budget=150, mesh=mesh, callback=ask)
assert (stopped.is_complete, stopped.stopped_by) == (False, "callback")
# The first process saves, and all continue.
import stopping
options = {"mesh": mesh, "record": "chains"}
whole = jc.run(key, search, problem, budget=150, keep_state=True, **options)
found, calls = stopping.run_in_parts(sys.argv[3], key, search, problem, 150, **options)
assert calls > 1
stopping.assert_equal(found, whole)
assert found.state is not None
try:
    jc.run(jax.random.key(7), search, problem, budget=150, mesh=mesh, checkpoint_dir=sys.argv[3])
except ValueError as error:
    assert "got another one: keys" in str(error), error
else:
    raise AssertionError("another run was accepted")
try:
    policy = jc.updates.Frozen()
    policy.run(key, search, problem.with_mesh(mesh), make_batch(), budget=150, checkpoint_dir="run")
except ValueError as error:
    assert "expected checkpoint_dir=None with a mesh of several processes" in str(error), error
else:
    raise AssertionError("an update policy accepted several processes")
# Without a mesh, each process saves a run of its own.
own = os.path.join(sys.argv[3], "..", f"own{jax.process_index()}")
saved = jc.run(key, search, problem, budget=150, checkpoint_dir=own)
np.testing.assert_array_equal(saved.best_chain, results[0].best_chain)
print("passed")
"""


def start(code, *args, num_devices=1):
    environment = os.environ | {
        "XLA_FLAGS": " ".join(
            [
                os.environ["XLA_FLAGS"],
                f"--xla_force_host_platform_device_count={num_devices}",
            ]
        ),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "PYTHONWARNINGS": "ignore",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, *(["-c", START + code] if code else ["-m", "jchain"]), *args]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_two_devices_give_the_losses_of_one():
    code, out, err = finish(start(TWO_DEVICES, num_devices=2))
    assert (code, out.split()[-1:]) == (0, ["passed"]), err


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one():
    code, out, err = finish(start(MESH, num_devices=8))
    assert (code, out.split()[-1:]) == (0, ["passed"]), err


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path):
    address = free_address()
    processes = [start(TWO_PROCESSES, address, str(i), str(tmp_path / "run")) for i in range(2)]
    for code, out, err in map(finish, processes):
        assert (code, out.split()[-1:]) == (0, ["passed"]), err


@pytest.mark.slow
def test_evaluate_distributed_prints_once(tmp_path, capsys):
    options = [
        "--data",
        "wine",
        "--num-layers",
        "4",
        "--depth",
        "2",
        "--num-steps",
        "30",
        "--budget",
        "100",
    ]
    assert main(["search", *options, "--search", "random", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    scored = ["evaluate", str(tmp_path / "out"), "--all", "2", "--json"]
    assert main(scored) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    together = [
        "--distributed",
        "--coordinator",
        free_address(),
        "--num-processes",
        "2",
        "--process-id",
    ]
    first, second = map(finish, [start("", *scored, *together, str(i)) for i in range(2)])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "loss" not in second[1]
    rows = json.loads(first[1].splitlines()[-1])
    assert rows["layer_calls"] == alone["layer_calls"] == 4 + 16
    assert len(rows["chains"]) == len(alone["chains"]) == 10
    for row, expected in zip(rows["chains"], alone["chains"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    optimum = json.loads((tmp_path / "out" / "result.json").read_text())["optimum"]
    assert rows["chains"][0]["loss"] == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize("process_id", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_distributed_times_out_if_a_process_never_joins(process_id):
    place = [
        "--coordinator",
        free_address(),
        "--num-processes",
        "2",
        "--process-id",
        process_id,
        "--timeout",
        "2",
    ]
    code, out, err = finish(start("", "evaluate", "nowhere", "--distributed", *place))
    assert code == 2
    assert "jchain: error: expected 2 processes to join at 127.0.0.1:" in err
    assert "within 2 seconds" in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "host:1"], "expected --distributed with --coordinator"),
        (
            ["--distributed", "--process-id", "0"],
            "expected coordinator, num_processes, and process_id together",
        ),
        (
            [
                "--distributed",
                "--coordinator",
                "host:1",
                "--num-processes",
                "2",
                "--process-id",
                "2",
            ],
            "expected a process_id in 0..1, got 2",
        ),
    ],
)
def test_distributed_rejects_bad_options(capsys, options, message):
    assert main(["evaluate", "nowhere", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_mesh_of_one_device_changes_nothing(problem):
    chains = jc.chain.ChainSpace(4, 2, 3).sample(jax.random.key(0), 9)
    one, same = (
        jc.evaluate(problem, chains),
        jc.evaluate(problem, chains, mesh=jc.engine.distributed.make_mesh()),
    )
    assert one.loss.tolist() == same.loss.tolist()
