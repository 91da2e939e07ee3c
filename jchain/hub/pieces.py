"""Encoding long texts in pieces, with the tokens that the whole text would have.

The encoding of a text takes over a hundred bytes for each of its bytes. Tokens depend on little of
the text around them, so a text can be cut where a token ends. Whether one ends is tried: the text
before the cut must have the same tokens with and without the text after it. The text after the cut
is encoded together with the end of the text before it, whose tokens are then removed, because many
tokenizers treat the start of a text in a special way.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jchain._typing import Int
from jchain.hub.checkpoint import list_names
from jchain.hub.text_files import Part
from jchain.hub.tokenizing import TextEncoder

# Number of characters of a piece, and of all pieces that are encoded at a time.
PIECE_SIZE, _BATCH_SIZE = 1 << 15, 1 << 18
# Number of characters before and after a cut with which it is tried.
CONTEXT = 256
# Number of characters in which a cut is looked for.
_RANGE = 4096
# Number of candidates of each kind that are tried.
_NUM_CANDIDATES = 12
# The ends of lines and of words are the likely ends of tokens.
_LINE_END, _WORD_END = re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?=\s\S)")


class Cut(NamedTuple):
    """A position in a text where a token ends.

    Attributes:
      position: number of characters before it.
      num_context: number of characters before it that are encoded with the text after it.
      num_tokens: number of tokens of these characters.
    """

    position: int
    num_context: int
    num_tokens: int


class Piece(NamedTuple):
    """A text to encode, without its first tokens.

    Attributes:
      text: the text.
      num_skipped: number of tokens that belong to the piece before it.
      is_start: whether a document begins with it.
      location: where it is from, for error messages.
    """

    text: str
    num_skipped: int
    is_start: bool
    location: str


def find_cut(text: str, low: int, high: int, encoder: TextEncoder, location: str) -> Cut:
    """Find the last position in a range where a token ends.

    Args:
      text: the text.
      low: the first position.
      high: the last position; the text should go on after it.
      encoder: the tokenizer.
      location: where the text is from, for error messages.

    Returns:
      The cut. If none of the candidates is the end of a token, it is at `high`.
    """
    low, high = max(low, high - _RANGE), max(low, high)
    ends = ([m.end() for m in kind.finditer(text, low, high)] for kind in (_LINE_END, _WORD_END))
    kinds = [*(reversed(found) for found in ends), range(high, low, -1)]
    candidates = [i for kind in kinds for i in itertools.islice(kind, _NUM_CANDIDATES)]
    for position in candidates:
        cut, is_end = _try_cut(text, position, encoder, location)
        if is_end:
            return cut
    return _try_cut(text, high, encoder, location)[0]


def _try_cut(text: str, position: int, encoder: TextEncoder, location: str) -> tuple[Cut, bool]:
    """Cut a text, and tell whether a token ends there."""
    start = max(0, position - CONTEXT)
    texts = text[start:position], text[start : position + CONTEXT]
    before, whole = encoder.encode_many(texts, location)
    is_end = np.array_equal(whole[: len(before)], before)
    return Cut(position, position - start, len(before)), is_end


def cut_pieces(parts: Iterable[Part], encoder: TextEncoder) -> Iterator[Piece]:
    """Cut documents into pieces of about `PIECE_SIZE` characters.

    Args:
      parts: the parts of the documents.
      encoder: the tokenizer.
    """
    text, num_context, num_tokens, is_start = "", 0, 0, True
    for part in parts:
        if part.is_start:
            text, num_context, num_tokens, is_start = "", 0, 0, True
        text += part.text
        while len(text) - num_context > PIECE_SIZE + CONTEXT:
            low, high = num_context + PIECE_SIZE // 2, num_context + PIECE_SIZE
            cut = find_cut(text, low, high, encoder, part.location)
            yield Piece(text[: cut.position], num_tokens, is_start, part.location)
            text = text[cut.position - cut.num_context :]
            num_context, num_tokens, is_start = cut.num_context, cut.num_tokens, False
        if part.is_end:
            yield Piece(text, num_tokens, is_start, part.location)


def encode_pieces(
    pieces: Iterable[Piece], encoder: TextEncoder
) -> Iterator[tuple[Piece, Int[np.ndarray, "T"]]]:
    """Encode pieces, many at a time.

    Args:
      pieces: the pieces.
      encoder: the tokenizer.

    Yields:
      Each piece with its tokens.
    """
    for group in _group(pieces):
        location = list_names({piece.location for piece in group})
        found = encoder.encode_many([piece.text for piece in group], location)
        for piece, ids in zip(group, found, strict=True):
            yield piece, ids[piece.num_skipped :]


def _group(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group consecutive pieces, up to `_BATCH_SIZE` characters."""
    group, size = [], 0
    for piece in pieces:
        if group and size + len(piece.text) > _BATCH_SIZE:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece.text)
    if group:
        yield group
