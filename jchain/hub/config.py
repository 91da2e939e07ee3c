"""The options of a checkpoint's config.json: each is used, known to change nothing, or refused by name."""

from typing import Any

# Of training, of generation, and of how the file was written: they change no output of a model that is applied to whole
# sequences without dropout. Names that end in * are prefixes.
IRRELEVANT = (
    "_attn_implementation*", "_commit_hash", "_name_or_path", "_num_labels", "architectures", "attn_pdrop", "attention_dropout", "attention_probs_dropout_prob", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "encoder_stride", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_factor", "initializer_range",
    "is_decoder", "is_encoder_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "min_length", "model_type", "n_ctx", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop",
    "return_dict", "return_dict_in_generate", "sep_token_id", "summary_*", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unsloth_*", "use_bfloat16", "use_cache",
)  # fmt: skip


class Config:
    """Options that remember which of them were asked for."""

    def __init__(self, options: dict[str, Any], where: str) -> None:
        self.options, self.where, self._asked = options, where, set()

    def get(self, key: str, default: Any) -> Any:
        """The option, or `default` where the file does not have it."""
        self._asked.add(key)
        return self.options.get(key, default)

    def require(self, key: str) -> Any:
        """The option.

        Raises:
          ValueError: the file does not have it.
        """
        self._asked.add(key)
        if self.options.get(key) is None:
            raise ValueError(f"{self.where}: expected {key}, got none")
        return self.options[key]

    def expect(self, key: str, *allowed: Any) -> None:
        """Only these values of the option are supported; the first is that of a file without it.

        Raises:
          ValueError: it has another one.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self.refuse(key, value, " or ".join(map(repr, allowed)))

    def refuse(self, key: str, value: Any, expected: str) -> ValueError:
        """That the option has a value that the code does not support."""
        return ValueError(f"{self.where}: {key} = {value!r} is not supported, expected {expected}")

    def inner(self, key: str, options: dict[str, Any]) -> "Config":
        """Options within an option."""
        return Config(options, f"{self.where}, {key}")

    def finish(self) -> None:
        """Check that nothing was ignored that could change the model.

        Raises:
          ValueError: an option that is set was never asked for.
        """
        for key, value in self.options.items():
            is_known = key in self._asked or any(
                key == name or (name.endswith("*") and key.startswith(name[:-1]))
                for name in IRRELEVANT
            )
            if not is_known and value not in (None, False, 0, "", [], {}):
                raise ValueError(f"{self.where}: option {key} = {value!r} is not supported")
