"""Data for pretrained transformers: text, multiple-choice questions, or images, in four splits.

`jchain.hub.losses` has the losses.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jchain import images
from jchain._typing import Array, Float, Int
from jchain.arguments import checked
from jchain.data import SHARES, SPLITS, Batch, Dataset, split
from jchain.hub.checkpoint import read_json
from jchain.hub.families import read_architecture
from jchain.pytree import get_first_line

TOKENIZER, PREPROCESSOR = "tokenizer.json", "preprocessor_config.json"
PathLike = str | os.PathLike[str]
# Number of images that are resized at a time.
_CHUNK_SIZE = 256
# The supported values of the option `resample`: PIL's numbers and the names of the filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}
# A function that maps a text, and its location for error messages, to tokens.
Encoder = Callable[[str, str], Int[np.ndarray, "T"]]


@checked
def load_text(
    checkpoint: PathLike,
    files: PathLike | Sequence[PathLike],
    *,
    length: int = 128,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
) -> Dataset:
    """Load text as sequences of tokens, for next-token prediction.

    The tokens of all files are concatenated and cut into sequences that do not overlap, and the
    sequences are split at random. The labels are the next tokens, so x and y are `[B, length]`. The
    default loss of `jchain.Problem` is then the cross-entropy of the next token, in nats.

    Args:
      checkpoint: folder with config.json and tokenizer.json, which the package tokenizers reads.
      files: path of a text file in UTF-8, or several paths.
      length: number of tokens in a sequence.
      seed: seed of the random splits.
      sizes: number of sequences in each split. If None, all sequences are used: 50% for train, 20%
        for search, 15% for select, and 15% for test.

    Raises:
      FileNotFoundError: if a file is missing.
      ImportError: if tokenizers is not installed.
      ValueError: if the text is not UTF-8 or has less than one sequence for each split, the
        tokenizer is damaged or makes tokens that the model does not know, there are fewer sequences
        than `sizes` asks for, or the model does not take text.
    """
    if length < 1:
        raise ValueError(f"expected a length of at least 1, got {length}")
    files = [files] if isinstance(files, str | os.PathLike) else [*files]
    vocab_size, encode = _open_tokenizer(checkpoint)
    ids = np.concatenate(
        [encode(_read_text(Path(file)), str(file)) for file in files] or [np.zeros(0, np.int32)]
    )
    count = max(0, (len(ids) - 1) // length)
    if count < len(SPLITS):
        raise ValueError(
            f"expected text of at least {len(SPLITS) * length + 1} tokens, a sequence of {length} "
            f"for each split, got {len(ids)} in {', '.join(map(str, files))}"
        )
    x, y = (ids[start : start + count * length].reshape(count, length) for start in (0, 1))
    return _split(x, y, seed, sizes, "+".join(Path(file).stem for file in files), vocab_size)


@checked
def load_choices(
    checkpoint: PathLike,
    file: PathLike,
    *,
    length: int | None = None,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
) -> Dataset:
    """Load multiple-choice questions, for `choice_loss` and `choice_accuracy`.

    Each line of the file is a question such as
    `{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}`, where `answer` is the index of
    the correct choice. Each choice becomes a row that joins the question and the choice with a
    space. x is `[B, C, T]`, padded at the end, with the correct choice first. y contains the next
    tokens, or -1 for tokens that are not part of the choice.

    Args:
      checkpoint: folder with config.json and tokenizer.json, which the package tokenizers reads.
      file: path of a file of JSON lines in UTF-8.
      length: maximum number of tokens in a row, T; longer questions lose their first tokens. If
        None, T is the length of the longest row.
      seed: seed of the random splits.
      sizes: number of questions in each split; if None, all questions are used.

    Raises:
      FileNotFoundError: if a file is missing.
      ImportError: if tokenizers is not installed.
      ValueError: if a line is not a question, questions have different numbers of choices, a
        question or a choice has no token, a choice is longer than `length`, or `load_text` would
        raise it.
    """
    if length is not None and length < 1:
        raise ValueError(f"expected a length of at least 1, got {length}")
    vocab_size, encode = _open_tokenizer(checkpoint)
    path = Path(file)
    # `splitlines` would also cut at characters that JSON strings may contain.
    lines = enumerate(_read_text(path).split("\n"), 1)
    questions = [
        _encode_question(line, encode, f"{path}, line {i}") for i, line in lines if line.strip()
    ]
    counts = sorted({len(question) for question in questions})
    if len(counts) != 1 or len(questions) < len(SPLITS):
        raise ValueError(
            f"expected at least {len(SPLITS)} questions with the same number of choices in {path}, "
            f"got {len(questions)} with {counts}"
        )
    longest = max(len(row.ids) for question in questions for row in question) - 1
    width = longest if length is None else min(length, longest)
    rows = [
        _make_labels(row, width, f"question {i} of {path}")
        for i, question in enumerate(questions)
        for row in question
    ]
    x, y = (
        np.stack(part).reshape(len(questions), counts[0], width) for part in zip(*rows, strict=True)
    )
    return _split(x, y, seed, sizes, path.stem, vocab_size)


class _Row(NamedTuple):
    """A question joined with one of its choices."""

    ids: Int[np.ndarray, "T"]
    start: int  # number of tokens in the question


def _encode_question(line: str, encode: Encoder, location: str) -> list[_Row]:
    """Encode a question as one row for each choice, with the correct choice first."""
    question, choices = _parse_question(line, location)
    start = len(encode(question, location))
    return [_Row(encode(f"{question} {choice}", location), start) for choice in choices]


def _make_labels(
    row: _Row, width: int, location: str
) -> tuple[Int[np.ndarray, "W"], Int[np.ndarray, "W"]]:
    """Make the inputs and the labels of a row; only the tokens of the choice are labels."""
    num = len(row.ids) - row.start
    if row.start < 1 or not 0 < num <= width:
        raise ValueError(
            f"expected a question of at least 1 token and a choice of 1 to {width}, got "
            f"{row.start} and {num} in {location}"
        )
    x, y = np.zeros(width, np.int32), np.full(width, -1, np.int32)
    kept = row.ids[-(width + 1) :]
    last = len(kept) - 1
    x[:last] = kept[:-1]
    y[last - num : last] = kept[1:][-num:]
    return x, y


@checked
def load_images(
    checkpoint: PathLike,
    name: str,
    *,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    most: Sequence[int | None] | None = None,
    data_dir: str | Path | None = None,
) -> Dataset:
    """Load images, and resize and standardize them as for the training of a model.

    Args:
      checkpoint: checkpoint folder of a ViT, with preprocessor_config.json.
      name: name of the data set, as in `jchain.data.load`.
      seed: seed of the random splits.
      sizes: number of examples in each split; if None, all examples are used.
      most: maximum number of examples to keep in each split, because resized images need much
        memory; None for no maximum.
      data_dir: folder that holds prepared data sets; if None, tensorflow-datasets' default folder.

    Raises:
      FileNotFoundError: if preprocessor_config.json is missing, or the data set is not prepared.
      ValueError: if the model does not take images, its preprocessing is not supported (a scale
        other than 0 to 1 before standardization, a crop, or a filter other than PIL's bilinear and
        bicubic), or `jchain.data.load` would raise it.
    """
    architecture = read_architecture(checkpoint)
    if architecture.vocab_size is not None:
        raise ValueError(f"expected a model of images at {checkpoint}, got one of text")
    mean, std, method = _read_preprocessor(Path(checkpoint) / PREPROCESSOR)
    found = images.read(name, data_dir)
    _, height, width, channels = architecture.example_shape
    data = split(
        *found.train,
        seed=seed,
        name=name,
        test=found.test,
        sizes=sizes,
        statistics=(255 * mean, 255 * std),
    )

    @jax.jit
    def resize(x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        colored = jnp.broadcast_to(x, (*x.shape[:3], channels))
        return jax.image.resize(colored, (x.shape[0], height, width, channels), method)

    def fit(batch: Batch, num: int | None) -> Batch:
        x, y = batch.x[:num], batch.y[:num]
        parts = [resize(x[i : i + _CHUNK_SIZE]) for i in range(0, len(x), _CHUNK_SIZE)]
        return Batch(jnp.concatenate(parts), y)

    kept = most or (None,) * len(SPLITS)
    splits = {name: fit(getattr(data, name), num) for name, num in zip(SPLITS, kept, strict=True)}
    return data._replace(**splits)


def _read_preprocessor(
    path: Path,
) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"], str]:
    """Read the mean and standard deviation of the channels, in units of 0 to 1, and the filter."""
    options = read_json(path)
    factor = options.get("rescale_factor") or 1 / 255
    if abs(factor * 255 - 1) > 1e-6 or not options.get("do_rescale", True):
        raise ValueError(f"{path}: expected a rescale_factor of 1/255")
    if options.get("do_center_crop") or not options.get("do_resize", True):
        raise ValueError(f"{path}: expected do_resize without do_center_crop")
    if (resample := options.get("resample", 2)) not in _FILTERS:
        raise ValueError(
            f"{path}: expected resample of 2 (bilinear) or 3 (bicubic), got {resample!r}"
        )
    mean, std = (
        np.array(options.get(key) or [0.5] * 3, np.float32) for key in ("image_mean", "image_std")
    )
    if not options.get("do_normalize", True):
        mean, std = np.zeros(3, np.float32), np.ones(3, np.float32)
    return mean, std, _FILTERS[resample]


def _open_tokenizer(checkpoint: PathLike) -> tuple[int, Encoder]:
    """Return the vocabulary size of a model, and the function that encodes text for it."""
    vocab_size = read_architecture(checkpoint).vocab_size
    if vocab_size is None:
        raise ValueError(f"expected a model of text at {checkpoint}, got one of images")
    path = Path(checkpoint) / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"expected {TOKENIZER} in {checkpoint}, found none")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f'text needs tokenizers: pip install -e ".[text]" ({error})') from None
    with _raise_value_errors(f"{path} is damaged or not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str, location: str) -> Int[np.ndarray, "T"]:
        with _raise_value_errors(f"{path} cannot encode {location}"):
            ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        if ids.size and ids.max() >= vocab_size:
            raise ValueError(
                f"expected tokens in 0..{vocab_size - 1}, the model's, got {ids.max()} from {path} "
                f"for {location}"
            )
        return ids

    return vocab_size, encode


@contextlib.contextmanager
def _raise_value_errors(text: str) -> Iterator[None]:
    """Turn what tokenizers raises into ValueErrors. A panic of its Rust code is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{text}: {get_first_line(error)}") from None
        raise


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"expected a text file at {path}, found none")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {path}: {error}") from None


def _parse_question(line: str, location: str) -> tuple[str, list[str]]:
    """Parse a question and its choices, and put the correct choice first."""
    try:
        found = json.loads(line)
        question, choices, answer = found["question"], found["choices"], found["answer"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{location}: expected {{"question": ..., "choices": [...], "answer": 0}}, got {error}'
        ) from None
    is_text = isinstance(question, str) and isinstance(choices, list) and len(choices) > 1
    is_text = is_text and all(isinstance(choice, str) for choice in choices)
    is_index = isinstance(answer, int) and not isinstance(answer, bool)
    if not is_text or not is_index or not 0 <= answer < len(choices):
        raise ValueError(
            f"{location}: expected a question, at least two choices as text, and the index of the "
            f"correct choice, got {line:.80}"
        )
    return question, [choices[answer], *choices[:answer], *choices[answer + 1 :]]


def _split(
    x: Int[np.ndarray, "E ..."],
    y: Int[np.ndarray, "E ..."],
    seed: int,
    sizes: Sequence[int] | None,
    name: str,
    vocab_size: int,
) -> Dataset:
    """Split examples at random."""
    order = np.random.default_rng(seed).permutation(len(x))
    others = np.maximum(1, np.floor(np.array(SHARES[1:]) * len(x)).astype(int))
    given = np.array([len(x) - others.sum(), *others] if sizes is None else sizes)
    if given.shape != (len(SPLITS),) or given.min() < 1 or given.sum() > len(x):
        raise ValueError(
            f"expected sizes of {', '.join(SPLITS)} of at least 1 and at most {len(x)} in all, got "
            f"{[*map(int, given)]}"
        )
    parts = np.split(order, np.cumsum(given))[: len(SPLITS)]
    batches = (
        Batch(jnp.asarray(x[rows], jnp.int32), jnp.asarray(y[rows], jnp.int32)) for rows in parts
    )
    return Dataset(*batches, name=name, num_classes=vocab_size)
