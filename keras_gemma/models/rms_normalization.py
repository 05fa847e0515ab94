import keras
from keras import ops

from keras_gemma import kernels


@keras.saving.register_keras_serializable(package="keras_gemma")
class RMSNormalization(keras.layers.Layer):
    """Root mean square normalisation with a zero-centred scale.

    Computes `x / sqrt(mean(x², axis=-1) + epsilon) * (1 + scale)` (Zhang and Sennrich, arXiv 1910.07467, with
    the scale stored minus one) in float32 and casts last, under every dtype policy.

    Args:
        epsilon: float. Added to the mean square.
    """

    def __init__(self, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape):
        # Without autocast: in bfloat16, 1 + scale would lose all but seven bits of the scale.
        self.scale = self.add_weight(name="scale", shape=(input_shape[-1],), initializer="zeros", autocast=False)
        self.built = True

    def call(self, x):
        scale = 1.0 + ops.cast(self.scale, "float32")
        return ops.cast(kernels.rms_normalize(ops.cast(x, "float32"), scale, self.epsilon), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}
