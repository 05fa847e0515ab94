"""Supervised tuning: the settings that `fit` is usually given for it."""

import math

import keras

from keras_gemma import data
from keras_gemma.distribution import whole
from keras_gemma.training.finite import StopOnNonFiniteLoss
from keras_gemma.training.monitor import TrainingMonitor
from keras_gemma.training.optimizers import AdamW
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
    lora_rank=None,
    learning_rate=None,
    weight_decay=0.0,
    gradient_accumulation_steps=1,
    patience=None,
    pack=True,
    checkpoints=None,
    callbacks=(),
    verbose="auto",
):
    """Tunes a model on prompts and responses, or on dialogues: what `compile` and `fit` are usually given for it.

    What is learned are the responses, their ends included; in dialogues all turns of the model. The rate rises over the
    first tenth of the steps and falls along half a cosine. With validation data the model ends with the weights of the
    epoch whose loss on them was the lowest.

    Args:
        model: a `GemmaCausalLM` with a preprocessor.
        examples: a list as `data.tuning_examples` gives it, or a dict of lists.
        validation_data: optional, as `examples`.
        epochs: int, most passes over the examples.
        batch_size: int, rows of a step; packed rows hold several examples.
        lora_rank: optional int. Trains adapters of this rank and nothing else.
        learning_rate: optional float, its peak, or a schedule. By default 2e-5, and 2e-4 for adapters.
        weight_decay: float.
        gradient_accumulation_steps: int, parts of a step that are in memory one at a time.
        patience: optional int. Ends training when so many epochs brought no lower loss on the validation data.
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
    if patience is not None and validation_data is None:
        raise ValueError(f"`patience` waits for the loss on `validation_data`. Received: patience={patience} and none.")
    _refuse_what_is_not_listed(examples)
    if lora_rank is not None:
        model.backbone.enable_lora(lora_rank)
    steps_per_epoch = _steps_per_epoch(model, examples, batch_size, pack)
    model.compile(
        AdamW(_rate(model, learning_rate, epochs * steps_per_epoch), weight_decay=weight_decay),
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    own = [TrainingMonitor(), StopOnNonFiniteLoss()]
    if validation_data is not None:
        own.append(KeepBest(patience=patience))
    if checkpoints is not None:
        own.append(ExactResume(checkpoints, save_every_steps=steps_per_epoch))
    return model.fit(
        examples,
        validation_data=validation_data,
        batch_size=batch_size,
        epochs=epochs,
        pack=pack,
        callbacks=[*own, *callbacks],
        verbose=verbose,
    )


def _refuse_what_is_not_listed(examples):
    if not isinstance(examples, (list, dict)):
        raise ValueError(
            "Tuning knows its number of steps beforehand: `examples` are a list, such as `data.tuning_examples` gives, "
            f"or a dict of lists. Received: {type(examples).__name__}"
        )


def _steps_per_epoch(model, examples, batch_size, pack):
    if not pack:
        return -(-data.count_examples(examples) // batch_size)
    return len(data.packed(examples, None, None, batch_size, model.preprocessor))


def _rate(model, learning_rate, steps):
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        return learning_rate
    has_adapters = any("lora" in variable.path for variable in model.trainable_variables)
    peak = learning_rate or (ADAPTER_RATE if has_adapters else FULL_RATE)
    return WarmUp(peak, warmup_steps=int(WARMUP_SHARE * steps), total_steps=steps)
