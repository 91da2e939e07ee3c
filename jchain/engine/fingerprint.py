"""Fingerprints of what the loss of a chain depends on, to recognize losses that are out of date."""

import dataclasses
import zlib
from functools import partial
from types import CodeType, FunctionType

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jchain._typing import Array, Int, UInt
from jchain.bank import Bank
from jchain.modules.activations import is_one_array
from jchain.modules.host_batch import HostBatch
from jchain.problem import Problem
from jchain.pytree import is_concrete

# How many numbers are read from each leaf of a layer's weights. To read all of them at each step
# would take as long as many layer calls.
_NUM_READ = 64
# Odd constants of Murmur3's finalizer.
_MIX = (0x85EBCA6B, 0xC2B2AE35)


def compute_fingerprints(problem: Problem, chains: Int[Array, "P L"]) -> UInt[Array, "P"]:
    """Return a hash, for each chain, of everything that its loss depends on besides its tokens.

    The examples, the labels, the costs, and the versions of the weights are read in full. Of
    the weights, at most 64 evenly spaced numbers of each leaf are read: enough to tell banks apart,
    but weights that are changed in place need new versions (`Bank.replace`). Works under `jit`,
    where a loop computes the hash of the problem only once.

    Args:
      problem: the problem to identify.
      chains: the tokens of the chains, `[P, L]`.
    """
    functions = [problem.loss_fn, problem.accuracy_fn]
    described = [describe_function(function) for function in functions]
    data = problem.data
    if isinstance(data, HostBatch):
        described.append(data.source.fingerprint)
        x, y = data.first
    else:
        x, y = data
    if not is_one_array(x):
        described += [keystr(path) for path, _ in tree_leaves_with_path(x)]
    value = jnp.uint32(zlib.crc32(repr(described).encode()))
    stem = jax.tree.map(lambda leaf: _sample(leaf[None]), problem.bank.stem_params)
    costs = problem.layer_cost, problem.token_costs, problem.max_cost
    for leaf in jax.tree.leaves(((x, y), costs, stem)):
        value = _mix(value ^ _hash(leaf))
    entries = _hash_entries(problem.bank)
    own = jnp.where(chains >= 0, entries[jnp.maximum(chains, 0)], jnp.uint32(0))
    return value ^ own.sum(axis=1, dtype=jnp.uint32)


def _hash_entries(bank: Bank) -> UInt[Array, "E"]:
    """Hash the version and a sample of the weights of each layer and head."""
    values = _mix(bank.get_versions().astype(jnp.uint32) + 1)
    for group in (*bank.layers, *bank.heads):
        members = jnp.zeros(len(group.tokens), jnp.uint32)
        for leaf in jax.tree.leaves((group.params, group.state)):
            members = _mix(members ^ jax.vmap(_hash)(_sample(leaf)))
        values = values.at[np.array(group.tokens)].add(members)
    return values


def describe_function(value: object, outer: tuple[object, ...] = ()) -> object:
    """Describe a function by what it computes, as far as Python shows it.

    Args:
      value: the function, or a value that it holds.
      outer: the values that are being described, because a function may refer to itself.
    """
    if any(value is other for other in outer):
        return "itself"
    describe = partial(describe_function, outer=(*outer, value))
    if isinstance(value, partial):
        keywords = [(name, describe(own)) for name, own in sorted(value.keywords.items())]
        return describe(value.func), [describe(own) for own in value.args], keywords
    if isinstance(value, np.ndarray | jax.Array) and is_concrete(value):
        array = np.asarray(value)
        return array.shape, array.dtype.name, zlib.crc32(array.tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return type(value).__qualname__, [(name, describe(own)) for name, own in named]
    if isinstance(value, tuple | list):
        return [describe(own) for own in value]
    if not isinstance(value, FunctionType):
        # Of a jitted function, the function that was jitted.
        wrapped = getattr(value, "__wrapped__", None)
        return repr(value) if wrapped is None else describe(wrapped)
    defaults = (*(value.__defaults__ or ()), *sorted((value.__kwdefaults__ or {}).items()))
    inner = [cell.cell_contents for cell in value.__closure__ or ()]
    given = [describe(own) for own in (*defaults, *inner)]
    return value.__qualname__, _describe_code(value.__code__), given


def _describe_code(code: CodeType) -> object:
    """Describe the instructions of a function, and those of the functions inside it."""
    constants = [_describe_constant(constant) for constant in code.co_consts]
    return code.co_code, code.co_names, constants


def _describe_constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _describe_code(value)
    # The order of a set is another one in each process.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _sample(leaf: Array) -> Array:
    """Take evenly spaced numbers of each member: `[n, ...]` to `[n, m]`."""
    rows = leaf.reshape(leaf.shape[0], -1)
    return rows[:, :: max(1, -(-rows.shape[1] // _NUM_READ))]


def _hash(leaf: Array) -> UInt[Array, ""]:
    """Hash the bits and the shape of an array; the order of its numbers matters."""
    words = _to_words(leaf)
    position = jnp.arange(words.size, dtype=jnp.uint32)
    total = jnp.sum(_mix(words ^ _mix(position + 1)), dtype=jnp.uint32)
    return total + jnp.uint32(zlib.crc32(repr((leaf.shape, str(leaf.dtype))).encode()))


def _to_words(leaf: Array) -> UInt[Array, "N"]:
    leaf = jnp.asarray(leaf).reshape(-1)
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    if leaf.dtype.itemsize > 4:
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(-1)
    kind = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)


def _mix(value: UInt[Array, "*N"]) -> UInt[Array, "*N"]:
    """Spread each bit over all bits (Murmur3's finalizer)."""
    value = (value ^ (value >> 16)) * jnp.uint32(_MIX[0])
    value = (value ^ (value >> 13)) * jnp.uint32(_MIX[1])
    return value ^ (value >> 16)
