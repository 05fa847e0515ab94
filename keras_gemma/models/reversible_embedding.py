import keras
from keras import ops

from keras_gemma import kernels


@keras.saving.register_keras_serializable(package="keras_gemma")
class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Token embedding tied to the output projection, whose logits are float32 under every dtype policy.

    Call arguments:
        inputs: int tensor `[B, T]`, or with `reverse=True` a float tensor `[B, T, D]`.
        reverse: bool.

    Returns:
        Embeddings `[B, T, D]`, or with `reverse=True` float32 logits `[B, T, V]`.
    """

    def call(self, inputs, reverse=False):
        if not reverse:
            return super().call(inputs)
        return kernels.einsum_float32("...d,vd->...v", inputs, self.embeddings)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return kernels.with_flags_bound(super().rematerialized_call)(layer_call, *args, **kwargs)

    def _int8_call(self, inputs, reverse=False):
        outputs = super()._int8_call(inputs, reverse=reverse)
        return ops.cast(outputs, "float32") if reverse else outputs

    def compute_output_spec(self, inputs, reverse=False):
        spec = super().compute_output_spec(inputs, reverse=reverse)
        return keras.KerasTensor(spec.shape, "float32") if reverse else spec

    def quantize(self, mode=None, type_check=True, config=None):
        # The base refuses subclasses; this one adds no variable, so its scheme applies unchanged.
        return super().quantize(mode, type_check=False, config=config)
