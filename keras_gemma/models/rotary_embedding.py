import keras
import numpy as np
from keras import ops

MAX_WAVELENGTH = 10_000.0


@keras.saving.register_keras_serializable(package="keras_gemma")
class RotaryEmbedding(keras.layers.Layer):
    """Sines and cosines of rotary position embedding (Su et al., arXiv 2104.09864).

    Both are float32 under every dtype policy: bfloat16 cannot tell position 8190 from 8192.

    Args:
        head_dim: int. Size of an attention head, even.
        max_wavelength: float. The base of the geometric series of wavelengths.

    Call arguments:
        token_ids: int tensor `[B, T]`, read for its shape only.
        positions: optional int tensor `[B, T]`. Counts from 0 along each row when left out.

    Returns:
        Two float32 tensors `[B, T, H / 2]`: sine and cosine.
    """

    def __init__(self, head_dim, max_wavelength=MAX_WAVELENGTH, **kwargs):
        super().__init__(**kwargs)
        if head_dim % 2:
            raise ValueError(f"Rotary embedding rotates pairs, so `head_dim` must be even. Received: {head_dim}")
        self.head_dim = head_dim
        self.max_wavelength = max_wavelength

    def call(self, token_ids, positions=None):
        if positions is None:
            positions = ops.broadcast_to(
                ops.arange(ops.shape(token_ids)[1], dtype="int32")[None, :], ops.shape(token_ids)
            )
        return self.rotation(positions)

    def rotation(self, positions):
        """Sine and cosine `[B, T, H / 2]` of int positions `[B, T]`."""
        angles = ops.cast(positions, "float32")[..., None] * ops.convert_to_tensor(self.inverse_frequencies())
        return ops.sin(angles), ops.cos(angles)

    def inverse_frequencies(self):
        """The angle of position 1 for each pair, a float32 array `[H / 2]`.

        Computed in float64 and rounded once: at position 8191, one unit in the last place is up to 2e-4 of the angle.
        """
        exponent = np.arange(0, self.head_dim, 2, dtype="float64") / self.head_dim
        return (self.max_wavelength**-exponent).astype("float32")

    def compute_output_spec(self, token_ids, positions=None):
        shape = (*token_ids.shape, self.head_dim // 2)
        return keras.KerasTensor(shape, "float32"), keras.KerasTensor(shape, "float32")

    def get_config(self):
        return {**super().get_config(), "head_dim": self.head_dim, "max_wavelength": self.max_wavelength}
