"""The same small network three times: ours, keras-hub's and transformers'."""

import functools

import keras
import keras_hub
import numpy as np

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

# Importing torch costs seconds, so only `transformers_twin` does.


def ours(shape, seed=0, **kwargs):
    """A `GemmaCausalLM` without preprocessor. Every weight is random, the scales of the norms too.

    Building takes seconds, so the next call with the same arguments gives the same model, its weights set anew.
    """
    model = _built(tuple({**shape, **kwargs}.items()))
    randomize(model, seed)
    return model


@functools.cache
def _built(arguments):
    return GemmaCausalLM(GemmaBackbone(**dict(arguments)))


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.backbone.weights:
        fan_in = 1 if len(weight.shape) == 1 else np.prod(weight.shape) / weight.shape[-1]
        spread = 0.5 if len(weight.shape) == 1 else 1.5 / np.sqrt(fan_in)
        weight.assign(rng.normal(0.0, spread, weight.shape).astype("float32"))


def keras_hub_twin(model, shape):
    twin = keras_hub.models.GemmaCausalLM(backbone=keras_hub.models.GemmaBackbone(**shape), preprocessor=None)
    weights = {weight.path: weight for weight in model.backbone.weights}
    assert {weight.path for weight in twin.backbone.weights} == set(weights)
    for weight in twin.backbone.weights:
        weight.assign(keras.ops.convert_to_numpy(weights[weight.path].value))
    return twin


def transformers_twin(model, shape):
    import torch
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=shape["vocabulary_size"],
        hidden_size=shape["hidden_dim"],
        intermediate_size=shape["intermediate_dim"] // 2,
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_query_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        hidden_act="gelu",  # what configurations say for historic reasons; transformers computes tanh GELU too
        attn_implementation="eager",
    )
    with torch.device("cpu"):
        twin = transformers.GemmaForCausalLM(config).eval()
        state = {name: torch.from_numpy(np.array(value)) for name, value in as_transformers(model).items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return twin


def as_transformers(model, values=None):
    """The weights of `model` (or `values` by path) under transformers' names and in its layouts."""
    if values is None:
        values = {weight.path: to_numpy(weight.value) for weight in model.backbone.weights}
    width = model.backbone.hidden_dim
    state = {
        "model.embed_tokens.weight": values["token_embedding/embeddings"],
        "model.norm.weight": values["final_normalization/scale"],
    }
    for i in range(model.backbone.num_layers):
        ours, theirs = f"decoder_block_{i}", f"model.layers.{i}"
        for name in "query", "key", "value":
            kernel = values[f"{ours}/attention/{name}/kernel"]
            state[f"{theirs}.self_attn.{name[0]}_proj.weight"] = kernel.transpose(0, 2, 1).reshape(-1, width)
        output = values[f"{ours}/attention/attention_output/kernel"]
        state[f"{theirs}.self_attn.o_proj.weight"] = output.reshape(-1, width).T
        for name, layer in {"gate": "ffw_gating", "up": "ffw_gating_2", "down": "ffw_linear"}.items():
            state[f"{theirs}.mlp.{name}_proj.weight"] = values[f"{ours}/{layer}/kernel"].T
        state[f"{theirs}.input_layernorm.weight"] = values[f"{ours}/pre_attention_norm/scale"]
        state[f"{theirs}.post_attention_layernorm.weight"] = values[f"{ours}/pre_ffw_norm/scale"]
    return state


def batch(vocabulary_size, lengths=(9, 12, 1), seed=0):
    """Right-padded token ids and their mask."""
    length = max(lengths)
    mask = np.arange(length)[None, :] < np.array(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(1, vocabulary_size, mask.shape)
    return {"token_ids": np.where(mask, ids, 0).astype("int32"), "padding_mask": mask.astype("int32")}


def logits(model, inputs):
    # As one program: operation by operation, JAX would compile three times as long.
    return np.array(model.predict_on_batch(inputs))


def transformers_logits(twin, inputs, positions=None):
    import torch

    with torch.no_grad():
        outputs = twin(
            input_ids=torch.from_numpy(inputs["token_ids"]).long(),
            attention_mask=torch.from_numpy(inputs["padding_mask"]).long(),
            position_ids=None if positions is None else torch.from_numpy(positions).long(),
        )
    return outputs.logits.numpy()


def gradients(model, inputs, targets, weights):
    """Gradient of the weighted mean cross-entropy for every weight by path: what a step of SGD subtracts."""
    # So large that the weights do not round the gradients away, and a power of two, which rounds nothing itself.
    learning_rate = 2.0**12
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), weighted_metrics=None)
    before = {weight.path: to_numpy(weight.value) for weight in model.trainable_weights}
    model.train_on_batch(inputs, targets, weights)
    after = {weight.path: to_numpy(weight.value) for weight in model.trainable_weights}
    return {path: (before[path] - after[path]) / learning_rate for path in before}


def to_numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))
