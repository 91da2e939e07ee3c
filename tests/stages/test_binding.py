"""Banks with stages: what they compute, their shapes, files, and errors."""

import dataclasses
import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from conftest import assert_same_bits

import jchain as jc
from jchain.stages.binding import bind, unbind

NUM_LAYERS = len(nets.LAYERS)


@pytest.fixture(scope="module")
def bank():
    return nets.make_bank()


@pytest.fixture(scope="module")
def problem(bank):
    return jc.Problem(bank, nets.make_batch(), max_layers=4)


def list_legal(max_layers):
    """List the legal chains by following the stages of every product of layers."""
    for length in range(max_layers + 1):
        for layers in itertools.product(range(NUM_LAYERS), repeat=length):
            stage = 0
            for token in layers:
                read, write = nets.STAGES[token]
                stage = write if stage == read else None
            if stage == 2:
                for head in (NUM_LAYERS, NUM_LAYERS + 1):
                    yield [*layers, head] + [-1] * (max_layers - length)


def test_losses_of_all_legal_chains_equal_a_loop_in_float64(problem):
    chains, out = jc.evaluate_all(problem)
    assert chains.tolist() == list(list_legal(4))
    drawn, (x, y) = nets.make_variables(), nets.make_batch()
    with jax.enable_x64(True):
        stem, layers, heads = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn)
        start = nets.STEM.apply(stem, np.asarray(x, np.float64))
        known = {(): start}
        for chain, loss in zip(chains.tolist(), out.loss, strict=True):
            tokens = tuple(token for token in chain if 0 <= token < NUM_LAYERS)
            for end in range(1, len(tokens) + 1):
                prefix = tokens[:end]
                if prefix not in known:
                    module = nets.LAYERS[prefix[-1]][0]
                    known[prefix] = module.apply(layers[prefix[-1]], known[prefix[:-1]])
            head = chain[len(tokens)] - NUM_LAYERS
            logits = np.asarray(nets.Head().apply(heads[head], known[tokens]))
            assert logits.dtype == np.float64
            log_sum = np.log(np.exp(logits).sum(axis=1))
            expected = (log_sum - logits[np.arange(len(y)), np.asarray(y)]).mean()
            np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)


def test_apply_chain_and_predict_give_the_plain_outputs(bank, problem):
    chain, (x, _) = [0, 2, 4, 8], nets.make_batch()
    stem, layers, heads = nets.make_variables()
    plain = nets.STEM.apply(stem, x)
    for token in chain[:-1]:
        plain = nets.LAYERS[token][0].apply(layers[token], plain)
    plain = nets.Head().apply(heads[1], plain)
    for found in (
        jc.apply_chain(bank, chain, x),
        jc.apply_chain(problem.bank, chain, x[:4]),
        jc.predict(problem, [*chain, -1]),
    ):
        np.testing.assert_allclose(found, plain[: len(found)], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reads stage 1, got stage 0 at slot 0"):
        jc.apply_chain(bank, [4, 7], x)


def test_activations_are_flat_and_padded_with_zeros(problem):
    hidden = problem.bank.embed(problem.data.x)
    assert hidden.shape == (6, 8 * 8 * 3)
    state, _ = jc.env.step(problem, jc.env.reset(problem), jnp.asarray(2))
    assert (state.hidden[:, : 4 * 4 * 4] != 0).any()
    assert (state.hidden[:, 4 * 4 * 4 :] == 0).all()


def test_illegal_chains_are_refused_on_the_host_and_infinite_inside_jit(bank, problem):
    message = (
        "chain 0: expected a chain whose layers follow each other: layer 0 'a' reads stage 0, got "
        "stage 1 at slot 2"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        jc.evaluate(problem, [[0, 2, 0, 7, -1]])
    with pytest.raises(ValueError, match="head 1 'head1' reads stage 2, got stage 1 at slot 1"):
        bank.validate([[2, 4, 7], [2, 8, -1]])
    rows = jnp.array([[0, 2, 0, 7, -1], [2, 4, 7, -1, -1], [7, -1, -1, -1, -1]])
    loss = np.asarray(jax.jit(lambda rows: jc.evaluate(problem, rows).loss)(rows))
    assert np.isfinite(loss).tolist() == [False, True, False]


def test_every_prefix_is_scored_with_the_heads_that_read_its_stage(problem):
    loss = np.asarray(jc.evaluate_prefixes(problem, [[0, 2, 4, 7, -1]]).loss[0])
    assert np.isfinite(loss).all(axis=1).tolist() == [False, False, False, True, False]
    chains = [[0, 2, 4, 7, -1], [0, 2, 4, 8, -1]]
    np.testing.assert_allclose(loss[3], jc.evaluate(problem, chains).loss, rtol=1e-5)


def test_saved_pickled_joined_and_taken_banks_keep_their_stages(bank, problem, tmp_path):
    path = tmp_path / "bank.safetensors"
    for own in (bank, problem.bank):
        own.save(path)
        loaded = jc.Bank.load(path, [nets.Block, nets.Down, nets.Head])
        assert loaded.stages == bank.stages
        assert_same_bits(loaded, bank)
    for made in (pickle.loads(pickle.dumps(bank)), bank.reserve(0)):
        assert made.stages == bank.stages
    again = pickle.loads(pickle.dumps(problem))
    assert jax.tree.structure(again.bank.heads[0].params) is not None
    assert again.bank.layers[0].module == problem.bank.layers[0].module
    both = jc.Bank.concat([problem.bank, bank])
    assert both.stages.layer_stages == bank.stages.layer_stages * 2
    assert both.stages.head_stages == (2, 2, 2, 2)
    taken = bank.take([2, 6, 5], [8])
    assert taken.stages.layer_stages == ((0, 1), (1, 2), (2, 2))
    x = nets.make_batch().x
    np.testing.assert_allclose(
        jc.apply_chain(taken, [0, 1, 3], x), jc.apply_chain(bank, [2, 6, 8], x), rtol=1e-4
    )
    assert [name for name in bank.reserve(1).names if "spare" in name] == [
        f"spare{NUM_LAYERS + i}" for i in range(len(bank.layers))
    ]
    assert bank.reserve(1).stages.layer_stages[NUM_LAYERS:] == tuple(g.stages for g in bank.layers)


def test_binding_again_fits_other_images_and_unbinding_restores_the_bank(bank):
    other = jnp.zeros((2, 12, 12, 1))
    assert bind(bind(bank, nets.make_batch().x), other).embed(other).shape == (2, 12 * 12 * 3)
    restored = unbind(bind(bank, other))
    assert jax.tree.structure(restored) == jax.tree.structure(bank)


def test_a_bank_says_its_stages(bank):
    assert "1 Down(4) (stage 0 to 1), 1 Block() (stage 1)" in repr(bank)
    assert "2 heads: 2 Head() (stage 2)" in repr(bank)


def stack(stages, modules=None, **kwargs):
    _, layers, heads = nets.make_variables()
    modules = modules or [module for module, _, _ in nets.LAYERS]
    return jc.Bank.stack(
        modules, layers, nets.Head(), heads[:1], stages=stages, input_shape=(8, 8, 3), **kwargs
    )


WRONG = [
    ([(0, 0)] * 6, {}, "expected the stages of 7 layers, got those of 6"),
    ([(0, 0, 1)] * 7, {}, "expected stages as one pair .* or a list of one pair per layer, got"),
    ((0, -1), {}, "expected stages as one pair"),
    (3, {}, "expected stages as one pair"),
    (nets.STAGES, {"head_stages": (2, 2)}, "expected the stages of 1 heads, got those of 2"),
    (nets.STAGES, {"head_stages": "2"}, "expected head_stages as the number of the stage"),
    (
        [(0, 0)] * 3 + nets.STAGES[3:],
        {},
        r"layer2 \(Down\(4\)\), token 2, must keep the shape .*expected float32\[2, 8, 8, 3\], got "
        r"float32\[2, 4, 4, 4\]",
    ),
    (
        [*nets.STAGES[:6], (0, 1)],
        {},
        r"layer6 \(Down\(6\)\), token 6, does not take an input of shape \[2, 8, 8, 3\]",
    ),
    (
        [*nets.STAGES[:5], (2, 2), (1, 1)],
        {},
        r"layer6 .*token 6, must keep the shape of stage 1: expected float32\[2, 4, 4, 4\], got "
        r"float32\[2, 2, 2, 6\]",
    ),
    (nets.STAGES, {"head_stages": 3}, r"from stage 0 to stage 3, which head0 .* reads, got none"),
    (
        [*nets.STAGES[:5], (3, 3), (1, 2)],
        {"head_stages": 2},
        r"from stage 0 to stage 3, which layer5 \(Block\(\)\), token 5, reads, got none",
    ),
    (
        nets.STAGES,
        {"parents": [[0, 4, 7]]},
        "layer 4 'layer4' reads stage 1, got stage 0 at slot 1",
    ),
]


@pytest.mark.parametrize(("stages", "kwargs", "message"), WRONG)
def test_wrong_stages_are_named(stages, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        stack(stages, **kwargs)
    assert "\n" not in str(error.value)


def test_two_layers_that_write_one_stage_in_different_shapes_are_named():
    one, two = nets.Down(4), nets.Down(6)
    params = [nets.init(own, jax.random.key(0), (8, 8, 3)) for own in (one, two)]
    head = [nets.init(nets.Head(), jax.random.key(0), (4, 4, 4))]
    bank = jc.Bank.stack([one, two], params, nets.Head(), head, stages=(0, 1))
    message = (
        "layer1 (Down(6)), token 1, must write stage 1 in the shape that layer0 (Down(4)), token 0 "
        "gives it: expected float32[5, 4, 4, 4], got float32[5, 4, 4, 6]"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jc.Problem(bank, jc.Batch(np.zeros((5, 8, 8, 3)), np.zeros(5, int)), max_layers=2)


def halve(params, x):
    return x[:, ::2] * params


def to_integers(params, x):
    return x.astype(int)


def make_half_bank(layers, stages, **kwargs):
    params = [np.float32(1.0)] * len(layers)
    return jc.Bank.stack(layers, params, halve, [np.float32(1.0)], stages=stages, **kwargs)


def test_a_layer_that_changes_the_dtype_is_told_apart():
    bank = make_half_bank([halve, to_integers], [(0, 1), (1, 1)])
    with pytest.raises(ValueError, match="token 1, must keep the dtype .* expected float32, got"):
        jc.Problem(bank, jc.Batch(np.zeros((5, 8), np.float32), np.zeros(5, int)), 2)


def test_too_few_layers_to_reach_a_head_are_refused(bank):
    with pytest.raises(ValueError, match="a chain of 0 to 1 layers from stage 0 .* got none"):
        jc.Problem(bank, nets.make_batch(), max_layers=1)


def test_a_bank_of_functions_without_a_stem_has_stages_too():
    x = jnp.arange(40, dtype=jnp.float32).reshape(5, 8)
    bank = make_half_bank([halve, halve], [(0, 1), (1, 1)], head_stages=1)
    with pytest.raises(ValueError, match="must keep the shape of stage 1"):
        jc.Problem(bank, jc.Batch(x, np.zeros(5, int)), 1)
    bank = make_half_bank([halve], [(0, 1)])
    np.testing.assert_allclose(jc.apply_chain(bank, [0, 1], x), x[:, ::4])
    problem = jc.Problem(bank, jc.Batch(x, jnp.zeros(5, int)), 1)
    assert problem.bank.embed(x).shape == (5, 8)
    chains, out = jc.evaluate_all(problem)
    assert chains.tolist() == [[0, 1]]
    in_parts = jc.Problem(bank, problem.data, 1, batch_size=2)
    np.testing.assert_allclose(jc.evaluate(in_parts, chains).loss, out.loss, rtol=1e-6)


def test_costs_of_a_layer_are_those_of_its_stage(bank):
    x = nets.make_batch().x[:1]
    for own in (bank, jc.Problem(bank, nets.make_batch(), 3).bank):
        flops = jc.token_costs(own, "flops", x=x)
        # With SAME padding, XLA counts only products with pixels inside the image: along an axis of
        # n pixels, 3 n - 2 of the 3 n that a 3x3 filter makes.
        for token, (size, channels) in {0: (8, 3), 3: (4, 4), 5: (2, 6)}.items():
            conv = 2 * channels**2 * (3 * size - 2) ** 2
            assert 0 < flops[token] - conv < 12 * size**2 * channels
        assert flops[0] == flops[1]
        assert flops[2] - 2 * 4 * 3 * 4 * 16 in (16 * 4, 2 * 16 * 4)
    chains = [[0, 2, 4, 7, -1], [1, 2, 4, 7, -1], [2, 3, 4, 7, -1]]
    found = jc.cost(bank, chains, x=x)
    expected = [sum(flops[token] for token in chain if token >= 0) for chain in chains]
    np.testing.assert_allclose(found.flops, expected)
    assert found.params[0] != found.params[2]


def test_a_limit_of_flops_is_kept_across_stages(bank):
    flops = jc.token_costs(bank, "flops", x=nets.make_batch().x[:1])
    whole = jc.Problem(bank, nets.make_batch(), 4, token_costs=flops)
    chains = whole.space.enumerate()
    costs = np.asarray(whole.chain_cost(jnp.asarray(chains)))
    limit = float(np.median(costs))
    problem = dataclasses.replace(whole, max_cost=limit)
    drawn = jc.env.sample_chains(jax.random.key(0), problem, 300)
    assert problem.space.contains(drawn).all()
    assert (problem.chain_cost(drawn) <= limit * 1.0001).all()
    with pytest.raises(ValueError, match=f"a max_cost of at least {costs.min():g}"):
        dataclasses.replace(whole, max_cost=0.9 * costs.min())
