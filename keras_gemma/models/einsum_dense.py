import keras
from keras import ops

CALIBRATED = ("gptq", "awq")


@keras.saving.register_keras_serializable(package="keras_gemma")
class EinsumDense(keras.layers.EinsumDense):
    """A projection as in Keras, whose calibrated quantisations see what goes in and keep all that they found.

    Keras' calibration replaces `call` to look at the inputs, but a layer that is being quantised runs another method:
    nothing is seen, and GPTQ and AWQ are then no more than rounding. Nor does Keras look at heads one by one, and files
    lack the zero points.

    Call arguments:
        inputs: float tensor, with the axes of the equation.
    """

    def quantize(self, mode=None, type_check=True, config=None):
        # The base refuses subclasses; this one adds no variable, so its schemes apply unchanged.
        return super().quantize(mode, type_check=False, config=config)

    def quantized_call(self, inputs, *args, **kwargs):
        if self._awaits_calibration:
            # Where Keras has put what looks on.
            return self.call(self._as_calibration_sees_it(inputs))
        return super().quantized_call(inputs, *args, **kwargs)

    def call(self, inputs, training=None):
        if self._awaits_calibration:
            inputs = self._as_it_came(inputs)
        return super().call(inputs, training=training)

    @property
    def _awaits_calibration(self):
        mode = self.quantization_mode
        return mode in CALIBRATED and not getattr(self, f"is_{mode}_calibrated", False)

    @property
    def _heads_of_kernel(self):
        """How many heads `N` of a kernel `[N, D, H]` have the same input `[…, D]`; 1 of any other kernel."""
        return self._kernel.shape[0] if self._input_axes_of_kernel == (1,) else 1

    @property
    def _input_axes_of_kernel(self):
        inputs, kernel = self.equation.split("->")[0].split(",")
        return tuple(axis for axis, letter in enumerate(kernel) if letter in inputs)

    def _as_calibration_sees_it(self, inputs):
        """Inputs `[…, D]` of heads as rows `[…, N, N·D]`, each for one head and 0 elsewhere.

        Keras flattens a kernel `[N, D, H]` to `[N·D, H]`, as if what the heads give were added up.
        """
        heads = self._heads_of_kernel
        if heads == 1:
            return inputs
        apart = ops.eye(heads, dtype=inputs.dtype)[:, :, None] * inputs[..., None, None, :]
        return ops.reshape(apart, (*ops.shape(inputs)[:-1], heads, heads * inputs.shape[-1]))

    def _as_it_came(self, inputs):
        return inputs if self._heads_of_kernel == 1 else inputs[..., 0, : self._kernel.shape[1]]

    def save_own_variables(self, store):
        mode = self.quantization_mode
        if not self.built or mode not in CALIBRATED:
            super().save_own_variables(store)
            return
        names = [name for name in self.variable_serialization_spec[mode] if getattr(self, name, None) is not None]
        for number, name in enumerate(names):
            store[str(number)] = getattr(self, name)
