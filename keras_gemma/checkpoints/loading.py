"""Presets → backbones, tokenizers, preprocessors and tasks."""

import base64
import contextlib
import inspect

import keras_hub

from keras_gemma.checkpoints import keras_hub_private as hub
from keras_gemma.checkpoints.filling import resolve_policies
from keras_gemma.checkpoints.filling import without_values
from keras_gemma.checkpoints.hugging_face import HuggingFacePreset
from keras_gemma.checkpoints.keras_preset import KerasPreset
from keras_gemma.checkpoints.keras_preset import is_of_class
from keras_gemma.checkpoints.keras_preset import said_beside
from keras_gemma.checkpoints.keras_preset import with_source_dtype
from keras_gemma.checkpoints.locating import locate
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.locating import required_file
from keras_gemma.checkpoints.tokenizer_files import number_of_pieces
from keras_gemma.damaged import reading

SHORTEST_PROTO = 2048


def load_backbone(cls, preset, load_weights=True, **kwargs):
    """Loads a backbone.

    Its variables come into being without a value and get it from the files one by one, the largest first, each cast to
    the dtype asked for and placed by the current `keras.distribution`. Besides the weights, memory holds a few copies
    of one tensor at most.

    Args:
        cls: a backbone class with `presets`.
        preset: a name in `cls.presets`, a handle `"kaggle://…"` or `"hf://…"`, or a local folder in the Keras or the
            Hugging Face format.
        load_weights: bool. `False` initialises at random, and downloads nothing for a name in `cls.presets`.
        **kwargs: constructor arguments that replace the preset's, `dtype` for instance.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: for an unknown name, another architecture, and damaged or mismatched files.
        FileNotFoundError: for a missing file, naming it.
    """
    return _backbone(cls, open_preset(cls, preset, config_only=not load_weights), load_weights, kwargs)


def load_tokenizer(cls, preset, config_file=hub.TOKENIZER_CONFIG_FILE, **kwargs):
    """Loads a tokenizer.

    Args:
        cls: a tokenizer class with `presets`.
        preset: as of `load_backbone`.
        config_file: name of the tokenizer's file in the preset.
        **kwargs: constructor arguments that replace the preset's.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError, FileNotFoundError: as of `load_backbone`.
    """
    source = open_preset(cls, preset)
    return _tokenizer(cls, source, source.tokenizer_config(config_file), config_file, kwargs)


def load_preprocessor(cls, preset, config_file=hub.PREPROCESSOR_CONFIG_FILE, **kwargs):
    """Loads a preprocessor with its tokenizer.

    Args:
        cls: a preprocessor class with `presets` and `tokenizer_cls`.
        preset: as of `load_backbone`.
        config_file: name of the preprocessor's file in the preset.
        **kwargs: constructor arguments that replace the preset's, `sequence_length` for instance.

    Returns:
        An instance of `cls`, with the preset's settings where it has any.

    Raises:
        ValueError, FileNotFoundError: as of `load_backbone`.
    """
    source = open_preset(cls, preset)
    return _preprocessor(cls, source, source.preprocessor_config(cls, config_file), kwargs)


def load_task(cls, preset, load_weights=True, **kwargs):
    """Loads a task with its backbone and preprocessor.

    Args:
        cls: a task class with `presets`, `backbone_cls` and `preprocessor_cls`.
        preset: as of `load_backbone`.
        load_weights: bool. `False` initialises at random. The official presets then need a download for the vocabulary
            only, and with `preprocessor=None` none at all.
        **kwargs: `dtype` for the backbone, `sequence_length` for the preprocessor, and constructor arguments that
            replace the preset's; `backbone` and `preprocessor` are not loaded when given.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError, FileNotFoundError: as of `load_backbone`.
    """
    dtype, sequence_length = kwargs.pop("dtype", None), kwargs.pop("sequence_length", None)
    source = open_preset(cls, preset, config_only=not load_weights)
    task_config = source.task_config(cls)
    config = dict(task_config or {})
    saved_preprocessor = config.pop("preprocessor", False)
    config.pop("backbone", None)
    _refuse_missing_arguments(cls, {**config, **kwargs}, preset)
    # The small files first: a preset that lacks one fails before gigabytes are read.
    if "preprocessor" not in kwargs:
        kwargs["preprocessor"] = _task_preprocessor(cls, preset, source, saved_preprocessor, sequence_length)
        if "backbone" not in kwargs:
            _check_rows(source, cls.backbone_cls, kwargs["preprocessor"])
    elif sequence_length is not None:
        raise ValueError("`sequence_length` belongs to the preset's preprocessor. Received: a `preprocessor` as well")
    if "backbone" not in kwargs:
        kwargs["backbone"] = _backbone(cls.backbone_cls, source, load_weights, {"dtype": dtype})
    with _settings_of(source, hub.TASK_CONFIG_FILE, {} if config else {"nothing": "of it"}):
        task = cls(**{**config, **kwargs})
    # As in keras-hub: who says how many classes there are wants a new head.
    if load_weights and "num_classes" not in kwargs:
        source.fill_task(task, task_config)
    _restore_sampler(task, source)
    return task


def _refuse_missing_arguments(cls, given, preset):
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
    if missing := [p.name for p in named if p.name not in {*given, "self", "backbone", "preprocessor"}]:
        raise ValueError(
            f"`{cls.__name__}` needs {' and '.join(map(repr, missing))}, and the preset `{preset}` of another task "
            "does not say what: pass it to `from_preset`."
        )


def open_preset(cls, preset, config_only=False):
    """A `KerasPreset` or a `HuggingFacePreset`. Arguments and errors are those of `load_backbone`."""
    location = locate(cls, preset, config_only)
    config = read_json(required_file(location, hub.CONFIG_FILE))
    with reading(location, "preset"):
        if config.get("registered_name"):
            return KerasPreset(location, config)
        if "model_type" in config:
            return HuggingFacePreset(location, config)
    raise ValueError(
        "`config.json` of a preset holds a `registered_name` (Keras format) or a `model_type` (Hugging Face format). "
        f"Received: `{location}` with {sorted(config)}"
    )


def _backbone(cls, source, load_weights, kwargs):
    dtype = kwargs.pop("dtype", None)
    with _settings_of(source, hub.CONFIG_FILE):
        config = source.backbone_config(cls)
        if dtype is not None:
            dtype = with_source_dtype(config["dtype"], dtype) if config["dtype"] else dtype
            config["dtype"] = dtype
    config = {**config, **kwargs}
    with _settings_of(source, hub.CONFIG_FILE, kwargs), without_values() if load_weights else contextlib.nullcontext():
        backbone = cls.from_config(config)
    resolve_policies(backbone)
    if load_weights:
        source.fill_backbone(backbone)
    return backbone


def _check_rows(source, backbone_cls, preprocessor):
    tokenizer = getattr(preprocessor, "tokenizer", None)
    rows = source.backbone_config(backbone_cls)["vocabulary_size"]
    if tokenizer is not None and tokenizer.proto and tokenizer.vocabulary_size() > rows:
        raise ValueError(
            f"Each piece of a vocabulary needs a row of the embedding. Received: {tokenizer.vocabulary_size()} pieces "
            f"in the vocabulary of `{source.location}`, {rows} rows by its `config.json`"
        )


def _tokenizer(cls, source, config, config_file, kwargs):
    _check_proto(source, config.get("proto"))
    config = {**config, **kwargs}
    if config.get("proto") is not None:
        return cls.from_config(config)
    where, config["proto"] = source.vocabulary(config_file)
    number_of_pieces(config["proto"], where)
    try:
        tokenizer = cls.from_config(config)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"`{where}` does not serve as a vocabulary with the settings of the preset: {error}"
        ) from error
    tokenizer.is_new = False
    return tokenizer


def _check_proto(source, proto):
    """Refuses a vocabulary that is a path: it may lead anywhere. A base64 text is what a preset may hold."""
    try:
        # keras-hub takes shorter ones for paths.
        is_base64 = proto is None or (len(proto) > SHORTEST_PROTO and bool(base64.b64decode(proto, validate=True)))
    except (ValueError, TypeError):
        is_base64 = False
    if not is_base64:
        raise ValueError(
            f"A preset keeps its vocabulary among its own files. Received: `proto` = {str(proto)[:80]!r} in a file of "
            f"`{source.location}`"
        )


def _preprocessor(cls, source, config, kwargs):
    config = dict(config or {})
    tokenizer_config = config.pop("tokenizer", None)
    if "tokenizer" not in kwargs:
        kwargs["tokenizer"] = _nested_tokenizer(cls.tokenizer_cls, source, tokenizer_config)
    with _settings_of(source, hub.PREPROCESSOR_CONFIG_FILE, {**kwargs, "tokenizer": None}):
        return cls.from_config({**config, **kwargs})


@contextlib.contextmanager
def _settings_of(source, file_name, given=None):
    """Errors name a preset's file where its settings are all that a constructor is given."""
    if any(value is not None for value in (given or {}).values()):
        yield
    else:
        with reading(f"{source.location}/{file_name}", "preset"):
            yield


def _nested_tokenizer(cls, source, content):
    if content and is_of_class(content, cls):
        config = {**content["config"], **said_beside(content)}
        return _tokenizer(cls, source, config, config.get("config_file", hub.TOKENIZER_CONFIG_FILE), {})
    config_file = hub.TOKENIZER_CONFIG_FILE
    return _tokenizer(cls, source, source.tokenizer_config(config_file), config_file, {})


def _task_preprocessor(cls, preset, source, saved, sequence_length):
    """The preprocessor that `task.json` holds (`None` too, where it says so), else the preset's own."""
    if saved is None or cls.preprocessor_cls is None:
        return None
    kwargs = {} if sequence_length is None else {"sequence_length": sequence_length}
    try:
        if saved and is_of_class(saved, cls.preprocessor_cls):
            return _preprocessor(cls.preprocessor_cls, source, saved["config"], kwargs)
        return load_preprocessor(cls.preprocessor_cls, preset, **kwargs)
    except Exception as error:
        # Hubs raise errors of their own kinds when they cannot be reached.
        kinds = {ConnectionError: ConnectionError, PermissionError: PermissionError, OSError: FileNotFoundError}
        kind = next((kinds[one] for one in kinds if isinstance(error, one)), ValueError)
        raise kind(
            f"The preprocessor of `{preset}` cannot be loaded. {error} "
            f"For a `{cls.__name__}` without text, from token ids to logits, pass `preprocessor=None`."
        ) from error


def _restore_sampler(task, source):
    config = source.sampler_config(type(task))
    # A task that was not compiled has none.
    if config is None or getattr(task, "sampler", None) is None:
        return
    try:
        sampler = keras_hub.samplers.deserialize(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"`task.json` of `{source.location}` holds a damaged sampler: {error}") from error
    if not isinstance(sampler, keras_hub.samplers.Sampler):
        raise ValueError(f"`task.json` of `{source.location}` holds a damaged sampler: {config!r}")
    task.sampler = sampler
