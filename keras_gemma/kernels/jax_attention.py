"""The fastest attention over long sequences on each platform of JAX."""

from keras_gemma.kernels.blockwise_attention import blockwise_attention
from keras_gemma.kernels.platform import jax_platform
from keras_gemma.kernels.platform import shards_of_columns
from keras_gemma.kernels.sharding import on_own_rows_and_heads


def jax_attention(query, key, value, segment_ids):
    """As `causal_attention`, without dropout and without a tensor of length × length."""
    kernel = kernel_for(query, of_all_columns=shards_of_columns(query.shape[1]) == 1)
    return on_own_rows_and_heads(kernel, query, key, value, segment_ids)


def kernel_for(query, of_all_columns=True):
    """The attention of one device for queries such as `query`, of all columns of a row or of a `Share`.

    Pallas and cuDNN are imported where they run only.
    """
    if jax_platform() == "tpu" and str(query.dtype) in ("bfloat16", "float32"):
        from keras_gemma.kernels.splash_attention import splash_attention

        return splash_attention
    if jax_platform() == "gpu" and of_all_columns:
        from keras_gemma.kernels.cudnn_attention import cudnn_attention
        from keras_gemma.kernels.cudnn_attention import cudnn_serves

        return cudnn_attention if cudnn_serves(query) else blockwise_attention
    return blockwise_attention
