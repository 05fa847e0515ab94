"""Supervised tuning: the settings that `fit` is usually given for it."""

import math

import keras

from keras_gemma import data
from keras_gemma.distribution import whole
from keras_gemma.training.finite import StopOnNonFiniteLoss
from keras_gemma.training.monitor import TrainingMonitor
from keras_gemma.training.optimizers import AdamW
from keras_gemma.training.progress import StopAtStep
from keras_gemma.training.resume import ExactResume
from keras_gemma.training.schedules import WarmUp

# Adapters begin as nothing and are small, so they bear ten times the rate.
FULL_RATE = 2e-5
ADAPTER_RATE = 2e-4
WARMUP_SHARE = 0.1


class KeepBest(keras.callbacks.EarlyStopping):
    """Ends training with the trained weights of its best epoch, and ends it once `patience` epochs brought nothing.

    As `keras.callbacks.EarlyStopping(restore_best_weights=True)`, but of what trains alone: with adapters little more
    than nothing, where Keras copies the whole model to the host each time. Works with `ExactResume` and on several
    processes.

    Args:
        monitor: name of the metric to be best at, its direction as Keras knows it.
        patience: optional int, epochs. `None` never ends early.
        **kwargs: as of `keras.callbacks.EarlyStopping`, but for `restore_best_weights`.

    Attributes:
        best: the best value.
        best_epoch: int, the epoch that had it, counted from 0.
    """

    def __init__(self, monitor="val_loss", patience=None, **kwargs):
        super().__init__(monitor, patience=math.inf if patience is None else patience, **kwargs)

    def on_epoch_end(self, epoch, logs=None):
        before = self.best
        super().on_epoch_end(epoch, logs)
        if self.best != before:
            self.best_weights = [whole(variable) for variable in self.model.trainable_variables]

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if self.best_weights is not None:
            for variable, value in zip(self.model.trainable_variables, self.best_weights):
                variable.assign(value)


def tune(
    model,
    examples,
    validation_data=None,
    *,
    epochs=3,
    batch_size=8,
    steps=None,
    lora_rank=None,
    lora_alpha=None,
    lora_targets=None,
    learning_rate=None,
    warmup_steps=None,
    decay="cosine",
    weight_decay=0.0,
    gradient_accumulation_steps=1,
    evaluation_steps=None,
    patience=None,
    recompute=None,
    pack=True,
    checkpoints=None,
    callbacks=(),
    verbose="auto",
):
    """Tunes a model on prompts and responses, or on dialogues: what `compile` and `fit` are usually given for it.

    What is learned are the responses, their ends included; in dialogues all turns of the model. The learning rate rises
    over the first tenth of the steps and falls along half a cosine, unless told otherwise. With validation data the
    model ends with the weights whose loss on them was the lowest.

    Args:
        model: a `GemmaCausalLM` with a preprocessor.
        examples: a list as `data.tuning_examples` gives it, or a dict of lists.
        validation_data: optional, as `examples`.
        epochs: int, most passes over the examples.
        batch_size: int, rows of a step; packed rows hold several examples.
        steps: optional int, optimizer steps to train for, in place of `epochs`.
        lora_rank: optional int. Trains LoRA adapters of this rank and nothing else.
        lora_alpha: optional float. Adapters are scaled by `lora_alpha / lora_rank`; by default the rank.
        lora_targets: optional list of strings, the layers that get adapters: of `query`, `key`, `value`,
            `attention_output`, `ffw_gating`, `ffw_gating_2`, `ffw_linear`. `query` and `value` by default.
        learning_rate: optional float, its peak, or a schedule. By default 2e-5, and 2e-4 for adapters.
        warmup_steps: optional int, steps over which the learning rate rises. By default a tenth of all.
        decay: `"cosine"`, `"linear"` or `"constant"`, how the learning rate falls afterwards.
        weight_decay: float.
        gradient_accumulation_steps: int, parts of a step that are in memory one at a time.
        evaluation_steps: optional int, steps between two evaluations on the validation data. By default an epoch's.
        patience: optional int. Ends training when so many evaluations brought no lower loss on the validation data.
        recompute: optional, what training keeps for the backward pass, as `GemmaBackbone.recompute`.
        pack: bool. Puts several examples into a row, none of which sees another.
        checkpoints: optional path of a folder. A killed run goes on from there (see `ExactResume`).
        callbacks: further Keras callbacks.
        verbose: as of `fit`.

    Returns:
        A `keras.callbacks.History`.

    Raises:
        ValueError: for examples that are not listed, `patience` without validation data, adapters beside adapters, and
            as `fit`.

    Example:

    >>> from keras_gemma import GemmaCausalLM
    >>> from keras_gemma.training import tune
    >>> model = GemmaCausalLM.from_preset("gemma_tiny_en", sequence_length=32)
    >>> pairs = [{"prompts": "cat\\n", "responses": "An animal."}, {"prompts": "sun\\n", "responses": "A star."}]
    >>> history = tune(model, pairs, lora_rank=2, epochs=1, verbose=0)
    >>> sorted(history.history)[:2]
    ['gradient_norm', 'learning_rate']
    """
    for name, value in {"patience": patience, "evaluation_steps": evaluation_steps}.items():
        if value is not None and validation_data is None:
            raise ValueError(f"`{name}` is about the loss on `validation_data`. Received: {name}={value} and none.")
    for name, value in {"steps": steps, "evaluation_steps": evaluation_steps}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is at least 1. Received: {value}")
    _refuse_what_is_not_listed(examples)
    if lora_rank is None and (lora_alpha is not None or lora_targets is not None):
        raise ValueError("`lora_alpha` and `lora_targets` are of adapters. Received them without `lora_rank`.")
    if recompute is not None:
        model.backbone.recompute = recompute
    if lora_rank is not None:
        alpha = {} if lora_alpha is None else {"lora_alpha": lora_alpha}
        model.backbone.enable_lora(lora_rank, target_layer_names=lora_targets, **alpha)
    steps_per_epoch = _steps_per_epoch(model, examples, batch_size, pack)
    total_steps = epochs * steps_per_epoch if steps is None else steps
    model.compile(
        AdamW(_rate(model, learning_rate, warmup_steps, decay, total_steps), weight_decay=weight_decay),
        gradient_accumulation_steps=gradient_accumulation_steps,
        # `compile` would put the greedy one in the place of that which the preset was saved with.
        sampler=getattr(model, "sampler", None) or "greedy",
    )
    own = [TrainingMonitor(), StopOnNonFiniteLoss()]
    if validation_data is not None:
        own.append(KeepBest(patience=patience))
    if checkpoints is not None:
        own.append(ExactResume(checkpoints, save_every_steps=min(steps_per_epoch, evaluation_steps or math.inf)))
    duration = {"epochs": epochs}
    if steps is not None or evaluation_steps is not None:
        # Keras evaluates at the end of an epoch, so an epoch is what lies between two evaluations.
        stretch = min(evaluation_steps or steps_per_epoch, total_steps)
        duration = {"epochs": -(-total_steps // stretch), "steps_per_epoch": stretch}
        if total_steps % stretch:
            own.append(StopAtStep(total_steps, stretch))
    return model.fit(
        examples,
        validation_data=validation_data,
        batch_size=batch_size,
        pack=pack,
        callbacks=[*own, *callbacks],
        verbose=verbose,
        **duration,
    )


def _refuse_what_is_not_listed(examples):
    if not isinstance(examples, (list, dict)):
        raise ValueError(
            "Tuning knows its number of steps beforehand: `examples` are a list, such as `data.tuning_examples` gives, "
            f"or a dict of lists. Received: {type(examples).__name__}"
        )


def _steps_per_epoch(model, examples, batch_size, pack):
    if not pack:
        return len(data.padded(examples, None, None, batch_size, model.preprocessor, model.preprocess_samples))
    return len(data.packed(examples, None, None, batch_size, model.preprocessor))


def _rate(model, learning_rate, warmup_steps, decay, total_steps):
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        return learning_rate
    has_adapters = any("lora" in variable.path for variable in model.trainable_variables)
    peak = learning_rate or (ADAPTER_RATE if has_adapters else FULL_RATE)
    if warmup_steps is None:
        warmup_steps = int(WARMUP_SHARE * total_steps)
    return WarmUp(peak, warmup_steps, None if decay == "constant" else total_steps, decay)
