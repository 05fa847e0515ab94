import keras
import keras_hub
import numpy as np

from keras_gemma import checkpoints
from keras_gemma import data
from keras_gemma import distribution
from keras_gemma import kernels
from keras_gemma.models import quantization
from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.description import described
from keras_gemma.models.packed_inputs import without_absent
from keras_gemma.models.preprocessor_outputs import numpy_outputs
from keras_gemma.models.presets import Presets
from keras_gemma.models.reward_model import AtLastToken
from keras_gemma.models.text_classifier_preprocessor import GemmaTextClassifierPreprocessor
from keras_gemma.training import exact_resume_among
from keras_gemma.training import in_whole_steps
from keras_gemma.training import refuse_uncompiled
from keras_gemma.training import with_progress_bar
from keras_gemma.training.optimizers import warn_of_weights_that_cannot_move
from keras_gemma.training.trained_weights import made_for_another_structure
from keras_gemma.training.trained_weights import refuse_other_weights_than_compiled
from keras_gemma.training.trained_weights import refuse_what_does_not_train


@kernels.with_torch_parameters
@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaTextClassifier(keras_hub.models.TextClassifier):
    """Gemma as a classifier of texts, linear in the hidden state at the last token.

    Args:
        backbone: a `GemmaBackbone`.
        num_classes: int.
        preprocessor: a `GemmaTextClassifierPreprocessor`, or `None` to feed token ids.
        activation: optional activation of the outputs, by default none: they are logits.
        dropout: float, rate of dropout before the output layer.

    Call arguments:
        inputs: `token_ids` and `padding_mask`, each `[B, T]`, padded on the right.

    Returns:
        Float32 outputs `[B, num_classes]`.

    Raises:
        ValueError: for fewer than one class.

    Example:

    >>> from keras_gemma.models import GemmaTextClassifier
    >>> classifier = GemmaTextClassifier.from_preset("gemma_tiny_en", num_classes=2, sequence_length=32)
    >>> history = classifier.fit(["The sea is calm.", "Call me Ishmael."], [0, 1], verbose=0)
    >>> classifier.predict(["The sea"], verbose=0).shape
    (1, 2)
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaTextClassifierPreprocessor
    presets = Presets()

    def __init__(self, backbone, num_classes, preprocessor=None, activation=None, dropout=0.0, **kwargs):
        if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)) or num_classes < 1:
            raise ValueError(f"`num_classes` is an integer of at least 1. Received: {num_classes!r}")
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.at_last_token = AtLastToken(dtype=backbone.dtype_policy, name="at_last_token")
        self.output_dropout = keras.layers.Dropout(dropout, dtype=backbone.dtype_policy, name="output_dropout")
        self.output_dense = keras.layers.Dense(
            num_classes,
            # As `GemmaForSequenceClassification` has it.
            use_bias=False,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
            activation=activation,
            dtype="float32",
            name="logits",
        )

        # === Functional model ===
        inputs = backbone.input
        last = self.at_last_token(backbone(inputs), inputs["padding_mask"])
        outputs = self.output_dense(self.output_dropout(last))

        # === Config ===
        self.num_classes = int(num_classes)
        self.activation = keras.activations.get(activation)
        self.dropout = dropout
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def get_config(self):
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
        }

    def __repr__(self):
        return described(self, self.backbone)

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(without_absent(inputs), *args, **kwargs)

    # === Training ===

    def compile_from_config(self, config):
        # Keras skips this for a class with its own `compile`, as keras-hub's classifiers have.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=0.0,
        validation_batch_size=None,
        shuffle=True,
        **kwargs,
    ):
        """Trains on texts and their classes.

        Args:
            x: strings or dialogues as a list or an array; or batches `(x, y)` or `(x, y, sample_weight)` as of
                `GemmaCausalLM.fit`; without a preprocessor, the model's own inputs.
            y: int labels `[n]` from 0 to `num_classes - 1`, or what the loss wants in their place.
            batch_size, sample_weight, validation_data, validation_split, validation_batch_size, shuffle, **kwargs: as
                of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for labels outside the classes.
        """
        refuse_uncompiled(self, "fit")
        refuse_what_does_not_train(self)
        warn_of_weights_that_cannot_move(self)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = data.split_off_validation(x, y, sample_weight, validation_split)
        if validation_data is not None:
            parts = validation_data if isinstance(validation_data, tuple) else (validation_data,)
            vx, vy, vw = keras.utils.unpack_x_y_sample_weight(parts)
            size = None if data.yields_batches(vx) else validation_batch_size or batch_size
            validation_data = distribution.filled_up(
                self._batches(vx, vy, vw, size), steps=kwargs.get("validation_steps")
            )
            validation_data = data.checked(validation_data, self.token_rules)
        shuffle_batches = shuffle and isinstance(x, keras.utils.PyDataset)
        x = self._batches(x, y, sample_weight, batch_size, shuffle)
        kwargs["callbacks"] = with_progress_bar(kwargs.get("callbacks"), kwargs.get("verbose", "auto"))
        if exact_resume := exact_resume_among(kwargs.get("callbacks")):
            return exact_resume.fit(self, x, validation_data=validation_data, shuffle=shuffle_batches, **kwargs)
        x = distribution.filled_up(x, shuffle_batches, kwargs.get("class_weight"), kwargs.get("steps_per_epoch"))
        x = data.checked(x, self.token_rules, shuffle_batches, kwargs.get("class_weight"))
        return in_whole_steps(keras.Model.fit)(
            self, x, validation_data=validation_data, shuffle=shuffle_batches, **kwargs
        )

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        """Loss and metrics on anything that `fit` takes. See `keras.Model.evaluate`."""
        refuse_uncompiled(self, "evaluate")
        if not kwargs.get("_use_cached_eval_dataset"):
            x, y, sample_weight = self._batches(x, y, sample_weight, batch_size), None, None
            x = data.checked(distribution.filled_up(x, steps=kwargs.get("steps")), self.token_rules)
            kwargs["callbacks"] = with_progress_bar(kwargs.get("callbacks"), kwargs.get("verbose", "auto"))
        return in_whole_steps(keras.Model.evaluate)(self, x, y, sample_weight=sample_weight, **kwargs)

    def predict(self, x=None, batch_size=None, **kwargs):
        """Outputs `[n, num_classes]` for texts. See `keras.Model.predict`."""
        batches = distribution.filled_up(self._batches(x, None, None, batch_size), steps=kwargs.get("steps"))
        rows = data.checked(batches, self.token_rules)
        return distribution.own_rows(batches, in_whole_steps(keras.Model.predict)(self, rows, **kwargs))

    @property
    def token_rules(self):
        """What batches must keep to, a `data.TokenRules`."""
        return data.TokenRules(self.backbone.vocabulary_size, has_labels=False, padded_on_the_right=True)

    train_on_batch = in_whole_steps(keras_hub.models.TextClassifier.train_on_batch)
    test_on_batch = in_whole_steps(keras_hub.models.TextClassifier.test_on_batch)
    predict_on_batch = in_whole_steps(keras_hub.models.TextClassifier.predict_on_batch)

    def make_train_function(self, force=False):
        refuse_other_weights_than_compiled(self)
        super().make_train_function(force or made_for_another_structure(self, "train_function"))

    def make_test_function(self, force=False):
        super().make_test_function(force or made_for_another_structure(self, "test_function"))

    def make_predict_function(self, force=False):
        force = made_for_another_structure(self, "predict_function") or force
        if self.predict_function is None or force:
            super().make_predict_function(force)
            if keras.backend.backend() == "jax":
                self.predict_function = distribution.with_whole_outputs(self.predict_function)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """As in keras-hub, and refuses what is no token of the model."""
        with numpy_outputs():
            samples = super().preprocess_samples(x, y, sample_weight)
        self.token_rules.refuse(*keras.utils.unpack_x_y_sample_weight(samples))
        return samples

    def _batches(self, x, y, sample_weight, batch_size, shuffle=False):
        return data.preprocessed(x, y, sample_weight, batch_size, self._checked_samples, shuffle)

    def _checked_samples(self, x, y=None, sample_weight=None):
        if y is not None and not hasattr(y, "get_shape"):
            y = np.asarray(y)
            if self._has_sparse_loss() and not np.isin(y, np.arange(self.num_classes)).all():
                wrong = y[~np.isin(y, np.arange(self.num_classes))].reshape(-1)[0]
                raise ValueError(f"Labels are integers from 0 to {self.num_classes - 1}. Received: {wrong!r}")
        batch = self.preprocess_samples(x, y, sample_weight)
        return batch if isinstance(batch, tuple) else (batch,)

    def _has_sparse_loss(self):
        sparse = (keras.losses.SparseCategoricalCrossentropy, "sparse_categorical_crossentropy")
        return isinstance(self.loss, sparse[0]) or self.loss == sparse[1]

    def export(self, filepath, format="tf_saved_model", verbose=None, input_signature=None, **kwargs):
        """As `keras.Model.export`. On JAX and TensorFlow a SavedModel takes any batch size and length by default."""
        kwargs = kernels.export_arguments(self.input, format, input_signature, kwargs)
        super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)

    # === Quantisation ===

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantises the weights in place. Arguments and errors are those of `GemmaBackbone.quantize`."""
        with quantization.quantizing(self.backbone, mode, config, filters) as filters:
            super().quantize(mode, config=config, filters=filters, **kwargs)

    def get_quantization_layer_structure(self, mode=None):
        """As of `GemmaBackbone`."""
        return quantization.structure_of(self.backbone, mode)

    # === Presets ===

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Loads a classifier; or the backbone of any preset of Gemma, to become one, its output layer at random.

        Args:
            preset, load_weights, **kwargs: as of `GemmaCausalLM.from_preset`. `num_classes` is needed but for a
                classifier that was saved; given for one, its output layer is at random, too.

        Returns:
            A `GemmaTextClassifier`.

        Raises:
            ValueError, FileNotFoundError: as `GemmaCausalLM.from_preset`, and without `num_classes`.
        """
        return checkpoints.load_task(cls, preset, load_weights=load_weights, **kwargs)

    @distribution.written_once
    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Saves model, output layer and preprocessor. Arguments and errors as of `GemmaCausalLM.save_to_preset`."""
        checkpoints.save_task(self, preset_dir, max_shard_size=max_shard_size)

    save_weights = distribution.written_once(checkpoints.save_weights)

    def save_task_weights(self, filepath):
        """Saves the weights of the output layer. keras-hub would put the state of the optimizer beside them."""
        checkpoints.save_weights(self, filepath, objects_to_skip=self._all_but_the_head())

    def load_task_weights(self, filepath):
        """Loads the weights of the output layer."""
        keras.saving.load_weights(self, filepath, objects_to_skip=self._all_but_the_head())

    def _all_but_the_head(self):
        return [*self.backbone._flatten_layers(), self.optimizer]
