"""Tracks config options: each must be used, known to be irrelevant, or rejected."""

from typing import Any

from jchain.arguments import is_integer
from jchain.hub.checkpoint import JsonObject
from jchain.pytree import shorten

# Options that concern training, generation, or how the file was written. They do not change the
# outputs of a model that is applied to whole sequences without dropout. A name that ends in * is a
# prefix.
IRRELEVANT = (
    "_attn_implementation*", "_commit_hash", "_name_or_path", "_num_labels", "architectures",
    "attn_pdrop", "attention_dropout", "attention_probs_dropout_prob", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "encoder_stride",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "hidden_dropout", "hidden_dropout_prob", "id2label",
    "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder",
    "is_llama_config", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "n_ctx", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop",
    "return_dict", "return_dict_in_generate", "sep_token_id", "summary_*", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_*", "use_bfloat16", "use_cache",
)  # fmt: skip


# Numbers are below this limit in all models. An error is better than arrays of such a size.
_MOST = 2**31


class Config:
    """The options of a config, and a record of the options that were read.

    Attributes:
      options: the options by name.
      location: path of the file, for error messages.
    """

    def __init__(self, options: JsonObject, location: str, most_blocks: int = 10_000) -> None:
        """Wrap the options of a config.

        Args:
          options: the options by name.
          location: path of the file, for error messages.
          most_blocks: the number of blocks that the model has at most.
        """
        self.options, self.location, self._most_blocks = options, location, most_blocks
        self._read: set[str] = set()

    def get(self, key: str, default: object) -> Any:
        """Read an option.

        Args:
          key: name of the option.
          default: value to return if the config does not have the option.

        Raises:
          ValueError: if it is a number that no model has.
        """
        self._read.add(key)
        value = self.options.get(key, default)
        if isinstance(value, int | float) and not abs(value) < _MOST:
            raise self.reject(key, value, f"a number below {_MOST:,}")
        return value

    def require(self, key: str) -> Any:
        """Read an option that must be present.

        Args:
          key: name of the option.

        Raises:
          ValueError: if the option is missing or null.
        """
        value = self.get(key, None)
        if value is None:
            raise ValueError(f"{self.location}: expected {key}, got none")
        return value

    def require_depth(self, key: str) -> int:
        """Read the number of blocks, which must be present.

        Args:
          key: name of the option.

        Raises:
          ValueError: if the option is not an integer, or larger than the number of tensors.
        """
        depth = self.require(key)
        if not is_integer(depth) or not 1 <= depth <= self._most_blocks:
            raise self.reject(key, depth, f"1 to {self._most_blocks:,} blocks")
        return int(depth)

    def expect(self, key: str, *allowed: object) -> None:
        """Check that an option has one of the supported values.

        Args:
          key: name of the option.
          *allowed: the supported values; the first one is assumed if the config does not have the
            option.

        Raises:
          ValueError: if the option has another value.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self.reject(key, value, " or ".join(map(repr, allowed)))

    def reject(self, key: str, value: object, expected: str) -> ValueError:
        """Make the error for an unsupported value, which the caller raises.

        Args:
          key: name of the option.
          value: value of the option.
          expected: description of the supported values.
        """
        return ValueError(
            f"{self.location}: {key} = {shorten(value)} is not supported, expected {expected}"
        )

    def inner(self, key: str, options: JsonObject) -> "Config":
        """Wrap the options that are nested in an option.

        Args:
          key: name of the outer option.
          options: the nested options by name.
        """
        return Config(options, f"{self.location}, {key}")

    def finish(self) -> None:
        """Check that every option that could change the model was read.

        Raises:
          ValueError: if an option is set that was never read and is not known to be irrelevant.
        """
        for key, value in self.options.items():
            is_known = key in self._read or any(
                key == name or (name.endswith("*") and key.startswith(name[:-1]))
                for name in IRRELEVANT
            )
            if not is_known and value not in (None, False, 0, "", [], {}):
                raise ValueError(
                    f"{self.location}: option {key} = {shorten(value)} is not supported"
                )
