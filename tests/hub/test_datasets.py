"""Text, questions, and images for pretrained transformers, and heads with many outputs."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import QUESTION, TEXT, VIT, make_checkpoint, write_config, write_file
from scipy.special import log_softmax as scipy_log_softmax

import jchain as jc
from jchain import images
from jchain.engine import layer_calls as calls

tokenizers = pytest.importorskip("tokenizers")


def log_softmax(outputs):
    return scipy_log_softmax(np.asarray(outputs, np.float64), axis=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model")


def test_text_is_cut_into_sequences_and_the_tokens_that_follow(checkpoint, tmp_path):
    data = jc.hub.load_text(checkpoint, write_file(tmp_path, TEXT), length=10)
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert data.num_classes == 256
    rows = []
    for split in (data.train, data.search, data.select, data.test):
        assert split.x.shape == split.y.shape
        np.testing.assert_array_equal(split.x[:, 1:], split.y[:, :-1])
        rows += [(*map(int, x), int(y[-1])) for x, y in zip(split.x, split.y, strict=True)]
    assert len(rows) == (len(TEXT) - 1) // 10
    expected = [TEXT[i : i + 11] for i in range(0, len(rows) * 10, 10)]
    assert sorted(tokenizer.decode(row) for row in rows) == sorted(expected)
    few = jc.hub.load_text(checkpoint, write_file(tmp_path, TEXT), length=10, sizes=(5, 4, 3, 2))
    assert [len(split.x) for split in few[:4]] == [5, 4, 3, 2]
    bank = jc.hub.load(checkpoint)
    out = jc.evaluate(jc.Problem(bank, data.search, 2), np.array([[0, 1, 2]]))
    logits = log_softmax(
        np.asarray(jc.apply_chain(bank, np.array([0, 1, 2]), data.search.x), np.float64)
    )
    expected = -np.take_along_axis(logits, np.asarray(data.search.y)[..., None], axis=-1).mean()
    assert float(out.loss[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "short",
            {},
            "expected text of at least 513 tokens, a sequence of 128 for each split, "
            "got 5 in .*text.txt",
        ),
        (TEXT, {"length": 0}, "expected a length of at least 1, got 0"),
        (
            TEXT,
            {"length": 10, "sizes": (100, 100, 3, 3)},
            "at least 1 and at most 203 in all, got .100, 100, 3, 3.",
        ),
        (TEXT, {"length": 10, "sizes": (1, 2)}, "expected sizes of train, search, select, test"),
    ],
)
def test_unsuitable_text_is_rejected(checkpoint, tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        jc.hub.load_text(checkpoint, write_file(tmp_path, text), **options)


def test_unsuitable_tokenizers_and_files_are_rejected(checkpoint, tmp_path):
    text = write_file(tmp_path, TEXT)
    small = make_checkpoint(tmp_path / "small", vocabulary=50)
    with pytest.raises(
        ValueError,
        match=r"expected tokens in 0..49, the model's, got \d+ from .*tokenizer.json for .*text",
    ):
        jc.hub.load_text(small, text, length=10)
    (small / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json is damaged or not a tokenizer"):
        jc.hub.load_text(small, text)
    (small / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json in .*small, found none"):
        jc.hub.load_text(small, text)
    with pytest.raises(FileNotFoundError, match="expected a text file at .*none.txt"):
        jc.hub.load_text(checkpoint, tmp_path / "none.txt")
    text.write_bytes(b"\xff\xfe\xfa" * 500)
    with pytest.raises(ValueError, match="expected text in UTF-8 in .*text.txt"):
        jc.hub.load_text(checkpoint, text)


def test_damaged_tokenizers_raise_only_clear_errors(tmp_path):
    path = make_checkpoint(tmp_path / "model") / "tokenizer.json"
    whole, text, rng = path.read_bytes(), write_file(tmp_path, TEXT), np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: rng.integers(0, len(damaged))]
        for place in rng.integers(0, max(1, len(damaged)), trial % 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            jc.hub.load_text(path.parent, text, length=10)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab={"a": 0}, unk_token="none"))
    words.save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot encode .*text.txt: .*UNK"):
        jc.hub.load_text(path.parent, text, length=10)


@pytest.mark.slow
def test_choices_are_ranked_by_their_mean_likelihood(checkpoint, tmp_path):
    lines = [QUESTION, {**QUESTION, "answer": 0}, {**QUESTION, "question": "xyz", "answer": 2}] * 4
    path = write_file(tmp_path, "\n".join(map(json.dumps, lines)), "questions.jsonl")
    data = jc.hub.load_choices(checkpoint, path)
    assert data.search.x.shape[1:] == (3, len("xyz dea") - 1)
    bank = jc.hub.load(checkpoint)
    chain = np.array([1, 0, 2])
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def find_mean(x, y):
        """Compute the mean log-likelihood of one choice without padding."""
        num = int((y >= 0).sum())
        end = int(np.flatnonzero(y >= 0)[-1]) + 1
        logits = log_softmax(
            np.asarray(jc.apply_chain(bank, chain, jnp.asarray(x[None, :end])), np.float64)
        )[0]
        assert tokenizer.decode([*x[:end], y[end - 1]])[-num:] in ("c", " c", " dea", " b")
        return np.mean([logits[i, y[i]] for i in range(end - num, end)])

    for split in (data.train, data.search, data.select, data.test):
        x, y = np.asarray(split.x), np.asarray(split.y)
        means = np.array([[find_mean(x[i, j], y[i, j]) for j in range(3)] for i in range(len(x))])
        problem = jc.Problem(
            bank, split, 2, loss_fn=jc.hub.choice_loss, accuracy_fn=jc.hub.choice_accuracy
        )
        out = jc.evaluate(problem, chain[None])
        assert float(out.loss[0]) == pytest.approx(-log_softmax(means)[:, 0].mean(), rel=1e-4)
        assert float(out.accuracy[0]) == pytest.approx(np.mean(means.argmax(axis=1) == 0))
    with pytest.raises(ValueError, match="expected a length of at least 1, got -3"):
        jc.hub.load_choices(checkpoint, path, length=-3)
    lines = [json.dumps({**QUESTION, "question": "a\u2028b"}, ensure_ascii=False)] * 4
    other = write_file(tmp_path, "\n".join(lines), "other.jsonl")
    assert len(jc.hub.load_choices(checkpoint, other).test.x) == 1
    short = jc.hub.load_choices(checkpoint, path, length=5)
    assert short.search.x.shape[1:] == (3, 5)
    assert int((short.train.y >= 0).sum()) == int((data.train.y >= 0).sum())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", r"questions.jsonl, line 1: expected \{.question.: "),
        (json.dumps({"question": "a", "choices": ["b", "c"]}), "line 1: expected .* got 'answer'"),
        (json.dumps({**QUESTION, "answer": 3}), "the index of the correct choice, got"),
        (json.dumps({**QUESTION, "choices": "abc"}), "the index of the correct choice, got"),
        (
            json.dumps({**QUESTION, "choices": {"text": ["a", "b"], "label": ["A", "B"]}}),
            "the index of the correct choice, got",
        ),
        (
            json.dumps({**QUESTION, "question": ""}),
            "expected a question of at least 1 token and a choice of 1 to",
        ),
        (
            json.dumps({**QUESTION, "choices": ["a", "b"]}) + "\n" + json.dumps(QUESTION),
            r"at least 4 questions with the same number of choices .*got 8 with \[2, 3\]",
        ),
    ],
)
def test_invalid_questions_are_rejected(checkpoint, tmp_path, line, message):
    path = write_file(tmp_path, "\n".join([line] * 4), "questions.jsonl")
    with pytest.raises(ValueError, match=message):
        jc.hub.load_choices(checkpoint, path)


def test_labels_below_zero_do_not_count():
    rng = np.random.default_rng(0)
    outputs, y = rng.normal(size=(3, 4, 5)), rng.integers(0, 5, (3, 4))
    y[0, 1:], y[2] = -1, -1
    logits = log_softmax(outputs)
    expected = [
        -np.mean([logits[i, t, y[i, t]] for t in range(4) if y[i, t] >= 0])
        if (y[i] >= 0).any()
        else 0.0
        for i in range(3)
    ]
    outputs, y = jnp.asarray(outputs, jnp.float32), jnp.asarray(y)
    np.testing.assert_allclose(jc.hub.next_token_loss(outputs, y), expected, rtol=1e-5)
    hits = [
        np.mean([outputs[i, t].argmax() == y[i, t] for t in range(4) if y[i, t] >= 0] or [0.0])
        for i in range(3)
    ]
    np.testing.assert_allclose(jc.hub.next_token_accuracy(outputs, y), hits)


def test_images_are_resized_and_standardized_as_in_training(tmp_path, monkeypatch):
    sizes = {"image_size": 16, "patch_size": 8, "num_channels": 3}
    folder = write_config(tmp_path / "vit", VIT | sizes)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.2]})
    )
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (80, 8, 8, 1)).astype(np.uint8), np.arange(80) % 2
    monkeypatch.setattr(
        images, "read", lambda name, data_dir: images.Images((pixels, labels), None, 2)
    )
    data = jc.hub.load_images(folder, "digits")
    assert data.test.x.shape[1:] == (16, 16, 3)
    plain = jc.data.split(pixels, labels, name="digits", statistics=(0.0, 1.0))
    expected = jax.image.resize(plain.test.x / 255, (len(plain.test.x), 16, 16, 1), "bilinear")
    expected = (np.asarray(expected) - [0.5, 0.4, 0.3]) / [0.5, 0.5, 0.2]
    np.testing.assert_allclose(data.test.x, expected, atol=1e-5)
    few = jc.hub.load_images(folder, "digits", most=(3, 2, 1, 100))
    assert [len(split.x) for split in few[:4]] == [3, 2, 1, len(data.test.x)]
    for changed, message in (
        ({"rescale_factor": 1.0}, "expected a rescale_factor of 1/255"),
        ({"do_center_crop": True}, "expected do_resize without do_center_crop"),
        (
            {"resample": 0, "rescale_factor": None},
            r"expected resample of 2 \(bilinear\) or 3 \(bicubic\), got 0",
        ),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            jc.hub.load_images(folder, "digits")


def test_a_model_of_text_takes_no_images(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="expected a model of images at .*, got one of text"):
        jc.hub.load_images(checkpoint, "digits")


@pytest.mark.parametrize(
    "plan", [jc.engine.DepthFirst(), jc.engine.Blocks(4, (1, 2), head_widths=(1, 4))]
)
def test_large_outputs_are_computed_in_parts(checkpoint, tmp_path, monkeypatch, plan):
    bank = jc.hub.load(checkpoint)
    data = jc.hub.load_text(checkpoint, write_file(tmp_path, TEXT), length=9)
    problem = jc.Problem(bank, jc.Batch(data.search.x[:11], data.search.y[:11]), 2)
    chains = jc.chain.ChainSpace(2, 1, 2).enumerate()
    whole = jc.evaluate(problem, chains, plan=plan)
    jax.clear_caches()
    # 5 examples fit, so the parts have 4, 4 and 3.
    monkeypatch.setattr(calls, "_OUTPUT_LIMIT", 4 * 9 * 256 * 5)
    parts = jc.evaluate(problem, chains, plan=plan)
    assert (
        plan.count_bytes(problem, jax.eval_shape(bank.embed, problem.data.x)) < 4 * 9 * 256 * 11 * 4
    )
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(parts.accuracy, whole.accuracy, rtol=1e-5)
    jax.clear_caches()
