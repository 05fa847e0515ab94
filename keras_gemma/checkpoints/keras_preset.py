"""The Keras format: a folder of JSON files, `.weights.h5` files and a SentencePiece vocabulary.

keras-hub writes it, under the names `keras_hub>…` and in its first years `keras_nlp>…`, and so does keras_gemma.
"""

import json
import os
import pathlib
import warnings

import keras
import keras_hub

from keras_gemma.checkpoints import besides_tensors
from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import keras_hub_private as hub
from keras_gemma.checkpoints.besides_tensors import NOTHING
from keras_gemma.checkpoints.besides_tensors import BesidesTensors
from keras_gemma.checkpoints.filling import Wanted
from keras_gemma.checkpoints.filling import fill
from keras_gemma.checkpoints.filling import without_values
from keras_gemma.checkpoints.locating import optional_file
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.locating import required_file
from keras_gemma.checkpoints.locating import shards_of
from keras_gemma.checkpoints.saving import BESIDE_TOKENIZER
from keras_gemma.checkpoints.saving import SAMPLER_OF_TASK
from keras_gemma.checkpoints.saving import write_settings
from keras_gemma.checkpoints.tensor_files import h5_tensors
from keras_gemma.checkpoints.tensor_files import tensors_of_files
from keras_gemma.checkpoints.tensor_files import write_h5
from keras_gemma.checkpoints.tensor_files import write_shards
from keras_gemma.damaged import DamagedFileError
from keras_gemma.damaged import reading
from keras_gemma.settings import shown

PACKAGES = ("keras_hub", "keras_nlp", "keras_gemma")
VOCABULARY_FILE = "vocabulary.spm"
LOADABLE_QUANTIZATIONS = (None, "int8", "int4", "float8", "gptq", "awq")
CALIBRATED = ("gptq", "awq")
FORMAT = "keras"
KEEPS = tuple(besides_tensors.NAMES)
HEAD, HEAD_BIAS = "layers/dense/vars/0", "layers/dense/vars/1"
REWARD_MODEL = "GemmaRewardModel"
OF_PREPROCESSOR = ("sequence_length", "add_start_token", "add_end_token")
EMBEDDING, FINAL_NORM = "layers/reversible_embedding", "layers/rms_normalization"
# The layers of a block by what they keep, as `canonical` calls it.
BLOCK_LAYERS = {
    "attention_norm": "pre_attention_norm",
    "query": "attention/query_dense",
    "key": "attention/key_dense",
    "value": "attention/value_dense",
    "output": "attention/output_dense",
    "ffw_norm": "pre_ffw_norm",
    "gate": "gating_ffw",
    "up": "gating_ffw_2",
    "down": "ffw_linear",
}


class KerasPreset:
    """A preset in the Keras format.

    Args:
        location: a local folder or a hub handle.
        config: the content of its `config.json`.
    """

    def __init__(self, location, config):
        self.location = location
        self.config = config

    def backbone_config(self, cls):
        """Constructor arguments of the backbone; its dtype serialised, or `None` for a plain floating one.

        Raises:
            ValueError: for the preset of another architecture.
        """
        if not is_of_class(self.config, cls):
            raise ValueError(
                f"`{cls.__name__}` loads Gemma 1 presets only. "
                f"Received: `{self.location}`, which holds a `{self.config['registered_name']}`"
            )
        config = dict(self.config["config"])
        # As in keras-hub: floating weights follow the current dtype policy, quantised ones keep their own.
        config["dtype"] = config.get("dtype") if is_quantized(config.get("dtype")) else None
        return config

    def task_config(self, cls):
        """What `task.json` says of a task of this class, or `None`."""
        config = self._config_of(hub.TASK_CONFIG_FILE, cls)
        said = ((config or {}).get("backbone") or {}).get("config") or {}
        for name in canonical.Sizes._fields:
            if name in said and said[name] != self.config["config"].get(name, said[name]):
                raise ValueError(
                    f"`{hub.TASK_CONFIG_FILE}` and `{hub.CONFIG_FILE}` of `{self.location}` describe one backbone. "
                    f"Received: `{name}` = {said[name]} and {self.config['config'][name]}"
                )
        return config

    def sampler_config(self, cls):
        """The sampler that a task of this class was saved with, serialised, or `None`."""
        path = optional_file(self.location, hub.TASK_CONFIG_FILE)
        content = read_json(path) if path else None
        return content.get(SAMPLER_OF_TASK) if content and is_of_class(content, cls) else None

    def preprocessor_config(self, cls, config_file):
        """What the preprocessor's file says of a preprocessor of this class, or `None`."""
        return self._config_of(config_file, cls)

    def tokenizer_config(self, config_file):
        """Constructor arguments of the tokenizer."""
        path = required_file(self.location, config_file)
        return {**settings_in(path), **said_beside(read_json(path))}

    def vocabulary(self, config_file):
        """Local path of the SentencePiece model, and its bytes."""
        path = required_file(self.location, f"assets/{config_file.split('.')[0]}/{VOCABULARY_FILE}")
        return path, pathlib.Path(path).read_bytes()

    def _config_of(self, file_name, cls):
        path = optional_file(self.location, file_name)
        return settings_in(path) if path and is_of_class(read_json(path), cls) else None

    def fill_backbone(self, backbone):
        """Gives a backbone that was built without values those of the preset."""
        where, files = self._weight_files()
        stored = tensors_of_files(files, h5_tensors)
        wanted = [Wanted(v, name, tuple(v.shape), lambda array: array) for name, v in variables_by_name(backbone)]
        fill(backbone, wanted, stored, where)
        for _, layer in layers_by_path(backbone):
            # Which Keras notes where it loads a layer itself.
            if layer.quantization_mode in CALIBRATED:
                setattr(layer, f"is_{layer.quantization_mode}_calibrated", True)

    def checkpoint(self):
        """The model's `Checkpoint`.

        Raises:
            ValueError: for another architecture, and for quantised weights.
        """
        sizes = self._sizes()
        where, files = self._weight_files()
        stored = tensors_of_files(files, h5_tensors)
        return canonical.Checkpoint(
            path=self.location,
            format=FORMAT,
            sizes=sizes,
            table=table_of(sizes),
            stored=stored,
            where=where,
            proto=self._proto,
            besides=self.besides,
        )

    def besides(self):
        """The model's `BesidesTensors`."""
        task, preprocessor, tokenizer = (
            self._content(name)
            for name in (hub.TASK_CONFIG_FILE, hub.PREPROCESSOR_CONFIG_FILE, hub.TOKENIZER_CONFIG_FILE)
        )
        alone = preprocessor.get("config", {})
        settings = (task.get("config", {}).get("preprocessor") or preprocessor).get("config", {})
        files = f"`{hub.TASK_CONFIG_FILE}`, which is followed, and `{hub.PREPROCESSOR_CONFIG_FILE}`"
        doubts = [
            f"{files} differ in `{name}`: {settings[name]} and {alone[name]}"
            for name in OF_PREPROCESSOR
            if name in settings and name in alone and settings[name] != alone[name]
        ]
        return BesidesTensors(
            preprocessor={name: settings[name] for name in OF_PREPROCESSOR if name in settings},
            head=self._head(task),
            generation=besides_tensors.generation_settings(self._content(besides_tensors.GENERATION_FILE)),
            doubts=tuple(doubts),
            sampler=task.get(SAMPLER_OF_TASK),
            other_head=self._other_head(task),
            **said_beside(tokenizer),
        )

    def _content(self, file_name):
        path = optional_file(self.location, file_name)
        return read_json(path) if path else {}

    def _head(self, task):
        if (task.get("registered_name") or "").rpartition(">")[2] != REWARD_MODEL:
            return None
        path = self.task_weights_file()
        head = canonical.head_among(
            tensors_of_files([path], h5_tensors), HEAD, HEAD_BIAS, (self._sizes().hidden_dim, 1)
        )
        if head is None:
            raise ValueError(f"`{path}` lacks `{HEAD}`, the head of a reward model.")
        return head

    def _other_head(self, task):
        name = (task.get("registered_name") or "").rpartition(">")[2]
        has_weights = name != REWARD_MODEL and optional_file(self.location, hub.TASK_WEIGHTS_FILE)
        return (name or "task") if has_weights else None

    def _sizes(self):
        if (self.config.get("registered_name") or "").rpartition(">")[2] != "GemmaBackbone":
            raise ValueError(f"Gemma 1 is converted. Received: `{self.location}`, a `{self.config['registered_name']}`")
        config = self.config["config"]
        _check_settings(self.location, config)
        if is_quantized(config.get("dtype")):
            raise ValueError(f"Floating weights are converted. Received: `{self.location}`, which is quantised")
        sizes = canonical.Sizes(**{name: config[name] for name in canonical.Sizes._fields if name in config})
        return canonical.checked(sizes, f"{self.location}/{hub.CONFIG_FILE}")

    def _proto(self):
        path = optional_file(self.location, f"assets/{hub.TOKENIZER_CONFIG_FILE.split('.')[0]}/{VOCABULARY_FILE}")
        return pathlib.Path(path).read_bytes() if path else None

    def fill_task(self, task, settings):
        """Loads what the task has besides its backbone, a head that is small; where `settings` is of such a task."""
        if settings is None:
            return
        if not task.has_task_weights():
            if optional_file(self.location, hub.TASK_WEIGHTS_FILE) and not self._is_task_of_base(type(task)):
                warnings.warn(
                    f"`{self.location}` has weights for layers of a `{type(task).__name__}` besides its backbone, and "
                    "none of these is built, so the weights are not loaded. Build such layers in `__init__`.",
                    stacklevel=2,
                )
            return
        # A subclass with layers of its own begins with a preset of its base, which has nothing for them.
        if self._is_task_of_base(type(task)) and optional_file(self.location, hub.TASK_WEIGHTS_FILE) is None:
            return
        path = self.task_weights_file()
        with reading(path, "file of this model's weights"):
            task.load_task_weights(path)

    def _is_task_of_base(self, cls):
        """Whether the task was saved by a class that `cls` derives from, and not by `cls` itself."""
        content = read_json(required_file(self.location, hub.TASK_CONFIG_FILE))
        return is_of_class(content, cls) and content["registered_name"].rpartition(">")[2] != cls.__name__

    def task_weights_file(self):
        """Local path of the weights that a task has besides its backbone's."""
        return required_file(self.location, hub.TASK_WEIGHTS_FILE)

    def _weight_files(self):
        """The file that lists the weights, and the files that hold them."""
        single = self.config.get("weights") or hub.MODEL_WEIGHTS_FILE
        path = optional_file(self.location, single)
        if path:
            return path, [path]
        index = optional_file(self.location, hub.SHARDED_MODEL_WEIGHTS_CONFIG_FILE)
        if index is None:
            raise FileNotFoundError(
                f"The preset `{self.location}` lacks the file `{single}`, and of a sharded one "
                f"`{hub.SHARDED_MODEL_WEIGHTS_CONFIG_FILE}`. For a model without its weights pass `load_weights=False`."
            )
        return index, [required_file(self.location, shard) for shard in shards_of(index)]


def _check_settings(location, config):
    # Not above: the models import this package.
    from keras_gemma.models.backbone import GEMMA_1_ONLY

    for name, value in GEMMA_1_ONLY.items():
        if config.get(name, value) != value:
            raise ValueError(f"Gemma 1 has `{name}={value}`. Received: {config[name]} in `{location}`")
    needed = set(canonical.Sizes._fields) - set(canonical.Sizes._field_defaults)
    if missing := sorted(needed - set(config)):
        raise ValueError(f"`config.json` of `{location}` lacks {canonical.listed(missing)}.")


def variables_by_name(backbone):
    """Every variable that weight files keep, as pairs of its name in the file and the variable.

    Raises:
        ValueError: for a quantisation whose state is more than its variables.
    """
    for path, layer in layers_by_path(backbone):
        mode = getattr(layer, "quantization_mode", None)
        if mode not in LOADABLE_QUANTIZATIONS:
            raise ValueError(
                f"Presets load in the quantisations {', '.join(map(str, LOADABLE_QUANTIZATIONS))}. "
                f"Received: {mode} for `{path}`"
            )
        kept = {}
        layer.save_own_variables(kept)
        for key, variable in kept.items():
            yield f"{path}/vars/{key}", variable


def layers_by_path(backbone):
    """Every layer that weight files keep something of, as pairs of its path in the file and the layer."""
    yield EMBEDDING, backbone.token_embedding
    for index, block in enumerate(backbone.transformer_layers):
        for path in BLOCK_LAYERS.values():
            layer = block
            for attribute in path.split("/"):
                layer = getattr(layer, attribute)
            yield f"{block_path(index)}/{path}", layer
    yield FINAL_NORM, backbone.layer_norm


def block_path(index):
    """Path of a block's layers in the file."""
    return f"layers/gemma_decoder_block_{index}" if index else "layers/gemma_decoder_block"


def table_of(sizes):
    """What a model of these `Sizes` has in this format, as `FileTensor`s."""
    names = {"embedding": EMBEDDING, "final_norm": FINAL_NORM}
    for index in range(sizes.num_layers):
        names |= {f"blocks.{index}.{part}": f"{block_path(index)}/{path}" for part, path in BLOCK_LAYERS.items()}
    return [canonical.as_it_is(f"{names[part]}/vars/0", part, shape) for part, shape in canonical.shapes(sizes).items()]


def said_beside(content):
    """Constructor arguments of a tokenizer that a serialised one has beside its configuration."""
    return {name: content[name] for name in BESIDE_TOKENIZER if content.get(name)}


def write(target, sizes, tensors, proto, dtype=None, max_shard_size=10, besides=NOTHING):
    """Writes a preset, one tensor at a time.

    Args:
        target: path of a folder that does not exist yet.
        sizes: `Sizes`.
        tensors: dict of `StoredTensor`, as of a `Checkpoint`.
        proto: bytes of the SentencePiece model, or `None`.
        dtype: optional, one of float32, float16 and bfloat16 to cast to.
        max_shard_size: int or float, as of `save_task`.
        besides: `BesidesTensors`. With a head the model is a `GemmaRewardModel`.

    Raises:
        ValueError: as `canonical.arranged`, and for a tensor that is larger than a file may be.
    """
    arranged = canonical.arranged(table_of(sizes), tensors, dtype)
    os.makedirs(target)
    write_settings(_task_without_values(sizes, proto, str(arranged[0].dtype), besides), target)
    if besides.generation:
        with open(os.path.join(target, besides_tensors.GENERATION_FILE), "w", encoding="utf-8") as file:
            json.dump(besides.generation, file, indent=2)
    if besides.head is not None:
        head = canonical.as_it_is(HEAD, "head", (sizes.hidden_dim, 1))
        # It is float32 whatever the backbone is.
        write_h5(
            os.path.join(target, hub.TASK_WEIGHTS_FILE), canonical.arranged([head], {"head": besides.head}, "float32")
        )
    names = (hub.MODEL_WEIGHTS_FILE, "model_{index:05}.weights.h5", hub.SHARDED_MODEL_WEIGHTS_CONFIG_FILE)
    write_shards(target, arranged, max_shard_size, names, write_h5, lambda name: f"/{os.path.dirname(name)}")


def _task_without_values(sizes, proto, dtype, besides):
    # Not above: the models import this package. Names that Keras counts up would tell one conversion from the next.
    from keras_gemma.models import GemmaBackbone
    from keras_gemma.models import GemmaCausalLM
    from keras_gemma.models import GemmaCausalLMPreprocessor
    from keras_gemma.models import GemmaRewardModel
    from keras_gemma.models import GemmaRewardModelPreprocessor
    from keras_gemma.models import GemmaTokenizer

    cls, preprocessor_cls = GemmaCausalLM, GemmaCausalLMPreprocessor
    if besides.head is not None:
        cls, preprocessor_cls = GemmaRewardModel, GemmaRewardModelPreprocessor
    with without_values():
        backbone = GemmaBackbone(**sizes._asdict(), dtype=dtype, name="gemma_backbone")
    preprocessor = None
    if proto:
        tokenizer = GemmaTokenizer(
            proto, stop_tokens=besides.stop_tokens, chat_template=besides.chat_template, name="gemma_tokenizer"
        )
        name = _snake_case(preprocessor_cls.__name__)
        preprocessor = preprocessor_cls(tokenizer, **besides.preprocessor, name=name)
    task = cls(backbone, preprocessor, name=_snake_case(cls.__name__))
    if besides.sampler is not None and getattr(task, "sampler", None) is not None:
        task.sampler = keras_hub.samplers.deserialize(besides.sampler)
    return task


def _snake_case(name):
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).replace("_l_m", "_lm").lstrip("_")


def fill_from(checkpoint, backbone):
    """Gives a backbone that was built without values those of a `Checkpoint` of any format.

    Raises:
        ValueError: as `fill`, for a quantised backbone, and for an output projection that is not the embedding.
    """
    checkpoint.check_copies()
    variables = dict(variables_by_name(backbone))
    names = {entry.parts[0]: entry.name for entry in table_of(checkpoint.sizes)}
    if quantized := set(variables) - set(names.values()):
        raise ValueError(
            f"The format {checkpoint.format!r} has floating weights only. "
            f"Received: a quantised `dtype`, with {canonical.listed(sorted(quantized))}"
        )
    wanted = [
        Wanted(variables[names[part]], entry.name, tuple(entry.shape), canonical.taker(entry, place))
        for entry in checkpoint.table
        for place, part in enumerate(entry.parts)
    ]
    fill(backbone, wanted, checkpoint.stored, checkpoint.where, checkpoint.ignored)


def settings_in(path):
    """The constructor arguments in the file of a serialised object.

    Raises:
        DamagedFileError: for a file without them.
    """
    config = read_json(path).get("config")
    if not isinstance(config, dict):
        raise DamagedFileError(path, f"`config` must be an object. Received: {shown(config)}", "preset")
    return config


def is_of_class(content, cls):
    """Whether a serialised object is one that `cls`, under any package's name, was made to load."""
    registered_name = str(content.get("registered_name") or "")
    if keras.saving.get_registered_name(cls) == registered_name:
        return True
    package, _, name = registered_name.rpartition(">")
    return package in PACKAGES and name in {base.__name__ for base in cls.__mro__}


def is_quantized(dtype):
    """Whether a serialised dtype policy is of a quantised model."""
    if isinstance(dtype, dict):
        return dtype["class_name"] not in ("DTypePolicy", "FloatDTypePolicy")
    return isinstance(dtype, str) and "_from_" in dtype


def with_source_dtype(dtype, source):
    """A serialised quantised policy whose floating parts compute in the dtype `source`."""
    if isinstance(dtype, str):
        return f"{dtype.split('_from_')[0]}_from_{source}"
    source = keras.dtype_policies.get(source).name
    return _with_source_name(dtype, source)


def _with_source_name(config, source):
    if not isinstance(config, dict):
        return config
    replaced = {key: _with_source_name(value, source) for key, value in config.items()}
    return {**replaced, **{key: source for key in ("source_name", "default_policy") if key in config}}
