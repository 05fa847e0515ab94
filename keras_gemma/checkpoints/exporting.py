"""A model in memory → a folder that transformers loads, by the writer that `convert` has."""

import contextlib
import os
import pathlib
import shutil
import tempfile

import numpy as np
from keras import ops

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import hugging_face
from keras_gemma.checkpoints import keras_preset
from keras_gemma.checkpoints.besides_tensors import BesidesTensors
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.checkpoints.tokenizer_files import hugging_face_files


def export_model(path, backbone, preprocessor=None, head=None):
    """Writes a model in the Hugging Face format.

    Args:
        path: path of the folder, made if missing. Files of the same names are replaced when all are written.
        backbone: a `GemmaBackbone`. LoRA adapters are merged.
        preprocessor: optional, with the tokenizer that is written as well.
        head: optional variable `[D, 1]`, of a reward model.

    Raises:
        ValueError: for a quantised backbone, for a vocabulary that the format cannot describe, and for numbers that are
            not finite; before any file is replaced.
    """
    sizes = canonical.Sizes(**{name: getattr(backbone, name) for name in canonical.Sizes._fields})
    tensors = _tensors(path, sizes, backbone)
    besides = {} if head is None else {"head": _stored(path, "head", head)}
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is not None:
        besides["stop_tokens"], besides["chat_template"] = tokenizer.stop_tokens, tokenizer.chat_template
        besides["preprocessor"] = {"add_start_token": preprocessor.add_start_token}
    with _replaced(path) as folder:
        proto = None if tokenizer is None else tokenizer.proto
        hugging_face.write(folder / "model", sizes, tensors, proto, besides=BesidesTensors(**besides))


def export_tokenizer(path, tokenizer, opens_with_bos=True):
    """Writes the files of a tokenizer alone. Arguments and errors as of `export_model`."""
    files = hugging_face_files(tokenizer.proto, tokenizer.chat_template, opens_with_bos, tokenizer.stop_tokens)
    with _replaced(path) as folder:
        (folder / "model").mkdir()
        for name, content in files.items():
            (folder / "model" / name).write_bytes(content)


def _tensors(path, sizes, backbone):
    parts = {entry.name: entry.parts[0] for entry in keras_preset.table_of(sizes)}
    variables = dict(keras_preset.variables_by_name(backbone))
    if quantized := sorted(set(variables) - set(parts)):
        raise ValueError(
            f"Floating weights are exported. Received: a quantised model, with {canonical.listed(quantized)}"
        )
    return {parts[name]: _stored(path, name, variable) for name, variable in variables.items()}


def _stored(path, name, variable):
    dtype = np.dtype(ops.convert_to_numpy(variable[:0]).dtype)
    return StoredTensor(
        os.fspath(path), name, tuple(variable.shape), dtype, lambda: np.asarray(ops.convert_to_numpy(variable))
    )


@contextlib.contextmanager
def _replaced(path):
    """A temporary folder; the files in its `model` take their place in `path` at the end."""
    path = pathlib.Path(path).absolute()
    path.mkdir(parents=True, exist_ok=True)
    # Inside, so that moving a file is renaming it.
    staging = pathlib.Path(tempfile.mkdtemp(prefix=".exporting-", dir=path))
    try:
        yield staging
        for weights in [*path.glob("model*.safetensors"), *path.glob(hugging_face.INDEX_FILE)]:
            if (staging / "model" / hugging_face.SINGLE_FILE).exists() or any(staging.glob("model/*.index.json")):
                weights.unlink()
        for file in sorted((staging / "model").iterdir()):
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
