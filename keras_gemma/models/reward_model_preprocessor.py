import keras
import numpy as np

from keras_gemma.data import record_formats
from keras_gemma.data import text_checks
from keras_gemma.data.tuning import PAIR_FIELDS
from keras_gemma.models.causal_lm_preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.models.causal_lm_preprocessor import examples_of
from keras_gemma.models.preprocessor_outputs import as_outputs


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaRewardModelPreprocessor(GemmaCausalLMPreprocessor):
    """Turns prompts and answers into what `GemmaRewardModel` compares and scores.

    A row is a prompt, an answer, and the token that ends it: `<eos>`, or in dialogues `<end_of_turn>`. Nothing is ever
    cut: a reward is read at that token.

    Args:
        tokenizer, sequence_length, add_start_token, **kwargs: as of `GemmaCausalLMPreprocessor`. `T` is
            `sequence_length`.

    Call arguments:
        x: `{"prompts": [...], "chosen": [...], "rejected": [...]}` and optionally `"margins"`; prompts are strings or
            dialogues that end with the user, answers are strings, or messages, which may repeat the prompt (see
            `keras_gemma.data.record_formats.pair`).
        y: must be `None`.
        sample_weight: optional float `[B]`.

    Returns:
        `(x, y, sample_weight)` of tensors, in Grain pipelines of NumPy arrays: `x` with `token_ids` and
            `padding_mask`, each `[B, 2, T]`, chosen before rejected; `y` float32 `[B]`, the margins; float32 weights
            `[B]`.

    Raises:
        ValueError: for labels, missing or unknown fields, fields of different lengths, and rows longer than `T`.
    """

    def __init__(self, tokenizer, sequence_length=1024, add_start_token=True, add_end_token=True, **kwargs):
        if not add_end_token:
            raise ValueError("A reward is read at the token that ends an answer. Received: add_end_token=False")
        super().__init__(
            tokenizer, sequence_length=sequence_length, add_start_token=add_start_token, add_end_token=True, **kwargs
        )
        # Keras would else try the model on the shapes of pairs to see what is to be built.
        self.built = True

    def call(self, x, y=None, sample_weight=None):
        if y is not None:
            raise ValueError("Which answer is better is in `x`, so `y` must be None. Received labels.")
        prompts, chosen, rejected, margins = self._columns(x)
        rows = text_checks.each(lambda pair: self.scored_row(*pair), zip(prompts, chosen))
        others = text_checks.each(lambda pair: self.scored_row(*pair), zip(prompts, rejected))
        self.refuse_longer_rows(rows + others)
        both = [row for pair in zip(rows, others) for row in pair]
        shape = len(prompts), 2, self.sequence_length
        token_ids, mask = (array.reshape(shape) for array in self._pad(both, self.sequence_length))
        weights = np.ones(len(prompts)) if sample_weight is None else np.asarray(sample_weight)
        features = {"token_ids": token_ids, "padding_mask": mask}
        return as_outputs((features, margins, weights.astype("float32")))

    def _columns(self, x):
        x = record_formats.pair_columns(text_checks.plain(text_checks.fields(x)) if text_checks.is_fields(x) else x)
        if not isinstance(x, dict) or not set(PAIR_FIELDS) <= set(x) <= {*PAIR_FIELDS, "margins"}:
            received = ", ".join(map(repr, x)) if isinstance(x, dict) else text_checks.shown(x)
            raise ValueError(
                "Pairs have the fields 'prompts', 'chosen' and 'rejected', and may have 'margins'. "
                f"Received: {received}"
            )
        columns = [self._texts_of(x[name], name) for name in PAIR_FIELDS]
        margins = np.asarray(x.get("margins", np.zeros(len(columns[0]))), "float32").reshape(-1)
        lengths = [len(column) for column in columns] + [len(margins)]
        if len(set(lengths)) != 1:
            raise ValueError(f"Every prompt needs both its answers. Received: {lengths} of {[*PAIR_FIELDS, 'margins']}")
        if not np.isfinite(margins).all():
            raise ValueError(f"Margins are finite numbers. Received: {margins[~np.isfinite(margins)][0]}")
        return *columns, margins

    def _texts_of(self, values, name):
        examples, batched = examples_of(values)
        if not batched:
            raise ValueError(
                f"Lists of {name} are expected; wrap a single one in a list. Received: {text_checks.shown(values)}"
            )
        return examples

    def scored_row(self, prompt, answer):
        """Token ids of a prompt, an answer and its end, a list.

        Args:
            prompt: a string, or a dialogue that ends with the user.
            answer: a string, or the assistant's message, which may stand in a list.

        Raises:
            ValueError: for a dialogue that Gemma's format refuses, and an answer that is neither.
        """
        answer = text_checks.text(record_formats.answer_of(text_checks.plain(answer)), "An answer")
        prompt = record_formats.messages(text_checks.plain(prompt))
        prompt = prompt if isinstance(prompt, list) else text_checks.text(prompt, "A prompt")
        row = self.row({"prompts": prompt, "responses": answer})
        # The line break after the turn is nobody's.
        return row.ids[: len(row.ids) - row.learned[::-1].index(True)]

    def refuse_longer_rows(self, rows):
        """Raises a `ValueError` where one of `rows`, lists of token ids, is longer than `sequence_length`."""
        longest = max(map(len, rows))
        if longest > self.sequence_length:
            raise ValueError(
                f"A prompt with its answer and end fits into `sequence_length={self.sequence_length}`; cut, it would "
                f"be scored as something else. Received one of {longest} tokens: raise `sequence_length`, or leave it "
                "out, as `data.preference_pairs` does."
            )
