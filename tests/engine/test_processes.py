"""Threads, forks, and processes of their own."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax
import numpy as np
import pytest
from stopping import ENVIRONMENT

import jchain as jc

FORK = """
import os, sys
import numpy as np, jax, jchain as jc
from conftest import make_bank, make_batch
problem = jc.Problem(make_bank(), make_batch(), 3)
chains = [[0, 1, 4]]
key = jax.random.key(0)
jc.evaluate(problem, chains).loss.block_until_ready()
pid = os.fork()
if pid == 0:
    for call in (
        lambda: jc.evaluate(problem, chains),
        lambda: jc.run(key, jc.RandomSearch(), problem, budget=100),
    ):
        try:
            call()
        except RuntimeError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def evaluate(problem, chains):
    return np.asarray(jc.evaluate(problem, chains).loss)


@pytest.mark.slow
def test_threads_get_the_losses_of_one(problem):
    populations = [np.asarray(problem.space.sample(jax.random.key(i), 9 + i)) for i in range(12)]
    expected = [evaluate(problem, chains) for chains in populations]
    jc.clear_caches()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda chains: evaluate(problem, chains), populations))
    for own, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, wanted)


def test_a_process_of_its_own_gets_the_same_losses(problem):
    chains = np.asarray(problem.space.sample(jax.random.key(0), 9))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(evaluate, problem, chains).result(timeout=120)
    np.testing.assert_allclose(found, evaluate(problem, chains), rtol=1e-6)


def test_a_fork_is_told_that_it_cannot_compute():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": "tests"},
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("got a fork of one in which JAX has computed" in line for line in lines)
