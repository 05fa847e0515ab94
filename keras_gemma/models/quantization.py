"""What Keras' quantisation asks of a Gemma model: which layers there are, and how to call a block by itself."""

import contextlib
import warnings

import keras
from keras import ops

from keras_gemma.models import lora
from keras_gemma.models.einsum_dense import CALIBRATED

# Layers that have nothing to quantise, which Keras says of each.
NOTHING_TO_QUANTIZE = r".*does not have a `quantize` method|Invalid quantization mode\. Expected one of"


@contextlib.contextmanager
def quantizing(backbone, mode, config):
    """What goes around `keras.Model.quantize`: refuses what would do nothing or harm, and spares useless warnings.

    Raises:
        ValueError: for adapters where the quantised weights take none, and for heads that calibration cannot tell from
            the width.
    """
    mode = mode or getattr(config, "mode", None)
    if mode in lora.WITHOUT_ADAPTERS and lora.adapted_layers(backbone):
        raise ValueError(
            f"Weights in {mode} take no adapters. Received: a backbone after `enable_lora`. `merge_lora()` adds them "
            "to the weights, `disable_lora()` takes them away."
        )
    if mode in CALIBRATED and backbone.num_query_heads >= max(backbone.hidden_dim, backbone.head_dim):
        raise ValueError(
            "Keras' GPTQ and AWQ take the largest axis of a kernel for its width, which heads must not exceed. "
            f"Received: num_query_heads={backbone.num_query_heads}, hidden_dim={backbone.hidden_dim}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOTHING_TO_QUANTIZE)
        yield


def structure_of(backbone, mode):
    """Which layers of a backbone calibration goes through, as `keras.Model.get_quantization_layer_structure`."""
    if mode not in CALIBRATED:
        return None
    return {
        "pre_block_layers": [backbone.token_embedding, backbone.embedding_scale],
        "sequential_blocks": [CalibratedBlock(block, backbone) for block in backbone.transformer_layers],
    }


class CalibratedBlock(keras.layers.Layer):
    """A decoder block as calibration calls it, with hidden states `[B, T, D]` of rows without padding alone."""

    def __init__(self, block, backbone):
        super().__init__(dtype=backbone.dtype_policy, name=f"calibrated_{block.name}")
        self.block = block
        self.rotary_embedding = backbone.rotary_embedding

    def call(self, x):
        segment_ids = ops.ones(ops.shape(x)[:2], "int32")
        return self.block(x, *self.rotary_embedding(segment_ids), segment_ids)
