import keras

from keras_gemma import kernels
from keras_gemma.models.attention import GemmaAttention
from keras_gemma.models.einsum_dense import EinsumDense
from keras_gemma.models.rms_normalization import RMSNormalization


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaDecoderBlock(keras.layers.Layer):
    """Pre-norm attention and GeGLU feed-forward, each with its residual.

    The class name and the attribute names are those of keras-hub: they spell the paths inside weight files.

    Args:
        hidden_dim: int, `D`.
        intermediate_dim: int. Both branches of the GeGLU together, `2F`.
        num_query_heads: int, `N`.
        num_key_value_heads: int, `K`.
        head_dim: int, `H`.
        layer_norm_epsilon: float.
        dropout: float. Applied in training to attention weights.

    Call arguments:
        x: float tensor `[B, T, D]`.
        sine, cosine: float32 tensors `[B, T, H / 2]`.
        segment_ids: int tensor `[B, T]`, 0 where padded.
        training: optional bool. Whether there is dropout.

    Returns:
        A tensor `[B, T, D]`.

    Raises:
        ValueError: for an odd `intermediate_dim`.
    """

    def __init__(
        self,
        hidden_dim,
        intermediate_dim,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        layer_norm_epsilon=1e-6,
        dropout=0.0,
        **kwargs,
    ):
        # Autocast would round the float32 sines and cosines; the layers within cast what they are given.
        super().__init__(autocast=False, **kwargs)
        if intermediate_dim % 2:
            raise ValueError(
                f"`intermediate_dim` counts both branches of the GeGLU and must be even. Received: {intermediate_dim}"
            )
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.layer_norm_epsilon = layer_norm_epsilon
        self.dropout = dropout
        self.pre_attention_norm = self._norm("pre_attention_norm")
        self.attention = GemmaAttention(
            num_query_heads,
            num_key_value_heads,
            head_dim,
            dropout=dropout,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.pre_ffw_norm = self._norm("pre_ffw_norm")
        branch_dim = intermediate_dim // 2
        self.gating_ffw = self._dense("btd,df->btf", branch_dim, "ffw_gating")
        self.gating_ffw_2 = self._dense("btd,df->btf", branch_dim, "ffw_gating_2")
        self.ffw_linear = self._dense("btf,fd->btd", hidden_dim, "ffw_linear")

    def _norm(self, name):
        return RMSNormalization(self.layer_norm_epsilon, dtype=self.dtype_policy, name=name)

    def _dense(self, equation, units, name):
        return EinsumDense(equation, output_shape=(None, units), dtype=self.dtype_policy, name=name)

    def build(self, input_shape, *args, **kwargs):
        self.pre_attention_norm.build(input_shape)
        self.attention.build(input_shape)
        self.pre_ffw_norm.build(input_shape)
        self.gating_ffw.build(input_shape)
        self.gating_ffw_2.build(input_shape)
        self.ffw_linear.build((*input_shape[:-1], self.intermediate_dim // 2))
        self.built = True

    def call(self, x, sine, cosine, segment_ids, training=None):
        normed = kernels.out_of_stream(self.pre_attention_norm(x))
        x = x + kernels.into_stream(self.attention(normed, sine, cosine, segment_ids, training=training))
        normed = kernels.out_of_stream(self.pre_ffw_norm(x))
        return x + kernels.into_stream(self._geglu(normed, training))

    def feed_forward(self, x, training=None):
        """The GeGLU branch of `x` `[B, T, D]`, without its residual."""
        return self._geglu(self.pre_ffw_norm(x), training)

    def _geglu(self, normed, training):
        if training and kernels.prefers_own_geglu(normed) and self._has_plain_feed_forward():
            return kernels.geglu(normed, self.gating_ffw.kernel, self.gating_ffw_2.kernel, self.ffw_linear.kernel)
        gate, up = (kernels.branch_apart(gating(normed)) for gating in (self.gating_ffw, self.gating_ffw_2))
        gated = kernels.branch_apart(keras.activations.gelu(gate, approximate=True) * up)
        return self.ffw_linear(kernels.named(gated, "gated"))

    def _has_plain_feed_forward(self):
        layers = (self.gating_ffw, self.gating_ffw_2, self.ffw_linear)
        return not any(layer.lora_enabled or layer.quantization_mode for layer in layers)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return kernels.with_flags_bound(super().rematerialized_call)(layer_call, *args, **kwargs)

    def compute_output_shape(self, input_shape, *args):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "intermediate_dim": self.intermediate_dim,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "dropout": self.dropout,
        }
