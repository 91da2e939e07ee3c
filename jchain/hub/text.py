"""Text for pretrained transformers, as sequences of tokens."""

import array
import heapq
import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jchain._typing import Int
from jchain.arguments import checked
from jchain.data import SPLITS, Batch, Dataset
from jchain.hub import splits
from jchain.hub.pieces import (
    CONTEXT,
    PIECE_SIZE,
    Cut,
    Piece,
    cut_pieces,
    encode_pieces,
    find_cut,
)
from jchain.hub.text_files import Part, read_parts
from jchain.hub.tokenizing import TextEncoder, open_tokenizer

PathLike = str | os.PathLike[str]
# The least number of characters in a block, and the number for each token of a sequence. A token of
# English prose has 4 to 5.
_LEAST_BLOCK, _BLOCK_SIZE = 2048, 16
# The most sequences that are taken from one block, so that they are spread over the text.
_NUM_PER_BLOCK = 4
# The least number of blocks to draw.
_LEAST_BLOCKS = 16
# Alignment in bytes of arrays that XLA uses without a copy.
_ALIGNMENT = 64


class _Sequences(NamedTuple):
    """Sequences of tokens, each with the token that follows."""

    ids: Int[np.ndarray, "E T"]
    following: Int[np.ndarray, "E"]


@checked
def load_text(
    checkpoint: PathLike,
    files: PathLike | Sequence[PathLike],
    *,
    length: int = 128,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    most: Sequence[int | None] | None = None,
    field: str | None = None,
) -> Dataset:
    """Load text as sequences of tokens, for next-token prediction.

    The labels are the next tokens, so x and y are `[B, length]`. The default loss of
    `jchain.Problem` is then the cross-entropy of the next token, in nats.

    Files that end in .jsonl, .json, .csv, .tsv, or .parquet hold documents: the field or column
    `text` of each record, or the strings of a JSON array. Any other file is one document of plain
    text. All but .parquet may be compressed (.gz). Documents are joined as in the training of most
    models: by `eos_token_id` of config.json, and `bos_token_id` if it is another token, or by a new
    line if the model has no end-of-text token.

    Without `sizes` and `most`, all text is used: its tokens are cut into sequences that do not
    overlap, which take 8 bytes a token, and the splits are chosen at random. With them, all files
    are read once, but only as much text is encoded as the splits need, if there is more. It is
    drawn at random from all files: whole documents, which are then joined, and blocks of `16 *
    length` characters, but at least 2,048, of longer documents, with up to 4 sequences each.

    Long documents are encoded in pieces that are cut where a token ends, so the tokens are those of
    the whole text, except for a few around a cut inside thousands of spaces or digits in a row.

    Args:
      checkpoint: the model, as in `load`, with tokenizer.json unless it is a GGUF file.
      files: path of a file in UTF-8, or several paths.
      length: number of tokens in a sequence.
      seed: seed of the random choice of text and splits.
      sizes: number of sequences in each split. If None, 50% of the sequences are for train, 20% for
        search, 15% for select, and 15% for test.
      most: maximum number of sequences to keep in each split; None for no maximum.
      field: name of the field or column that holds the text; if None, `text`.

    Raises:
      FileNotFoundError: if a file is missing.
      ImportError: if tokenizers is not installed, or pyarrow for a file of Parquet.
      ValueError: if a file is damaged or not UTF-8, a record has no text, the text has less than
        one sequence for each split, the tokenizer is damaged or makes tokens that the model does
        not know, there are fewer sequences than `sizes` asks for, or the model does not take text.
    """
    if length < 1:
        raise ValueError(f"expected a length of at least 1, got {length}")
    splits.check_sizes(sizes, most)
    paths = [Path(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
    encoder = open_tokenizer(checkpoint)

    def read(size: int) -> Iterator[Part]:
        return itertools.chain.from_iterable(read_parts(path, field, size) for path in paths)

    num = splits.count_needed(sizes, most)
    found = None if num is None else _sample(read, encoder, length, num, seed)
    found = _read_all(read, encoder, length, paths) if found is None else found
    chosen = splits.split_at_random(len(found.ids), seed, sizes, most)
    x = [_take(found.ids, rows) for rows in chosen]
    following = [found.following[rows] for rows in chosen]
    del found  # which is as large as x, before the labels, which are as large, are made
    batches = map(_make_batch, x, following)
    name = "+".join(path.stem for path in paths)
    return Dataset(*batches, name=name, num_classes=encoder.vocab_size)


def _read_all(
    read: Callable[[int], Iterable[Part]], encoder: TextEncoder, length: int, paths: Sequence[Path]
) -> _Sequences:
    """Encode all text, and cut it into sequences."""
    ids = array.array("i")
    for piece, part in encode_pieces(cut_pieces(read(PIECE_SIZE), encoder), encoder):
        if piece.is_start and ids:
            ids.frombytes(encoder.separator.tobytes())
        ids.frombytes(part.tobytes())
    num = max(0, (len(ids) - 1) // length)
    if num < len(SPLITS):
        raise ValueError(
            f"expected text of at least {len(SPLITS) * length + 1} tokens, a sequence of {length} "
            f"for each split, got {len(ids)} in {', '.join(map(str, paths))}"
        )
    return _cut_sequences(np.frombuffer(ids, np.int32), length)


def _cut_sequences(ids: Int[np.ndarray, "N"], length: int) -> _Sequences:
    """Cut tokens into sequences that do not overlap."""
    num = max(0, (len(ids) - 1) // length)
    sequences = ids[: num * length].reshape(num, length)
    return _Sequences(sequences, ids[length : num * length + 1 : length])


def _take(ids: Int[np.ndarray, "E T"], rows: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B T"]:
    x = _allocate((len(rows), ids.shape[1]))
    # With the default mode, NumPy would make a copy.
    return np.take(ids, rows, axis=0, out=x, mode="clip")


def _make_batch(x: Int[np.ndarray, "B T"], following: Int[np.ndarray, "B"]) -> Batch:
    y = _allocate(x.shape)
    y[:, :-1], y[:, -1] = x[:, 1:], following
    return Batch(*(jax.device_put(part, may_alias=True) for part in (x, y)))


def _allocate(shape: tuple[int, ...]) -> Int[np.ndarray, "B T"]:
    """Allocate an array that JAX uses on a CPU without a copy, which would be kept, too."""
    size = math.prod(shape) * np.dtype(np.int32).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.int32).reshape(shape)


def _sample(
    read: Callable[[int], Iterable[Part]],
    encoder: TextEncoder,
    length: int,
    num: int,
    seed: int,
) -> _Sequences | None:
    """Encode random parts of the text until there are enough sequences; None if all are needed."""
    size = max(_BLOCK_SIZE * length, _LEAST_BLOCK)
    budget = (num // _NUM_PER_BLOCK + _LEAST_BLOCKS) * size
    while True:
        parts, is_all = _draw(read(size), budget, seed)
        if is_all:
            return None
        found = _encode_parts(parts, encoder, length, num)
        if len(found.ids) >= num:
            return found
        budget *= 4


def _draw(parts: Iterable[Part], budget: int, seed: int) -> tuple[list[Part], bool]:
    """Draw parts at random, in random order, with about `budget` characters in all.

    Returns:
      The parts, and whether they are all there are.
    """
    rng, size, is_all = random.Random(seed), 0, True
    kept: list[tuple[float, int, Part]] = []  # a heap of the parts with the largest numbers
    for i, part in enumerate(parts):
        heapq.heappush(kept, (rng.random(), i, part))
        size += len(part.text)
        while size - len(kept[0][2].text) >= budget:
            size -= len(heapq.heappop(kept)[2].text)
            is_all = False
    return [part for _, _, part in sorted(kept, key=lambda item: -item[0])], is_all


def _encode_parts(parts: Sequence[Part], encoder: TextEncoder, length: int, num: int) -> _Sequences:
    """Encode parts until there are enough sequences.

    Whole documents are joined. The blocks of longer documents are cut into sequences one by one.
    """
    joined, blocks, count = array.array("i"), [], 0
    pieces = (_trim(part, encoder) for part in parts)
    for part, (_, ids) in zip(parts, encode_pieces(pieces, encoder), strict=True):
        if part.is_start and part.is_end:
            joined.frombytes((encoder.separator if joined else ids[:0]).tobytes())
            joined.frombytes(ids.tobytes())
        else:
            blocks.append(_cut_sequences(ids[: _NUM_PER_BLOCK * length + 1], length))
            count += len(blocks[-1].ids)
        if count + (len(joined) - 1) // length >= num:
            break
    found = [_cut_sequences(np.array(joined, np.int32), length), *blocks]
    ids, following = (np.concatenate(part)[:num] for part in zip(*found, strict=True))
    return _Sequences(ids, following)


def _trim(part: Part, encoder: TextEncoder) -> Piece:
    """Cut a block where tokens end; the text that is cut off tells where."""
    text, location, begin, end = part.text, part.location, Cut(0, 0, 0), len(part.text)
    if not part.is_end:
        end = find_cut(text, end * 3 // 4, end - CONTEXT, encoder, location).position
    if not part.is_start:
        begin = find_cut(text, 1, len(text) // 4, encoder, location)
    text = text[begin.position - begin.num_context : end]
    return Piece(text, begin.num_tokens, part.is_start, location)
