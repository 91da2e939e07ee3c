"""The tokenizer of a GGUF file, made from the file's metadata.

A GGUF file has the vocabulary, the merges or scores, and the name of the rule that splits text into
words. The rules are those of llama.cpp (https://github.com/ggml-org/llama.cpp, llama-vocab.cpp),
which defines these names.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from jchain.hub.checkpoint import JsonObject
from jchain.hub.gguf_header import Header
from jchain.pytree import get_first_line, shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_SPACE = "\u2581"  # stands for a space in tokens of SentencePiece

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The expressions that split text one after the other, by `tokenizer.ggml.pre`.
SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "dbrx", "smaug-bpe"),
        (_LLAMA3,),
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "kormo", "f2llmv2", "megrez"), (_QWEN2,)
    ),
    "tekken": (_TEKKEN,),
}  # fmt: skip
# In these vocabularies, a word that is a token is never split, and text begins with a BOS token.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0")


def make_tokenizer(header: Header) -> "Tokenizer":
    """Make the tokenizer of a file.

    Args:
      header: the header of the file.

    Raises:
      ImportError: if tokenizers is not installed.
      ValueError: if the file has no tokenizer, or one of a kind that is not supported.
    """
    try:
        from tokenizers import AddedToken
    except ImportError as error:
        raise ImportError(f'text needs tokenizers: pip install -e ".[text]" ({error})') from None
    model = header.get("tokenizer.ggml.model")
    makers = {"gpt2": _make_byte_level, "llama": _make_sentencepiece}
    if not isinstance(model, str) or model not in makers:
        got = "none" if model is None else shorten(model)
        raise ValueError(
            f"{header.path}: expected tokenizer.ggml.model to be gpt2 or llama, got {got}: put the "
            f"model's {TOKENIZER} beside the file, and give the folder"
        )
    tokens = header.read_strings("tokenizer.ggml.tokens")
    try:
        tokenizer = makers[model](header, tokens)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # tokenizers has no more specific class
        raise ValueError(f"{header.path}: invalid tokenizer: {get_first_line(error)}") from None
    types = _read_numbers(header, "tokenizer.ggml.token_type", len(tokens))
    special = {tokens[i] for i in _read_special_ids(header, len(tokens)).values()}
    special |= {tokens[i] for i in np.flatnonzero(types == _CONTROL)}
    # llama.cpp finds these tokens in the text before it splits the rest.
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token in special)
            for token, kind in zip(tokens, types, strict=True)
            if token and (token in special or kind == _USER_DEFINED)
        ]
    )
    tokenizer.post_processor = _make_template(header, tokens)
    return tokenizer


def make_tokenizer_files(header: Header) -> dict[str, str]:
    """Make the files of a tokenizer in a checkpoint folder, as a map from name to content.

    The map is empty if the file has no tokenizer.

    Args:
      header: the header of the file.

    Raises:
      ImportError: if tokenizers is not installed.
      ValueError: if the file has a tokenizer that is invalid or not supported.
    """
    if header.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return {}
    tokens = header.read_strings("tokenizer.ggml.tokens")
    config: JsonObject = {
        f"{name}_token": tokens[i] for name, i in _read_special_ids(header, len(tokens)).items()
    }
    config |= {f"add_{name}_token": _adds(header, name) for name in ("bos", "eos")}
    template = header.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {
        TOKENIZER: make_tokenizer(header).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _make_byte_level(header: Header, tokens: list[str]) -> "Tokenizer":
    """Make a tokenizer of byte pairs, as in GPT-2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    rule = _get_rule(header)
    if rule not in SPLITS:
        raise ValueError(
            f"{header.path}: expected tokenizer.ggml.pre to be one of {', '.join(SPLITS)}, got "
            f"{shorten(rule)}: put the model's {TOKENIZER} beside the file, and give the folder"
        )
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[rule]]
    merges = [_split_merge(merge) for merge in header.read_strings("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_sentencepiece(header: Header, tokens: list[str]) -> "Tokenizer":
    """Make a tokenizer of SentencePiece's byte-pair encoding, as in Llama 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in header.metadata:
        merges = [_split_merge(merge) for merge in header.read_strings("tokenizer.ggml.merges")]
    else:
        scores = _read_numbers(header, "tokenizer.ggml.scores", len(tokens))
        merges = _make_merges(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True))
    has_prefix = header.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        _SPACE, prepend_scheme="first" if has_prefix else "never", split=False
    )
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    parts += [decoders.Strip(" ", left=1)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _get_rule(header: Header) -> str:
    return str(header.get("tokenizer.ggml.pre", "default"))


def _split_merge(merge: str) -> tuple[str, str]:
    # The first character can be a space.
    middle = merge.find(" ", 1)
    return merge[:middle], merge[middle + 1 :]


def _make_merges(vocabulary: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Find all pairs of tokens that join to a token, the one with the highest score first."""
    pairs = [
        (-float(scores[i]), cut, len(token) - cut, token[:cut], token[cut:])
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: pair[:3])
    return [(first, second) for *_, first, second in pairs]


def _read_numbers(header: Header, key: str, count: int) -> np.ndarray:
    """Read one number for each token; zeros if the file does not have them."""
    found = header.metadata.get(key)
    if found is None:
        return np.zeros(count)
    if not isinstance(found, np.ndarray) or len(found) != count:
        raise ValueError(
            f"{header.path}: expected {key} to have a number for each of {count:,} tokens, got "
            f"{shorten(found)}"
        )
    return found


def _read_special_ids(header: Header, num_tokens: int) -> dict[str, int]:
    """Read the ids of the special tokens that have a role."""
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = header.get(f"tokenizer.ggml.{key}_token_id")
        if token is None:
            continue
        if type(token) is not int or not 0 <= token < num_tokens:
            raise ValueError(
                f"{header.path}: expected tokenizer.ggml.{key}_token_id in 0..{num_tokens - 1}, "
                f"got {shorten(token)}"
            )
        found[name] = token
    return found


def _adds(header: Header, name: str) -> bool:
    """Return whether the tokenizer adds the BOS or EOS token to a text."""
    is_default = name == "bos" and (
        header.get("tokenizer.ggml.model") == "llama" or _get_rule(header) in _WHOLE_WORDS
    )
    return bool(header.get(f"tokenizer.ggml.add_{name}_token", is_default))


def _make_template(header: Header, tokens: list[str]) -> Any:
    """Make the step that adds the BOS and EOS tokens."""
    from tokenizers import processors

    ids = _read_special_ids(header, len(tokens))
    added = {name: tokens[ids[name]] for name in ("bos", "eos") if name in ids}
    added = {name: token for name, token in added.items() if _adds(header, name)}
    before, after = ([added[name]] if name in added else [] for name in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
        + [f"{token}:1" for token in after],
        special_tokens=[(token, ids[name]) for name, token in added.items()],
    )
