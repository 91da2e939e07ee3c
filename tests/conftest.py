"""Shared setup: jaxtyping and beartype check signatures, and rank promotion is an error."""

import gc
import os
from contextlib import contextmanager
from pathlib import Path

# XLA's older emitters compile these small programs in two thirds of the time. To test with the
# default ones, set XLA_FLAGS to an empty string. JAX reads the variable when it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import numpy as np
import psutil
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# These tests spend most of their time on compilation. Few optimizations make it shorter, and so
# does a cache of programs from an earlier run, if JAX_COMPILATION_CACHE_DIR is set.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

with install_import_hook("jchain", "beartype.beartype"):
    import jchain as jc

# Programs and their traces are millions of objects that stay, so look for garbage less often.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

LAYER, HEAD = jc.layers.ResidualMLP(5, hidden=7), jc.layers.DenseHead(3)


@contextmanager
def optimizations(is_on=True):
    """Compile with optimizations, for tests that compute more than they compile."""
    jax.config.update("jax_disable_most_optimizations", not is_on)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def init_params(module, key, num, shape):
    """Make random params. Biases are random too, or zeros would hide a bias that is left out."""
    params = [
        module.init(k, jax.numpy.ones((1, *shape)))["params"] for k in jax.random.split(key, num)
    ]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def make_bank(num_layers=4, num_heads=2, seed=0, layer=LAYER, **kwargs):
    """Make a small bank of random weights for 5 features and 3 classes."""
    layer_key, head_key = jax.random.split(jax.random.key(seed))
    return jc.Bank.stack(
        layer,
        init_params(layer, layer_key, num_layers, (5,)),
        HEAD,
        init_params(HEAD, head_key, num_heads, (5,)),
        **kwargs,
    )


def make_batch(num_examples=9, seed=1):
    x_key, y_key = jax.random.split(jax.random.key(seed))
    return jc.Batch(
        jax.random.normal(x_key, (num_examples, 5)),
        jax.random.randint(y_key, (num_examples,), 0, 3),
    )


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Clear caches between modules that use much memory."""
    yield
    if psutil.Process().memory_info().rss > 2**31:
        jax.clear_caches()
    _forget_many_programs()


@pytest.fixture(autouse=True)
def _forget_programs_of_slow_tests(request):
    yield
    if request.node.get_closest_marker("slow"):
        _forget_many_programs()


def _forget_many_programs():
    """Clear caches: programs use mappings, and a process can have only so many."""
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def bank():
    return make_bank()


@pytest.fixture(scope="session")
def two_group_bank():
    """A bank of five layers of two modules, and two heads."""
    return jc.Bank.concat([make_bank(3, 1), make_bank(2, 1, seed=5, layer=jc.layers.Dense(5))])


@pytest.fixture(scope="session")
def problem(bank):
    return jc.Problem(bank, make_batch(), max_layers=3)


@pytest.fixture(scope="session")
def two_group_problem(two_group_bank):
    return jc.Problem(two_group_bank, make_batch(), max_layers=3)


@pytest.fixture(scope="session")
def digits():
    return jc.data.load("digits", seed=0)


def assert_trees_close(a, b, rtol, atol):
    """Compare two trees, except for one bias.

    A bias that all keys share changes no choice. Its gradient is only rounding error, which Adam
    turns into full-sized steps.
    """

    def check(path, x, y):
        if "['key_out']['bias']" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)

    jax.tree_util.tree_map_with_path(check, a, b)


def assert_same_bits(a, b):
    """Check that two trees have the same dtypes and bytes."""
    leaves, other = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves) == len(other) > 0
    for x, y in zip(leaves, other, strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
