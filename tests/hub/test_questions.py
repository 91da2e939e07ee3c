"""Multiple-choice questions in the layouts of benchmarks."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import QUESTION, make_checkpoint, write_file, write_parquet
from scipy.special import log_softmax as scipy_log_softmax

import jchain as jc
from jchain.hub import questions
from jchain.hub.question_layouts import is_header, parse_question
from jchain.hub.record_files import Record

tokenizers = pytest.importorskip("tokenizers")


def log_softmax(outputs):
    return scipy_log_softmax(np.asarray(outputs, np.float64), axis=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model")


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


LETTERS = {"text": ["fox", "dog", "ant"], "label": ["A", "B", "C"]}
NUMBERS = {"text": ["fox", "dog", "ant"], "label": ["1", "2", "3"]}
PAIRS = [
    {"text": "fox", "label": "A"},
    {"label": "B", "text": "dog"},
    {"text": "ant", "label": "C"},
]
LAYOUTS = {
    "MMLU": {"question": "the", "choices": ["fox", "dog", "ant"], "answer": 1},
    "MMLU, letter": {"question": "the", "choices": ["fox", "dog", "ant"], "answer": "B"},
    "MMLU, small letter": {"question": "the", "choices": ["fox", "dog", "ant"], "answer": " b "},
    "MMLU, digit": {"question": "the", "choices": ["fox", "dog", "ant"], "answer": "1"},
    "MMLU, float": {"question": "the", "choices": ["fox", "dog", "ant"], "answer": 1.0},
    "MMLU-Pro": {
        "question": "the", "options": ["fox", "dog", "ant"], "answer": "B", "answer_index": 1
    },
    "text of the choice": {"question": "the", "choices": ["fox", "dog", "ant"], "answer": "dog"},
    "MedQA": {
        "question": "the", "options": {"A": "fox", "B": "dog", "C": "ant"}, "answer": "dog",
        "answer_idx": "B",
    },
    "ARC": {"question": "the", "choices": LETTERS, "answerKey": "B"},
    "ARC, numbers": {"question": "the", "choices": NUMBERS, "answerKey": "2"},
    "ARC, a number": {"question": "the", "choices": NUMBERS, "answerKey": 2},
    "OpenBookQA": {"question_stem": "the", "choices": LETTERS, "answerKey": "B"},
    "CommonsenseQA": {"question": {"stem": "the", "choices": PAIRS}, "answerKey": "B"},
    "ARC, index": {"question": "the", "choices": PAIRS, "answer": 1},
    "HellaSwag": {"ctx": "the", "endings": ["fox", "dog", "ant"], "label": "1", "ctx_a": "x"},
    "HellaSwag, number": {"ctx": "the", "endings": ["fox", "dog", "ant"], "label": 1},
    "TruthfulQA": {
        "question": "the",
        "mc1_targets": {"choices": ["fox", "dog", "ant"], "labels": [0, 1, 0]},
        "mc2_targets": {"choices": ["x", "y"], "labels": [1, 1]},
    },
    "TruthfulQA, original": {"question": "the", "mc1_targets": {"fox": 0, "dog": 1, "ant": 0}},
    "columns": {"question": "the", "A": "fox", "B": "dog", "C": "ant", "D": "", "answer": "B"},
    "Kaggle": {"id": 0, "prompt": "the", "A": "fox", "B": "dog", "C": "ant", "answer": "B"},
    "a row": ["the", "fox", "dog", "ant", "B"],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_benchmarks_are_known(name):
    found = parse_question(Record(LAYOUTS[name], "here"))
    assert found == ("the", ("dog", "fox", "ant"), "here")


def test_layouts_of_two_choices_are_known():
    piqa = {"goal": "the", "sol1": "fox", "sol2": "dog", "label": 1}
    for label in (1, "1"):
        found = parse_question(Record(piqa | {"label": label}, "here"))
        assert found[:2] == ("the", ("dog", "fox"))
    blank = {"sentence": "the _ runs.", "option1": "fox", "option2": "dog", "answer": "2"}
    found = parse_question(Record(blank, "here"))
    assert found[:2] == ("the", ("dog runs.", "fox runs."))
    numbers = {"question": "2 + 2 =", "choices": [3, 4, 0.5], "answer": 1}
    assert parse_question(Record(numbers, "here")).choices == ("4", "3", "0.5")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "here: expected a question, got 3; known: question, choices, answer"),
        ([], "here: expected a question, got "),
        ({}, "expected one of the layouts question, choices, answer .MMLU, .*; found none"),
        ({"q": 1, "a": 2}, "HellaSwag.*PIQA.*TruthfulQA.*WinoGrande.*; found a, q"),
        ({"question": "a", "choices": ["b", "c"]}, "; found choices, question"),
        (QUESTION | {"answer": 3}, "index of the correct choice, 0..2 or a letter, got 3"),
        (QUESTION | {"answer": -1}, "0..2 or a letter, got -1"),
        (QUESTION | {"answer": "D"}, "0..2 or a letter, got 'D'"),
        (QUESTION | {"answer": "9" * 5000}, "0..2 or a letter, got '9999"),
        (QUESTION | {"answer": 10**100}, "0..2 or a letter, got 1000"),
        (QUESTION | {"answer": True}, "0..2 or a letter, got True"),
        (QUESTION | {"answer": 0.5}, "0..2 or a letter, got 0.5"),
        (QUESTION | {"answer": [1]}, "0..2 or a letter, got .1."),
        (QUESTION | {"answer": ""}, "0..2 or a letter, got ''"),
        (QUESTION | {"choices": "abc"}, "a question as text and at least two choices, got 'ab'"),
        (QUESTION | {"choices": ["b"]}, "at least two choices"),
        (QUESTION | {"choices": ["b", None]}, "choices as text or numbers, got None"),
        (QUESTION | {"choices": ["b", True]}, "choices as text or numbers, got True"),
        (QUESTION | {"question": 1}, "a question as text"),
        (QUESTION | {"question": {"stem": None}}, "; found answer, choices, question"),
        ({"question": "a", "choices": LETTERS, "answerKey": "D"}, "one of A, B, C, got 'D'"),
        ({"question": "a", "choices": LETTERS, "answerKey": "1"}, "one of A, B, C, got '1'"),
        ({"question": "a", "choices": NUMBERS, "answerKey": 0}, "one of 1, 2, 3, got 0"),
        ({"question": "a", "choices": NUMBERS, "answerKey": "B"}, "one of 1, 2, 3, got 'B'"),
        (QUESTION | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "at least two choices"),
        (QUESTION | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "at least two choices"),
        ({"ctx": "a", "endings": ["b", "c"], "label": ""}, "got ''"),
        ({"question": "a", "mc1_targets": {"a": 1, "b": 1}}, "labels, one of which is 1"),
        ({"question": "a", "mc1_targets": 3}, "labels, one of which is 1"),
        (
            {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"},
            "a sentence with one _",
        ),
    ],
)
def test_records_that_are_no_questions_are_refused(value, message):
    with pytest.raises(ValueError, match=f"^here: .*{message.removeprefix('here: ')}"):
        parse_question(Record(value, "here"))


def test_headers_are_told_from_questions():
    assert is_header(["question", "A", "B", "answer"])
    assert is_header(["goal", "sol1", "sol2", "label"])
    assert not is_header(["What is a question?", "1", "2", "A"])


def make_rows():
    """Make questions with 2 to 4 choices."""
    texts = ["fox", "brown dog", "ant", "4"]
    return [
        {"question": f"the {'very ' * (i % 3)}", "choices": texts[: 2 + i % 3], "answer": i % 2}
        for i in range(12)
    ]


def write_rows(path, rows):
    match path.suffix:
        case ".jsonl":
            path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
        case ".json" | ".txt":
            path.write_text(json.dumps(rows, indent=1))
        case ".csv" | ".tsv":
            table = [["question", *"ABCD", "answer"]] if path.stem == "header" else []
            for row in rows:
                choices = [*row["choices"], "", "", ""][:4]
                if not table or path.stem != "header":
                    choices = row["choices"]
                table.append([row["question"], *choices, "AB"[row["answer"]]])
            with path.open("w", newline="") as file:
                csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(table)
        case _:
            pytest.importorskip("pyarrow")
            write_parquet(path, rows)
    return path


@pytest.mark.parametrize(
    "name",
    ["q.jsonl", "q.json", "q.txt", "header.csv", "q.csv", "q.tsv", "q.parquet"],
)
def test_files_of_each_format_give_the_same_questions(checkpoint, tmp_path, name):
    rows = make_rows()
    data = jc.hub.load_choices(checkpoint, write_rows(tmp_path / name, rows))
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    found = []
    for split in data[:4]:
        assert split.x.shape[1] == 4
        for x, y in zip(np.asarray(split.x), np.asarray(split.y), strict=True):
            texts = []
            for ids, labels in zip(x, y, strict=True):
                if (labels >= 0).any():
                    end = np.flatnonzero(labels >= 0)[-1]
                    texts.append(tokenizer.decode([*ids[: end + 1], labels[end]]))
                else:
                    assert not ids.any()
            found.append(texts)
    expected = []
    for row in rows:
        first, choices = row["answer"], row["choices"]
        order = [choices[first], *choices[:first], *choices[first + 1 :]]
        expected.append([f"{row['question']} {choice}" for choice in order])
    assert sorted(found) == sorted(expected)


def test_questions_with_fewer_choices_have_their_own_loss(checkpoint, tmp_path):
    bank = jc.hub.load(checkpoint)

    def find_losses(rows):
        path = tmp_path / "q.json"
        path.write_text(json.dumps(rows))
        data = jc.hub.load_choices(checkpoint, path, sizes=(1, 1, 1, len(rows) - 3))
        problem = jc.Problem(bank, data.test, 2, loss_fn=jc.hub.choice_loss)
        return float(jc.evaluate(problem, np.array([[0, 1, 2]])).loss[0])

    two = {"question": "ab", "choices": ["c", "d"], "answer": 1}
    three = {"question": "ab", "choices": ["c", "d", "e"], "answer": 1}
    alone, other = find_losses([two] * 4), find_losses([three] * 4)
    # The seed puts two of the five questions into the split, whatever they are.
    mixed = [find_losses([two if i == k else three for i in range(5)]) for k in range(5)]
    half = pytest.approx((alone + other) / 2, rel=1e-5)
    assert [loss == half for loss in mixed].count(True) == 2
    assert [loss == pytest.approx(other, rel=1e-5) for loss in mixed].count(True) == 3


def test_sizes_choose_questions_at_random(checkpoint, tmp_path):
    path = write_rows(tmp_path / "q.json", make_rows())
    whole = jc.hub.load_choices(checkpoint, path)
    data = jc.hub.load_choices(checkpoint, path, most=(2, None, 1, 9))
    assert [len(split.x) for split in data[:4]] == [2, 2, 1, 1]
    assert int((data.search.y >= 0).sum()) == int((whole.search.y >= 0).sum())
    few = jc.hub.load_choices(checkpoint, path, sizes=(5, 4, 2, 1))
    assert [len(split.x) for split in few[:4]] == [5, 4, 2, 1]
    with pytest.raises(ValueError, match="at most 12 in all"):
        jc.hub.load_choices(checkpoint, path, sizes=(5, 4, 3, 1))


def test_a_question_that_would_make_the_others_mostly_padding_is_refused(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(questions, "_NUM_TOKENS", 1000)
    rows = [QUESTION] * 50 + [{**QUESTION, "question": "ab" * 500}]
    path = write_file(tmp_path, json.dumps(rows), "q.json")
    with pytest.raises(ValueError, match="51 that are padded to 3 choices of 1003 tokens"):
        jc.hub.load_choices(checkpoint, path)
    assert jc.hub.load_choices(checkpoint, path, length=20).test.x.shape == (7, 3, 20)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "questions.jsonl, line 1: expected JSON, got Expecting value"),
        (json.dumps({"question": "a", "choices": ["b", "c"]}), "line 1: expected one of the"),
        (
            json.dumps({**QUESTION, "question": ""}),
            "expected a question of at least 1 token and a choice of 1 to",
        ),
        ("", "expected at least 4 questions, one for each split, got 0"),
    ],
)
def test_invalid_questions_are_rejected(checkpoint, tmp_path, line, message):
    path = write_file(tmp_path, "\n".join([line] * 4), "questions.jsonl")
    with pytest.raises(ValueError, match=message):
        jc.hub.load_choices(checkpoint, path)
