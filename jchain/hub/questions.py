"""Multiple-choice questions for pretrained transformers."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jchain._typing import Int
from jchain.arguments import checked
from jchain.data import SPLITS, Batch, Dataset
from jchain.hub import splits
from jchain.hub.question_layouts import Question, is_header, parse_question
from jchain.hub.record_files import read_records
from jchain.hub.tokenizing import TextEncoder, open_tokenizer

PathLike = str | os.PathLike[str]
# Number of questions that are encoded at a time.
_NUM_QUESTIONS = 256
# Tokens with padding: as many are always allowed, and as many for each token without padding.
_NUM_TOKENS, _PADDING_FACTOR = 1 << 26, 32


@checked
def load_choices(
    checkpoint: PathLike,
    file: PathLike,
    *,
    length: int | None = None,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    most: Sequence[int | None] | None = None,
) -> Dataset:
    """Load multiple-choice questions, for `choice_loss` and `choice_accuracy`.

    Each choice becomes a row that joins the question and the choice with a space. x is `[B, C, T]`,
    padded at the end, with the correct choice first. y contains the next tokens, or -1 for tokens
    that are not part of the choice. If questions have fewer than C choices, their last rows have no
    labels and do not count.

    A file holds JSON lines (.jsonl), a JSON array of objects (.json), a table (.csv, .tsv), or
    .parquet. Other endings are read as JSON. These fields of a question are known:

    - `question`, `choices`, `answer`: MMLU, also as a table without a header, whose rows are the
      question, the choices, and the answer, or with columns `A`, `B`, ... for the choices. Choices
      may be numbers. ARC, OpenBookQA, and CommonsenseQA give them labels:
      `{"text": [...], "label": [...]}`, with `answerKey`; `question_stem` and
      `{"stem": ..., "choices": [{"text": ..., "label": ...}]}` are read, too.
    - `ctx`, `endings`, `label`: HellaSwag.
    - `goal`, `sol1`, `sol2`, `label`: PIQA.
    - `question`, `mc1_targets`: TruthfulQA.
    - `sentence` with a blank `_`, `option1`, `option2`, `answer`: WinoGrande. The choices are the
      options with the rest of the sentence.

    An answer is one of the labels, if the choices have labels. Otherwise it is a letter, or a
    number that counts from 0, also in quotes, or else the text of a choice.

    Args:
      checkpoint: the model, as in `load`, with tokenizer.json unless it is a GGUF file.
      file: path of the file, in UTF-8.
      length: maximum number of tokens in a row, T; longer questions lose their first tokens. If
        None, T is the length of the longest row.
      seed: seed of the random splits.
      sizes: number of questions in each split. If None, 50% of the questions are for train, 20% for
        search, 15% for select, and 15% for test.
      most: maximum number of questions to keep in each split; None for no maximum.

    Raises:
      FileNotFoundError: if a file is missing.
      ImportError: if tokenizers is not installed, or pyarrow for a file of Parquet.
      ValueError: if a record is not a question of a known layout, an answer is not one of the
        choices, a question or a choice has no token, a choice is longer than `length`, one question
        is so long that most tokens would be padding, there are fewer questions than `sizes` asks
        for, or `load_text` would raise it.
    """
    if length is not None and length < 1:
        raise ValueError(f"expected a length of at least 1, got {length}")
    splits.check_sizes(sizes, most)
    path = Path(file)
    encoder = open_tokenizer(checkpoint)
    questions = [*map(parse_question, read_records(path, is_header=is_header))]
    if len(questions) < len(SPLITS):
        raise ValueError(
            f"expected at least {len(SPLITS)} questions, one for each split, got {len(questions)} "
            f"in {path}"
        )
    chosen = splits.split_at_random(len(questions), seed, sizes, most)
    order = np.concatenate(chosen)
    rows = _encode([questions[i] for i in order], encoder)
    x, y = _pad(rows, length, path)
    ends = np.cumsum([len(part) for part in chosen])[:-1]
    parts = zip(np.split(x, ends), np.split(y, ends), strict=True)
    batches = [Batch(*map(jnp.asarray, part)) for part in parts]
    return Dataset(*batches, name=path.stem, num_classes=encoder.vocab_size)


class _Row(NamedTuple):
    """A question joined with one of its choices."""

    ids: Int[np.ndarray, "T"]
    num_question: int  # number of tokens in the question
    location: str


def _encode(questions: Sequence[Question], encoder: TextEncoder) -> list[list[_Row]]:
    """Encode each question as one row for each choice, with the correct choice first."""
    found = []
    for start in range(0, len(questions), _NUM_QUESTIONS):
        group = questions[start : start + _NUM_QUESTIONS]
        location = f"{group[0].location} and the following"
        texts = [question.text for question in group]
        counts = [len(ids) for ids in encoder.encode_many(texts, location)]
        joined = [f"{text} {choice}" for text, choices, _ in group for choice in choices]
        rows = iter(encoder.encode_many(joined, location))
        found += [
            [_Row(ids, count, question.location) for ids in itertools.islice(rows, num)]
            for question, count in zip(group, counts, strict=True)
            for num in (len(question.choices),)
        ]
    return found


def _pad(
    questions: Sequence[Sequence[_Row]], length: int | None, path: Path
) -> tuple[Int[np.ndarray, "E C T"], Int[np.ndarray, "E C T"]]:
    """Make the inputs and labels of questions, padded to one number of choices and of tokens."""
    longest = max(len(row.ids) for question in questions for row in question) - 1
    width = longest if length is None else min(length, longest)
    num_choices = max(map(len, questions))
    num_tokens = sum(min(len(row.ids), width) for question in questions for row in question)
    shape = (len(questions), num_choices, max(width, 0))
    if np.prod(shape, dtype=float) > max(_NUM_TOKENS, _PADDING_FACTOR * num_tokens):
        raise ValueError(
            f"expected questions of similar size in {path}, got {shape[0]} that are padded to "
            f"{num_choices} choices of {width} tokens: pass length=, or remove the longest ones"
        )
    x, y = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for i, question in enumerate(questions):
        for j, row in enumerate(question):
            _fill(x[i, j], y[i, j], row)
    return x, y


def _fill(x: Int[np.ndarray, "T"], y: Int[np.ndarray, "T"], row: _Row) -> None:
    """Write the inputs and the labels of a row; only the tokens of the choice are labels."""
    num = len(row.ids) - row.num_question
    if row.num_question < 1 or not 0 < num <= len(x):
        raise ValueError(
            f"expected a question of at least 1 token and a choice of 1 to {len(x)}, got "
            f"{row.num_question} and {num} in {row.location}"
        )
    kept = row.ids[-(len(x) + 1) :]
    last = len(kept) - 1
    x[:last] = kept[:-1]
    y[last - num : last] = kept[1:][-num:]
