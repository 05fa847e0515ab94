"""The Hugging Face format of Gemma 1: `config.json`, safetensors and `tokenizer.model`.

Letters: D width, N query heads, K key-value heads, H head dim, F feed-forward. Kernels are kept as `torch.nn.Linear`
keeps them, outputs first, with heads and head dim folded into one axis.
"""

import os

import numpy as np

from keras_gemma.checkpoints.filling import Wanted
from keras_gemma.checkpoints.filling import fill
from keras_gemma.checkpoints.keras_preset import variables_by_name
from keras_gemma.checkpoints.locating import optional_file
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.locating import required_file
from keras_gemma.checkpoints.tensor_files import safetensors_tensors
from keras_gemma.checkpoints.tensor_files import tensors_of_files

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VOCABULARY_FILE = "tokenizer.model"
ROPE_THETA = 10_000.0

# `hidden_act` is not among them: configurations say "gelu" for historic reasons, and the tanh form is always meant.
GEMMA_1_HAS = {"attention_bias": False, "tie_word_embeddings": True, "quantization_config": None}


class HuggingFacePreset:
    """A preset in the Hugging Face format.

    Args:
        location: a local folder or a hub handle.
        config: the content of its `config.json`.

    Raises:
        ValueError: for any architecture other than Gemma 1.
    """

    def __init__(self, location, config):
        self.location = location
        self.config = config
        _check_architecture(location, config)

    def backbone_config(self, cls):
        """Constructor arguments of the backbone."""
        try:
            return {
                "vocabulary_size": self.config["vocab_size"],
                "num_layers": self.config["num_hidden_layers"],
                "num_query_heads": self.config["num_attention_heads"],
                "num_key_value_heads": self.config["num_key_value_heads"],
                "hidden_dim": self.config["hidden_size"],
                "intermediate_dim": 2 * self.config["intermediate_size"],
                "head_dim": self.config["head_dim"],
                "layer_norm_epsilon": self.config.get("rms_norm_eps", 1e-6),
                "dropout": self.config.get("attention_dropout", 0.0),
                "dtype": None,
            }
        except KeyError as error:
            raise ValueError(f"`config.json` of `{self.location}` lacks {error}.") from error

    def task_config(self, cls):
        return None

    def preprocessor_config(self, cls, config_file):
        return None

    def tokenizer_config(self, config_file):
        return {}

    def vocabulary_file(self, config_file):
        """Local path of the SentencePiece model."""
        return required_file(self.location, VOCABULARY_FILE)

    def fill_backbone(self, backbone):
        """Gives a backbone that was built without values those of the preset."""
        where, files = self._weight_files()
        stored = tensors_of_files(files, safetensors_tensors)
        # A bare `GemmaModel` is saved without the task's prefix.
        prefix = "" if "embed_tokens.weight" in stored else "model."
        wanted = [_wanted(prefix, name, variable) for name, variable in variables_by_name(backbone)]
        fill(backbone, wanted, stored, where, ignored=[name for name in stored if _is_redundant(name)])

    def _weight_files(self):
        index = optional_file(self.location, INDEX_FILE)
        if index is None:
            path = required_file(self.location, SINGLE_FILE)
            return path, [path]
        shards = set(read_json(index)["weight_map"].values())
        for shard in shards:
            if os.path.basename(shard) != shard:
                raise ValueError(f"`{index}` names `{shard}`, which is not a file of the preset itself.")
        return index, [required_file(self.location, shard) for shard in sorted(shards)]


def _check_architecture(location, config):
    if config.get("model_type") != "gemma":
        raise ValueError(
            "Gemma 1 (`model_type` 'gemma') is the architecture that loads from the Hugging Face format. "
            f"Received: `{location}` of `model_type` {config.get('model_type')!r}, "
            f"architectures {config.get('architectures')}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", ROPE_THETA))
    if theta != ROPE_THETA or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"Gemma 1 rotates with base {ROPE_THETA:.0f}, unscaled. Received: base {theta}, {rope} in `{location}`"
        )
    for key, value in GEMMA_1_HAS.items():
        if config.get(key, value) != value:
            raise ValueError(f"Gemma 1 has `{key}={value}`. Received: {config[key]} in `{location}`")


def _is_redundant(name):
    # The output projection is the embedding again, and inverse frequencies follow from the head dim.
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


# === Layouts ===


def _wanted(prefix, keras_name, variable):
    if not keras_name.endswith("/vars/0"):
        raise ValueError("The Hugging Face format has floating weights only. Received: a quantised `dtype`")
    path = keras_name.removeprefix("layers/").removesuffix("/vars/0")
    shape = tuple(variable.shape)
    if path == "reversible_embedding":
        return Wanted(variable, f"{prefix}embed_tokens.weight", shape, _unchanged)
    if path == "rms_normalization":
        return Wanted(variable, f"{prefix}norm.weight", shape, _unchanged)
    block, _, layer = path.partition("/")
    index = block.removeprefix("gemma_decoder_block").removeprefix("_") or "0"
    name, layout = BLOCK_TENSORS[layer]
    file_shape, convert = layout(shape)
    return Wanted(variable, f"{prefix}layers.{index}.{name}.weight", file_shape, convert)


def _unchanged(array):
    return array


def _raw(shape):
    return shape, _unchanged


def _transposed(shape):
    return shape[::-1], np.transpose


def _from_heads(shape):
    """`(N·H, D)` → `(N, D, H)`."""
    heads, width, head_dim = shape
    return (heads * head_dim, width), lambda array: array.reshape(heads, head_dim, width).transpose(0, 2, 1)


def _to_width(shape):
    """`(D, N·H)` → `(N, H, D)`."""
    heads, head_dim, width = shape
    return (width, heads * head_dim), lambda array: array.T.reshape(heads, head_dim, width)


BLOCK_TENSORS = {
    "pre_attention_norm": ("input_layernorm", _raw),
    "attention/query_dense": ("self_attn.q_proj", _from_heads),
    "attention/key_dense": ("self_attn.k_proj", _from_heads),
    "attention/value_dense": ("self_attn.v_proj", _from_heads),
    "attention/output_dense": ("self_attn.o_proj", _to_width),
    "pre_ffw_norm": ("post_attention_layernorm", _raw),
    "gating_ffw": ("mlp.gate_proj", _transposed),
    "gating_ffw_2": ("mlp.up_proj", _transposed),
    "ffw_linear": ("mlp.down_proj", _transposed),
}
