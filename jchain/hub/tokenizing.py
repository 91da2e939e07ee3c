"""Tokenizers of checkpoints: opening one, and comparing those of two checkpoints."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from jchain._typing import Int
from jchain.hub.adapter import find_model
from jchain.hub.checkpoint import JsonObject, list_names, read_json
from jchain.hub.families import read_architecture
from jchain.hub.gguf_header import Header
from jchain.hub.gguf_tokenizer import make_tokenizer
from jchain.hub.opening import find_gguf, read_config
from jchain.pytree import get_first_line, shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# Files from which transformers makes a tokenizer.json.
_SOURCES = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt", "vocab.txt")
# The parts of a tokenizer that decide how text is encoded, besides its model and its vocabulary.
_OPTIONS = ("normalizer", "pre_tokenizer")
# How an added token is found in a text.
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class TextEncoder:
    """A tokenizer with the vocabulary of a model.

    Attributes:
      vocab_size: number of tokens that the model knows.
      special: the tokens that end a document and begin the next one; empty if there are none.
    """

    def __init__(
        self, tokenizer: "Tokenizer", path: Path, vocab_size: int, special: Sequence[int]
    ) -> None:
        """Wrap a tokenizer.

        Args:
          tokenizer: the tokenizer.
          path: its file, for error messages.
          vocab_size: number of tokens that the model knows.
          special: the tokens that end a document and begin the next one; those that the model
            does not know are ignored.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._path, self.vocab_size = tokenizer, path, vocab_size
        self.special = [i for i in special if 0 <= i < vocab_size]

    @cached_property
    def separator(self) -> Int[np.ndarray, "T"]:
        """The tokens between two documents, which are those of a new line if none are special."""
        return np.array(self.special, np.int32) if self.special else self.encode("\n", "a new line")

    def encode(self, text: str, location: str) -> Int[np.ndarray, "T"]:
        """Encode a text without adding special tokens.

        Args:
          text: the text.
          location: where it is from, for error messages.

        Raises:
          ValueError: if it cannot be encoded, or has tokens that the model does not know.
        """
        return self.encode_many([text], location)[0]

    def encode_many(self, texts: Sequence[str], location: str) -> list[Int[np.ndarray, "T"]]:
        """Encode several texts, on several cores.

        Args:
          texts: the texts.
          location: as for `encode`.

        Raises:
          ValueError: as for `encode`.
        """
        with _raise_value_errors(f"{self._path} cannot encode {location}"):
            found = self._tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
            ids = [np.array(encoding.ids, np.int32) for encoding in found]
        largest = max((int(part.max()) for part in ids if part.size), default=0)
        if largest >= self.vocab_size:
            raise ValueError(
                f"expected tokens in 0..{self.vocab_size - 1}, the model's, got {largest} from "
                f"{self._path} for {location}"
            )
        return ids


def open_tokenizer(checkpoint: str | os.PathLike[str]) -> TextEncoder:
    """Open the tokenizer of a checkpoint.

    Documents are separated as in the training of most models: by the end-of-text token, and by the
    token that begins a text if it is another one. These are `eos_token_id` and `bos_token_id` of
    config.json, or else `eos_token` and `bos_token` of tokenizer_config.json.

    Args:
      checkpoint: the checkpoint, as in `jchain.hub.load`, with tokenizer.json unless it is a GGUF
        file.

    Raises:
      FileNotFoundError: if a file is missing.
      ImportError: if tokenizers is not installed.
      ValueError: if a file is damaged, or the model does not take text.
    """
    folder = find_model(checkpoint)
    vocab_size = read_architecture(folder).vocab_size
    if vocab_size is None:
        raise ValueError(f"expected a model of text at {folder}, got one of images")
    path = _find_tokenizer(folder)
    tokenizer, options = _load_tokenizer(path), read_config(folder)[0]
    path_options = folder / TOKENIZER_CONFIG
    names = read_json(path_options) if path_options.is_file() else {}
    tokens = [
        _find_special_token(name, options, names, tokenizer) for name in ("eos_token", "bos_token")
    ]
    # A text that only begins with a special token does not end with one.
    special = [] if tokens[0] is None else [i for i in dict.fromkeys(tokens) if i is not None]
    return TextEncoder(tokenizer, path, vocab_size, special)


def _load_tokenizer(path: Path) -> "Tokenizer":
    """Load a tokenizer from tokenizer.json, or from a GGUF file."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f'text needs tokenizers: pip install -e ".[text]" ({error})') from None
    with _raise_value_errors(f"{path} is damaged or not a tokenizer"):
        if path.name == TOKENIZER:
            return Tokenizer.from_file(str(path))
        return make_tokenizer(Header(path))


def find_tokenizer(checkpoint: Path) -> Path | None:
    """Find the file that a checkpoint's tokenizer is made from.

    Args:
      checkpoint: folder or GGUF file of a model.

    Returns:
      tokenizer.json or a GGUF file; None if there is none.
    """
    path = checkpoint / TOKENIZER
    return path if path.is_file() else find_gguf(checkpoint)


def _find_tokenizer(folder: Path) -> Path:
    if (path := find_tokenizer(folder)) is not None:
        return path
    found = sorted({path.name for pattern in _SOURCES for path in folder.glob(pattern)})
    hint = (
        f"{' and '.join(found)}: transformers makes {TOKENIZER} of it, with "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
    raise FileNotFoundError(f"expected {TOKENIZER} in {folder}, found {hint if found else 'none'}")


def _find_special_token(
    name: str, options: JsonObject, names: JsonObject, tokenizer: "Tokenizer"
) -> int | None:
    """Find a special token by its id in config.json, or its name in tokenizer_config.json."""
    found = options.get(f"{name}_id")
    if isinstance(found, list) and found:
        found = found[0]
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    token = names.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


@contextlib.contextmanager
def _raise_value_errors(text: str) -> Iterator[None]:
    """Turn what tokenizers raises into ValueErrors. A panic of its Rust code is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{text}: {get_first_line(error)}") from None
        raise


class TokenizerComparison(NamedTuple):
    """How the tokenizers of two checkpoints differ.

    Attributes:
      kind: "same" if they encode all text alike; "extended" if one has more tokens, whose ids
        follow those of the other, and encodes text without these tokens alike; else "different".
      difference: the first difference, for messages; empty if there is none.
    """

    kind: Literal["same", "extended", "different"]
    difference: str


def compare_tokenizers(first: Path, second: Path) -> TokenizerComparison:
    """Compare how the tokenizers of two checkpoints encode text.

    What does not change the tokens of a text, such as decoders and templates, is ignored.

    Args:
      first: a tokenizer.json, or a GGUF file.
      second: another one.

    Raises:
      ValueError: if a file is damaged.
    """
    paths = first, second
    if all(path.name == TOKENIZER for path in paths) and first.read_bytes() == second.read_bytes():
        return TokenizerComparison("same", "")
    one, other = map(_read_parts, paths)
    for name in sorted(one.options.keys() | other.options.keys()):
        values = [part.options.get(name) for part in (one, other)]
        if values[0] != values[1]:
            return TokenizerComparison("different", f"{name}: {_show_difference(*values)}")
    for token in sorted(
        one.tokens.keys() & other.tokens.keys(), key=lambda token: one.tokens[token][0]
    ):
        if one.tokens[token] != other.tokens[token]:
            values = f"{one.tokens[token]} and {other.tokens[token]}"
            return TokenizerComparison("different", f"token {token!r}: {values}")
    return _compare_sizes(one.tokens, other.tokens)


def _compare_sizes(one: "_Tokens", other: "_Tokens") -> TokenizerComparison:
    """Compare vocabularies whose shared tokens are the same."""
    only = [[t for t in a if t not in b] for a, b in ((one, other), (other, one))]
    if not any(only):
        return TokenizerComparison("same", "")
    names = [list_names(map(repr, tokens)) or "none" for tokens in only]
    last = max((id for token, (id, _) in one.items() if token in other), default=-1)
    both = one | other
    first = min(both[token][0] for tokens in only for token in tokens)
    kind = "extended" if not all(only) and first > last else "different"
    return TokenizerComparison(kind, f"tokens of only one: {names[0]} and {names[1]}")


def _show_difference(one: object, other: object) -> str:
    """Show two values, or the first items in which two lists differ."""
    if isinstance(one, list) and isinstance(other, list):
        pairs = zip([*one, None], [*other, None], strict=False)
        one, other = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{shorten(one)} and {shorten(other)}"


class _Parts(NamedTuple):
    """What decides how a tokenizer encodes text."""

    options: JsonObject
    tokens: "_Tokens"


# A map from each token to its id, and to how an added token is found in a text.
_Tokens = dict[str, tuple[int, tuple[bool, ...] | None]]


def _read_parts(path: Path) -> _Parts:
    content = _normalize(path)
    try:
        model, added = dict(content["model"]), content.get("added_tokens") or []
        vocab = model.pop("vocab")
        if isinstance(vocab, list):  # of a Unigram model, with the score of each token
            model["scores"] = [score for _, score in vocab]
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        tokens: _Tokens = {str(token): (int(i), None) for token, i in vocab.items()}
        for token in added:
            flags = tuple(bool(token.get(flag)) for flag in _FLAGS)
            tokens[str(token["content"])] = int(token["id"]), flags
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not a tokenizer: {error!r}") from None
    options = {f"model.{name}": value for name, value in model.items()}
    return _Parts(options | {name: content.get(name) for name in _OPTIONS}, tokens)


def _normalize(path: Path) -> JsonObject:
    """Read a tokenizer.json as the installed version of tokenizers writes it.

    Older versions left out options that had one value, and wrote merges in another format.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        if path.name == TOKENIZER:
            return read_json(path)
    return json.loads(_load_tokenizer(path).to_str())
