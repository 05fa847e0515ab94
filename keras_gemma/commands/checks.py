"""Whether presets, checkpoints and folders that arguments name are there, found out before Keras is imported."""

import difflib
import os
import shlex
from pathlib import Path

from keras_gemma.preset_table import known_presets

DTYPES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
HUB_HANDLES = ("kaggle://", "hf://", "modelscope://", "gs://")
# Where examples and texts come from: data sets of libraries, and files, of which those of text may be compressed.
DATA_SETS = ("tfds:", "hf:")
DATA_KINDS = (".jsonl", ".parquet", ".array_record", ".csv", ".tsv", ".txt")
COMPRESSED = (".gz", ".zst")
DATA_HELP = (
    "file, folder or pattern: .jsonl or .csv (also .gz or .zst), .parquet or .array_record; or tfds:NAME:SPLIT or "
    "hf:NAME:SPLIT"
)
# Files that are a whole checkpoint, which a preset's folder is made of by `convert`.
SINGLE_FILES = {
    ".gguf": "a GGUF file",
    ".h5": "a Keras weights file",
    ".ckpt": "a checkpoint of PyTorch",
    ".bin": "a checkpoint of PyTorch",
    ".safetensors": "a safetensors file",
}


def check_preset(preset):
    """Raises for what `from_preset` will surely refuse.

    Raises:
        FileNotFoundError: for a name that is no preset, file or folder.
        ValueError: for a file, and for a folder that holds no preset, with the command that makes one.
    """
    if preset in known_presets() or preset.startswith(HUB_HANDLES):
        return
    path = Path(preset)
    if path.is_file():
        raise ValueError(f"{preset} is {_kind(path)}, not a preset folder. {_how_to_convert(path)}")
    if not path.is_dir():
        raise FileNotFoundError(_unknown(preset, "--preset takes the name of a preset, a folder or a hub handle"))
    if (path / "preset" / "config.json").exists():
        raise ValueError(f"The folder {preset} holds a preset inside: --preset {shlex.quote(str(path / 'preset'))}")
    if not (path / "config.json").exists():
        raise ValueError(f"The folder {preset} holds no preset: it has no config.json. {_how_to_convert(path)}")


def check_checkpoint(path):
    """Raises a `FileNotFoundError` for a checkpoint of any format that is not there."""
    if path not in known_presets() and not path.startswith(HUB_HANDLES) and not os.path.exists(path):
        raise FileNotFoundError(_unknown(path, "A checkpoint is a file, a folder, a preset or a hub handle"))


def check_data(path, patterns="*?["):
    """Raises a `FileNotFoundError` for a data file that is not there. Patterns and `scheme:` names pass."""
    if ":" in path or any(sign in path for sign in patterns) or os.path.exists(path):
        return
    raise FileNotFoundError(f"No file or folder {path!r}.{_similar_files(path)}")


def check_examples(path):
    """Raises for examples that are not there, or of a format that is not read.

    Raises:
        FileNotFoundError: as `check_data`.
        ValueError: for a file of another format.
    """
    check_data(path)
    name = Path(path)
    suffix = Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix
    is_pattern = any(sign in (suffix or path) for sign in "*?[")
    if path.startswith(DATA_SETS) or name.is_dir() or suffix in DATA_KINDS or is_pattern:
        return
    raise ValueError(
        f"Examples lie in files of {', '.join(DATA_KINDS)}, or in tfds:NAME:SPLIT or hf:NAME:SPLIT. Received: {path}"
    )


def check_new(path):
    """Raises for a target that exists, or whose folder cannot be written.

    Raises:
        FileExistsError: for a path that is taken.
        PermissionError: where nothing can be written.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already. Choose another name, or remove it first.")
    check_writable(path)


def check_writable(path):
    """Raises a `PermissionError` or `NotADirectoryError` where a folder could not be made or written."""
    folder = Path(path).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write in {folder}.")


def _kind(path):
    return SINGLE_FILES.get(path.suffix, "a file")


def _how_to_convert(path):
    if path.is_file() and path.suffix not in SINGLE_FILES:
        return "Give the folder of a preset."
    if path.suffix == ".safetensors":
        return f"Give its folder, with config.json: --preset {shlex.quote(str(path.parent))}"
    target = shlex.quote(str(path.with_suffix("")) if path.suffix else f"{path}_preset")
    return f"Convert it first: keras-gemma convert {shlex.quote(str(path))} {target} --to keras"


def _unknown(name, rule):
    names = known_presets()
    closest = difflib.get_close_matches(name, names, n=1)
    if closest:
        return f"No preset, file or folder {name!r}. Did you mean {closest[0]}?"
    return f"No preset, file or folder {name!r}. {rule}; `keras-gemma presets` lists the names.{_similar_files(name)}"


def _similar_files(path):
    folder = os.path.dirname(path) or "."
    try:
        names = os.listdir(folder)
    except OSError:
        return ""
    closest = difflib.get_close_matches(os.path.basename(path), names, n=1)
    return f" Did you mean {os.path.join(os.path.dirname(path), closest[0])}?" if closest else ""
