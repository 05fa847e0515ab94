"""Prompts as token ids → key-value cache → decode → chosen token ids.

    prompts ─ right-aligned ─→ prefill ─→ cache ─→ decode ⇄ sampling ─→ new ids

`Engine` holds the three stages together and one compiled program per bucket of sizes. It knows token ids, never text.

All rows of a batch end at the same column, so that they decode in step whatever their lengths:

    column         0  1  2  3  4 │ 5  6  7
    row 0          ·  ·  a  b  c │ d  e  f      first_column 2
    row 1          a  b  c  d  e │ f  g  h      first_column 0

The position of a token is its column minus the `first_column` of its row. Columns before it are never attended to.
"""

from keras_gemma.generation.cache import check_cache
from keras_gemma.generation.cache import empty_cache
from keras_gemma.generation.combined_sampler import CombinedSampler
from keras_gemma.generation.decode import make_decode
from keras_gemma.generation.engine import SMALLEST_STOP_LIST
from keras_gemma.generation.engine import Engine
from keras_gemma.generation.engine import Request
from keras_gemma.generation.engine import batch_bucket
from keras_gemma.generation.engine import capacity_bucket
from keras_gemma.generation.engine import prompt_bucket
from keras_gemma.generation.network import LayerNetwork
from keras_gemma.generation.overridden import OverriddenEngine
from keras_gemma.generation.prefill import make_block
from keras_gemma.generation.prefill import make_embed
from keras_gemma.generation.prefill import make_last_block
from keras_gemma.generation.sampler_settings import check_settings
from keras_gemma.generation.sampling import Sampling
from keras_gemma.generation.sampling import has_own_loop
from keras_gemma.generation.sampling import resolve_sampler

__all__ = [
    "SMALLEST_STOP_LIST",
    "CombinedSampler",
    "Engine",
    "LayerNetwork",
    "OverriddenEngine",
    "Request",
    "Sampling",
    "batch_bucket",
    "capacity_bucket",
    "check_cache",
    "check_settings",
    "empty_cache",
    "has_own_loop",
    "make_block",
    "make_decode",
    "make_embed",
    "make_last_block",
    "prompt_bucket",
    "resolve_sampler",
]
