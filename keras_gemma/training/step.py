"""One step of `fit` and of `evaluate`.

batch → microbatches → outcome (loss and what metrics need) → gradients → optimizer → logs

What a step computes is asked of the model, alike on every backend:

    model.outcome_of(microbatch, total_weight, share, training)   → (loss, outcome)
    model.logs_with(loss, outcome, microbatch, total_weight)       → logs, after adding to the metrics

`loss` is a microbatch's part of the loss of its batch: the parts and their gradients add up.
"""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops


class Microbatch(NamedTuple):
    """Rows of a batch that go through the model together.

    Attributes:
        x: the model's inputs.
        y: targets.
        sample_weight: weights, or `None`.
    """

    x: Any
    y: Any
    sample_weight: Any


def train_step(model, *arguments, microbatches=1):
    """What `keras.Model.train_step` does, for a batch cut into microbatches.

    Args:
        model: a compiled `GemmaCausalLM`.
        *arguments: those of `keras.Model.train_step` on the backend at hand.
        microbatches: int. Into how many parts the rows are cut; one at a time is in memory.

    Returns:
        As `keras.Model.train_step`. The logs have `tokens` and `gradient_norm` besides the metrics: tokens trained
        on in this epoch, and the global norm of the gradients before the optimizer clips them.
    """
    return {"jax": _train_on_jax, "tensorflow": _train_on_tensorflow, "torch": _train_on_torch}[
        keras.backend.backend()
    ](model, *arguments, microbatches=microbatches)


def test_step(model, *arguments):
    """What `keras.Model.test_step` does. See `train_step`."""
    if keras.backend.backend() == "jax":
        return _test_on_jax(model, *arguments)
    batch = _unpacked(*arguments)
    total_weight = _weight_or_one(batch)
    loss, outcome = model.outcome_of(batch, total_weight, 1.0, training=False)
    return _without_token_count(model.logs_with(loss, outcome, batch, total_weight))


def weights_of(batch):
    """The weights of a batch; ones where it has none."""
    return ops.ones(ops.shape(batch.y), "float32") if batch.sample_weight is None else batch.sample_weight


def weight_of(batch):
    """The sum of a batch's weights, a float32 scalar."""
    return ops.sum(ops.cast(weights_of(batch), "float32"))


def _weight_or_one(batch):
    # A batch without weight has no loss; dividing by its weight would make NaN of that.
    weight = weight_of(batch)
    return ops.where(weight > 0, weight, 1.0)


def _unpacked(data):
    return Microbatch(*keras.utils.unpack_x_y_sample_weight(data))


def _cut(batch, microbatches):
    """A `Microbatch` whose tensors are `[microbatches, rows, …]`; rows without weight fill the last ones up.

    Neighbouring rows go to different microbatches: of rows that are spread over devices, each device has some in
    every microbatch.
    """
    batch = batch._replace(sample_weight=weights_of(batch))

    def cut(x):
        x = ops.convert_to_tensor(x)
        missing = -ops.shape(x)[0] % microbatches
        x = ops.pad(x, [(0, missing), *[(0, 0)] * (len(x.shape) - 1)])
        return ops.swapaxes(ops.reshape(x, (-1, microbatches, *ops.shape(x)[1:])), 0, 1)

    return keras.tree.map_structure(lambda x: None if x is None else cut(x), batch)


def _without_token_count(logs):
    # It is there for the speed of training and says nothing about an evaluation.
    return {name: value for name, value in logs.items() if name != "tokens"}


def global_norm(gradients, variables):
    """Root of the sum of all squares, float32, without what is no gradient."""
    pairs = zip(gradients, variables)
    squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g, v in pairs if not takes_new_value(v)]
    return ops.sqrt(sum(squares)) if squares else ops.zeros((), "float32")


def takes_new_value(variable):
    """Whether what comes as a variable's gradient is its next value, as with the scales of float8."""
    return getattr(variable, "overwrite_with_gradient", False)


def _added(total, gradients, variables):
    """Sums of gradients; of next values, none of which is negative, the largest (as in Keras' optimizers)."""
    if total is None:
        return gradients
    return [
        ops.maximum(old, new) if takes_new_value(variable) else old + new
        for old, new, variable in zip(total, gradients, variables)
    ]


def _without_absent(gradients, variables):
    """Gradients with zeros for a weight that does not bear upon the loss, as JAX has it."""

    def absent(variable):
        return variable.value if takes_new_value(variable) else ops.zeros(variable.shape, variable.dtype)

    return [absent(variable) if g is None else g for g, variable in zip(gradients, variables)]


# === JAX ===


def _train_on_jax(model, state, data, microbatches):
    import jax

    trainable, non_trainable, optimizer_variables, metrics_variables = state
    batch = _unpacked(data)
    total_weight = _weight_or_one(batch)

    def loss_of(trainable, non_trainable, batch):
        share = weight_of(batch) / total_weight if microbatches > 1 else 1.0
        values = _values_of(model, trainable, non_trainable)
        loss, outcome, non_trainable = _outcome_on_jax(model, values, batch, total_weight, share, training=True)
        with keras.StatelessScope(zip(model.optimizer.variables, optimizer_variables)):
            return model.optimizer.scale_loss(loss), (loss, outcome, non_trainable)

    def run(non_trainable, metrics_variables, batch):
        (_, (loss, outcome, non_trainable)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            trainable, non_trainable, batch
        )
        logs, metrics_variables = _logs_on_jax(model, metrics_variables, loss, outcome, batch, total_weight)
        return gradients, non_trainable, metrics_variables, logs

    if microbatches == 1:
        gradients, non_trainable, metrics_variables, logs = run(non_trainable, metrics_variables, batch)
    else:

        def add_microbatch(carry, microbatch):
            summed, non_trainable, metrics_variables = carry
            gradients, non_trainable, metrics_variables, logs = run(non_trainable, metrics_variables, microbatch)
            summed = _added(summed, gradients, model.trainable_variables)
            return (summed, non_trainable, metrics_variables), logs

        start = [ops.zeros_like(v) for v in trainable], non_trainable, metrics_variables
        (gradients, non_trainable, metrics_variables), logs = jax.lax.scan(
            add_microbatch, start, _cut(batch, microbatches)
        )
        logs = keras.tree.map_structure(lambda value: value[-1], logs)

    norm = global_norm(gradients, model.trainable_variables)
    logs["gradient_norm"] = _unscaled(model.optimizer, norm, optimizer_variables)
    trainable, optimizer_variables = model.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
    return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)


def _test_on_jax(model, state, data):
    trainable, non_trainable, metrics_variables = state
    batch = _unpacked(data)
    total_weight = _weight_or_one(batch)
    values = _values_of(model, trainable, non_trainable)
    loss, outcome, non_trainable = _outcome_on_jax(model, values, batch, total_weight, 1.0, training=False)
    logs, metrics_variables = _logs_on_jax(model, metrics_variables, loss, outcome, batch, total_weight)
    return _without_token_count(logs), (trainable, non_trainable, metrics_variables)


def _values_of(model, trainable, non_trainable):
    return [*zip(model.trainable_variables, trainable), *zip(model.non_trainable_variables, non_trainable)]


def _outcome_on_jax(model, values, batch, total_weight, share, training):
    """Loss and outcome as functions of the variables' values, and the new values of those that do not train."""
    with keras.StatelessScope(values, collect_losses=True) as scope:
        loss, outcome = model.outcome_of(batch, total_weight, share, training)
    non_trainable = [value for _, value in values[len(model.trainable_variables) :]]
    return loss, outcome, _values_after(scope, model.non_trainable_variables, non_trainable)


def _logs_on_jax(model, metrics_variables, loss, outcome, batch, total_weight):
    with keras.StatelessScope(zip(model.metrics_variables, metrics_variables)) as scope:
        logs = model.logs_with(loss, outcome, batch, total_weight)
    return logs, _values_after(scope, model.metrics_variables, metrics_variables)


def _values_after(scope, variables, values):
    current = [scope.get_current_value(variable) for variable in variables]
    return [old if new is None else new for new, old in zip(current, values)]


def _unscaled(optimizer, norm, optimizer_variables):
    """The norm of gradients of the loss itself, where an optimizer scales it up for float16."""
    with keras.StatelessScope(zip(optimizer.variables, optimizer_variables)):
        return norm / optimizer.scale_loss(1.0)


# === TensorFlow and torch ===


def _train_on_tensorflow(model, data, microbatches):
    import tensorflow as tf

    batch = _unpacked(data)
    total_weight = _weight_or_one(batch)
    weights, summed = model.trainable_weights[:], None
    for microbatch, share in _listed(batch, microbatches, total_weight):
        with tf.GradientTape() as tape:
            loss, outcome = model.outcome_of(microbatch, total_weight, share, training=True)
            scaled = model.optimizer.scale_loss(loss)
        gradients = [g if g is None else tf.convert_to_tensor(g) for g in tape.gradient(scaled, weights)]
        summed = _added(summed, _without_absent(gradients, weights), weights)
        logs = model.logs_with(loss, outcome, microbatch, total_weight)
    logs["gradient_norm"] = global_norm(summed, weights) / model.optimizer.scale_loss(1.0)
    model.optimizer.apply_gradients(zip(summed, weights))
    return logs


def _train_on_torch(model, data, microbatches):
    import torch

    batch = _unpacked(data)
    total_weight = _weight_or_one(batch)
    weights = model.trainable_weights[:]
    replaced = [weight for weight in weights if takes_new_value(weight)]
    largest = None
    model.zero_grad()
    for microbatch, share in _listed(batch, microbatches, total_weight):
        loss, outcome = model.outcome_of(microbatch, total_weight, share, training=True)
        # torch adds to the gradients that are there, which is right for all but those.
        model.optimizer.scale_loss(loss).backward()
        logs = model.logs_with(loss, outcome, microbatch, total_weight)
        largest = _added(largest, _without_absent(_taken(replaced), replaced), replaced)
    with torch.no_grad():
        for weight, value in zip(replaced, largest):
            weight.value.grad = value
        gradients = _without_absent([weight.value.grad for weight in weights], weights)
        logs["gradient_norm"] = global_norm(gradients, weights) / model.optimizer.scale_loss(1.0)
        model.optimizer.apply(gradients, weights)
    return logs


def _taken(weights):
    """The gradients that torch has for some weights, and has no more afterwards."""
    gradients = [weight.value.grad for weight in weights]
    for weight in weights:
        weight.value.grad = None
    return gradients


def _listed(batch, microbatches, total_weight):
    """Pairs of a microbatch and its share of the weight."""
    if microbatches == 1:
        return [(batch, 1.0)]
    cut = _cut(batch, microbatches)
    unstacked = [[None] * microbatches if x is None else ops.unstack(x, microbatches) for x in keras.tree.flatten(cut)]
    parts = [keras.tree.pack_sequence_as(cut, list(part)) for part in zip(*unstacked)]
    return [(part, weight_of(part) / total_weight) for part in parts]
