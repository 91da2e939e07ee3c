"""Examples of several inputs, and activations that are pytrees, from data to scores."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import several_inputs as states
from conftest import assert_same_bits

import jchain as jc
from jchain.engine import layer_calls
from jchain.engine.fingerprint import compute_fingerprints
from jchain.engine.population import cast

# Without the checks of types that the tests add, as users call it.
split = inspect.unwrap(jc.data.split)
Share = jc.engine.Share


@pytest.fixture(scope="module")
def dict_problem():
    return states.make_dict_problem()


@pytest.fixture(scope="module")
def pair_problem():
    return states.make_pair_problem()


def find_losses(problem, chains, rows=slice(None)):
    """Compute the loss of each chain, by a loop in float64."""
    outputs = (states.find_outputs(problem, chain)[rows] for chain in chains)
    return np.array([states.find_loss(made, states.Y[rows]) for made in outputs])


# Evaluation


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("dict", None),
        ("dict", jc.engine.DepthFirst()),
        ("dict", jc.engine.Blocks(4, (1, 2), Share.LAYER, (1, 2))),
        ("pair", jc.engine.Blocks(16, (1, 2), Share.INPUT)),
        ("pair", jc.engine.Blocks(8, (1, 4), Share.NOTHING, (1, 2))),
    ],
    ids=str,
)
def test_every_plan_computes_what_a_loop_computes(kind, plan, dict_problem, pair_problem):
    problem = dict_problem if kind == "dict" else pair_problem
    chains, out = jc.evaluate_all(problem, plan=plan)
    np.testing.assert_array_equal(chains, problem.space.enumerate())
    np.testing.assert_allclose(out.loss, find_losses(problem, chains), rtol=2e-5)
    explanation = jc.explain_plan(problem, chains, plan=plan)
    assert (explanation.layer_calls, explanation.head_calls) == (out.layer_calls, len(chains))


def test_outputs_and_prefixes_are_those_of_a_loop(pair_problem):
    problem, chain = pair_problem, np.array([2, 0, 1, 4])
    outputs = jc.apply_chain(problem.bank, chain, problem.data.x)
    np.testing.assert_allclose(outputs, states.find_outputs(problem, chain), rtol=1e-4, atol=1e-5)
    loss = jc.evaluate_prefixes(problem, chain[None]).loss[0]
    prefixes = [[*chain[:length], 3 + head] for length in range(4) for head in range(2)]
    np.testing.assert_allclose(loss.reshape(-1), find_losses(problem, prefixes), rtol=2e-5)


def test_heads_are_called_in_parts(dict_problem, monkeypatch):
    monkeypatch.setattr(layer_calls, "_OUTPUT_LIMIT", 4 * 3 * 4)  # four examples of six
    chains = dict_problem.space.enumerate()[:7]
    loss = jc.evaluate(dict_problem, chains, plan=jc.engine.DepthFirst()).loss
    np.testing.assert_allclose(loss, find_losses(dict_problem, chains), rtol=2e-5)


def test_populations_and_problems_are_vmapped(dict_problem):
    chains = dict_problem.space.enumerate()[:6].reshape(2, 3, -1)
    together = jax.vmap(lambda rows: jc.evaluate(dict_problem, rows).loss)(chains)
    parts = [dict_problem.take(slice(i, i + 3)) for i in (0, 3)]
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part.data for part in parts))
    apart = jax.vmap(lambda one: jc.evaluate(dict_problem._replace("data", one), chains[1]).loss)(
        data
    )
    for i, part in enumerate(parts):
        rows = slice(3 * i, 3 * i + 3)
        np.testing.assert_allclose(together[i], find_losses(dict_problem, chains[i]), rtol=2e-5)
        np.testing.assert_allclose(apart[i], find_losses(dict_problem, chains[1], rows), rtol=2e-5)
        x = jax.tree.map(lambda leaf, rows=rows: leaf[rows], dict_problem.data.x)
        assert_same_bits(part.data.x, x)


def test_a_dtype_leaves_integers_and_booleans_alone(dict_problem):
    half = cast(dict_problem, np.dtype(jnp.bfloat16)).data.x
    kept = [half["side"][1], half["side"][2]]
    assert_same_bits(kept, list(dict_problem.data.x["side"][1:]))
    assert half["stream"].dtype == half["side"][0].dtype == jnp.bfloat16
    chains = dict_problem.space.enumerate()[:8]
    loss = jc.evaluate(dict_problem, chains, dtype=jnp.bfloat16).loss
    np.testing.assert_allclose(loss, find_losses(dict_problem, chains), rtol=0.05)


def test_activations_of_integers_alone_are_evaluated():
    x = {"a": jnp.arange(6), "b": jnp.arange(6) * 2}
    bank = jc.Bank.stack(
        lambda params, x: {"a": x["b"] + params, "b": x["a"]},
        [jnp.int32(1), jnp.int32(3)],
        lambda params, x: jnp.stack([x["a"], x["b"]], axis=1) * params,
        [jnp.float32(0.2)],
    )
    problem = jc.Problem(bank, jc.Batch(x, jnp.arange(6) % 2), 2)
    a, b = np.arange(6), np.arange(6) * 2
    a, b = b + 3, a
    a, b = b + 1, a
    expected = states.find_loss(0.2 * np.stack([a, b], axis=1), np.arange(6) % 2)
    np.testing.assert_allclose(jc.evaluate(problem, [[1, 0, 2]]).loss, [expected], rtol=1e-5)
    with pytest.raises(ValueError, match=r"floating-point activations.*\{'a': int32\[6\], 'b'"):
        jc.swap_scores(problem, [0, 1, 2])
    with pytest.raises(ValueError, match=r"floating-point activations.*\{'a': int32\[6\], 'b'"):
        jc.run(jax.random.key(0), jc.CriticSearch(width=2), problem, budget=10)


def test_memory_counts_every_array(dict_problem):
    x = dict_problem.data.x
    assert layer_calls.nbytes(x) == 6 * (4 * 4 + 2 * 4 + 1 + 4)
    with pytest.raises(ValueError, match="activations of 174 bytes along 3 layers"):
        jc.evaluate(dict_problem, dict_problem.space.enumerate(), memory_limit=1)


def test_fingerprints_tell_inputs_apart():
    x = {"a": jnp.arange(6.0), "b": -jnp.arange(6.0), "c": jnp.arange(6)}
    bank = jc.Bank.stack(
        lambda params, x: x, [jnp.ones(1)], lambda params, x: jnp.ones((6, 3)), [jnp.ones(1)]
    )

    def compute(x):
        problem = jc.Problem(bank, jc.Batch(x, jnp.asarray(states.Y)), 1)
        return int(compute_fingerprints(problem, jnp.array([[0, 1]]))[0])

    others = [
        x | {"a": x["b"], "b": x["a"]},
        {"a": x["a"], "b": x["b"], "d": x["c"]},
        x | {"c": x["c"].at[3].set(0)},
        (x["a"], x["b"], x["c"]),
    ]
    assert compute(dict(x)) == compute(x)
    assert len({compute(x), *map(compute, others)}) == 5


def test_layers_may_write_into_their_input():
    """As a function that changes a dict and returns it; other layers still get the dict before."""

    def write(params, x):
        x["a"] = x["a"] * params
        x["b"] += 1
        return x

    x = {"a": jnp.arange(6.0), "b": jnp.arange(6)}
    layers = [write, lambda params, x: write(params, x), write]
    weights = [jnp.float32(weight) for weight in (2, 3, 5)]
    bank = jc.Bank.stack(layers, weights, lambda params, x: x["a"], [jnp.ones(1)])
    made = layer_calls.apply_all(bank.layers, x)
    np.testing.assert_array_equal(made["a"], np.outer([2, 3, 5], np.arange(6)))
    np.testing.assert_array_equal(made["b"], np.tile(np.arange(6) + 1, (3, 1)))
    assert x["b"].tolist() == list(range(6))


# Data


def test_inputs_are_read_as_they_are_meant():
    numbers = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    y, rows = [0, 1, 0], [np.array(row) for row in numbers]
    read = inspect.unwrap(jc.data.read_batch)
    for x in (numbers, rows, tuple(rows), np.array(numbers)):  # rows of one array
        assert_same_bits(read((x, y)).x, jnp.asarray(numbers))
    pair = [np.array(numbers), np.arange(3)]
    for x in (pair, tuple(pair)):
        found = read((x, y)).x
        assert type(found) is type(x)
        assert_same_bits(found, [jnp.asarray(leaf) for leaf in pair])
    assert_same_bits(read(({"a": numbers, "b": {"c": [1, 2, 3]}}, y)).x["a"], jnp.asarray(numbers))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"a": np.zeros((6, 2)), "b": np.zeros(5)}, r"got x\['b'\] \[5\] and y \[6\]"),
        ((np.zeros((6, 2)), np.zeros((7, 3))), r"got x\[1\] \[7, 3\] and y \[6\]"),
        ({"a": np.zeros(6), "b": np.float32(1.0)}, r"got x\['b'\] \[\] and y \[6\]"),
        ({"a": np.zeros(6), "b": "words"}, r"expected x\['b'\] as an array, got str"),
        ({}, "expected x as an array, got dict"),
        (states.make_inputs() | {"stream": np.full((6, 4), np.nan)}, "expected finite examples"),
    ],
)
def test_wrong_inputs_are_named(x, words, dict_problem):
    with pytest.raises(ValueError, match=words):
        jc.Problem(dict_problem.bank, jc.Batch(x, states.Y), 1)


def test_split_standardizes_floats_and_keeps_inputs_together():
    rng, num = np.random.default_rng(0), 60
    index = np.arange(num)
    x = {
        "image": rng.normal(3, 2, (num, 4, 4, 2)),
        "rest": (5 + 0.1 * index[:, None], index, index % 3 == 0),
    }
    data = split(x, index % 2, seed=1)
    assert data.train.x["image"].shape[1:] == (4, 4, 2)
    seen = []
    mean = np.mean(x["rest"][0][np.asarray(data.train.x["rest"][1])])
    std = np.std(x["rest"][0][np.asarray(data.train.x["rest"][1])])
    for part in data[:4]:
        number, kept, mask = part.x["rest"]
        assert (number.dtype, kept.dtype, mask.dtype) == (jnp.float32, jnp.int32, bool)
        np.testing.assert_allclose(number[:, 0], (5 + 0.1 * kept - mean) / std, rtol=1e-3)
        np.testing.assert_array_equal(mask, kept % 3 == 0)
        np.testing.assert_array_equal(part.y, kept % 2)
        seen += kept.tolist()
    assert sorted(seen) == index.tolist()
    assert abs(float(data.train.x["image"].mean())) < 1e-5
    given = split(x, index % 2, seed=1, statistics=(0.0, {"image": 2.0, "rest": 1.0}))
    rows = np.asarray(given.test.x["rest"][1])
    np.testing.assert_allclose(given.test.x["image"], x["image"][rows] / 2, rtol=1e-5)
    np.testing.assert_allclose(given.test.x["rest"][0], x["rest"][0][rows], rtol=1e-5)


def test_split_names_a_wrong_input():
    y = np.arange(60) % 2
    with pytest.raises(ValueError, match=r"got x\['b'\] \[59\] and y \[60\]"):
        split({"a": np.zeros(60), "b": np.zeros(59)}, y)
    with pytest.raises(ValueError, match=r"numbers, got <U1 at x\['b'\]"):
        split({"a": np.zeros(60), "b": np.array(["a"] * 60)}, y)
    with pytest.raises(ValueError, match="expected test with the inputs of x"):
        split({"a": np.zeros(60)}, y, test=(np.zeros(60), y))


# Banks and problems


def test_layers_are_checked_with_the_shapes_of_all_inputs():
    params = states.draw_params(states.Modulate(), 1)
    side = (
        [2],
        jax.ShapeDtypeStruct((), bool),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    read = [states.Read(), states.draw_params(states.Read(), 1)]
    shape = {"stream": (4,), "side": side}
    jc.Bank.stack(states.Modulate(), params, *read, input_shape=shape)
    with pytest.raises(ValueError, match=r"layer0 \(Modulate\(\)\), token 0, does not take the in"):
        jc.Bank.stack(states.Modulate(), params, *read, input_shape={**shape, "stream": (5,)})
    with pytest.raises(ValueError, match="expected input_shape as a tuple of integers, .* got str"):
        jc.Bank.stack(states.Modulate(), params, *read, input_shape={"stream": "4"})


WRONG_LAYERS = {
    "structure": (
        lambda params, x: (x["a"], x["b"]),
        r"token 0, must keep the structure of its input: expected \{'a': float32\[6, 2\], 'b': "
        r"int32\[6\]\}, got \(float32\[6, 2\], int32\[6\]\)",
    ),
    "shape": (
        lambda params, x: {"a": x["a"][:, :1], "b": x["b"]},
        r"token 0, must keep the shape of its input: expected float32\[6, 2\] at \['a'\], got "
        r"float32\[6, 1\]",
    ),
    "dtype": (
        lambda params, x: {"a": x["a"], "b": x["b"] * 1.0},
        r"token 0, must keep the dtype of its input: expected int32 at \['b'\], got float32",
    ),
    "input": (
        lambda params, x: x["c"],
        r"token 0, does not take the input \{'a': float32\[6, 2\], 'b': int32\[6\]\}: 'c'",
    ),
}


@pytest.mark.parametrize("kind", WRONG_LAYERS)
def test_errors_name_the_layer_and_the_array(kind):
    layer, words = WRONG_LAYERS[kind]
    bank = jc.Bank.stack(layer, [None], lambda params, x: x["a"], [None], names=["first"])
    x = {"a": jnp.zeros((6, 2)), "b": jnp.arange(6)}
    with pytest.raises(ValueError, match=r"first \(<lambda>\), " + words):
        jc.Problem(bank, jc.Batch(x, states.Y % 2), 1)


def test_heads_return_one_array_and_stems_keep_examples():
    x = (jnp.zeros((6, 2)), jnp.arange(6))
    bank = jc.Bank.stack(lambda params, x: x, [None], lambda params, x: x, [None])
    with pytest.raises(ValueError, match="head0 .* must return an array, got tuple of 2"):
        jc.Problem(bank, jc.Batch(x, states.Y), 1)
    bank = jc.Bank.stack(
        lambda params, x: x, [None], lambda params, x: x[0], [None], stem=lambda _, x: (x, x[0])
    )
    words = r"stem <lambda> must keep the examples .* expected \[6, ...\] at \[1\], got float32\[2"
    with pytest.raises(ValueError, match=words):
        jc.Problem(bank, jc.Batch(x[0], states.Y % 2), 1)


@pytest.fixture(scope="module")
def stem_problem():
    """A problem of invertible layers, whose stem maps several inputs to one array."""
    layer, head = jc.layers.InvertibleDense(4), jc.layers.DenseHead(3)
    keys, x = jax.random.split(jax.random.key(0), 3), states.make_inputs()
    bank = jc.Bank.stack(
        layer,
        [layer.init(key, x["stream"])["params"] for key in keys[:2]],
        head,
        [head.init(keys[2], x["stream"])["params"]],
        stem=lambda _, x: x["stream"] * x["side"][2][:, None],
    )
    return jc.Problem(bank, jc.Batch(x, states.Y), 2)


def embed(problem):
    """Make the same problem without a stem."""
    x = problem.data.x["stream"] * problem.data.x["side"][2][:, None]
    bank = jc.Bank(problem.bank.layers, problem.bank.heads)
    return jc.Problem(bank, problem.data._replace(x=x), problem.max_layers)


def test_a_stem_maps_several_inputs_to_one_array(stem_problem):
    found, expected = (
        jc.evaluate_all(problem)[1].loss for problem in (stem_problem, embed(stem_problem))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    bank, x = stem_problem.bank, stem_problem.data.x
    made = bank.embed(x)
    for token in (1, 0):
        made = bank.layers[0].apply(token, made)
    assert jc.meet_in_the_middle(bank, x, made, 2).layers.tolist() == [[1, 0]]
    assert jc.inverse.condition_numbers(bank, [1, 0], x).shape == (6,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        jc.SuffixBeamSearch(width=2, num_candidates=2, num_probes=4),
        jc.TargetPropagation(num_chains=2),
    ],
)
def test_searches_that_need_one_array_get_it_from_a_stem(search, stem_problem):
    results = [
        jc.run(jax.random.key(1), search, problem, budget=60)
        for problem in (stem_problem, embed(stem_problem))
    ]
    np.testing.assert_array_equal(results[0].best_chain, results[1].best_chain)
    np.testing.assert_allclose(results[0].best_loss, results[1].best_loss, rtol=1e-5)


def test_a_problem_shows_its_inputs(dict_problem):
    words = "6 examples {'side': (float32[2], bool[], int32[]), 'stream': float32[4]}"
    assert words in repr(dict_problem)


# Training


@pytest.mark.slow
def test_training_steps_are_those_of_the_gradient():
    x = states.make_inputs(3)
    data = jc.Batch(x, jnp.asarray(states.Y))
    layer, head = states.Modulate(), states.Read()
    options = {"layer": layer, "head": head, "num_nets": 1, "depth": 2, "optimizer": optax.sgd(1.0)}
    start, after = (
        jc.train.independent(jax.random.key(0), data, num_steps=num, **options) for num in (0, 1)
    )

    def compute_loss(params):
        state = x
        for i in range(2):
            state = layer.apply(
                {"params": jax.tree.map(lambda leaf, i=i: leaf[i], params[0])}, state
            )
        logits = head.apply({"params": jax.tree.map(lambda leaf: leaf[0], params[1])}, state)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), data.y])

    params = start.layers[0].params, start.heads[0].params
    expected = jax.tree.map(jnp.subtract, params, jax.grad(compute_loss)(params))
    found = after.layers[0].params, after.heads[0].params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )
