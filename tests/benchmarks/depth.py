"""How long a training step takes to compile, by the number of layers: scanned, layer by layer, and in keras-hub.

For a CPU and without memory for weights. What it compiles for a TPU and how long that takes says `planning.py`.
"""

import jax
import keras
import keras_hub

from keras_gemma import GemmaBackbone
from keras_gemma import GemmaCausalLM
from keras_gemma.distribution import local_data
from keras_gemma.planning import abstract
from keras_gemma.planning import compiling
from keras_gemma.planning import phases

DEPTHS = (2, 6, 18)
MODEL = {
    "vocabulary_size": 32000,
    "num_query_heads": 8,
    "num_key_value_heads": 1,
    "hidden_dim": 512,
    "intermediate_dim": 4096,
    "head_dim": 64,
}
ROWS, LENGTH = 8, 256


def run(repeats):
    """Compiles every depth `repeats` times.

    Returns:
        A list of dicts with `layers` and the shortest seconds of `scanned`, `layer by layer` and `keras_hub`.
    """
    makers = {"scanned": _scanned, "layer by layer": _layer_by_layer, "keras_hub": _keras_hub}
    results = []
    for layers in DEPTHS:
        seconds = {name: min(_seconds(make, layers) for _ in range(repeats)) for name, make in makers.items()}
        results.append({"layers": layers, **seconds})
    return results


def table(results):
    """Lines of a table in Markdown."""
    names = [name for name in results[0] if name != "layers"]
    yield f"| layers | {' | '.join(f'{name}, s' for name in names)} |"
    yield "|---|" + "---|" * len(names)
    for one in results:
        yield f"| {one['layers']} | {' | '.join(f'{one[name]:.1f}' for name in names)} |"


def _seconds(make, layers):
    jax.clear_caches()
    distribution = local_data(devices=jax.devices()[:1])
    with distribution.scope():
        phase = phases.of_training(abstract.without_memory(lambda: make(layers)), ROWS, LENGTH)
        return compiling.findings(phase, distribution.device_mesh, None)["compile_seconds"]


def _scanned(layers):
    return _ours(layers, recompute="block", scan_layers=True)


def _layer_by_layer(layers):
    return _ours(layers, scan_layers=False)


def _ours(layers, **settings):
    model = GemmaCausalLM(GemmaBackbone(**MODEL, num_layers=layers, **settings))
    model.compile(optimizer=keras.optimizers.Adam())
    return _built(model)


def _keras_hub(layers):
    backbone = keras_hub.models.GemmaBackbone(**MODEL, num_layers=layers)
    model = keras_hub.models.GemmaCausalLM(preprocessor=None, backbone=backbone)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Its metrics are made by the first batch only; without them it does less.
    model.compile(optimizer=keras.optimizers.Adam(), loss=loss, weighted_metrics=[])
    return _built(model)


def _built(model):
    model.optimizer.build(model.trainable_variables)
    return model
