"""Steps of a policy's optimizer on a loss of the log-probabilities of responses.

microbatches ─→ log-probabilities ─→ loss ─→ gradients ─→ optimizer
"""

import contextlib

import jax
import keras
from jax import lax

from keras_gemma import kernels
from keras_gemma.distribution import whole
from keras_gemma.distribution.layouts import Layout
from keras_gemma.rlhf import rows
from keras_gemma.training import uninterrupted
from keras_gemma.training.step import global_norm


class PolicyUpdate:
    """A policy that trains, beside what it was when this was made, its reference.

    Only weights that train are copied, so that the reference of adapters costs next to nothing.

    Args:
        policy: a compiled `GemmaCausalLM`.
        loss: callable `(logps [R, C], entropies [R, C], microbatch) → (float32 scalar, {name: float32 scalar}, {name:
            array [R]})` of rows as `rows.microbatches` gives them. Microbatches with their losses and metrics add up to
            a step; what is said of rows is handed out as it is.
        temperature: float, of all probabilities.

    Attributes:
        reference: list of arrays, the values of the variables that train.

    Raises:
        ValueError: for another backend than JAX, a policy without preprocessor or optimizer, with dropout, or
            quantised.
    """

    def __init__(self, policy, loss, temperature=1.0):
        _refuse_policy(policy)
        self.policy = policy
        self.loss = loss
        self.temperature = temperature
        policy.optimizer.build(policy.trainable_variables)
        self.reference = jax.jit(lambda values: [jax.numpy.copy(value) for value in values])(self.trained())
        self._log_probabilities = jax.jit(self._of_microbatches)
        self._reference_log_probabilities = jax.jit(self._of_reference)
        self._step = jax.jit(self._stepped, donate_argnums=(0, 1), out_shardings=self._where_they_lie())

    def trained(self):
        """The values of the variables that train, a list of arrays."""
        return [variable.value for variable in self.policy.trainable_variables]

    def log_probabilities(self, batch):
        """Those of the targets, and the entropies of the distributions they come from: arrays `[M, R, C]`, in nats."""
        return self._log_probabilities(self.trained(), self._frozen(), placed(batch))

    def reference_log_probabilities(self, batch):
        """Those of the targets under the reference, an array `[M, R, C]` in nats."""
        return self._reference_log_probabilities(self.reference, self._frozen(), placed(batch))

    def step(self, batch):
        """Makes a step of the optimizer.

        Args:
            batch: what `rows.microbatches` gave, and what the loss needs besides, `[M, R, …]` each; `logps` and
                `entropies` of the weights as they are, where they are known already.

        Returns:
            A dict of floats, `loss`, `gradient_norm` and the metrics of the loss; and a dict of arrays `[M, R]`, what
            the loss said of rows.
        """
        batch = placed(batch)
        # The program takes over the memory of the old values.
        with uninterrupted():
            optimizer = [variable.value for variable in self.policy.optimizer.variables]
            trained, optimizer, logs, of_rows = self._step(self.trained(), optimizer, self._frozen(), batch)
            _assign(self.policy.trainable_variables, trained)
            _assign(self.policy.optimizer.variables, optimizer)
        return {name: float(value) for name, value in logs.items()}, of_rows

    @contextlib.contextmanager
    def as_reference(self):
        """Within, the policy is its reference."""
        trained = self.trained()
        try:
            _assign(self.policy.trainable_variables, self.reference)
            yield
        finally:
            with uninterrupted():
                _assign(self.policy.trainable_variables, trained)

    # === Programs ===

    def gradients(self, trained, frozen, batch):
        """Loss, gradients by `trained`, metrics, and what the loss says of rows, as a pure function."""

        def objective(trained, microbatch):
            with self._with(trained, frozen):
                known = (microbatch["logps"], microbatch["entropies"]) if "logps" in microbatch else None
                loss, metrics, of_rows = self.loss(*self._scored(microbatch, known, training=True), microbatch)
                return loss, (loss, metrics, of_rows)

        def run(microbatch):
            (_, (loss, metrics, of_rows)), gradients = jax.value_and_grad(objective, has_aux=True)(trained, microbatch)
            return (gradients, loss, metrics), of_rows

        def add_microbatch(total, microbatch):
            summed, of_rows = run(microbatch)
            return jax.tree.map(jax.numpy.add, total, summed), of_rows

        first = jax.tree.map(lambda x: x[0], batch)
        nothing = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), jax.eval_shape(run, first)[0])
        (gradients, loss, metrics), of_rows = lax.scan(add_microbatch, nothing, batch)
        return loss, gradients, metrics, of_rows

    def _stepped(self, trained, optimizer, frozen, batch):
        loss, gradients, metrics, of_rows = self.gradients(trained, frozen, batch)
        logs = {"loss": loss, "gradient_norm": global_norm(gradients, self.policy.trainable_variables), **metrics}
        trained, optimizer = self.policy.optimizer.stateless_apply(optimizer, gradients, trained)
        return trained, optimizer, logs, of_rows

    def _of_microbatches(self, trained, frozen, batch):
        def of_microbatch(microbatch):
            with self._with(trained, frozen):
                return self._scored(microbatch)

        return lax.map(of_microbatch, batch)

    def _of_reference(self, *arguments):
        logps, _ = self._of_microbatches(*arguments)
        return logps

    def _scored(self, microbatch, known=None, training=False):
        """Log-probabilities of the targets, at the temperature, and entropies.

        They are those of the distribution that rollouts are drawn from: over the ids that the tokenizer has, not over
        rows of the embedding beyond them. Nothing teaches these rows.
        """
        backbone = self.policy.backbone
        hidden = rows.predicting_states(backbone, microbatch, training) / self.temperature
        embeddings = backbone.token_embedding.embeddings
        return kernels.token_log_probabilities(
            hidden,
            embeddings,
            microbatch["targets"],
            microbatch["mask"],
            known,
            vocabulary_size=self.policy.preprocessor.tokenizer.vocabulary_size(),
        )

    def _frozen(self):
        # As arguments: values that a program closes over would be copied into it.
        return [variable.value for variable in self.policy.non_trainable_variables]

    def _with(self, trained, frozen):
        policy = self.policy
        values = [*zip(policy.trainable_variables, trained), *zip(policy.non_trainable_variables, frozen)]
        return keras.StatelessScope(state_mapping=values)

    def _where_they_lie(self):
        if keras.distribution.distribution() is None:
            return None
        optimizer = [variable.value.sharding for variable in self.policy.optimizer.variables]
        return [value.sharding for value in self.trained()], optimizer, None, None


def placed(batch):
    """Microbatches `[M, R, …]` on the devices, the rows of each spread as `keras.distribution` spreads a batch."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return batch

    def on_devices(array):
        layout = distribution.get_data_layout(array.shape[1:])
        layout = Layout((None, *layout.axes), layout.device_mesh)
        return keras.distribution.distribute_tensor(array, layout)

    return jax.tree.map(on_devices, batch)


def on_host(values):
    """A tree of arrays, wherever they lie, as NumPy arrays."""
    return jax.tree.map(whole, values)


def _assign(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(value)


def _refuse_policy(policy):
    if policy.preprocessor is None or policy.optimizer is None:
        raise ValueError(
            "A policy has a preprocessor and an optimizer. Received one without: give it one, `compile` it"
        )
    if policy.backbone.dropout:
        raise ValueError(
            "With dropout, what is learned from is not what sampled. "
            f"Received: a policy with dropout={policy.backbone.dropout}"
        )
    layers = policy.backbone._flatten_layers(include_self=False)
    if quantized := sorted({layer.quantization_mode for layer in layers if layer.quantization_mode is not None}):
        raise ValueError(f"A policy trains in floating point. Received: one quantised to {', '.join(quantized)}")
