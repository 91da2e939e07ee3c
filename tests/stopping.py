"""Helpers that stop runs and compare results. They do not need the checks of conftest."""

import os
from pathlib import Path

import jax
import numpy as np

import jchain as jc
from jchain.runs.result import Result

BUDGET = 150
# Other processes compile as quickly as the tests do.
ENVIRONMENT = {
    **os.environ,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.parent / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def assert_equal(found: Result, expected: Result):
    if found.state is None or expected.state is None:  # states are kept with files only
        found, expected = (result._replace(state=None) for result in (found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, one), other in leaves:
        assert np.asarray(one).dtype == np.asarray(other).dtype, path
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


def run_in_parts(folder, key, search, problem, budget=BUDGET, **kwargs):
    """Run a search that is stopped after each of its first parts, and count the calls."""
    for num_calls in range(1, 20):
        result = jc.run(
            key,
            search,
            problem,
            budget=budget,
            checkpoint_dir=folder,
            callback=lambda progress, n=num_calls: n < 6,
            **kwargs,
        )
        if result.is_complete:
            return result, num_calls
        assert result.stopped_by == "callback"
    raise AssertionError("expected the run to end")
