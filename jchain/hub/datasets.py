"""What pretrained transformers are judged on, as the four splits of `jchain.data`: text, questions with choices, images."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jchain import images
from jchain._typing import Array, Float, Int
from jchain.data import SHARES, SPLITS, Batch, Dataset, split
from jchain.hub.checkpoint import read_json
from jchain.hub.places import read_architecture

TOKENIZER, PREPROCESSOR = "tokenizer.json", "preprocessor_config.json"
Path_ = str | os.PathLike[str]
# Images that are resized together.
_CHUNK = 256
# Of `resample`, numbered as by PIL.
_FILTERS = {2: "bilinear", 3: "bicubic"}


def load_text(
    checkpoint: Path_,
    files: Path_ | Sequence[Path_],
    *,
    length: int = 128,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
) -> Dataset:
    """Text as sequences of tokens, for the loss of the next token (the default of `jchain.Problem`), in nats.

    The tokens of all files, one behind the other, are cut into sequences that do not overlap; which go into which split is
    drawn by `seed`. Labels are the tokens that follow, so x and y are `[B, length]`.

    Args:
      checkpoint: folder with tokenizer.json, read by `tokenizers`, and config.json.
      files: of text, in UTF-8.
      length: tokens of a sequence.
      seed: of the splits; the shares are 50% train, 20% search, 15% select, 15% test.
      sizes: sequences of each split; as many as there are when None.

    Raises:
      FileNotFoundError: a file is missing.
      ImportError: tokenizers is not installed.
      ValueError: the text is no UTF-8 or shorter than a sequence for each split, the tokenizer is damaged or has tokens that the
        model does not know, there are fewer sequences than `sizes` asks for, or the model takes no text.
    """
    if length < 1:
        raise ValueError(f"expected a length of at least 1, got {length}")
    files = [files] if isinstance(files, str | os.PathLike) else [*files]
    vocabulary, encode = _open_tokenizer(checkpoint)
    ids = np.concatenate(
        [encode(_read_text(Path(file)), str(file)) for file in files] or [np.zeros(0, np.int32)]
    )
    count = max(0, (len(ids) - 1) // length)
    if count < len(SPLITS):
        raise ValueError(
            f"expected text of at least {len(SPLITS) * length + 1} tokens, a sequence of {length} for each split, got {len(ids)} "
            f"in {', '.join(map(str, files))}"
        )
    x, y = (ids[start : start + count * length].reshape(count, length) for start in (0, 1))
    return _split(x, y, seed, sizes, "+".join(Path(file).stem for file in files), vocabulary)


def load_choices(
    checkpoint: Path_,
    file: Path_,
    *,
    length: int | None = None,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
) -> Dataset:
    """Questions with choices, for `choice_loss` and `choice_accuracy`.

    A line of the file is a question, `{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}`. Each choice, behind the
    question and a space, is a row: x is `[B, C, T]`, padded at the end, and y the tokens that follow, -1 where they do not
    belong to the choice. The right choice stands first.

    Args:
      checkpoint: as for `load_text`.
      file: of JSON lines.
      length: tokens of a row, at most: longer questions are cut at their beginning; as long as the longest when None.
      seed: of the splits.
      sizes: questions of each split; as many as there are when None.

    Raises:
      FileNotFoundError: a file is missing.
      ImportError: tokenizers is not installed.
      ValueError: a line is no such question, questions have different numbers of choices, a choice has no token or does not fit
        into `length`, or as `load_text`.
    """
    if length is not None and length < 1:
        raise ValueError(f"expected a length of at least 1, got {length}")
    vocabulary, encode = _open_tokenizer(checkpoint)
    path = Path(file)
    rows = []
    # Not `splitlines`, which cuts at characters that JSON leaves in its strings.
    for i, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            question, choices = _read_question(line, f"{path}, line {i}")
            start = len(encode(question, f"{path}, line {i}"))
            rows.append(
                [(encode(f"{question} {choice}", f"{path}, line {i}"), start) for choice in choices]
            )
    counts = sorted({len(row) for row in rows})
    if len(counts) != 1 or len(rows) < len(SPLITS):
        raise ValueError(
            f"expected questions of one number of choices in {path}, at least {len(SPLITS)}, got {len(rows)} of {counts}"
        )
    longest = max(len(ids) for row in rows for ids, _ in row) - 1
    width = longest if length is None else min(length, longest)
    x = np.zeros((len(rows), counts[0], width), np.int32)
    y = np.full_like(x, -1)
    for i, row in enumerate(rows):
        for j, (ids, start) in enumerate(row):
            num = len(ids) - start
            if start < 1 or not 0 < num <= width:
                raise ValueError(
                    f"expected a question of a token or more and a choice of 1 to {width}, got {start} and {num} in question {i} of {path}"
                )
            kept = ids[-(width + 1) :]
            x[i, j, : len(kept) - 1] = kept[:-1]
            y[i, j, len(kept) - 1 - num : len(kept) - 1] = kept[1:][-num:]
    return _split(x, y, seed, sizes, path.stem, vocabulary)


def load_images(
    checkpoint: Path_,
    name: str,
    seed: int = 0,
    *,
    sizes: Sequence[int] | None = None,
    most: Sequence[int] | None = None,
    data_dir: str | Path | None = None,
) -> Dataset:
    """A prepared set of images as the model was trained on: resized and standardized as its preprocessor_config.json says.

    Args:
      checkpoint: folder of a ViT.
      name: of the set, as for `jchain.data.load`.
      seed: of the splits.
      sizes: examples of each split; as many as there are when None.
      most: examples of each split that are kept, at most: resized they take memory.
      data_dir: the folder of prepared sets.

    Raises:
      FileNotFoundError: preprocessor_config.json is missing, or the set is not prepared.
      ValueError: the model takes no images, it was trained on another scale than 0 to 1 before it was standardized, on images
        that were cut or resized by another filter than PIL's bilinear or bicubic, or as `jchain.data.load`.
    """
    architecture = read_architecture(checkpoint)
    if architecture.vocabulary is not None:
        raise ValueError(f"expected a model of images at {checkpoint}, got one of text")
    options = read_json(Path(checkpoint) / PREPROCESSOR)
    where = Path(checkpoint) / PREPROCESSOR
    if abs((options.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6 or not options.get(
        "do_rescale", True
    ):
        raise ValueError(f"{where}: expected a rescale_factor of 1/255")
    if options.get("do_center_crop") or not options.get("do_resize", True):
        raise ValueError(f"{where}: expected do_resize without do_center_crop")
    if (kind := options.get("resample", 2)) not in _FILTERS:
        raise ValueError(f"{where}: expected resample of 2 (bilinear) or 3 (bicubic), got {kind!r}")
    is_standard = options.get("do_normalize", True)
    mean, std = (
        np.array(options.get(f"image_{of}") or [0.5] * 3, np.float32) for of in ("mean", "std")
    )
    if not is_standard:
        mean, std = np.zeros(3, np.float32), np.ones(3, np.float32)
    found = images.read(name, data_dir)
    _, height, width, channels = architecture.example
    data = split(
        *found.train,
        seed=seed,
        name=name,
        test=found.test,
        sizes=sizes,
        statistics=(255 * mean, 255 * std),
    )
    resize = jax.jit(
        lambda x: jax.image.resize(
            jnp.broadcast_to(x, (*x.shape[:3], channels)),
            (x.shape[0], height, width, channels),
            _FILTERS[kind],
        )
    )

    def fit(batch: Batch, num: int | None) -> Batch:
        batch = Batch(batch.x[:num], batch.y[:num])
        parts = [resize(batch.x[i : i + _CHUNK]) for i in range(0, len(batch.x), _CHUNK)]
        return Batch(jnp.concatenate(parts), batch.y)

    kept = most or (None,) * len(SPLITS)
    return data._replace(
        **{name: fit(getattr(data, name), num) for name, num in zip(SPLITS, kept, strict=True)}
    )


def token_loss(outputs: Float[Array, "*B T V"], y: Int[Array, "*B T"]) -> Float[Array, "*B"]:
    """Cross-entropy of the next token in nats, the mean over the tokens of each sequence whose label is not below 0."""
    is_counted = y >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(y, 0))
    return jnp.sum(jnp.where(is_counted, each, 0.0), axis=-1) / jnp.maximum(
        jnp.sum(is_counted, axis=-1), 1
    )


def token_accuracy(outputs: Float[Array, "*B T V"], y: Int[Array, "*B T"]) -> Float[Array, "*B"]:
    """The share of the tokens of each sequence, of those whose label is not below 0, that are the likeliest."""
    is_counted = y >= 0
    is_right = is_counted & (jnp.argmax(outputs, axis=-1) == y)
    return jnp.sum(is_right, axis=-1) / jnp.maximum(jnp.sum(is_counted, axis=-1), 1)


def choice_loss(outputs: Float[Array, "B C T V"], y: Int[Array, "B C T"]) -> Float[Array, "B"]:
    """Cross-entropy of the right choice in nats, by a softmax over the mean log-likelihood of a token of each."""
    first = jnp.zeros(y.shape[:1], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(-token_loss(outputs, y), first)


def choice_accuracy(outputs: Float[Array, "B C T V"], y: Int[Array, "B C T"]) -> Float[Array, "B"]:
    """Whether the right choice has the highest mean log-likelihood of a token; 0 where another has as high a one."""
    each = token_loss(outputs, y)
    return (each[:, 0] < jnp.min(each[:, 1:], axis=1)).astype(jnp.float32)


def _open_tokenizer(checkpoint: Path_) -> tuple[int, Any]:
    """The model's vocabulary, and a function from text, and where it stands, to ids."""
    vocabulary = read_architecture(checkpoint).vocabulary
    if vocabulary is None:
        raise ValueError(f"expected a model of text at {checkpoint}, got one of images")
    path = Path(checkpoint) / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"expected {TOKENIZER} in {checkpoint}, found none")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"text needs tokenizers: pip install 'jchain[text]' ({error})") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of no class of its own
        raise ValueError(f"{path} is damaged or no tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str, where: str) -> Int[np.ndarray, "T"]:
        try:
            ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # of no class of its own
            raise ValueError(f"{path} has no tokens for {where}: {error}") from None
        if ids.size and ids.max() >= vocabulary:
            raise ValueError(
                f"expected tokens in 0..{vocabulary - 1}, those of the model, got {ids.max()} by {path} from {where}"
            )
        return ids

    return vocabulary, encode


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of text at {path}, found none")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {path}: {error}") from None


def _read_question(line: str, where: str) -> tuple[str, list[str]]:
    """The question, and its choices with the right one first."""
    try:
        found = json.loads(line)
        question, choices, answer = found["question"], found["choices"], found["answer"]
        is_right = isinstance(question, str) and isinstance(choices, list) and len(choices) > 1
        is_right = is_right and all(isinstance(choice, str) for choice in choices)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{where}: expected {{"question": ..., "choices": [...], "answer": 0}}, got {error}'
        ) from None
    if (
        not is_right
        or isinstance(answer, bool)
        or not isinstance(answer, int)
        or not 0 <= answer < len(choices)
    ):
        raise ValueError(
            f"{where}: expected a question, choices as text, and which of them is right from 0, got {line:.80}"
        )
    return question, [choices[answer], *choices[:answer], *choices[answer + 1 :]]


def _split(
    x: np.ndarray, y: np.ndarray, seed: int, sizes: Sequence[int] | None, name: str, vocabulary: int
) -> Dataset:
    """Examples drawn into splits."""
    order = np.random.default_rng(seed).permutation(len(x))
    others = np.maximum(1, np.floor(np.array(SHARES[1:]) * len(x)).astype(int))
    given = np.array([len(x) - others.sum(), *others] if sizes is None else sizes)
    if given.shape != (len(SPLITS),) or given.min() < 1 or given.sum() > len(x):
        raise ValueError(
            f"expected sizes of {', '.join(SPLITS)} of at least 1 and {len(x)} in all, got {[*map(int, given)]}"
        )
    parts = np.split(order, np.cumsum(given))[: len(SPLITS)]
    batches = (
        Batch(jnp.asarray(x[rows], jnp.int32), jnp.asarray(y[rows], jnp.int32)) for rows in parts
    )
    return Dataset(*batches, name=name, num_classes=vocabulary)
