"""The Hugging Face format of Gemma 1: `config.json`, safetensors and the files of a tokenizer.

The head of a reward model is that of `GemmaForSequenceClassification` with one label, `score.weight`, without bias.

Kernels are kept as `torch.nn.Linear` keeps them, outputs first, with heads and head dim folded into one axis.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib

import keras

from keras_gemma.checkpoints import besides_tensors
from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import tokenizer_files
from keras_gemma.checkpoints import tokenizer_folder
from keras_gemma.checkpoints.besides_tensors import GENERATION_FILE
from keras_gemma.checkpoints.besides_tensors import NOTHING
from keras_gemma.checkpoints.besides_tensors import BesidesTensors
from keras_gemma.checkpoints.keras_preset import fill_from
from keras_gemma.checkpoints.locating import optional_file
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.locating import required_file
from keras_gemma.checkpoints.locating import shards_of
from keras_gemma.checkpoints.tensor_files import safetensors_tensors
from keras_gemma.checkpoints.tensor_files import tensors_of_files
from keras_gemma.checkpoints.tensor_files import write_safetensors
from keras_gemma.checkpoints.tensor_files import write_shards
from keras_gemma.checkpoints.tokenizer_files import TOKENIZER_FILE
from keras_gemma.checkpoints.tokenizer_files import VOCABULARY_FILE
from keras_gemma.checkpoints.tokenizer_files import hugging_face_files
from keras_gemma.damaged import NO_DAMAGE

FORMAT = "hugging_face"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
CLASSIFIER, SCORE, SCORE_BIAS = "GemmaForSequenceClassification", "score.weight", "score.bias"
KEEPS = tuple(besides_tensors.NAMES)

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
            sizes = canonical.Sizes(
                vocabulary_size=self.config["vocab_size"],
                num_layers=self.config["num_hidden_layers"],
                num_query_heads=self.config["num_attention_heads"],
                num_key_value_heads=self.config["num_key_value_heads"],
                hidden_dim=self.config["hidden_size"],
                intermediate_dim=_doubled(self.config["intermediate_size"]),
                head_dim=self.config["head_dim"],
                layer_norm_epsilon=self.config.get("rms_norm_eps", canonical.LAYER_NORM_EPSILON),
            )
        except KeyError as error:
            raise ValueError(f"`config.json` of `{self.location}` lacks {error}.") from error
        return canonical.checked(sizes, f"{self.location}/config.json")

    def backbone_config(self, cls):
        """Constructor arguments of the backbone."""
        return {**self.sizes._asdict(), "dropout": self.config.get("attention_dropout", 0.0), "dtype": None}

    def task_config(self, cls):
        """`None`: the format has no settings of a task."""
        return None

    def sampler_config(self, cls):
        """`None`, as in transformers where nobody asks for sampling: the likeliest token."""
        return None

    def preprocessor_config(self, cls, config_file):
        """Settings of a preprocessor, or `None`: the format has no others than whether texts open with `<bos>`."""
        opens = tokenizer_folder.opens_with_bos(self._tokenizer_files)
        return None if opens in (None, True) else {"add_start_token": False}

    def tokenizer_config(self, config_file):
        """Constructor arguments of the tokenizer besides the vocabulary."""
        return {
            name: value
            for name, value in (("stop_tokens", self._stop_tokens), ("chat_template", self._chat_template))
            if value
        }

    def vocabulary(self, config_file):
        """Local path of the vocabulary, and the bytes of the SentencePiece model that all files together describe."""
        name = VOCABULARY_FILE if optional_file(self.location, VOCABULARY_FILE) else TOKENIZER_FILE
        vocabulary = self._vocabulary
        return required_file(self.location, name), vocabulary

    @functools.cached_property
    def _tokenizer_files(self):
        paths = {name: optional_file(self.location, name) for name in tokenizer_folder.FILES}
        return {name: pathlib.Path(path).read_bytes() for name, path in paths.items() if path}

    @functools.cached_property
    def _vocabulary(self):
        if not self._has_vocabulary:
            # Which it says.
            required_file(self.location, VOCABULARY_FILE)
        with self._named_errors():
            return tokenizer_folder.proto_of_files(self._tokenizer_files)

    @functools.cached_property
    def _stop_tokens(self):
        """Tokens that end an answer besides Gemma's own, in whatever file they are named."""
        configs = {"config.json": self.config, GENERATION_FILE: self._generation_config}
        model = tokenizer_files.parsed(self._vocabulary)
        with self._named_errors():
            for name, config in configs.items():
                bos = config.get("bos_token_id")
                if bos not in (None, model.trainer_spec.bos_id):
                    raise ValueError(
                        f"Texts begin with {tokenizer_files.BOS!r}, id {model.trainer_spec.bos_id} of the vocabulary. "
                        f"Received: `bos_token_id` = {bos!r} in `{name}`"
                    )
            pieces = [piece.piece for piece in model.pieces]
            ids = [index for config in configs.values() for index in _as_list(config.get("eos_token_id"))]
            tokens = tokenizer_folder.eos_tokens(self._tokenizer_files)
            return besides_tensors.stop_tokens_of(pieces, ids, tokens, f"`eos_token_id` of {' and '.join(configs)}")

    @functools.cached_property
    def _generation_config(self):
        path = optional_file(self.location, GENERATION_FILE)
        return read_json(path) if path else {}

    @functools.cached_property
    def _chat_template(self):
        with self._named_errors():
            template = tokenizer_folder.chat_template(self._tokenizer_files)
        ours = template is not None and template.strip() == tokenizer_files.CHAT_TEMPLATE.strip()
        return None if ours else template

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except NO_DAMAGE:
            raise
        except Exception as error:
            raise ValueError(f"The tokenizer of `{self.location}` does not load: {error}") from error

    def besides(self):
        """The model's `BesidesTensors`."""
        with_tokenizer = {}
        if self._has_vocabulary:
            with_tokenizer = {
                "stop_tokens": self._stop_tokens,
                "chat_template": self._chat_template,
                "preprocessor": self.preprocessor_config(None, None) or {},
            }
        generation = besides_tensors.generation_settings(self._generation_config)
        return BesidesTensors(head=self.head(), generation=generation, **with_tokenizer)

    def head(self):
        """The head of a reward model, a `StoredTensor` `[D, 1]`, or `None` where there is none.

        Raises:
            ValueError: for a head of several labels, and for one with a bias that is not zero.
        """
        head = canonical.head_among(self._stored, SCORE, SCORE_BIAS, (1, self.config["hidden_size"]))
        if head is None and CLASSIFIER in (self.config.get("architectures") or []):
            raise ValueError(f"`{self.location}` is a `{CLASSIFIER}` by its `config.json`, but lacks `{SCORE}`.")
        return head and dataclasses.replace(head, shape=head.shape[::-1], read=lambda: head.read().T)

    def fill_task(self, task, settings):
        """Gives a reward model that has its backbone the head of the preset, if there is one."""
        if isinstance(getattr(task, "reward_head", None), keras.Layer) and (head := self.head()):
            task.reward_head.kernel.assign(head.read().astype("float32"))

    def fill_backbone(self, backbone):
        """Gives a backbone that was built without values those of the preset."""
        fill_from(self.checkpoint(), backbone)

    def checkpoint(
        self, format=FORMAT, single_file=SINGLE_FILE, index_file=INDEX_FILE, tensors_of_file=safetensors_tensors
    ):
        """The model's `Checkpoint`; the arguments are for weight files of the same tensors in another format."""
        where, files = self._weight_files(single_file, index_file)
        stored = self._stored = tensors_of_files(files, tensors_of_file)
        if where != files[0]:
            _check_index(where, stored)
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
            proto=lambda: self._vocabulary if self._has_vocabulary else None,
            besides=self.besides,
        )

    @property
    def _has_vocabulary(self):
        return bool({VOCABULARY_FILE, TOKENIZER_FILE}.intersection(self._tokenizer_files))

    def _weight_files(self, single_file, index_file):
        if optional_file(self.location, ADAPTER_FILE):
            raise ValueError(
                f"`{self.location}` holds LoRA adapters (`{ADAPTER_FILE}`) beside its weights, which they change. Move "
                "them into a folder of their own, load the weights, and then the adapters with `load_adapters`."
            )
        index = optional_file(self.location, index_file)
        if index is None:
            path = required_file(self.location, single_file)
            return path, [path]
        return index, [required_file(self.location, shard) for shard in shards_of(index)]


def _doubled(size):
    """The size of both branches of the GeGLU; what is no number is refused as it is."""
    return 2 * size if isinstance(size, int) and not isinstance(size, bool) else size


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
    return name in ("lm_head.weight", SCORE, SCORE_BIAS) or name.endswith("rotary_emb.inv_freq")


def _as_list(value):
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_index(index, stored):
    """Refuses an index that does not say what its files hold."""
    said = read_json(index)["weight_map"]
    wrong = [name for name, file in said.items() if name not in stored or pathlib.Path(stored[name].file).name != file]
    unsaid = [name for name in stored if name not in said]
    if wrong or unsaid:
        name = [*wrong, *unsaid][0]
        where = f"in `{pathlib.Path(stored[name].file).name}`" if name in stored else "in none of its files"
        raise ValueError(
            f"`{index}` says where each tensor is. Received: `{name}`, which is {where}, and which it puts in "
            f"`{said.get(name)}`. Are these files of one model?"
        )


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


def write(target, sizes, tensors, proto, dtype=None, max_shard_size=10, besides=NOTHING):
    """Writes a folder that transformers loads, one tensor at a time.

    Args:
        target: path of a folder that does not exist yet.
        sizes: `Sizes`.
        tensors: dict of `StoredTensor`, as of a `Checkpoint`.
        proto: bytes of the SentencePiece model, or `None`.
        dtype: optional, one of float32, float16 and bfloat16 to cast to.
        max_shard_size: int or float. Gigabytes (2³⁰ bytes) above which the weights are split into several files; `None`
            never splits.
        besides: `BesidesTensors`. With a head the model is a `GemmaForSequenceClassification`.

    Raises:
        ValueError: as `canonical.arranged`, and for a tensor that is larger than a file may be.
    """
    table, tensors = table_of(sizes), dict(tensors)
    if besides.head is not None:
        tensors["head"] = besides.head
        table.append(canonical.transposed(SCORE, "head", (sizes.hidden_dim, 1)))
    arranged = canonical.arranged(table, tensors, dtype)
    special_ids, ends = _special_ids(proto, besides.stop_tokens)
    config = {**config_of(sizes, str(arranged[0].dtype)), **special_ids}
    tokenizer = {}
    if proto:
        tokenizer = hugging_face_files(proto, besides.chat_template, besides.opens_with_bos, besides.stop_tokens)
    files = {
        "config.json": _json({**config, **(SCORE_CONFIG if besides.head is not None else {})}),
        GENERATION_FILE: _json(
            {**besides.generation, **special_ids, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        ),
        **tokenizer,
    }
    folder = pathlib.Path(target)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    names = (SINGLE_FILE, "model-{number:05}-of-{count:05}.safetensors", INDEX_FILE)
    write_shards(folder, arranged, max_shard_size, names, write_safetensors)


SPECIAL_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
# transformers takes two labels for granted.
SCORE_CONFIG = {
    "architectures": [CLASSIFIER],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}


def _special_ids(proto, stop_tokens):
    """Ids of special tokens as `config.json` names them, and the list of all that end an answer."""
    if not proto:
        return SPECIAL_IDS, [SPECIAL_IDS["eos_token_id"]]
    model = tokenizer_files.parsed(proto)
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    ends = [ids[token] for token in (tokenizer_files.EOS, tokenizer_files.END_OF_TURN, *stop_tokens) if token in ids]
    names = zip(SPECIAL_IDS, (tokenizer_files.BOS, tokenizer_files.EOS, tokenizer_files.PAD))
    return {name: ids[token] for name, token in names}, ends


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
        "max_position_embeddings": tokenizer_files.CONTEXT_LENGTH,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        **SPECIAL_IDS,
    }


def _json(content):
    return json.dumps(content, indent=2).encode() + b"\n"
