"""Keras' optimizers with the settings of language models, and weight decay that leaves the norms alone.

Keras forgets in `get_config` what `exclude_from_weight_decay` was told, so a saved model would go on with decayed
norms; here the exclusions belong to the configuration.
"""

import re
import warnings

import keras
from keras import ops

# Regular expressions searched in the paths of variables.
NORMS_AND_BIASES = r"/(scale|bias)$"
TOKEN_EMBEDDING = r"token_embedding/embeddings$"


@keras.saving.register_keras_serializable(package="keras_gemma")
class AdamW(keras.optimizers.AdamW):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the settings common for language models.

    Args:
        learning_rate: float or schedule.
        weight_decay: float. Each step takes away `learning_rate * weight_decay` of a weight.
        beta_1, beta_2, epsilon: floats, as in Keras.
        global_clipnorm: optional float. Gradients that together have a larger L2 norm are scaled down to it.
        weight_decay_exclusions: regular expressions. A variable whose path contains one of them does not decay. By
            default norm scales and biases; add `TOKEN_EMBEDDING` to spare the embedding, too.
        **kwargs: as of `keras.optimizers.AdamW`.

    Example:

    >>> from keras_gemma.training import AdamW, NORMS_AND_BIASES, TOKEN_EMBEDDING, WarmUp
    >>> schedule = WarmUp(peak=3e-4, warmup_steps=100, total_steps=1000)
    >>> optimizer = AdamW(schedule, weight_decay_exclusions=[NORMS_AND_BIASES, TOKEN_EMBEDDING])
    """

    def __init__(
        self,
        learning_rate,
        weight_decay=0.1,
        beta_1=0.9,
        beta_2=0.95,
        epsilon=1e-8,
        global_clipnorm=1.0,
        weight_decay_exclusions=(NORMS_AND_BIASES,),
        **kwargs,
    ):
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            global_clipnorm=global_clipnorm,
            **kwargs,
        )
        self.weight_decay_exclusions = _patterns(weight_decay_exclusions)

    def build(self, variables):
        _exclude(self, variables)
        super().build(variables)

    def get_config(self):
        return {**super().get_config(), "weight_decay_exclusions": list(self.weight_decay_exclusions)}


@keras.saving.register_keras_serializable(package="keras_gemma")
class Lion(keras.optimizers.Lion):
    """Lion (Chen et al., arXiv 2302.06675): sign updates with one moment.

    Its steps are larger than AdamW's, so the paper divides AdamW's learning rate by 3 to 10 and multiplies the weight
    decay by as much.

    Args:
        learning_rate: float or schedule.
        weight_decay: float. Each step takes away `learning_rate * weight_decay` of a weight.
        beta_1, beta_2: floats, as in Keras.
        global_clipnorm, weight_decay_exclusions: as of `AdamW`.
        **kwargs: as of `keras.optimizers.Lion`.
    """

    def __init__(
        self,
        learning_rate,
        weight_decay=1.0,
        beta_1=0.9,
        beta_2=0.99,
        global_clipnorm=1.0,
        weight_decay_exclusions=(NORMS_AND_BIASES,),
        **kwargs,
    ):
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            global_clipnorm=global_clipnorm,
            **kwargs,
        )
        self.weight_decay_exclusions = _patterns(weight_decay_exclusions)

    def build(self, variables):
        _exclude(self, variables)
        super().build(variables)

    def get_config(self):
        return {**super().get_config(), "weight_decay_exclusions": list(self.weight_decay_exclusions)}


@keras.saving.register_keras_serializable(package="keras_gemma")
class Adafactor(keras.optimizers.Adafactor):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235), without momentum.

    Keeps one mean square a row and one a column in place of one a weight. Rows and columns are the last two axes: in
    `[N, D, H]` every head has its own, as if its kernel were a matrix of its own. Keras' class computes the same but
    stores their outer product as well, as large as the weights, and divides 0 by 0 where a gradient is 0 in a whole
    row and a whole column.

    Args:
        learning_rate: float or schedule, in units of a variable's own root mean square.
        weight_decay: optional float. Each step takes away `learning_rate * weight_decay` of a weight.
        epsilon_2: float. The least root mean square that a variable is given credit for; what the scales of Gemma's
            norms start with, which are 0.
        relative_step: bool. Caps the learning rate at `1 / sqrt(step)`, as in the paper. By default a schedule is
            taken at its word.
        global_clipnorm, weight_decay_exclusions: as of `AdamW`.
        **kwargs: as of `keras.optimizers.Adafactor`.
    """

    def __init__(
        self,
        learning_rate,
        weight_decay=None,
        epsilon_2=1e-3,
        relative_step=False,
        global_clipnorm=1.0,
        weight_decay_exclusions=(NORMS_AND_BIASES,),
        **kwargs,
    ):
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            epsilon_2=epsilon_2,
            relative_step=relative_step,
            global_clipnorm=global_clipnorm,
            **kwargs,
        )
        self.weight_decay_exclusions = _patterns(weight_decay_exclusions)

    def build(self, variables):
        if self.built:
            return
        _exclude(self, variables)
        # Past the parent, which would allocate what this class is here to save.
        super(keras.optimizers.Adafactor, self).build(variables)
        self._mean_squares = [self._add_mean_squares(variable) for variable in variables]

    def _add_mean_squares(self, variable):
        shape = tuple(variable.shape)
        if len(shape) < 2:
            return [self.add_variable_from_reference(variable, name="mean_square")]
        return [
            self.add_variable(shape[:-1], dtype=variable.dtype, name="row_mean_square"),
            self.add_variable((*shape[:-2], shape[-1]), dtype=variable.dtype, name="column_mean_square"),
        ]

    def update_step(self, gradient, variable, learning_rate):
        """One step of one variable, algorithms 4 and 5 of the paper with the parameter scaling of its section 8."""
        dtype = variable.dtype
        gradient = ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        rate = ops.cast(learning_rate, dtype)
        if self.relative_step:
            rate = ops.minimum(rate, ops.rsqrt(step))
        update = self._whiten(gradient, self._mean_squares[self._get_variable_index(variable)], step)
        update = update / ops.maximum(1.0, self._rms(update) / self.clip_threshold)
        scale = ops.maximum(self.epsilon_2, self._rms(variable))
        self.assign_sub(variable, ops.cast(rate * scale, dtype) * update)

    def _whiten(self, gradient, mean_squares, step):
        kept = 1.0 - ops.power(step, self.beta_2_decay)
        squares = ops.square(gradient) + self.epsilon_1
        axes = [None] if len(mean_squares) == 1 else [-1, -2]
        for mean_square, axis in zip(mean_squares, axes):
            new = squares if axis is None else ops.mean(squares, axis=axis)
            self.assign(mean_square, kept * mean_square + (1.0 - kept) * new)
        if len(mean_squares) == 1:
            return gradient * ops.rsqrt(mean_squares[0])
        # Two factors one after the other: their product may be too small for float32 where neither of them is.
        rows, columns = mean_squares
        rows = rows / ops.mean(rows, axis=-1, keepdims=True)
        return gradient * ops.expand_dims(ops.rsqrt(rows), -1) * ops.expand_dims(ops.rsqrt(columns), -2)

    def get_config(self):
        return {**super().get_config(), "weight_decay_exclusions": list(self.weight_decay_exclusions)}


def _patterns(exclusions):
    if isinstance(exclusions, str):
        raise ValueError(
            f"`weight_decay_exclusions` is a list of regular expressions. Received the string {exclusions!r}"
        )
    for pattern in exclusions:
        re.compile(pattern)
    return tuple(exclusions)


def _exclude(optimizer, variables):
    spared = [v for v in variables if any(re.search(p, v.path) for p in optimizer.weight_decay_exclusions)]
    optimizer.exclude_from_weight_decay(var_list=spared)


# What Keras' optimizers do to bfloat16 weights, where 1 - beta_2 is 0: they correct their bias in the weights' dtype.
BFLOAT16_BETA_2 = 1 - 2**-9
NOT_MOVED_WITH_BETA_2 = (keras.optimizers.Adam, keras.optimizers.Lamb)
NAN_WITH_BETA_2 = (keras.optimizers.Nadam, keras.optimizers.ScheduleFreeAdamW)


def warn_of_weights_that_cannot_move(model):
    """Warns of an optimizer that leaves a compiled model's weights as they are, in the name of who called `fit`.

    Raises:
        ValueError: for one that makes NaN of them.
    """
    if not any(variable.dtype == "bfloat16" for variable in model.trainable_variables):
        return
    for optimizer in _optimizers_in(model.optimizer):
        name = type(optimizer).__name__
        remedy = "Train under the dtype policy 'mixed_bfloat16', whose weights are float32."
        if isinstance(optimizer, NAN_WITH_BETA_2) and optimizer.beta_2 > BFLOAT16_BETA_2:
            raise ValueError(f"{name} with beta_2={optimizer.beta_2} makes NaN of bfloat16 weights. {remedy}")
        if unmoved := _unmoved_in_bfloat16(optimizer):
            warnings.warn(f"{name}{unmoved}. {remedy}", stacklevel=3)


def _unmoved_in_bfloat16(optimizer):
    """What an optimizer does not move, as the rest of a sentence, or `None`."""
    if isinstance(optimizer, NOT_MOVED_WITH_BETA_2) and optimizer.beta_2 > BFLOAT16_BETA_2:
        return f" with beta_2={optimizer.beta_2} does not change bfloat16 weights"
    if isinstance(optimizer, keras.optimizers.Muon) and optimizer.adam_beta_2 > BFLOAT16_BETA_2:
        return f" with adam_beta_2={optimizer.adam_beta_2} does not change the bfloat16 weights that it leaves to Adam"
    if isinstance(optimizer, keras.optimizers.Adadelta):
        return " begins with steps so small that bfloat16 weights hardly change"
    return None


def _optimizers_in(optimizer):
    """An optimizer, or those that it is made of."""
    if inner := getattr(optimizer, "inner_optimizer", None):
        return _optimizers_in(inner)
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return [one for each in optimizer._inner_optimizers for one in _optimizers_in(each)]
    return [optimizer]


def warn_of_accumulation_by_batches(optimizer):
    """Warns of an optimizer that averages batches, in the name of who called `compile`."""
    # What `LossScaleOptimizer` wraps has the setting.
    steps = getattr(getattr(optimizer, "inner_optimizer", optimizer), "gradient_accumulation_steps", None)
    if steps:
        warnings.warn(
            f"`gradient_accumulation_steps={steps}` of the optimizer averages {steps} batches, however few tokens one "
            f"has. `compile(gradient_accumulation_steps={steps})` and batches {steps} times as large weigh all tokens "
            "alike.",
            stacklevel=3,
        )
