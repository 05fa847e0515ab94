"""Backbones, tokenizers, preprocessors and tasks → a preset folder that keras-hub reads without this package."""

import contextlib
import datetime
import json
import math
import os
import shutil
import tempfile

import keras
import keras_hub
import numpy as np

from keras_gemma.checkpoints import keras_hub_private as hub
from keras_gemma.checkpoints.besides_tensors import GENERATION_FILE
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.tensor_files import BYTES_OF_GB
from keras_gemma.checkpoints.tensor_files import check_shard_size
from keras_gemma.locking import locked
from keras_gemma.staging import naming_full_disks

STAGING_PREFIX = ".saving-"
LOCK_FILE = ".saving.lock"
FORMER_CONFIG = "former_config.json"
CONFIG_OF_THIS_PROCESS = ("build_config", "compile_config")
# In `task.json` beside what keras-hub reads there.
SAMPLER_OF_TASK = "sampler"
# How a backbone is trained and not what it is; keras-hub's does not know them.
CONFIG_OF_TRAINING = ("recompute", "scan_layers")
# What a preprocessor makes of texts, which keras-hub's does not ask.
CONFIG_OF_PREPROCESSING = ("allow_special_tokens", "merge_system_messages")
# What a tokenizer's file says beside its configuration.
BESIDE_TOKENIZER = ("stop_tokens", "chat_template")
# Of an earlier save, and no longer true beside a new backbone.
BACKBONE_FILES = (
    hub.MODEL_WEIGHTS_FILE,
    hub.SHARDED_MODEL_WEIGHTS_CONFIG_FILE,
    hub.TASK_CONFIG_FILE,
    hub.TASK_WEIGHTS_FILE,
    GENERATION_FILE,
)


def save_backbone(backbone, preset_dir, max_shard_size=10):
    """Saves a backbone as a preset.

    Files are complete under a temporary name before the first takes its place, and `config.json`, without which no
    folder loads, is away until the last one has: an interrupted save leaves the old preset, the new one, or a folder
    that does not load, never a mixture.

    Args:
        backbone: a `GemmaBackbone`. LoRA adapters are merged into the weights saved.
        preset_dir: path of the folder, made if missing. Files of an earlier preset are replaced.
        max_shard_size: int or float. Gigabytes (2³⁰ bytes) above which the weights are split into several files, each
            no larger; `None` never splits.

    Raises:
        ValueError: for what cannot be saved, before anything is touched.
    """
    _check_backbone(backbone, max_shard_size)
    with _staged(preset_dir) as staging:
        _write_backbone_settings(backbone, staging)
        _write_weights(backbone, staging, max_shard_size)


def save_tokenizer(tokenizer, preset_dir):
    """Saves a tokenizer into a preset.

    Args:
        tokenizer: a `GemmaTokenizer`.
        preset_dir: as of `save_backbone`.

    Raises:
        ValueError: for a tokenizer without vocabulary.
    """
    _check_tokenizer(tokenizer)
    with _staged(preset_dir) as staging:
        _write_tokenizer(tokenizer, staging)


def save_preprocessor(preprocessor, preset_dir):
    """Saves a preprocessor and its tokenizer into a preset.

    Args:
        preprocessor: a `GemmaCausalLMPreprocessor`.
        preset_dir: as of `save_backbone`. The settings in a task saved there before are brought up to date.

    Raises:
        ValueError: for a tokenizer without vocabulary.
    """
    _check_tokenizer(preprocessor.tokenizer)
    with _staged(preset_dir) as staging:
        _write_preprocessor(preprocessor, staging)
        _write_into_saved_task(preprocessor, preset_dir, staging)


def save_task(task, preset_dir, max_shard_size=10):
    """Saves a task with its backbone and preprocessor as a preset.

    Args:
        task: a `GemmaCausalLM`, or another task on a `GemmaBackbone`.
        preset_dir, max_shard_size: as of `save_backbone`.

    Raises:
        ValueError: for what cannot be saved, before anything is touched.
    """
    _check_backbone(task.backbone, max_shard_size)
    if task.preprocessor is not None:
        _check_tokenizer(task.preprocessor.tokenizer)
    with _staged(preset_dir) as staging:
        write_settings(task, staging)
        if task.has_task_weights():
            task.save_task_weights(os.path.join(staging, hub.TASK_WEIGHTS_FILE))
        _write_weights(task.backbone, staging, max_shard_size)


def write_settings(task, folder):
    """Writes all files of a task's preset but the weights.

    Args:
        task: a `GemmaCausalLM`, or another task on a `GemmaBackbone`. Its variables need no values.
        folder: path of an existing folder.
    """
    _write_json({**_serialized(task), **_sampler_of(task)}, folder, hub.TASK_CONFIG_FILE)
    _write_backbone_settings(task.backbone, folder)
    if task.preprocessor is not None:
        _write_preprocessor(task.preprocessor, folder)


# === What can be saved ===


def _check_backbone(backbone, max_shard_size):
    for variable in backbone.variables:
        if variable._value is None:
            raise ValueError(f"A model is saved when every variable has a value. Received: none in `{variable.path}`")
    check_shard_size(max_shard_size, {variable.path: _bytes(variable) for variable in backbone.variables})


def _check_tokenizer(tokenizer):
    if tokenizer is None or tokenizer.proto is None:
        raise ValueError("A tokenizer is saved with its vocabulary. Received: one without")


def _needs_shards(backbone, max_shard_size):
    size = sum(_bytes(variable) for variable in backbone.variables)
    return max_shard_size is not None and size > max_shard_size * BYTES_OF_GB


def _bytes(variable):
    return math.prod(variable.shape) * np.dtype(keras.backend.standardize_dtype(variable.dtype)).itemsize


# === Files ===


def _write_backbone_settings(backbone, folder):
    _write_json(_serialized(backbone), folder, hub.CONFIG_FILE)
    _write_json(_metadata(backbone), folder, hub.METADATA_FILE)


def _write_weights(backbone, folder, max_shard_size):
    if _needs_shards(backbone, max_shard_size):
        path = os.path.join(folder, hub.SHARDED_MODEL_WEIGHTS_CONFIG_FILE)
        backbone.save_weights(path, max_shard_size=max_shard_size)
    else:
        backbone.save_weights(os.path.join(folder, hub.MODEL_WEIGHTS_FILE))


def _write_preprocessor(preprocessor, folder):
    _write_json(_serialized(preprocessor), folder, preprocessor.config_file)
    _write_tokenizer(preprocessor.tokenizer, folder)


def _write_tokenizer(tokenizer, folder):
    _write_json(_serialized(tokenizer), folder, tokenizer.config_file)
    assets = os.path.join(folder, "assets", tokenizer.config_file.split(".")[0])
    os.makedirs(assets)
    tokenizer.save_assets(assets)


def _write_into_saved_task(preprocessor, preset_dir, folder):
    path = os.path.join(preset_dir, hub.TASK_CONFIG_FILE)
    if os.path.exists(path):
        content = read_json(path)
        content["config"]["preprocessor"] = _serialized(preprocessor)
        _write_json(content, folder, hub.TASK_CONFIG_FILE)


def _write_json(content, folder, name):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=4)


def _serialized(saveable):
    return _for_keras_hub(keras.saving.serialize_keras_object(saveable))


def _for_keras_hub(config):
    """The same configuration under the names by which keras-hub knows these classes."""
    if isinstance(config, list):
        return [_for_keras_hub(item) for item in config]
    if not isinstance(config, dict):
        return config
    left_out = CONFIG_OF_THIS_PROCESS + CONFIG_OF_TRAINING + CONFIG_OF_PREPROCESSING
    config = {key: _for_keras_hub(value) for key, value in config.items() if key not in left_out}
    name = config.get("class_name")
    if str(config.get("registered_name")).startswith("keras_gemma>") and hub.module_of(name):
        config.update(module=hub.module_of(name), registered_name=f"keras_hub>{name}")
    if name == "GemmaTokenizer":
        # keras-hub's tokenizer takes no arguments for them.
        config.update({key: value for key in BESIDE_TOKENIZER if (value := config["config"].pop(key, None))})
    return config


def _sampler_of(task):
    """What the model was compiled to choose tokens with, where keras-hub has it and would not take it by itself."""
    sampler = getattr(task, "sampler", None)
    # Here, because the models that import generation import this package first.
    from keras_gemma.generation import CombinedSampler

    is_known = type(sampler).__module__.startswith("keras_hub.") or type(sampler) is CombinedSampler
    if not is_known or isinstance(sampler, keras_hub.samplers.GreedySampler):
        return {}
    return {SAMPLER_OF_TASK: keras_hub.samplers.serialize(sampler)}


def _metadata(backbone):
    return {
        "keras_version": keras.version(),
        "keras_hub_version": keras_hub.__version__,
        "parameter_count": backbone.count_params(),
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
    }


# === All of it or nothing ===


@contextlib.contextmanager
def _staged(preset_dir):
    """A temporary folder whose files take their place in `preset_dir` at the end. Those who save there take turns."""
    preset_dir = os.fspath(preset_dir)
    existed = os.path.isdir(preset_dir)
    os.makedirs(preset_dir, exist_ok=True)
    try:
        with locked(os.path.join(preset_dir, LOCK_FILE), preset_dir, wait=True) as alone:
            # Inside, so that moving a file is renaming it.
            staging = tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=preset_dir)
            try:
                with naming_full_disks(preset_dir):
                    yield staging
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            _publish(staging, preset_dir)
            shutil.rmtree(staging, ignore_errors=True)
            if alone:
                _remove_unfinished(preset_dir)
    except BaseException:
        if not existed:
            # Another one may have saved there in the meantime.
            with contextlib.suppress(OSError):
                os.rmdir(preset_dir)
        raise


def _remove_unfinished(preset_dir):
    for entry in os.listdir(preset_dir):
        if entry.startswith(STAGING_PREFIX):
            shutil.rmtree(os.path.join(preset_dir, entry), ignore_errors=True)


def _publish(staging, preset_dir):
    config = os.path.join(preset_dir, hub.CONFIG_FILE)
    staged_config = os.path.join(staging, hub.CONFIG_FILE)
    replaces_backbone = os.path.exists(staged_config)
    if os.path.exists(config):
        # From here on the folder does not load until all is in place.
        os.replace(config, os.path.join(staging, FORMER_CONFIG) if replaces_backbone else staged_config)
    if replaces_backbone:
        _remove_former_backbone(preset_dir)
    for name in _files_with_config_last(staging):
        os.makedirs(os.path.dirname(os.path.join(preset_dir, name)), exist_ok=True)
        os.replace(os.path.join(staging, name), os.path.join(preset_dir, name))


def _remove_former_backbone(preset_dir):
    for name in os.listdir(preset_dir):
        shard = name.startswith("model_") and name.endswith(".weights.h5")
        if shard or name in BACKBONE_FILES:
            os.remove(os.path.join(preset_dir, name))


def _files_with_config_last(staging):
    names = []
    for folder, _, files in os.walk(staging):
        names += [os.path.relpath(os.path.join(folder, name), staging) for name in files if name != FORMER_CONFIG]
    return sorted(names, key=lambda name: name == hub.CONFIG_FILE)
