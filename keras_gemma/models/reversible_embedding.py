import keras

from keras_gemma import kernels


@keras.saving.register_keras_serializable(package="keras_gemma")
class ReversibleEmbedding(keras.layers.ReversibleEmbedding):
    """Token embedding tied to the output projection, whose logits are float32 under every dtype policy.

    Gradients pass through the rounding of a quantised projection as if it were none.

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
        if not reverse:
            return super()._int8_call(inputs)
        logits = kernels.int8_logits(inputs, self._embeddings, self.embeddings_scale, self.inputs_quantizer)
        return self._with_adapters(logits, inputs)

    def _int4_call(self, inputs, reverse=False):
        if not reverse:
            return super()._int4_call(inputs)
        table = keras.quantizers.unpack_int4(self._embeddings, self.output_dim, axis=-1)
        zero, groups = getattr(self, "embeddings_zero", None), getattr(self, "g_idx", None)
        logits = kernels.logits_of_groups(inputs, table, self.embeddings_scale, zero, groups, self.inputs_quantizer)
        return self._with_adapters(logits, inputs)

    def _with_adapters(self, logits, inputs):
        """Adds to logits of a quantised table what adapters add to it, which Keras leaves out."""
        if not self.lora_enabled:
            return logits
        inner = kernels.einsum_float32("...d,rd->...r", inputs, self.lora_embeddings_b)
        added = kernels.einsum_float32("...r,vr->...v", inner, self.lora_embeddings_a)
        return logits + (self.lora_alpha / self.lora_rank) * added

    def compute_output_spec(self, inputs, reverse=False):
        spec = super().compute_output_spec(inputs, reverse=reverse)
        return keras.KerasTensor(spec.shape, "float32") if reverse else spec

    def quantize(self, mode=None, type_check=True, config=None):
        # The base refuses subclasses; this one adds no variable, so its scheme applies unchanged.
        return super().quantize(mode, type_check=False, config=config)
