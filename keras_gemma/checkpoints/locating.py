"""What a user calls a preset → where its files are."""

import os
import pathlib

from keras_gemma.checkpoints.json_files import read_json
from keras_gemma.checkpoints.keras_hub_private import get_file

HUB_SCHEMES = ("kaggle", "hf", "modelscope", "gs")
FORBIDDEN = 403


def locate(cls, preset, config_only=False):
    """The folder or hub handle of a preset.

    Args:
        cls: the class to load; its `presets` are the known names.
        preset: a name in `cls.presets`, a hub handle or a local folder. A version of a handle is pinned as in
            `"kaggle://keras/gemma/keras/gemma_2b_en/3"` and `"hf://google/gemma-2b@main"`, a branch, tag or commit.
        config_only: bool. Prefers the configuration in this package to a download.

    Returns:
        A string that `get_file` takes.

    Raises:
        ValueError: for anything else, with the known names.
    """
    preset = os.fspath(preset)
    known = cls.presets
    if preset in known:
        return _of_known(known[preset], config_only)
    if _scheme(preset) in HUB_SCHEMES or os.path.isdir(preset):
        return preset
    raise ValueError(
        "A preset is a known name, a handle such as 'kaggle://keras/gemma/keras/gemma_2b_en' or "
        "'hf://google/gemma-2b', or an existing local folder. "
        f"Received: {preset!r}. Known names: {', '.join(sorted(known))}"
    )


def _of_known(entry, config_only):
    handle, folder = entry.get("kaggle_handle"), entry.get("folder")
    if handle is None or (config_only and folder):
        return folder
    return handle


def _scheme(preset):
    return preset.split("://")[0].lower() if "://" in preset else None


def _file(location, name):
    """Local path of a preset's file, downloaded if need be; a `FileNotFoundError` where the preset has none."""
    _check_inside(location, name)
    try:
        return _fetched(location, name)
    except FileNotFoundError as error:
        _check_that_hub_knows(location, name, error)
        raise


def _check_inside(location, name):
    """Refuses a name that leads out of the preset: the files of a preset may name others."""
    path = pathlib.PureWindowsPath(name) if isinstance(name, str) else None
    if path is None or not path.parts or path.anchor or ".." in path.parts:
        raise ValueError(f"A preset names files of its own, by paths inside it. Received: {name!r} in `{location}`")


def _fetched(location, name):
    handle, revision = _repository(location)
    if _scheme(location) != "hf" or revision is None:
        return get_file(location, name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(handle, name, revision=revision)
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"`{name}` is not in `{location}`.") from error


def _repository(location):
    """A handle without its scheme, and the revision that it pins, or `None`."""
    handle, _, revision = location.partition("://")[2].partition("@")
    return handle, revision or None


def _check_that_hub_knows(location, name, error):
    """Libraries raise the same for a file that is not there, for a hub that is not, and for one that withholds it."""
    chain = list(_chain(error))
    if any(getattr(getattr(one, "response", None), "status_code", None) == FORBIDDEN for one in chain):
        raise PermissionError(f"The hub does not hand out `{name}` of `{location}`. {_one_line(error)}") from error
    if _scheme(location) == "hf" and not _is_absent_from_hugging_face(location, name, chain):
        raise ConnectionError(
            f"The hub did not answer whether `{location}` has the file `{name}`. {_one_line(error)} Try again, or set "
            "`HF_HUB_OFFLINE=1` to take what was downloaded before for all there is."
        ) from error


def _is_absent_from_hugging_face(location, name, chain):
    from huggingface_hub import _CACHED_NO_EXIST
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    if is_offline_mode() or not any(isinstance(one, LocalEntryNotFoundError) for one in chain):
        return True
    handle, revision = _repository(location)
    # An earlier answer of the hub.
    return try_to_load_from_cache(handle, name, revision=revision) is _CACHED_NO_EXIST


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error):
    return " ".join(str(error).split())


def optional_file(location, name):
    """Local path of a preset's file, downloaded if need be, or `None` where the preset has none.

    Raises:
        ConnectionError: where the hub does not say whether the preset has it.
        PermissionError: where the hub does not hand it out.
    """
    try:
        return _file(location, name)
    except FileNotFoundError:
        return None


def required_file(location, name):
    """Local path of a preset's file, downloaded if need be.

    Raises:
        FileNotFoundError: where the preset has none.
        ConnectionError, PermissionError: as `optional_file`.
    """
    try:
        return _file(location, name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The preset `{location}` lacks the file `{name}`. {error}") from error


def shards_of(index):
    """Names of the files that an index of weights names.

    Args:
        index: path of a JSON file with a `weight_map` from tensor to file, or to a list of files.

    Returns:
        A sorted list of strings.

    Raises:
        ValueError: for an index without that, and for a file that is not of the preset itself.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"`{index}` must hold a `weight_map` from tensor to file.")
    names = set()
    for shards in weight_map.values():
        for name in shards if isinstance(shards, list) else [shards]:
            if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
                raise ValueError(f"`{index}` names `{name}`, which is not a file of the preset itself.")
            names.add(name)
    return sorted(names)
