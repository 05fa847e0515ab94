"""Tensor programs with a path per platform behind one signature.

Everything here is a pure function of backend tensors. A caller never asks which backend runs.

Shape letters: B batch, T query length, S key length, D width, N query heads, K key-value heads, G = N / K,
H head dim, V vocabulary.
"""

from keras_gemma.kernels.attention import cached_attention
from keras_gemma.kernels.attention import causal_attention
from keras_gemma.kernels.products import einsum_float32

__all__ = ["cached_attention", "causal_attention", "einsum_float32"]
