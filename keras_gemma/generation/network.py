"""A backbone as generation sees it: the products of each block and of both ends, with weights given from outside.

Two implementations of one interface. `LayerNetwork` calls the Keras layers and so serves every backend, dtype,
quantization and adapter. `PackedNetwork` holds float32 weights rearranged for a CPU under XLA, and keeps them for as
long as the weights stay the same.

What every block offers (B batch, T tokens, D width, N query heads, K key-value heads, H head dim):

    queries_keys_values(x, rotation)   [B, T, D] → [B, T, N, H], [B, T, K, H], [B, T, K, H]
    keys_values(x, rotation)           the last two of them
    finish(x, attended)                [B, T, D], [B, T, N, H] → [B, T, D]; output projection and feed-forward

and both ends:

    embed(token_ids)                   [B, T] → [B, T, D]
    hidden(x)                          [B, T, D] → [B, T, D]; the final norm
    logits(hidden)                     [B, T, D] → [B, T, V], float32
"""

import contextlib
import math
import threading
import weakref

import keras
from keras import ops

from keras_gemma import kernels
from keras_gemma.generation.programs import Program

# A packed copy stands beside the weights between calls, too: worth it for models that leave room for two.
PACKED_BYTES = 4 * 2**30


def network_of(backbone, memory):
    """The fastest network that computes what `backbone` computes.

    Args:
        backbone: a `GemmaBackbone`.
        memory: a `Memory` that keeps packed weights from call to call.
    """
    return PackedNetwork(backbone, memory) if _packable(backbone) else LayerNetwork(backbone)


# === Through the Keras layers ===


class LayerNetwork:
    """The layers of a backbone, run on values of their variables that the caller passes in.

    On JAX compiled functions take the values as arguments, and one function serves all blocks of a kind. Other
    backends read the variables themselves.
    """

    def __init__(self, backbone):
        self.backbone = backbone
        self.layers = backbone.transformer_layers
        self.ends_layers = [backbone.token_embedding, backbone.layer_norm]
        kinds = [_kind_of(layer) for layer in self.layers]
        self.key = ("layers", *kinds, *(_kind_of(layer) for layer in self.ends_layers))
        stateless = keras.backend.backend() == "jax"
        self.representatives = [kinds.index(kind) if stateless else i for i, kind in enumerate(kinds)]

    def weights(self):
        return {
            "blocks": [_values_of(layer) for layer in self.layers],
            "ends": [_values_of(layer) for layer in self.ends_layers],
        }

    def block(self, index, values):
        return LayerBlock(self.layers[index], values)

    def ends(self, values):
        return LayerEnds(self.backbone, values)

    def rotation(self, positions):
        return self.backbone.rotary_embedding.rotation(positions)


class LayerBlock:
    def __init__(self, layer, values):
        self.layer = layer
        self.values = values

    def queries_keys_values(self, x, rotation):
        with _given_values(self.layer, self.values):
            return self.layer.attention.project(self.layer.pre_attention_norm(x), *rotation)

    def keys_values(self, x, rotation):
        attention = self.layer.attention
        with _given_values(self.layer, self.values):
            x = self.layer.pre_attention_norm(x)
            return kernels.rotate(attention.key_dense(x), *rotation), attention.value_dense(x)

    def finish(self, x, attended):
        with _given_values(self.layer, self.values):
            x = x + self.layer.attention.output_dense(attended)
            return x + self.layer.feed_forward(x)


class LayerEnds:
    def __init__(self, backbone, values):
        self.backbone = backbone
        self.embedding_values, self.norm_values = values

    def embed(self, token_ids):
        with _given_values(self.backbone.token_embedding, self.embedding_values):
            embedding = self.backbone.token_embedding
            x = kernels.look_up(embedding, token_ids)
            return self.backbone.embedding_scale(x)

    def hidden(self, x):
        with _given_values(self.backbone.layer_norm, self.norm_values):
            return self.backbone.layer_norm(x)

    def logits(self, hidden):
        with _given_values(self.backbone.token_embedding, self.embedding_values):
            return self.backbone.token_embedding(hidden, reverse=True)


def _values_of(layer):
    # `value` and not the variable: it keeps the sharding of `keras.distribution`.
    return [v.value for v in layer.variables] if keras.backend.backend() == "jax" else []


def _given_values(layer, values):
    if not values:
        return contextlib.nullcontext()
    return keras.StatelessScope(state_mapping=zip(layer.variables, values))


def _kind_of(layer):
    """What must be equal for two layers to run the same program."""
    variables = tuple((v.name, tuple(v.shape), v.dtype) for v in layer.variables)
    policies = tuple(sublayer.dtype_policy.name for sublayer in _projections(layer))
    return type(layer).__name__, layer.dtype_policy.name, variables, policies


def _projections(layer):
    if not hasattr(layer, "attention"):
        return [layer]
    attention = layer.attention
    return [
        attention.query_dense,
        attention.key_dense,
        attention.value_dense,
        attention.output_dense,
        layer.gating_ffw,
        layer.gating_ffw_2,
        layer.ffw_linear,
    ]


# === Packed weights ===


class PackedNetwork:
    """Weights as rows of outputs, query, key and value in one product and both branches of the GeGLU in another."""

    def __init__(self, backbone, memory):
        self.backbone = backbone
        self.memory = memory
        self.key_value_heads = backbone.num_key_value_heads
        self.head_dim = backbone.head_dim
        self.epsilon = backbone.layer_norm_epsilon
        self.key = ("packed", self.key_value_heads, self.head_dim, self.epsilon)
        self.representatives = [0] * len(backbone.transformer_layers)

    def weights(self):
        return self.memory.recall(_values_of(self.backbone), self._packed)

    def _packed(self):
        embeddings = ops.convert_to_tensor(self.backbone.token_embedding.embeddings)
        return {
            "blocks": [_packing(*_products_and_norms(layer)) for layer in self.backbone.transformer_layers],
            "ends": [embeddings, 1.0 + self.backbone.layer_norm.scale],
        }

    def block(self, index, values):
        return PackedBlock(values, self.key_value_heads, self.head_dim, self.epsilon)

    def ends(self, values):
        return PackedEnds(*values, self.epsilon)

    def rotation(self, positions):
        return self.backbone.rotary_embedding.rotation(positions)


class Memory:
    """Keeps the result of a function for as long as the immutable arrays that it was made from are in use.

    Assigning to one variable, or a step of training, ends the life of its array and with it the result's: nothing
    is stale, and the result takes no memory away from training.
    """

    def __init__(self):
        self._kept = [], None
        # Of a reference that dies while the lock is held, the same thread hears.
        self._lock = threading.RLock()

    def recall(self, sources, make):
        """What `make()` returned when it was last called with these sources, or returns now."""
        with self._lock:
            references, result = self._kept
            same = len(sources) == len(references) and all(kept() is now for kept, now in zip(references, sources))
            if not same or result is None:
                references = [weakref.ref(source, self._forget) for source in sources]
                result = make()
                self._kept = references, result
            return result

    def _forget(self, _):
        self._kept = [], None


class PackedBlock:
    def __init__(self, weights, key_value_heads, head_dim, epsilon):
        self.weights = weights
        self.key_value_heads = key_value_heads
        self.head_dim = head_dim
        self.epsilon = epsilon

    def queries_keys_values(self, x, rotation):
        heads = self._heads(x, self.weights["query_key_value"])
        rotated = kernels.rotate(heads[:, :, : -self.key_value_heads], *rotation)
        return (
            rotated[:, :, : -self.key_value_heads],
            rotated[:, :, -self.key_value_heads :],
            heads[:, :, -self.key_value_heads :],
        )

    def keys_values(self, x, rotation):
        heads = self._heads(x, self.weights["query_key_value"][-2 * self.key_value_heads * self.head_dim :])
        key, value = ops.split(heads, 2, axis=2)
        return kernels.rotate(key, *rotation), value

    def _heads(self, x, weight):
        norm = self.weights["attention_norm"]
        heads = kernels.in_row_chunks(lambda x: kernels.project(_normalised(x, norm, self.epsilon), weight), x)
        return ops.reshape(heads, (*ops.shape(x)[:2], -1, self.head_dim))

    def finish(self, x, attended):
        attended = ops.reshape(attended, (*ops.shape(x)[:2], -1))
        return kernels.in_row_chunks(self._finish_rows, x, attended)

    def _finish_rows(self, x, attended):
        x = x + kernels.project(attended, self.weights["output"])
        branches = kernels.project(_normalised(x, self.weights["ffw_norm"], self.epsilon), self.weights["gating"])
        gate, linear = ops.split(branches, 2, axis=-1)
        return x + kernels.project(keras.activations.gelu(gate, approximate=True) * linear, self.weights["ffw"])


class PackedEnds:
    def __init__(self, embeddings, norm, epsilon):
        self.embeddings = embeddings
        self.norm = norm
        self.epsilon = epsilon

    def embed(self, token_ids):
        return ops.take(self.embeddings, token_ids, axis=0) * ops.shape(self.embeddings)[1] ** 0.5

    def hidden(self, x):
        return _normalised(x, self.norm, self.epsilon)

    def logits(self, hidden):
        return kernels.project(hidden, self.embeddings)


def _normalised(x, scale, epsilon):
    return x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + epsilon) * scale


def _products_and_norms(layer):
    """The weights of a block, adapters merged."""
    products = [ops.convert_to_tensor(product.kernel) for product in _projections(layer)]
    return products, [ops.convert_to_tensor(norm.scale) for norm in (layer.pre_attention_norm, layer.pre_ffw_norm)]


def _pack(products, norms):
    query, key, value, output, gate, linear, ffw = products
    attention_norm, ffw_norm = norms
    head_dim = ops.shape(query)[-1]
    return {
        "attention_norm": 1.0 + attention_norm,
        "query_key_value": ops.concatenate(
            [_rows_of_heads(query) * head_dim**-0.5, _rows_of_heads(key), _rows_of_heads(value)]
        ),
        "output": ops.transpose(ops.reshape(output, (-1, ops.shape(output)[-1]))),
        "ffw_norm": 1.0 + ffw_norm,
        "gating": ops.concatenate([ops.transpose(gate), ops.transpose(linear)]),
        "ffw": ops.transpose(ffw),
    }


def _rows_of_heads(kernel):
    """`[heads, D, H]` → `[heads * H, D]`."""
    kernel = ops.transpose(kernel, (0, 2, 1))
    return ops.reshape(kernel, (-1, ops.shape(kernel)[-1]))


# Compiled: step by step, the transposed weights would be written twice.
_packing = Program(_pack)


def _packable(backbone):
    if not kernels.prefers_packed_weights() or keras.distribution.distribution() is not None:
        return False
    blocks = backbone.transformer_layers
    products = [backbone.token_embedding, *(product for layer in blocks for product in _projections(layer))]
    plain = all(p.dtype_policy.name == "float32" and p.quantization_mode is None for p in products)
    return plain and sum(4 * math.prod(v.shape) for layer in blocks for v in layer.weights) <= PACKED_BYTES
