import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_bank, make_batch

import jchain as jc
from jchain.agent.encoding import ActorCriticNetwork, entry_features

OBSERVED = jc.ObservedEncoding(jc.agent.observations.observe, features=8)
JOINT = jc.JointEncoding((jc.TokenEncoding(features=8), OBSERVED))
# The first two encodings observe nothing.
ENCODINGS = [jc.TokenEncoding(features=8), jc.WeightEncoding(features=8), OBSERVED, JOINT]
EMPTY = jnp.arange(3.0)  # features of the empty prefix


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode(encoding, params, entries, tokens):
    features = EMPTY
    carry = encoding.apply(params, entries, features, method="init_carry")
    for token in tokens:
        # This behaves like data: each layer changes it in a way that depends on the layers before.
        features = 0.5 * features + entries[token, :3]
        carry = encoding.apply(params, carry, jnp.array(token), entries, features, method="advance")
    return encoding.apply(params, carry, method="read")


def init(encoding, entries):
    network = ActorCriticNetwork(encoding)
    params = network.init(jax.random.key(0), entries, EMPTY)
    return network, params, {"params": params["params"]["encoding"]}


def test_entry_features_follow_the_entry_not_its_token(two_group_bank):
    features = entry_features(two_group_bank)
    assert features.shape == (7, 66)
    assert features[:, -1].tolist() == [0] * 5 + [1] * 2
    order = [4, 0, 2, 1, 3, 6, 5]
    permuted = entry_features(two_group_bank.take(order[:5], order[5:]))
    np.testing.assert_allclose(permuted, features[np.array(order)], atol=1e-5)


def test_sketch_keeps_inner_products_of_weights():
    bank = make_bank(40, 1)
    sketch = np.asarray(entry_features(bank, size=4096))[:40, :-2]
    weights = np.concatenate(
        [leaf.reshape(40, -1) for leaf in jax.tree.leaves(bank.layers[0].params)], axis=1
    )
    weights = weights - weights.mean(axis=0)
    exact, sketched = weights @ weights.T, sketch @ sketch.T
    # Up to a scale of the sketch, its Gram matrix is that of the weights.
    scale = np.sum(exact * sketched) / np.sum(exact**2)
    assert np.abs(sketched / scale - exact).max() < 0.1 * np.abs(exact).max()


def test_equal_entries_have_equal_features_and_broken_ones_finite():
    bank = make_bank(3, 2)
    doubled = jc.Bank.concat([bank, bank])
    features = np.asarray(entry_features(doubled))
    np.testing.assert_allclose(features[:3], features[3:6], atol=1e-6)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), bank)
    assert np.all(np.isfinite(entry_features(broken)))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_know_the_order_and_the_number_of_layers(encoding):
    entries = entry_features(make_bank(5, 1))
    _, _, params = init(encoding, entries)
    prefixes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
    codes = [encode(encoding, params, entries, prefix) for prefix in prefixes]
    for i in range(len(codes)):
        for j in range(i):
            assert np.abs(np.subtract(codes[i], codes[j])).max() > 1e-3, (prefixes[i], prefixes[j])


def test_discrete_encodes_tokens_and_continuous_encodes_weights():
    bank = make_bank(4, 1)
    swapped = bank.take([1, 0, 2, 3])
    for encoding, follows in zip(ENCODINGS[:2], ((0, 2), (1, 2)), strict=True):
        entries, moved = entry_features(bank), entry_features(swapped)
        _, _, params = init(encoding, entries)
        # Equal tokens have equal discrete codes, and equal weights have equal continuous codes.
        code = encode(encoding, params, entries, (0, 2))
        np.testing.assert_allclose(encode(encoding, params, moved, follows), code, atol=1e-5)
        other = (1, 2) if follows == (0, 2) else (0, 2)
        assert np.abs(encode(encoding, params, moved, other) - code).max() > 1e-3


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_network_reads_banks_of_any_size(encoding):
    network, params, _ = init(encoding, entry_features(make_bank(4, 2)))
    for num_layers, num_heads in ((2, 1), (9, 3)):
        entries = entry_features(make_bank(num_layers, num_heads))
        logits, value = network.apply(params, entries, EMPTY)
        assert logits.shape == (num_layers + num_heads,)
        assert value.shape == ()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_actor_selects_entries_by_their_features(encoding):
    bank = make_bank(4, 2)
    network, params, _ = init(encoding, entry_features(bank))
    entries = entry_features(bank)
    keys = network.apply(params, entries, method="embed")
    state = network.apply(
        params, network.apply(params, entries, EMPTY, method="init_carry"), method="read"
    )
    logits, _ = network.apply(params, state + 1.0, keys, method="act")
    order = jnp.array([3, 1, 0, 2, 5, 4])
    permuted, _ = network.apply(params, state + 1.0, keys[order], method="act")
    np.testing.assert_allclose(permuted, logits[order], rtol=1e-5)
    assert np.ptp(logits) > 0


def test_observed_encodings_by_hand_and_joined():
    """Features, change, and number of layers pass through two layers and a norm."""
    entries = entry_features(make_bank(4, 1))
    _, _, params = init(OBSERVED, entries)
    last = np.array([0.3, -1.0, 2.0])
    carry = OBSERVED.apply(params, entries, EMPTY, method="init_carry")
    for now in (EMPTY + 5.0, jnp.asarray(last)):
        carry = OBSERVED.apply(params, carry, jnp.array(1), entries, now, method="advance")
    weights = jax.tree.map(np.asarray, params["params"])
    hidden = np.concatenate([last, last - np.arange(3.0), [2.0]]) @ weights["hidden"]["kernel"]
    normed = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-6)
    expected = np.tanh(np.maximum(normed, 0) @ weights["out"]["kernel"])
    np.testing.assert_allclose(
        OBSERVED.apply(params, carry, method="read"), expected, rtol=1e-4, atol=1e-5
    )

    _, _, both = init(JOINT, entries)
    parts = [
        encode(part, {"params": both["params"][f"parts_{i}"]}, entries, (2, 0))
        for i, part in enumerate(JOINT.parts)
    ]
    np.testing.assert_allclose(
        encode(JOINT, both, entries, (2, 0)), np.concatenate(parts), rtol=1e-5
    )
    assert (JOINT.features, JOINT.observe) == (16, jc.agent.observations.observe)


def test_joined_encodings_reject_different_observations():
    other = jc.ObservedEncoding(jc.agent.observations.observe_gradients)
    for parts in ((), (OBSERVED, other)):
        with pytest.raises(
            ValueError, match="expected at least one encoding, and those that observe"
        ):
            jc.JointEncoding(parts)


@pytest.mark.parametrize("scale", [1e20, 3e38, 1e-30])
def test_features_of_entries_are_finite_for_finite_weights(bank, scale):
    groups = [
        dataclasses.replace(group, params=jax.tree.map(lambda leaf: scale * leaf, group.params))
        for group in bank.layers
    ]
    scaled = dataclasses.replace(bank, layers=tuple(groups))
    assert np.isfinite(entry_features(scaled)).all()
    some = dataclasses.replace(
        bank,
        layers=(
            dataclasses.replace(
                bank.layers[0],
                params=jax.tree.map(lambda leaf: leaf.at[1].mul(scale), bank.layers[0].params),
            ),
        ),
    )
    assert np.isfinite(entry_features(some)).all()


@pytest.mark.slow
def test_a_search_with_huge_weights_spends_its_budget(bank):
    params = jax.tree.map(lambda leaf: leaf.at[1].mul(1e20), bank.layers[0].params)
    huge = dataclasses.replace(bank, layers=(dataclasses.replace(bank.layers[0], params=params),))
    problem = jc.Problem(huge, make_batch(), 3)
    result = jc.run(jax.random.key(0), jc.ActorCritic(num_chains=8), problem, budget=300)
    assert result.ended_by == "budget"
