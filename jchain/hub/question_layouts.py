"""The layouts in which benchmarks store multiple-choice questions."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jchain.hub.checkpoint import list_names
from jchain.hub.record_files import Record
from jchain.pytree import shorten

# The names of the same thing in different data sets, in order of precedence.
_QUESTIONS = ("question", "question_stem", "prompt")
_CHOICES = ("choices", "options")
_ANSWERS = ("answerKey", "answer_idx", "answer_index", "answer", "label")
_INDEX = re.compile(r"[0-9]{1,4}")
_KNOWN = (
    "question, choices, answer (MMLU, ARC, OpenBookQA, CommonsenseQA); ctx, endings, label "
    "(HellaSwag); goal, sol1, sol2, label (PIQA); question, mc1_targets (TruthfulQA); sentence, "
    "option1, option2, answer (WinoGrande)"
)


class Question(NamedTuple):
    """A multiple-choice question.

    Attributes:
      text: the question.
      choices: at least two choices, the correct one first.
      location: where it is from, for error messages.
    """

    text: str
    choices: tuple[str, ...]
    location: str


def is_header(cells: Sequence[str]) -> bool:
    """Tell whether the first row of a table names its columns, or is a question.

    Args:
      cells: the cells of the row.
    """
    names = {cell.strip() for cell in cells}
    return bool(names & {*_QUESTIONS, "ctx", "goal", "sentence"}) and bool(names & {*_ANSWERS})


def parse_question(record: Record) -> Question:
    """Find the question, its choices, and the correct one, in any known layout.

    Args:
      record: the record of a file.

    Raises:
      ValueError: if the layout is unknown, the choices are not text or numbers, or the answer does
        not name one of them.
    """
    value, location = record
    if isinstance(value, list) and len(value) > 3:  # a row of a table without a header
        value = {"question": value[0], "choices": value[1:-1], "answer": value[-1]}
    if not isinstance(value, dict):
        raise ValueError(f"{location}: expected a question, got {shorten(value)}; known: {_KNOWN}")
    keys = value.keys()
    if {"question", "mc1_targets"} <= keys:
        return _parse_targets(value, location)
    if {"sentence", "option1", "option2", "answer"} <= keys:
        return _parse_blank(value, location)
    if {"ctx", "endings", "label"} <= keys:
        return _make(value["ctx"], value["endings"], value["label"], location)
    if {"goal", "sol1", "sol2", "label"} <= keys:
        return _make(value["goal"], [value["sol1"], value["sol2"]], value["label"], location)
    return _parse_general(value, location)


def _parse_general(value: Mapping[str, object], location: str) -> Question:
    text, answer = _get(value, _QUESTIONS), _get(value, _ANSWERS)
    choices = _get(value, _CHOICES)
    if isinstance(text, dict):  # as AI2 publishes ARC and OpenBookQA
        choices = _get(text, _CHOICES) if choices is None else choices
        text = text.get("stem")
    if choices is None:  # a table with a column for each choice
        letters = [letter for letter in string.ascii_uppercase if letter in value]
        choices = [value[letter] for letter in letters if value[letter] not in (None, "")]
    if text is None or answer is None or choices == []:
        found = list_names(map(str, value), 12) or "none"
        raise ValueError(f"{location}: expected one of the layouts {_KNOWN}; found {found}")
    return _make(text, choices, answer, location)


def _get(value: Mapping[str, object], names: Sequence[str]) -> object:
    return next((value[name] for name in names if value.get(name) is not None), None)


def _parse_targets(value: Mapping[str, object], location: str) -> Question:
    """Parse TruthfulQA, where one of the choices has the label 1."""
    targets = value["mc1_targets"]
    if isinstance(targets, dict) and not {"choices", "labels"} <= targets.keys():
        targets = {"choices": [*targets], "labels": [*targets.values()]}
    labels = targets.get("labels") if isinstance(targets, dict) else None
    if not isinstance(targets, dict) or not isinstance(labels, list) or labels.count(1) != 1:
        raise ValueError(
            f"{location}: expected mc1_targets with choices and labels, one of which is 1, got "
            f"{shorten(targets)}"
        )
    return _make(value["question"], targets["choices"], labels.index(1), location)


def _parse_blank(value: Mapping[str, object], location: str) -> Question:
    """Parse WinoGrande: the question ends at the blank, and the choices fill it and go on."""
    sentence, options = value["sentence"], [value["option1"], value["option2"]]
    if not isinstance(sentence, str) or sentence.count("_") != 1:
        raise ValueError(f"{location}: expected a sentence with one _, got {shorten(sentence)}")
    before, after = sentence.split("_")
    choices = [f"{_get_text(option, location)}{after}" for option in options]
    choices = {"text": choices, "label": ["1", "2"]}
    return _make(before.rstrip(), choices, value["answer"], location)


def _make(text: object, choices: object, answer: object, location: str) -> Question:
    """Make a question, with the correct choice first."""
    labels, values = _read_labels(choices)
    if not isinstance(text, str) or not isinstance(values, list) or len(values) < 2:
        raise ValueError(
            f"{location}: expected a question as text and at least two choices, got "
            f"{shorten(text)} and {shorten(choices)}"
        )
    texts = [_get_text(value, location) for value in values]
    first = _find_answer(answer, texts, labels)
    if first is None:
        names = f"one of {list_names(labels, 12)}" if labels else f"0..{len(texts) - 1} or a letter"
        raise ValueError(
            f"{location}: expected the index of the correct choice, {names}, got {shorten(answer)}"
        )
    return Question(text, (texts[first], *texts[:first], *texts[first + 1 :]), location)


def _read_labels(choices: object) -> tuple[list[str], object]:
    """Separate the labels of choices, such as A to D, from their texts, if they have labels."""
    if isinstance(choices, list) and choices and all(isinstance(c, dict) for c in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("label", "text")}
    if not isinstance(choices, dict):
        return [], choices
    if not {"label", "text"} <= choices.keys():
        choices = {"label": [*choices], "text": [*choices.values()]}
    labels, texts = choices["label"], choices["text"]
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        return [], None
    labels = [str(label).strip() for label in labels]
    return (labels, texts) if len(set(labels)) == len(labels) else ([], None)


def _get_text(value: object, location: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{location}: expected choices as text or numbers, got {shorten(value)}")


def _find_answer(answer: object, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer means, by its label if there are labels."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return None
    name = answer.strip() if isinstance(answer, str) else f"{answer:d}"
    if name in labels:
        return labels.index(name)
    is_index = _INDEX.fullmatch(name) is not None
    if labels and (isinstance(answer, str) or any(map(_INDEX.fullmatch, labels))):
        return None
    if is_index:
        return int(name) if int(name) < len(texts) else None
    letters = string.ascii_uppercase[: len(texts)]
    if len(name) == 1 and name.upper() in letters:
        return letters.index(name.upper())
    return texts.index(name) if texts.count(name) == 1 else None
