"""The Hugging Face format of Gemma 1: `config.json`, safetensors and `tokenizer.model`.

Kernels are kept as `torch.nn.Linear` keeps them, outputs first, with heads and head dim folded into one axis.
"""

import json
import pathlib

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints.keras_preset import fill_from
from keras_gemma.checkpoints.locating import optional_file
from keras_gemma.checkpoints.locating import required_file
from keras_gemma.checkpoints.locating import shards_of
from keras_gemma.checkpoints.tensor_files import safetensors_tensors
from keras_gemma.checkpoints.tensor_files import tensors_of_files
from keras_gemma.checkpoints.tensor_files import write_safetensors
from keras_gemma.checkpoints.tensor_files import write_shards
from keras_gemma.checkpoints.tokenizer_files import TOKENIZER_FILE
from keras_gemma.checkpoints.tokenizer_files import VOCABULARY_FILE
from keras_gemma.checkpoints.tokenizer_files import hugging_face_files
from keras_gemma.checkpoints.tokenizer_files import proto_of_tokenizer_json

FORMAT = "hugging_face"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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

    @property
    def sizes(self):
        """The model's `Sizes`."""
        try:
            return canonical.Sizes(
                vocabulary_size=self.config["vocab_size"],
                num_layers=self.config["num_hidden_layers"],
                num_query_heads=self.config["num_attention_heads"],
                num_key_value_heads=self.config["num_key_value_heads"],
                hidden_dim=self.config["hidden_size"],
                intermediate_dim=2 * self.config["intermediate_size"],
                head_dim=self.config["head_dim"],
                layer_norm_epsilon=self.config.get("rms_norm_eps", canonical.LAYER_NORM_EPSILON),
            )
        except KeyError as error:
            raise ValueError(f"`config.json` of `{self.location}` lacks {error}.") from error

    def backbone_config(self, cls):
        """Constructor arguments of the backbone."""
        return {**self.sizes._asdict(), "dropout": self.config.get("attention_dropout", 0.0), "dtype": None}

    def task_config(self, cls):
        """`None`: the format has no settings of a task."""
        return None

    def preprocessor_config(self, cls, config_file):
        """`None`: the format has no settings of a preprocessor."""
        return None

    def tokenizer_config(self, config_file):
        """No constructor arguments: the vocabulary says all."""
        return {}

    def vocabulary(self, config_file):
        """Local path of the vocabulary, and the bytes of the SentencePiece model that it is, or says how to make."""
        converted = optional_file(self.location, TOKENIZER_FILE)
        if converted and not optional_file(self.location, VOCABULARY_FILE):
            return converted, proto_of_tokenizer_json(pathlib.Path(converted).read_bytes())
        path = required_file(self.location, VOCABULARY_FILE)
        return path, pathlib.Path(path).read_bytes()

    def fill_backbone(self, backbone):
        """Gives a backbone that was built without values those of the preset."""
        fill_from(self.checkpoint(), backbone)

    def checkpoint(
        self, format=FORMAT, single_file=SINGLE_FILE, index_file=INDEX_FILE, tensors_of_file=safetensors_tensors
    ):
        """The model's `Checkpoint`; the arguments are for weight files of the same tensors in another format."""
        where, files = self._weight_files(single_file, index_file)
        stored = tensors_of_files(files, tensors_of_file)
        # A bare `GemmaModel` is saved without the task's prefix.
        prefix = "" if "embed_tokens.weight" in stored else "model."
        return canonical.Checkpoint(
            path=self.location,
            format=format,
            sizes=self.sizes,
            table=table_of(self.sizes, prefix),
            stored=stored,
            where=where,
            ignored=tuple(name for name in stored if _is_redundant(name)),
            copies={"lm_head.weight": f"{prefix}embed_tokens.weight"} if "lm_head.weight" in stored else {},
            proto=self._proto,
        )

    def _proto(self):
        has_any = any(optional_file(self.location, name) for name in (VOCABULARY_FILE, TOKENIZER_FILE))
        return self.vocabulary(None)[1] if has_any else None

    def _weight_files(self, single_file, index_file):
        index = optional_file(self.location, index_file)
        if index is None:
            path = required_file(self.location, single_file)
            return path, [path]
        return index, [required_file(self.location, shard) for shard in shards_of(index)]


def _check_architecture(location, config):
    if config.get("model_type") != "gemma":
        raise ValueError(
            "Gemma 1 (`model_type` 'gemma') is the architecture that loads from the Hugging Face format. "
            f"Received: `{location}` of `model_type` {config.get('model_type')!r}, "
            f"architectures {config.get('architectures')}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", canonical.ROPE_BASE))
    if theta != canonical.ROPE_BASE or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"Gemma 1 rotates with base {canonical.ROPE_BASE:.0f}, unscaled. "
            f"Received: base {theta}, {rope} in `{location}`"
        )
    for key, value in GEMMA_1_HAS.items():
        if config.get(key, value) != value:
            raise ValueError(f"Gemma 1 has `{key}={value}`. Received: {config[key]} in `{location}`")


def _is_redundant(name):
    # The output projection is the embedding again, and inverse frequencies follow from the head dim.
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


# === Tensors ===


def table_of(sizes, prefix="model."):
    """What a model of these `Sizes` has in this format, as `FileTensor`s."""
    wanted = canonical.shapes(sizes)
    return [
        canonical.as_it_is(f"{prefix}embed_tokens.weight", "embedding", wanted["embedding"]),
        *canonical.of_blocks(sizes, prefix + "layers.{index}.{name}.weight", BLOCK_TENSORS),
        canonical.as_it_is(f"{prefix}norm.weight", "final_norm", wanted["final_norm"]),
    ]


BLOCK_TENSORS = {
    "attention_norm": ("input_layernorm", canonical.as_it_is),
    "query": ("self_attn.q_proj", canonical.heads_first),
    "key": ("self_attn.k_proj", canonical.heads_first),
    "value": ("self_attn.v_proj", canonical.heads_first),
    "output": ("self_attn.o_proj", canonical.heads_last),
    "ffw_norm": ("post_attention_layernorm", canonical.as_it_is),
    "gate": ("mlp.gate_proj", canonical.transposed),
    "up": ("mlp.up_proj", canonical.transposed),
    "down": ("mlp.down_proj", canonical.transposed),
}


# === Writing ===


def write(target, sizes, tensors, proto, dtype=None, max_shard_size=10):
    """Writes a folder that transformers loads, one tensor at a time.

    Args:
        target: path of a folder that does not exist yet.
        sizes: `Sizes`.
        tensors: dict of `StoredTensor`, as of a `Checkpoint`.
        proto: bytes of the SentencePiece model, or `None`.
        dtype: optional, one of float32, float16 and bfloat16 to cast to.
        max_shard_size: int or float. Gigabytes (2³⁰ bytes) above which the weights are split into several files; `None`
            never splits.

    Raises:
        ValueError: as `canonical.arranged`, and for a tensor that is larger than a file may be.
    """
    arranged = canonical.arranged(table_of(sizes), tensors, dtype)
    files = {
        "config.json": _json(config_of(sizes, str(arranged[0].dtype))),
        "generation_config.json": _json(GENERATION_CONFIG),
        **(hugging_face_files(proto) if proto else {}),
    }
    folder = pathlib.Path(target)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    names = (SINGLE_FILE, "model-{number:05}-of-{count:05}.safetensors", INDEX_FILE)
    write_shards(folder, arranged, max_shard_size, names, write_safetensors)


GENERATION_CONFIG = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def config_of(sizes, dtype):
    """The content of `config.json` for a model of these `Sizes`."""
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": sizes.vocabulary_size,
        "hidden_size": sizes.hidden_dim,
        "intermediate_size": sizes.intermediate_dim // 2,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_query_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": sizes.layer_norm_epsilon,
        "rope_theta": canonical.ROPE_BASE,
        "max_position_embeddings": canonical.CONTEXT_LENGTH,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        **GENERATION_CONFIG,
    }


def _json(content):
    return json.dumps(content, indent=2).encode() + b"\n"
