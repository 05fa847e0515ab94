"""Tensor programs with a path per platform behind one signature.

Everything here is a pure function of backend tensors. A caller never asks which backend runs.

Shape letters: B batch, T query length, S key length, D width, N query heads, K key-value heads, G = N / K,
H head dim, V vocabulary.
"""

from keras_gemma.kernels.attention import cached_attention
from keras_gemma.kernels.attention import causal_attention
from keras_gemma.kernels.attention import prompt_attention
from keras_gemma.kernels.cache import write_columns
from keras_gemma.kernels.continuations import continued_prompts
from keras_gemma.kernels.continuations import takes_continuations
from keras_gemma.kernels.exporting import export_arguments
from keras_gemma.kernels.feed_forward import geglu
from keras_gemma.kernels.feed_forward import prefers_own_geglu
from keras_gemma.kernels.layer_stack import RECOMPUTE_POLICIES
from keras_gemma.kernels.layer_stack import named
from keras_gemma.kernels.layer_stack import run_layers
from keras_gemma.kernels.layer_stack import with_flags_bound
from keras_gemma.kernels.log_probabilities import token_log_probabilities
from keras_gemma.kernels.normalization import rms_normalize
from keras_gemma.kernels.platform import for_any_batch
from keras_gemma.kernels.platform import shards_of_batch
from keras_gemma.kernels.products import einsum_float32
from keras_gemma.kernels.products import in_row_chunks
from keras_gemma.kernels.products import prefers_packed_weights
from keras_gemma.kernels.products import project
from keras_gemma.kernels.quantized_head import int8_logits
from keras_gemma.kernels.quantized_head import logits_of_groups
from keras_gemma.kernels.rotation import rotate
from keras_gemma.kernels.selection import draw
from keras_gemma.kernels.selection import first_argmax
from keras_gemma.kernels.sharding import branch_apart
from keras_gemma.kernels.sharding import cache_apart
from keras_gemma.kernels.sharding import into_stream
from keras_gemma.kernels.sharding import look_up
from keras_gemma.kernels.sharding import out_of_stream
from keras_gemma.kernels.sharding import refuse_uneven_columns
from keras_gemma.kernels.sharding import rows_apart
from keras_gemma.kernels.sharding import sharding_of_cache
from keras_gemma.kernels.sharding import stream_apart
from keras_gemma.kernels.sharding import tokens_apart
from keras_gemma.kernels.torch_parameters import with_torch_parameters
from keras_gemma.kernels.vocabulary import TokenSums
from keras_gemma.kernels.vocabulary import logits_loss
from keras_gemma.kernels.vocabulary import vocabulary_loss

__all__ = [
    "RECOMPUTE_POLICIES",
    "TokenSums",
    "branch_apart",
    "cache_apart",
    "cached_attention",
    "causal_attention",
    "continued_prompts",
    "draw",
    "einsum_float32",
    "export_arguments",
    "first_argmax",
    "for_any_batch",
    "geglu",
    "in_row_chunks",
    "int8_logits",
    "into_stream",
    "logits_loss",
    "logits_of_groups",
    "look_up",
    "named",
    "out_of_stream",
    "prefers_own_geglu",
    "prefers_packed_weights",
    "project",
    "prompt_attention",
    "refuse_uneven_columns",
    "rms_normalize",
    "rotate",
    "rows_apart",
    "run_layers",
    "sharding_of_cache",
    "shards_of_batch",
    "stream_apart",
    "takes_continuations",
    "token_log_probabilities",
    "tokens_apart",
    "vocabulary_loss",
    "with_flags_bound",
    "with_torch_parameters",
    "write_columns",
]
