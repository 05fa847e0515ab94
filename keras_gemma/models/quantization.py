"""What Keras' quantisation asks of a Gemma model: which layers there are, and how to call a block by itself."""

import contextlib
import re
import sys
import warnings

import keras
import tqdm
from keras import ops

from keras_gemma.models import lora
from keras_gemma.models.einsum_dense import CALIBRATED

# Layers that have nothing to quantise, which Keras says of each.
NOTHING_TO_QUANTIZE = r".*does not have a `quantize` method|Invalid quantization mode\. Expected one of"


@contextlib.contextmanager
def quantizing(backbone, mode, config, filters=None):
    """What goes around `keras.Model.quantize`: a progress bar, no useless warnings, and no quantising that does harm.

    Args:
        backbone: a `GemmaBackbone`.
        mode, config, filters: as of `keras.Model.quantize`.

    Yields:
        Filters that select the same layers, and move the bar.

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
    filters = _in_backbone(filters, backbone)
    blocks = {id(layer): block for block in backbone.transformer_layers for layer in block._flatten_layers()}
    # Calibration has a bar of Keras' own, and calls filters again.
    shown = sys.stderr.isatty() and mode not in CALIBRATED
    with warnings.catch_warnings(), tqdm.tqdm(total=len(backbone.transformer_layers), disable=not shown) as bar:
        bar.set_description(f"{mode} blocks")
        warnings.filterwarnings("ignore", message=NOTHING_TO_QUANTIZE)
        yield _counting_blocks(filters, blocks, bar) if shown else filters


def _counting_blocks(filters, blocks, bar):
    """Filters, a callable, that also count a block when its first layer is asked for."""
    seen = set()

    def selected(layer):
        block = blocks.get(id(layer))
        if block is not None and id(block) not in seen:
            seen.add(id(block))
            bar.update()
        return filters(layer)

    return selected


def _in_backbone(filters, backbone):
    """Filters as a callable that leaves out the head of a task, which is small and which presets load in float32."""
    inside = {id(layer) for layer in backbone._flatten_layers()}

    def selected(layer):
        if id(layer) not in inside:
            return False
        if filters is None or callable(filters):
            return filters is None or filters(layer)
        patterns = [filters] if isinstance(filters, str) else filters
        return any(re.search(pattern, layer.name) for pattern in patterns)

    return selected


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
