import keras
import keras_hub
import numpy as np
from keras import ops

from keras_gemma import checkpoints
from keras_gemma import data
from keras_gemma import distribution
from keras_gemma import kernels
from keras_gemma.data import record_formats
from keras_gemma.data import text_checks
from keras_gemma.generation.buckets import bucket
from keras_gemma.models import cloning
from keras_gemma.models import quantization
from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.description import described
from keras_gemma.models.packed_inputs import without_absent
from keras_gemma.models.preprocessor_outputs import numpy_outputs
from keras_gemma.models.presets import Presets
from keras_gemma.models.reward_model_preprocessor import GemmaRewardModelPreprocessor
from keras_gemma.training import TokenCount
from keras_gemma.training import bradley_terry_losses
from keras_gemma.training import exact_resume_among
from keras_gemma.training import in_whole_steps
from keras_gemma.training import refuse_uncompiled
from keras_gemma.training import step
from keras_gemma.training import with_progress_bar
from keras_gemma.training.optimizers import warn_of_weights_that_cannot_move
from keras_gemma.training.trained_weights import made_for_another_structure
from keras_gemma.training.trained_weights import refuse_other_weights_than_compiled
from keras_gemma.training.trained_weights import refuse_what_does_not_train

SMALLEST_ROW = 32


@keras.saving.register_keras_serializable(package="keras_gemma")
class AtLastToken(keras.layers.Layer):
    """Hidden states `[B, T, D]` and a padding mask `[B, T]` → the state at the last token of each row, `[B, D]`."""

    def call(self, hidden, padding_mask):
        length = ops.sum(ops.cast(ops.not_equal(padding_mask, 0), "int32"), axis=1)
        # A row that only fills a batch up has no token.
        last = ops.maximum(length - 1, 0)[:, None, None]
        return ops.squeeze(ops.take_along_axis(hidden, last, axis=1), axis=1)

    def get_config(self):
        # Keras would not serialise a dtype policy by itself.
        return super().get_config()


@kernels.with_torch_parameters
@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaRewardModel(keras_hub.models.Task):
    """Gemma as a judge of answers: one number for each, learned from pairs of which one is better.

    The reward is linear in the hidden state at the last token, which is the end of the answer.

    Args:
        backbone: a `GemmaBackbone` without dropout.
        preprocessor: a `GemmaRewardModelPreprocessor`, or `None` to feed token ids.

    Call arguments:
        inputs: `token_ids` and `padding_mask`, each `[B, T]`, padded on the right.

    Returns:
        Float32 rewards `[B]`.

    Raises:
        ValueError: for a backbone with dropout: two answers are compared by one and the same network.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.models import GemmaBackbone, GemmaRewardModel
    >>> backbone = GemmaBackbone(
    ...     vocabulary_size=64, num_layers=2, num_query_heads=4, num_key_value_heads=1,
    ...     hidden_dim=16, intermediate_dim=64, head_dim=8,
    ... )
    >>> model = GemmaRewardModel(backbone)
    >>> model.score_tokens([[2, 5, 7, 1], [2, 5, 1]]).shape
    (2,)
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaRewardModelPreprocessor
    presets = Presets()

    def __init__(self, backbone, preprocessor=None, **kwargs):
        if backbone.dropout:
            raise ValueError(
                "A reward model compares two answers by one network, so its backbone has no dropout. "
                f"Received: dropout={backbone.dropout}"
            )
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.at_last_token = AtLastToken(dtype=backbone.dtype_policy, name="at_last_token")
        self.reward_head = keras.layers.Dense(
            1,
            use_bias=False,
            # Rewards begin as close to each other as answers are alike.
            kernel_initializer=keras.initializers.RandomNormal(stddev=1 / np.sqrt(backbone.hidden_dim + 1)),
            dtype="float32",
            name="reward_head",
        )

        # === Functional model ===
        inputs = backbone.input
        last = self.at_last_token(backbone(inputs), inputs["padding_mask"])
        super().__init__(inputs=inputs, outputs=ops.squeeze(self.reward_head(last), axis=-1), **kwargs)

    # === Training ===

    def compile(self, optimizer="auto", *, centring=0.0, gradient_accumulation_steps=1, **kwargs):
        """Configures training. The loss is that of Bradley and Terry.

        Args:
            optimizer: as of `keras.Model.compile`; `"auto"` is Adam at 2e-5.
            centring: float. Coefficient of the squared sum of both rewards, which draws their free constant to zero;
                0.01 where it is wanted.
            gradient_accumulation_steps: int, into how many microbatches a batch of pairs is cut.
            **kwargs: passed to `keras.Model.compile`, but for losses and metrics.

        Raises:
            ValueError: for a loss or metrics of one's own, a negative coefficient, and fewer than one step.
        """
        if given := sorted({"loss", "metrics", "weighted_metrics"}.intersection(kwargs)):
            raise ValueError(f"A reward model has the loss and the metrics of pairs. Received: {', '.join(given)}")
        if centring < 0 or gradient_accumulation_steps < 1:
            raise ValueError(
                "`centring` is at least 0 and `gradient_accumulation_steps` at least 1. "
                f"Received: {centring} and {gradient_accumulation_steps}"
            )
        self.centring = centring
        self.gradient_accumulation_steps = gradient_accumulation_steps
        # Not among the attributes that Keras tracks: it would list them as metrics for good.
        self.__dict__["_pair_metrics"] = PairMetrics()
        super().compile(optimizer=keras.optimizers.Adam(2e-5) if optimizer == "auto" else optimizer, **kwargs)

    def get_compile_config(self):
        config = super().get_compile_config()
        if not config:
            return config
        of_others = ("loss", "loss_weights", "metrics", "weighted_metrics")
        return cloning.with_own_arguments(
            self,
            {name: value for name, value in config.items() if name not in of_others},
            centring=self.centring,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self):
        own = self.__dict__.get("_pair_metrics")
        return [*super().metrics, *(own.all if own else ())]

    def train_step(self, *args):
        return step.train_step(self, *args, microbatches=self.gradient_accumulation_steps)

    def test_step(self, *args):
        return step.test_step(self, *args)

    def outcome_of(self, batch, total_weight, share, training):
        """The forward pass of a step, chosen and rejected answers together. See `keras_gemma.training.step`.

        Returns:
            The microbatch's part of the loss, and float32 rewards `[B, 2]`.
        """
        rows = {name: ops.reshape(x, (-1, ops.shape(x)[-1])) for name, x in batch.x.items()}
        rewards = ops.reshape(self(rows, training=training), (-1, 2))
        losses = bradley_terry_losses(rewards[:, 0], rewards[:, 1], batch.y, self.centring)
        loss = ops.sum(losses * step.weights_of(batch)) / total_weight
        return loss + sum((ops.sum(added) for added in self.losses), start=0.0) * share, rewards

    def logs_with(self, loss, outcome, batch, total_weight):
        """Adds the outcome of a microbatch to the metrics and returns their results."""
        weights = step.weights_of(batch)
        self._loss_tracker.total.assign_add(loss * total_weight)
        self._loss_tracker.count.assign_add(ops.sum(weights))
        self._pair_metrics.add(outcome, weights, batch.x)
        return self.get_metrics_result()

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
        """Trains on pairs of answers.

        Args:
            x: `{"prompts", "chosen", "rejected"}` of lists, optionally with `"margins"`, a list of such examples
                (strings or messages, with the prompt beside or within the answers; see `GemmaRewardModelPreprocessor`),
                or batches of them as of `GemmaCausalLM.fit`; without a preprocessor, the arrays that it gives.
            y: must be `None`, but beside arrays: the margins.
            batch_size: int, pairs of a step.
            sample_weight, validation_data, validation_split, validation_batch_size, shuffle, **kwargs: as of
                `GemmaCausalLM.fit`.

        Returns:
            A `keras.callbacks.History` with `accuracy` (the share of pairs whose better answer has the larger reward;
            equal ones are wrong), `margin` (the mean difference), and the `reward_min`, `reward_mean` and `reward_max`
            of all answers.

        Raises:
            ValueError: for pairs that do not fit into a row, and as `GemmaCausalLM.fit`.
        """
        refuse_uncompiled(self, "fit")
        refuse_what_does_not_train(self)
        warn_of_weights_that_cannot_move(self)
        x = _as_columns(x)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = data.split_off_validation(x, y, sample_weight, validation_split)
        if validation_data is not None:
            parts = validation_data if isinstance(validation_data, tuple) else (validation_data,)
            vx, vy, vw = keras.utils.unpack_x_y_sample_weight(parts)
            size = None if data.yields_batches(vx) else validation_batch_size or batch_size
            validation_data = distribution.filled_up(
                self._batches(_as_columns(vx), vy, vw, size), steps=kwargs.get("validation_steps")
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
            x, y, sample_weight = self._batches(_as_columns(x), y, sample_weight, batch_size), None, None
            x = data.checked(distribution.filled_up(x, steps=kwargs.get("steps")), self.token_rules)
            kwargs["callbacks"] = with_progress_bar(kwargs.get("callbacks"), kwargs.get("verbose", "auto"))
        return in_whole_steps(keras.Model.evaluate)(self, x, y, sample_weight=sample_weight, **kwargs)

    def _batches(self, x, y, sample_weight, batch_size, shuffle=False):
        return data.preprocessed(x, y, sample_weight, batch_size, self.preprocess_samples, shuffle)

    # === Scoring ===

    def score(self, prompts, responses, batch_size=8):
        """Rewards of answers.

        Args:
            prompts: list of strings or of dialogues that end with the user.
            responses: list of strings, as many.
            batch_size: int, rows that are scored at once.

        Returns:
            Float32 NumPy array `[n]`.

        Raises:
            ValueError: without a preprocessor, for lists of different lengths or none, and for rows that do not fit.
        """
        if self.preprocessor is None:
            raise ValueError("A reward model without a preprocessor scores token ids: call `score_tokens`.")
        prompts, responses = list(prompts), list(responses)
        if len(prompts) != len(responses) or not prompts:
            raise ValueError(
                "There are as many responses as prompts, and one at least. "
                f"Received: {len(prompts)} prompts and {len(responses)} responses"
            )
        rows = text_checks.each(lambda pair: self.preprocessor.scored_row(*pair), zip(prompts, responses))
        return self.score_tokens(rows, batch_size)

    def score_tokens(self, rows, batch_size=8):
        """Rewards of rows of token ids, each with the token that ends its answer.

        Args:
            rows: list of lists of ints.
            batch_size: int, rows that are scored at once.

        Returns:
            Float32 NumPy array `[n]`.

        Raises:
            ValueError: for an empty row, one longer than the preprocessor's `sequence_length`, and ids outside the
                vocabulary.
        """
        if not rows or not all(map(len, rows)):
            raise ValueError("Rows to score have at least one token. Received none, or an empty one.")
        if self.preprocessor is not None:
            self.preprocessor.refuse_longer_rows(rows)
        data.refuse_rows_outside(rows, self.backbone.vocabulary_size)
        # Few shapes, so that little is compiled.
        length, missing = bucket(max(map(len, rows)), SMALLEST_ROW), -len(rows) % batch_size
        mask = np.arange(length)[None, :] < np.array([*map(len, rows), *[1] * missing])[:, None]
        token_ids = np.zeros(mask.shape, "int32")
        token_ids[mask] = np.concatenate([*rows, np.zeros(missing)])
        x = data.preprocessed(
            {"token_ids": token_ids, "padding_mask": mask.astype("int32")}, None, None, batch_size, lambda x, *_: (x,)
        )
        batches = distribution.filled_up(x)
        rewards = in_whole_steps(keras.Model.predict)(self, batches, verbose=0)
        return distribution.own_rows(batches, rewards)[: len(rows)]

    @property
    def token_rules(self):
        """What batches must keep to, a `data.TokenRules`."""
        return data.TokenRules(self.backbone.vocabulary_size, has_labels=False, padded_on_the_right=True)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """As in keras-hub, and refuses what is no token of the model."""
        with numpy_outputs():
            samples = super().preprocess_samples(x, y, sample_weight)
        self.token_rules.refuse(*keras.utils.unpack_x_y_sample_weight(samples))
        return samples

    predict = in_whole_steps(keras_hub.models.Task.predict)
    train_on_batch = in_whole_steps(keras_hub.models.Task.train_on_batch)
    test_on_batch = in_whole_steps(keras_hub.models.Task.test_on_batch)
    predict_on_batch = in_whole_steps(keras_hub.models.Task.predict_on_batch)

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

    def export(self, filepath, format="tf_saved_model", verbose=None, input_signature=None, **kwargs):
        """As `keras.Model.export`. On JAX and TensorFlow a SavedModel takes any batch size and length by default."""
        kwargs = kernels.export_arguments(self.input, format, input_signature, kwargs)
        super().export(filepath, format=format, verbose=verbose, input_signature=input_signature, **kwargs)

    def _run_through_graph(self, inputs, operation_fn=lambda layer: layer, call_fn=None):
        return super()._run_through_graph(inputs, cloning.tied(self, operation_fn), call_fn)

    # === Quantisation ===

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantises the weights in place. Arguments and errors are those of `GemmaBackbone.quantize`."""
        with quantization.quantizing(self.backbone, mode, config, filters) as filters:
            super().quantize(mode, config=config, filters=filters, **kwargs)

    def get_quantization_layer_structure(self, mode=None):
        """As of `GemmaBackbone`."""
        return quantization.structure_of(self.backbone, mode)

    # === Presets ===

    @distribution.written_once
    def export_to_transformers(self, path):
        """Writes a `GemmaForSequenceClassification` with one label, whose logits are the rewards.

        Arguments and errors as of `GemmaCausalLM.export_to_transformers`.
        """
        checkpoints.export_model(path, self.backbone, self.preprocessor, self.reward_head.kernel)

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Loads a reward model, a `GemmaForSequenceClassification` with one label included.

        The backbone of any other preset of Gemma becomes one, its head at random.

        Args:
            preset, load_weights, **kwargs: as of `GemmaCausalLM.from_preset`.

        Returns:
            A `GemmaRewardModel`.

        Raises:
            ValueError, FileNotFoundError: as `GemmaCausalLM.from_preset`.
        """
        return checkpoints.load_task(cls, preset, load_weights=load_weights, **kwargs)

    @distribution.written_once
    def save_to_preset(self, preset_dir, max_shard_size=10):
        """Saves model, head and preprocessor as a preset. Arguments and errors as of `GemmaCausalLM.save_to_preset`."""
        checkpoints.save_task(self, preset_dir, max_shard_size=max_shard_size)

    save_weights = distribution.written_once(checkpoints.save_weights)

    def save_task_weights(self, filepath):
        """Saves the weights of the head. keras-hub would put the state of the optimizer beside them."""
        checkpoints.save_weights(self, filepath, objects_to_skip=self._all_but_the_head())

    def load_task_weights(self, filepath):
        """Loads the weights of the head."""
        keras.saving.load_weights(self, filepath, objects_to_skip=self._all_but_the_head())

    def _all_but_the_head(self):
        return [*self.backbone._flatten_layers(), self.optimizer]

    def __repr__(self):
        return described(self, self.backbone)

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(without_absent(inputs), *args, **kwargs)


class PairMetrics:
    """What `fit` reports of pairs besides the loss, over all of an epoch."""

    def __init__(self):
        self.accuracy = keras.metrics.Mean(name="accuracy")
        self.margin = keras.metrics.Mean(name="margin")
        self.smallest = Extreme(smallest=True, name="reward_min")
        self.mean = keras.metrics.Mean(name="reward_mean")
        self.largest = Extreme(smallest=False, name="reward_max")
        self.tokens = TokenCount()
        self.all = [self.accuracy, self.margin, self.smallest, self.mean, self.largest, self.tokens]

    def add(self, rewards, weights, x):
        """Adds rewards `[B, 2]` of pairs with weights `[B]` and inputs `[B, 2, T]`."""
        ahead = rewards[:, 0] - rewards[:, 1]
        both = ops.repeat(weights[:, None], 2, axis=1)
        self.accuracy.update_state(ops.cast(ahead > 0, "float32"), sample_weight=weights)
        self.margin.update_state(ahead, sample_weight=weights)
        self.mean.update_state(rewards, sample_weight=both)
        self.smallest.update_state(rewards, sample_weight=both)
        self.largest.update_state(rewards, sample_weight=both)
        self.tokens.update_state(x["token_ids"], sample_weight=x["padding_mask"])


@keras.saving.register_keras_serializable(package="keras_gemma")
class Extreme(keras.metrics.Metric):
    """The smallest or largest value that has any weight, since the last reset."""

    def __init__(self, smallest, name, **kwargs):
        super().__init__(name=name, **kwargs)
        self.sign = -1.0 if smallest else 1.0
        self.largest = self.add_variable((), initializer=keras.initializers.Constant(-np.inf), name="largest")

    def update_state(self, values, sample_weight):
        signed = ops.where(sample_weight > 0, self.sign * values, -np.inf)
        self.largest.assign(ops.maximum(self.largest, ops.max(signed)))

    def result(self):
        return self.sign * self.largest

    def reset_state(self):
        # Keras would begin anew at 0, which is no reward that was seen.
        self.largest.assign(-np.inf)


def _as_columns(x):
    """A list of examples as a dict of lists; anything else as it is."""
    if not isinstance(x, (list, tuple)) or not x or not text_checks.is_fields(x[0]):
        return x
    for number, example in enumerate(x):
        if not text_checks.is_fields(example):
            raise text_checks.ExampleError(number, f"A pair has fields. Received: {text_checks.shown(example)}")
    x = text_checks.each(lambda example: record_formats.pair(text_checks.fields(example)), x)
    for number, example in enumerate(x):
        if set(example) != set(x[0]):
            raise text_checks.ExampleError(
                number, f"Pairs have the same fields. Received: {sorted(x[0])} first, and {sorted(example)}"
            )
    return {name: [example[name] for example in x] for name in x[0]}
