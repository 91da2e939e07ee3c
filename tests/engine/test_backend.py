import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.engine import backend
from jchain.engine.backend import compiler_options, default_memory_limit, jit_for_problem

GIB = 2**30


@pytest.fixture
def cgroup_files(monkeypatch, tmp_path):
    """Paths that replace a container's limit files, versions 2 and 1; neither file exists yet."""
    paths = (tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes")
    monkeypatch.setattr(backend, "_CGROUP_LIMITS", paths)
    monkeypatch.setattr(backend, "_get_host_memory", lambda: 16 * GIB)
    return paths


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, 4 * GIB),
        ("max\n", 4 * GIB),
        ("9223372036854771712\n", 4 * GIB),
        (f"{2 * GIB}\n", GIB // 2),
    ],
)
def test_the_limit_of_a_container_counts_if_it_is_lower(cgroup_files, version, text, expected):
    if text is not None:
        cgroup_files[version].write_text(text)
    assert default_memory_limit() == expected


def test_the_memory_of_the_machine_is_known_without_psutil(monkeypatch):
    with_psutil = backend._get_host_memory()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert backend._get_host_memory() == with_psutil > 0


def test_one_program_for_problems_that_differ_only_in_names():
    traces = []

    @jit_for_problem(static_argnames=("factor",))
    def penalty(problem, chains, *, factor):
        traces.append(problem.bank.names)
        return factor * problem.penalty(chains)

    problems = [
        jc.Problem(make_bank(2, 1, names=names), make_batch(), 1, layer_cost=0.5)
        for names in (["a", "b", "c"], ["d", "e", "f"])
    ]
    chains = jnp.array([[0, 2]])
    assert [float(penalty(problem, chains, factor=3)[0]) for problem in problems] == [1.5, 1.5]
    assert len(traces) == 1
    # JAX rejects compiler options inside of another jit, so there must be none.
    inside = jax.jit(lambda problem, chains: penalty(problem, chains, factor=2))
    assert inside(problems[0], chains)[0] == 1.0


def test_compiler_options_of_other_backends_are_empty():
    assert compiler_options("gpu") == {}
