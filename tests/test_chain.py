import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jchain import chain

N, K, D = 3, 2, 2
SPACE = chain.ChainSpace(N, K, D)


def all_chains(num_layers, num_heads, max_layers):
    """List every chain as a tuple, with itertools."""
    return [
        (*layers, head)
        for depth in range(max_layers + 1)
        for layers in itertools.product(range(num_layers), repeat=depth)
        for head in range(num_layers, num_layers + num_heads)
    ]


def to_tuple(row):
    return tuple(int(token) for token in row if token >= 0)


def test_enumerate_gives_every_chain_once_in_order():
    chains = SPACE.enumerate()
    assert [to_tuple(row) for row in chains] == all_chains(N, K, D)
    assert chains.shape == (SPACE.num_chains, D + 1)
    SPACE.validate(chains)


@pytest.mark.parametrize("min_layers", [1, D])
def test_chains_of_some_layers_at_least(min_layers):
    expected = [tokens for tokens in all_chains(N, K, D) if len(tokens) > min_layers]
    space = chain.ChainSpace(N, K, D, min_layers)
    chains = space.enumerate()
    assert [to_tuple(row) for row in chains] == expected
    assert len(chains) == space.num_chains
    num = 1000 * len(expected)
    rows = np.asarray(space.sample(jax.random.key(0), num))
    found, counts = np.unique(rows, axis=0, return_counts=True)
    assert {to_tuple(row) for row in found} == set(expected)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)
    for tokens in expected:
        row = jnp.array(chain.pad([tokens], D)[0])
        rows, is_there = (np.asarray(a) for a in space.neighbors(row))
        every, was_there = (np.asarray(a) for a in SPACE.neighbors(row))
        is_long = np.array([len(to_tuple(other)) > min_layers for other in every])
        np.testing.assert_array_equal(rows, every)
        np.testing.assert_array_equal(is_there, was_there & is_long)


def test_sample_is_uniform_over_all_chains():
    num = 26_000
    rows = np.asarray(SPACE.sample(jax.random.key(0), num))
    SPACE.validate(rows)
    found, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(found) == SPACE.num_chains == 26
    # The counts are Poisson with mean 1000, and the tolerance is five standard deviations.
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


@pytest.mark.parametrize("max_layers", [0, 1, 3])
def test_neighbors_are_all_chains_one_edit_away(max_layers):
    universe, space = all_chains(N, K, max_layers), chain.ChainSpace(N, K, max_layers)
    for tokens in universe:
        *layers, head = tokens
        swaps = {
            (*layers[:i], new, *layers[i + 1 :], head)
            for i in range(len(layers))
            for new in range(N)
        }
        heads = {(*layers, new) for new in range(N, N + K)}
        inserts = {
            (*layers[:i], new, *layers[i:], head)
            for i in range(len(layers) + 1)
            for new in range(N)
        }
        deletes = {(*layers[:i], *layers[i + 1 :], head) for i in range(len(layers))}
        expected = ((swaps | heads | inserts | deletes) & set(universe)) - {tokens}
        rows, is_valid = jax.jit(space.neighbors)(jnp.array(chain.pad([tokens], max_layers)[0]))
        assert len(rows) == space.num_neighbors
        found = [to_tuple(row) for row in np.asarray(rows)[np.asarray(is_valid)]]
        assert len(found) == len(set(found))
        assert set(found) == expected
        space.validate(np.asarray(rows)[np.asarray(is_valid)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [0, 1, 999],
            r"token 999 at slot 2 is out of range: expected 0..2 \(layers\), 3..4 \(heads\) or -1",
        ),
        ([0, -2, 3], "token -2 at slot 1 is out of range"),
        ([0, 1, 2], "chain 0 has no head token"),
        ([-1, -1, -1], "chain 0 has no head token"),
        ([3, 0, -1], "chain 0 has tokens after its head"),
        ([3, 4, -1], "chain 0 has tokens after its head"),
        ([-1, 3, -1], "chain 0 has padding before its head"),
        ([0.0, 1.0, 3.0], "expected chains of integer tokens, got dtype float64"),
        (np.array([0, 3]), r"expected chains of shape \[P, 3\].*got \[2\]"),
        ([[[3, -1, -1]]], "expected chains of shape"),
    ],
)
def test_validate_says_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        SPACE.validate(row)


def test_validate_names_the_first_bad_row():
    with pytest.raises(ValueError, match=r"chain 1 has no head token: .* got \[0, 1, 2\]"):
        SPACE.validate([[3, -1, -1], [0, 1, 2], [0, 0, 0]])


def test_pad():
    np.testing.assert_array_equal(chain.pad([[3], [0, 1, 4]]), [[3, -1, -1], [0, 1, 4]])
    assert chain.pad([[3]], 2).tolist() == [[3, -1, -1]]
    with pytest.raises(ValueError, match="at most 1 layers and a head, got one of 3"):
        chain.pad([[0, 1, 4]], 1)
    with pytest.raises(ValueError, match="at least one chain"):
        chain.pad([])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2**31 - 1))
def test_samples_are_chains(num_layers, num_heads, max_layers, seed):
    space = chain.ChainSpace(num_layers, num_heads, max_layers)
    rows = space.sample(jax.random.key(seed), 16)
    space.validate(rows)
    lengths = [len(to_tuple(row)) - 1 for row in np.asarray(rows)]
    np.testing.assert_array_equal(space.count_layers(rows), lengths)


def test_describe_leaves_padding_out():
    assert chain.describe([1, 3, -1], ["a", "b", "c", "head"]) == "b -> head"


def test_long_chains_of_one_layer_are_enumerated():
    chains = chain.ChainSpace(1, 2, 70).enumerate()
    assert chains.shape == (71 * 2, 71)
    np.testing.assert_array_equal((chains >= 0).sum(axis=1), np.repeat(np.arange(1, 72), 2))


def test_index_is_the_place_in_the_enumeration():
    np.testing.assert_array_equal(SPACE.index(jnp.asarray(SPACE.enumerate())), np.arange(26))
    with pytest.raises(ValueError, match=r"fewer than 2\^31 chains, got"):
        chain.ChainSpace(48, 1, 12).index(jnp.zeros(13, int))
    np.testing.assert_array_equal(SPACE.head_alone, [N, -1, -1])


def test_tokens_that_do_not_fit_into_32_bits_are_refused():
    with pytest.raises(ValueError, match=r"expected tokens below 2\^31, got \[0, 2147483648\]"):
        chain.pad([[0, 2**31]])
    np.testing.assert_array_equal(chain.pad([jnp.array([0, 3])]), [[0, 3]])
