import keras
from keras import ops

from keras_gemma import kernels
from keras_gemma.models.einsum_dense import EinsumDense

# What a recomputation policy calls them.
NAMES_OF_HEADS = ("query", "key", "value")


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaAttention(keras.layers.Layer):
    """Self-attention with rotary positions and grouped key-value heads.

    Args:
        num_query_heads: int, `N`.
        num_key_value_heads: int, `K`; divides `N`.
        head_dim: int, `H`; `N * H` need not equal the width.
        dropout: float. Share of attention weights dropped in training.

    Call arguments:
        x: float tensor `[B, T, D]`.
        sine, cosine: float32 tensors `[B, T, H / 2]` of `RotaryEmbedding`.
        segment_ids: int tensor `[B, T]`, 0 where padded.
    """

    def __init__(self, num_query_heads, num_key_value_heads, head_dim, dropout=0.0, **kwargs):
        # Autocast would round the float32 sines and cosines; the layers within cast what they are given.
        super().__init__(autocast=False, **kwargs)
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                "`num_key_value_heads` must divide `num_query_heads`. "
                f"Received: num_query_heads={num_query_heads}, num_key_value_heads={num_key_value_heads}"
            )
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.dropout = dropout

    def build(self, input_shape):
        hidden_dim = input_shape[-1]
        self.query_dense = self._projection("btd,ndh->btnh", self.num_query_heads, "query")
        self.key_dense = self._projection("bsd,kdh->bskh", self.num_key_value_heads, "key")
        self.value_dense = self._projection("bsd,kdh->bskh", self.num_key_value_heads, "value")
        for projection in (self.query_dense, self.key_dense, self.value_dense):
            projection.build(input_shape)
        self.output_dense = EinsumDense(
            "btnh,nhd->btd", output_shape=(None, hidden_dim), dtype=self.dtype_policy, name="attention_output"
        )
        self.output_dense.build((None, None, self.num_query_heads, self.head_dim))
        if self.dropout:
            self.dropout_layer = keras.layers.Dropout(self.dropout, dtype=self.dtype_policy, name="dropout")
        self.built = True

    def _projection(self, equation, heads, name):
        return EinsumDense(equation, output_shape=(None, heads, self.head_dim), dtype=self.dtype_policy, name=name)

    def call(self, x, sine, cosine, segment_ids, training=None):
        query, key, value = self.project(x, sine, cosine)
        query, key, value = (kernels.named(x, name) for x, name in zip((query, key, value), NAMES_OF_HEADS))
        attended = kernels.causal_attention(query, key, value, segment_ids, self._weight_dropout(training))
        return self.output_dense(kernels.named(attended, "attended"))

    def project(self, x, sine, cosine):
        """Rotated and scaled query `[B, T, N, H]`, rotated key and value `[B, T, K, H]`."""
        query = kernels.rotate(self.query_dense(x), sine, cosine)
        query = query * ops.cast(self.head_dim**-0.5, query.dtype)
        return query, kernels.rotate(self.key_dense(x), sine, cosine), self.value_dense(x)

    def _weight_dropout(self, training):
        if not self.dropout or not training:
            return None
        return lambda weights: self.dropout_layer(weights, training=training)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return kernels.with_flags_bound(super().rematerialized_call)(layer_call, *args, **kwargs)

    def compute_output_shape(self, input_shape, *args):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "dropout": self.dropout,
        }
