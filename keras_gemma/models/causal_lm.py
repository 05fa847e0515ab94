import warnings

import keras
import keras_hub
from keras import ops

from keras_gemma import checkpoints
from keras_gemma import data
from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.causal_lm_preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.models.optional_inputs import with_optional_inputs
from keras_gemma.models.presets import Presets


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLM(keras_hub.models.CausalLM):
    """Gemma as a language model: trains with `fit`, writes with `generate`.

    Args:
        backbone: a `GemmaBackbone`.
        preprocessor: a `GemmaCausalLMPreprocessor`, or `None` to feed and receive token ids.

    Call arguments:
        inputs: as of `GemmaBackbone`.

    Returns:
        Float32 logits `[B, T, V]`.
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaCausalLMPreprocessor
    presets = Presets()

    def __init__(self, backbone, preprocessor=None, **kwargs):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        inputs = backbone.input
        logits = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=logits, **kwargs)

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(with_optional_inputs(inputs), *args, **kwargs)

    def call(self, inputs, training=None, mask=None):
        return super().call(with_optional_inputs(inputs), training=training, mask=mask)

    # === Training ===

    def compile(self, optimizer="auto", loss="auto", *, weighted_metrics="auto", sampler="greedy", **kwargs):
        """Configures training and sampling.

        Args:
            optimizer: as of `keras.Model.compile`; `"auto"` is Adam at 2e-5.
            loss: as of `keras.Model.compile`; `"auto"` is the cross-entropy of the next token, divided by the
                sum of the weights (not by the number of positions).
            weighted_metrics: as of `keras.Model.compile`; `"auto"` is perplexity and token accuracy.
            sampler: a keras-hub sampler or its name.
            **kwargs: passed to `keras.Model.compile`.
        """
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight", name="loss"
            )
        if weighted_metrics == "auto":
            weighted_metrics = [
                keras_hub.metrics.Perplexity(from_logits=True, name="perplexity"),
                keras.metrics.SparseCategoricalAccuracy(name="token_accuracy"),
            ]
        super().compile(
            optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, sampler=sampler, **kwargs
        )

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=0.0,
        shuffle=True,
        **kwargs,
    ):
        """Trains the model on text or token ids.

        Args:
            x: strings, `{"prompts", "responses"}` or dialogues as lists (see `GemmaCausalLMPreprocessor`); a
                `tf.data.Dataset`, Grain data set, `keras.utils.PyDataset`, generator or torch `DataLoader` of
                such batches; without a preprocessor, the model's own inputs.
            shuffle: bool. Draws a new order of listed examples, or of a `PyDataset`'s batches, each epoch.
            y, batch_size, sample_weight, validation_data, validation_split, **kwargs: as of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.
        """
        _warn_of_weights_that_cannot_move(self)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = data.split_off_validation(
                x, y, sample_weight, validation_split
            )
        if validation_data is not None:
            validation_data = _unpacked(validation_data)
            # A validation set in batches keeps their size.
            validation_size = None if data.yields_batches(validation_data[0]) else batch_size
            validation_data = self._batches(*validation_data, validation_size)
        # Listed examples are shuffled one by one below; Keras can shuffle whole batches only.
        shuffle_batches = shuffle and isinstance(x, keras.utils.PyDataset)
        x = self._batches(x, y, sample_weight, batch_size, shuffle)
        return keras.Model.fit(self, x, validation_data=validation_data, shuffle=shuffle_batches, **kwargs)

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        """Loss and metrics on anything that `fit` takes. See `keras.Model.evaluate`."""
        if not kwargs.get("_use_cached_eval_dataset"):
            x, y, sample_weight = self._batches(x, y, sample_weight, batch_size), None, None
        return keras.Model.evaluate(self, x, y, sample_weight=sample_weight, **kwargs)

    def predict(self, x=None, batch_size=None, **kwargs):
        """Logits `[B, T, V]` of anything that `fit` takes. See `keras.Model.predict`."""
        return keras.Model.predict(self, self._batches(x, None, None, batch_size), **kwargs)

    def score(self, token_ids, padding_mask=None, scoring_mode="logits", layer_intercept_fn=None, target_ids=None):
        """Logits or losses of given tokens, with a look at every layer on the way.

        Args:
            token_ids: int tensor `[B, T]`.
            padding_mask: optional tensor `[B, T]`, true where a token stands. All of them if left out.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: optional callable `(activations [B, T, D], index) → activations`, called with the
                token embeddings before they are scaled (index -1) and with the output of every decoder block
                (from 0). What it returns goes on to the next layer.
            target_ids: int tensor `[B, T]`, the tokens that `"loss"` compares with.

        Returns:
            Float32 logits `[B, T, V]`, or losses `[B, T]`.

        Raises:
            ValueError: for an unknown mode, or `"loss"` without `target_ids`.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(f"`scoring_mode` is 'logits' or 'loss'. Received: {scoring_mode!r}")
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("`scoring_mode='loss'` compares with `target_ids`. Received: target_ids=None")
        intercept = layer_intercept_fn or (lambda x, index: x)
        backbone = self.backbone
        token_ids = ops.convert_to_tensor(token_ids, "int32")
        padding_mask = ops.ones_like(token_ids) if padding_mask is None else ops.convert_to_tensor(padding_mask)

        sine, cosine = backbone.rotary_embedding(token_ids)
        segments = backbone.segment_ids(padding_mask)
        x = backbone.embedding_scale(intercept(backbone.token_embedding(token_ids), -1))
        for index, block in enumerate(backbone.transformer_layers):
            x = intercept(block(x, sine, cosine, segments), index)
        logits = backbone.token_embedding(backbone.layer_norm(x), reverse=True)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)

    def _batches(self, x, y, sample_weight, batch_size, shuffle=False):
        return data.preprocessed(x, y, sample_weight, batch_size, self.preprocess_samples, shuffle)

    # === Presets ===

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Loads a model with its preprocessor.

        Args:
            preset: a name in `GemmaCausalLM.presets`; a handle such as `"kaggle://keras/gemma/keras/gemma_2b_en"` or
                `"hf://google/gemma-2b"`; or a local folder, saved by `save_to_preset` here or in keras-hub, or in the
                Hugging Face format (`config.json`, safetensors, `tokenizer.model`).
            load_weights: bool. `False` initialises at random. A name then needs a download for its vocabulary only,
                and with `preprocessor=None` none at all.
            **kwargs: `dtype` of the backbone, by default the current Keras dtype policy; `sequence_length` of the
                preprocessor; `backbone` and `preprocessor` in place of the preset's; and constructor arguments.

        Returns:
            A `GemmaCausalLM`.

        Raises:
            ValueError: for an unknown name, another architecture, and damaged or mismatched files.
            FileNotFoundError: for a missing file, naming it.
        """
        return checkpoints.load_task(cls, preset, load_weights=load_weights, **kwargs)

    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Saves model and preprocessor as a preset, which `keras_hub.models.GemmaCausalLM` loads as well.

        An interrupted save leaves the old preset, the new one, or a folder that does not load, never a mixture.

        Args:
            preset_dir: path of the folder, made if missing.
            max_shard_size: int or float. Gigabytes (2³⁰ bytes) above which the weights are split into several files,
                each no larger; `None` never splits.

        Raises:
            ValueError: for what cannot be saved, before anything is touched.
        """
        checkpoints.save_task(self, preset_dir, max_shard_size=max_shard_size)


def _warn_of_weights_that_cannot_move(model):
    # Keras' Adam corrects its bias in the dtype of the weights, and in bfloat16 1 - 0.999 is 0: no step at all.
    optimizer = model.optimizer
    if not isinstance(optimizer, keras.optimizers.Adam) or optimizer.beta_2 <= 1 - 2**-9:
        return
    if any(variable.dtype == "bfloat16" for variable in model.trainable_variables):
        warnings.warn(
            f"{type(optimizer).__name__} with beta_2={optimizer.beta_2} does not change bfloat16 weights. Train under "
            "the dtype policy 'mixed_bfloat16', whose weights are float32.",
            stacklevel=3,
        )


def _unpacked(validation_data):
    if isinstance(validation_data, tuple):
        return keras.utils.unpack_x_y_sample_weight(validation_data)
    return validation_data, None, None
