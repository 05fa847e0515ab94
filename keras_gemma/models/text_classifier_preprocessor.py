import warnings

import keras
import numpy as np

from keras_gemma.models.causal_lm_preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.models.causal_lm_preprocessor import call_python_from_tf_graph
from keras_gemma.models.causal_lm_preprocessor import examples_of
from keras_gemma.models.preprocessor_outputs import as_outputs
from keras_gemma.models.preprocessor_outputs import in_tf_graph


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaTextClassifierPreprocessor(GemmaCausalLMPreprocessor):
    """Turns texts into what `GemmaTextClassifier` reads. Labels and weights pass unchanged.

    Args:
        tokenizer: a `GemmaTokenizer`.
        sequence_length: int, `T`. Longer texts lose their end, which is warned of once.
        add_start_token: bool. Opens each row with `<bos>`.
        add_end_token: bool. Ends each text that fits with `<eos>`. Off by default, as in transformers.
        **kwargs: as of `GemmaCausalLMPreprocessor`.

    Call arguments:
        x: a string or a dialogue, or a list of either.
        y: optional labels.
        sample_weight: optional weights.

    Returns:
        `x`, `(x, y)` or `(x, y, sample_weight)`, as given, of tensors, in Grain pipelines of NumPy arrays: `x` with
            `token_ids` and `padding_mask`, each `[B, T]`.

    Raises:
        ValueError: for what is no text.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.models import GemmaTextClassifierPreprocessor
    >>> preprocessor = GemmaTextClassifierPreprocessor.from_preset("gemma_tiny_en", sequence_length=16)
    >>> x, y = preprocessor(["The sea", "Call me Ishmael."], [1, 0])
    >>> x["token_ids"].shape, np.asarray(y).tolist()
    ((2, 16), [1, 0])
    """

    def __init__(self, tokenizer, sequence_length=512, add_start_token=True, add_end_token=False, **kwargs):
        super().__init__(
            tokenizer,
            sequence_length=sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )
        self._cut_was_told = False
        # Keras would else try the layer on shapes to see what is to be built.
        self.built = True

    def call(self, x, y=None, sample_weight=None):
        if not in_tf_graph():
            y, sample_weight = (part if part is None else np.asarray(part) for part in (y, sample_weight))
            return as_outputs(keras.utils.pack_x_y_sample_weight(self._features(x), y, sample_weight))
        leaves = keras.tree.flatten(x)
        token_ids, padding_mask = call_python_from_tf_graph(
            lambda *arrays: tuple(self._features(keras.tree.pack_sequence_as(x, arrays)).values()),
            leaves,
            dtypes=["int32", "bool"],
            shape=[*leaves[0].shape[:1], self.sequence_length],
        )
        return keras.utils.pack_x_y_sample_weight(
            {"token_ids": token_ids, "padding_mask": padding_mask}, y, sample_weight
        )

    def _features(self, x):
        examples, batched = examples_of(x)
        rows = [self._classified_ids(example) for example in examples]
        longest = max(map(len, rows))
        if longest > self.sequence_length and not self._cut_was_told:
            self._cut_was_told = True
            warnings.warn(
                f"Texts longer than `sequence_length={self.sequence_length}` tokens lose their end: one has {longest}. "
                "This is said once.",
                stacklevel=2,
            )
        token_ids, padding_mask = self._pad(rows, self.sequence_length)
        features = {"token_ids": token_ids, "padding_mask": padding_mask}
        return features if batched else {name: array[0] for name, array in features.items()}

    def _classified_ids(self, example):
        if isinstance(example, dict):
            raise ValueError(f"A text or a dialogue is classified. Received: a dict with {', '.join(example)}")
        return self.row(example).ids
