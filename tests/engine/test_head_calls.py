"""Heads whose outputs are read in parts give the losses of outputs that are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jchain as jc
from jchain import env
from jchain.engine import head_calls
from jchain.gradient.layer_report import report_layers
from jchain.losses import PartSizes, ReadTokens
from tests import checkpoints
from tests.edit_references import use_float64

VOCABULARY, LENGTH = 23, 5
SMALL = PartSizes(4, 9)
x64 = pytest.fixture(use_float64)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = checkpoints.write_config(
        tmp_path_factory.mktemp("model"), checkpoints.GPT2 | {"vocab_size": VOCABULARY}
    )
    found = jc.hub.random_bank(jax.random.key(0), folder)
    # Larger weights, so that chains differ.
    return jax.tree.map(lambda leaf: 20 * leaf, found)


@pytest.fixture
def read_in_parts(monkeypatch):
    """Return a context in which outputs are read in parts, which small ones are not by default."""
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(head_calls, "_MIN_OUTPUTS", 2)
        patch.setattr(head_calls, "_CPU_SIZES", SMALL)
        yield patch
    jax.clear_caches()


def make_text(num=9, seed=1):
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=(num, LENGTH + 1))
    return jc.Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


def make_questions(num=7, num_choices=3, seed=2):
    """Make questions of which few tokens count."""
    rng = np.random.default_rng(seed)
    x = rng.integers(VOCABULARY, size=(num, num_choices, LENGTH))
    y = np.where(rng.random(x.shape) < 0.2, rng.integers(VOCABULARY, size=x.shape), -1)
    y[..., 3] = 1
    return jc.Batch(jnp.asarray(x), jnp.asarray(y))


def make_problems(bank, **options):
    text, questions = make_text(), make_questions()
    ignored = text._replace(y=jnp.where(text.x % 3 == 0, -1, text.y).at[0].set(-1))
    hub = jc.hub
    pairs = [
        (text, {}),
        (ignored, {"loss_fn": hub.next_token_loss, "accuracy_fn": hub.next_token_accuracy}),
        (questions, {"loss_fn": hub.choice_loss, "accuracy_fn": hub.choice_accuracy}),
    ]
    return [jc.Problem(bank, data, 2, **own, **options) for data, own in pairs]


def score_plainly(problem):
    """Score all chains by their outputs, in a loop."""
    chains = problem.space.enumerate()
    pairs = [problem.loss_and_accuracy(jnp.asarray(jc.predict(problem, row))) for row in chains]
    return np.array(pairs, np.float64).T


def check_close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_small_outputs_are_kept_and_large_ones_are_not(bank, read_in_parts):
    problem = make_problems(bank)[0]
    hidden = bank.embed(problem.data.x)
    assert head_calls.is_read_in_parts(problem, hidden)
    read_in_parts.undo()
    assert not head_calls.is_read_in_parts(problem, hidden)


@pytest.mark.parametrize(
    "plan",
    [jc.engine.DepthFirst(), jc.engine.Blocks(4, (1, 2), head_widths=(1, 2)), None],
    ids=["depth-first", "blocks", "chosen"],
)
def test_every_plan_gives_the_losses_of_plain_outputs(bank, read_in_parts, plan):
    for problem in make_problems(bank):
        found = jc.evaluate_all(problem, plan=plan)[1]
        check_close((found.loss, found.accuracy), score_plainly(problem))


@pytest.mark.slow
@pytest.mark.parametrize("share", list(jc.engine.Share))
def test_every_way_to_share_calls_gives_the_same_losses(bank, read_in_parts, share):
    problem = make_problems(bank)[1]
    plan = jc.engine.Blocks(4, (1, 2), share, head_widths=(1, 2))
    found = jc.evaluate_all(problem, plan=plan)[1]
    check_close((found.loss, found.accuracy), score_plainly(problem))


@pytest.mark.slow
def test_several_heads_and_seeds_give_the_same_losses(bank, read_in_parts):
    other = jax.tree.map(lambda leaf: -leaf, bank)
    both = jc.Bank.concat([bank, dataclasses.replace(other, stem_params=bank.stem_params)])
    for problem in make_problems(both)[1:2]:
        chains, out = jc.evaluate_all(problem)
        check_close((out.loss, out.accuracy), score_plainly(problem))
        losses = env.head_losses(problem, both.embed(problem.data.x))
        check_close(losses, out.loss[:2])
        populations = jnp.asarray(chains[:12]).reshape(2, 6, -1)
        by_seed = jax.vmap(lambda rows, problem=problem: jc.evaluate(problem, rows).loss)
        check_close(by_seed(populations).reshape(-1), out.loss[:12])


@pytest.mark.slow
def test_parts_of_a_split_that_is_read_in_parts(bank, read_in_parts):
    for whole, problem in zip(make_problems(bank), make_problems(bank, batch_size=2), strict=True):
        found = jc.evaluate_all(problem)[1]
        check_close((found.loss, found.accuracy), score_plainly(whole))


@pytest.mark.slow
def test_half_precision_is_close(bank, read_in_parts):
    for problem in make_problems(bank):
        found = jc.evaluate_all(problem, dtype=jnp.bfloat16)[1].loss
        np.testing.assert_allclose(found, score_plainly(problem)[0], rtol=0.05, atol=0.05)


def test_a_loss_that_needs_the_outputs_and_labels_of_another_shape_get_them(bank, read_in_parts):
    def square(outputs, y):
        return jnp.square(outputs).mean(axis=-1)

    text = make_text()
    problem = jc.Problem(bank, text, 2, loss_fn=square)
    assert not head_calls.is_read_in_parts(problem, bank.embed(text.x))
    found = jc.evaluate_all(problem)[1]
    check_close((found.loss, found.accuracy), score_plainly(problem))
    mixed = jc.hub.mixed_loss([(square, 0.5), (optax.softmax_cross_entropy_with_integer_labels, 1)])
    problem = jc.Problem(bank, text, 2, loss_fn=mixed)
    assert not head_calls.is_read_in_parts(problem, bank.embed(text.x))
    check_close(jc.evaluate_all(problem)[1].loss, score_plainly(problem)[0])


def test_only_the_tokens_that_count_are_read(bank):
    text, ignored, questions = make_problems(bank)
    assert text.read_tokens is None
    y = np.asarray(questions.data.y) >= 0
    total, most = y.sum(), y.sum(axis=(1, 2)).max()
    assert total <= questions.read_tokens.total <= total * 9 / 8
    assert most <= questions.read_tokens.most <= most * 9 / 8
    # The bound of some examples, which may repeat, holds for all of them.
    rows = jnp.array([int(y.sum(axis=(1, 2)).argmax())] * 5)
    assert questions.take(rows).read_tokens.total >= 5 * most
    assert questions.take(slice(3)).read_tokens.total >= y[:3].sum()
    assert questions.read_part(0, 2).read_tokens.total <= 2 * questions.read_tokens.most
    parts = make_problems(bank, batch_size=2)[2]
    assert parts.read_tokens == questions.read_tokens
    assert parts.first_part().read_tokens.total >= y[:2].sum()
    assert (
        ignored.with_data(questions.data._replace(y=jnp.zeros_like(questions.data.y))) is not None
    )


def test_splits_of_nearly_as_many_tokens_share_a_program():
    y = np.full((4, 100), -1)
    y[:, :40] = 0
    first, second = (
        jc.problem.count_tokens((jc.hub.next_token_loss.token_loss,), [labels])
        for labels in (y, np.where(np.arange(100) == 39, -1, y))
    )
    assert first == second == ReadTokens(160, 40)


@pytest.mark.slow
def test_examples_that_repeat_are_all_counted(bank, read_in_parts):
    questions = make_problems(bank)[2]
    rows = jnp.array([4, 4, 4, 4, 1, 1])
    part = questions.take(rows)
    fresh = questions.with_data(jc.Batch(questions.data.x[rows], questions.data.y[rows]))
    chains = questions.space.enumerate()
    check_close(jc.evaluate(part, chains).loss, score_plainly(fresh)[0])
    traced = jax.jit(lambda rows: jc.evaluate(questions.take(rows), chains).loss)(rows)
    check_close(traced, score_plainly(fresh)[0])


def test_labels_that_are_traced_are_all_read(bank, read_in_parts):
    questions = make_problems(bank)[2]
    other = make_questions(seed=5)
    chains = questions.space.enumerate()
    found = jax.jit(lambda data: jc.evaluate(questions.with_data(data), chains).loss)(other)
    check_close(found, score_plainly(questions.with_data(other))[0])


def test_a_sequence_whose_labels_are_all_ignored_has_loss_0(bank, read_in_parts):
    text = make_text(3)
    problem = jc.Problem(
        bank, text._replace(y=jnp.full_like(text.y, -1)), 2, loss_fn=jc.hub.next_token_loss
    )
    assert float(jc.evaluate_all(problem)[1].loss.max()) == 0


def test_logits_that_are_not_finite_make_the_loss_infinite(bank, read_in_parts):
    text = make_text()
    for value in (np.nan, np.inf):
        weight = bank.heads[0].params["lm_head"]["weight"].at[0, 3].set(value)
        params = bank.heads[0].params | {"lm_head": {"weight": weight}}
        heads = (dataclasses.replace(bank.heads[0], params=params),)
        broken = dataclasses.replace(bank, heads=heads)
        out = jc.evaluate_all(jc.Problem(broken, text, 2))[1]
        assert np.isinf(out.loss).all()
        assert not np.any(out.accuracy)


def test_labels_out_of_range_are_refused(bank):
    data = make_questions()
    y = data.y.at[0, 0, 0].set(VOCABULARY)
    with pytest.raises(
        ValueError, match=r"expected labels in 0..22, the head's classes, got -1..23"
    ):
        jc.Problem(bank, data._replace(y=y), 2, loss_fn=jc.hub.choice_loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    "search", [jc.BeamSearch(width=2, max_width=2), jc.CriticSearch(epsilon=0.0)]
)
def test_searches_by_prefixes_find_the_same(bank, read_in_parts, search):
    problem = make_problems(bank)[0]
    found = jc.run(jax.random.key(0), search, problem, budget=12)
    read_in_parts.undo()
    jax.clear_caches()
    jc.clear_caches()
    expected = jc.run(jax.random.key(0), search, problem, budget=12)
    np.testing.assert_array_equal(found.best_chain, expected.best_chain)
    check_close(found.best_loss, expected.best_loss)


def test_the_estimate_of_memory_follows_the_parts(bank, read_in_parts):
    problem = jc.Problem(bank, make_text(64), 2)
    hidden = jax.eval_shape(bank.embed, problem.data.x)
    in_parts = head_calls.estimate_head_bytes(problem, hidden, 1)
    read_in_parts.setattr(head_calls, "_MIN_OUTPUTS", 1000)
    assert in_parts < head_calls.estimate_head_bytes(problem, hidden, 1)


@pytest.mark.slow
def test_gradients_of_a_head_are_those_of_plain_outputs(bank, read_in_parts):
    for problem in make_problems(bank):
        hidden = bank.embed(problem.data.x)

        def compute(params, hidden, problem=problem):
            heads = (dataclasses.replace(bank.heads[0], params=params),)
            own = problem.with_bank(dataclasses.replace(bank, heads=heads))
            return head_calls.compute_head_loss(own, 2, hidden)

        arguments = bank.heads[0].params, hidden
        found = jax.grad(compute, (0, 1))(*arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_calls, "_MIN_OUTPUTS", 1000)
            expected = jax.grad(compute, (0, 1))(*arguments)
        for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5)


def test_scores_of_examples_are_those_of_plain_outputs(bank, read_in_parts):
    for problem in make_problems(bank):
        hidden = bank.embed(problem.data.x)
        found = head_calls.score_examples(problem, 2, hidden)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_calls, "_MIN_OUTPUTS", 1000)
            expected = head_calls.score_examples(problem, jnp.array(2), hidden)
        check_close(found, expected)
        assert found[0].shape == (problem.num_examples,)
        check_close(found[0].mean(), env.head_loss(problem, jnp.array(2), hidden))


def compare(read_in_parts, fn):
    """Return what a function computes by parts and by kept outputs."""
    found = fn()
    read_in_parts.undo()
    jax.clear_caches()
    jc.clear_caches()
    return found, fn()


@pytest.mark.slow
def test_gradient_steps_are_those_of_plain_outputs(bank, read_in_parts, x64):
    # In float32 alone, two steps make rounding errors of 1%. Normalization is in float32 anyway.
    bank = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), bank)
    problem = make_problems(bank)[2]

    def tune():
        tuned = jc.updates.tune.tune_chain(
            jax.random.key(0),
            problem,
            np.array([1, 0, 2]),
            num_steps=2,
            optimizer=optax.sgd(0.1),
        )
        return jax.tree.leaves((tuned.layers, tuned.heads))

    for own, other in zip(*compare(read_in_parts, tune), strict=True):
        assert own.dtype == jnp.float64
        np.testing.assert_allclose(own, other, atol=1e-4 * abs(other).max())


@pytest.mark.slow
def test_gradient_scores_are_those_of_plain_outputs(bank, read_in_parts):
    problem = make_problems(bank)[1]
    kinds = ("activations", "weights", "linearized")

    def score():
        report = report_layers(problem, [1, 0, 2])
        fishers = [leaf.fisher for layer in report for leaf in layer.tensors.values()]
        return [jc.swap_scores(problem, [1, 0, 2], kind) for kind in kinds] + fishers

    for own, other in zip(*compare(read_in_parts, score), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4)
