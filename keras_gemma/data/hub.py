"""Data sets of the Hugging Face Hub → single examples that can be read in any order.

`datasets`, where it is installed, reads whatever the Hub has. Without it, files are downloaded and read by the readers
of this package: those that the Hub itself has converted to parquet, or the data set's own.
"""

import importlib.util
import re
from pathlib import Path
from pathlib import PurePosixPath

from keras_gemma.data import compressed
from keras_gemma.data import sources
from keras_gemma.data.text_files import from_csv

CONVERTED = "refs/convert/parquet"
READERS = {
    ".parquet": sources.from_parquet,
    ".jsonl": sources.from_jsonl,
    ".csv": from_csv,
    ".tsv": from_csv,
}


def from_hub(name, split="train", fields=None, config=None, revision=None, token=None):
    """Examples of a data set of the Hugging Face Hub, downloaded once.

    Uses the library `datasets` where it is installed, which reads every format and slices splits (`"train[:10%]"`).

    Args:
        name: name on the Hub, such as `"HuggingFaceH4/no_robots"`.
        split: name of a split.
        fields: as of `from_jsonl`.
        config: optional name of a configuration, where the data set has several.
        revision: optional branch, tag or commit. By default the newest.
        token: optional token of a user, for data sets that need one. By default the one that is logged in.

    Returns:
        A `grain.MapDataset` of dicts.

    Raises:
        ValueError: for a split or configuration that does not exist, naming those that do, a data set whose files none
            of our readers reads, and, when it is read, for an example that lacks a field.
        OSError: for a data set that cannot be had.
        ImportError: without the extra `train`.
    """
    if has_datasets():
        return _through_datasets(name, split, fields, config, revision, token)
    return _through_files(name, split, fields, config, revision, token)


def has_datasets():
    """Whether the library `datasets` is installed. A folder of that name, as many have, is none."""
    spec = importlib.util.find_spec("datasets")
    return spec is not None and spec.origin is not None


def _through_datasets(name, split, fields, config, revision, token):
    import datasets

    place = f"{name}, split {split}"
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, token=token)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{place}, cannot be read: {error}") from error
    names = sources.field_names(fields)
    return sources.records_of([HubRows(rows, place)], lambda row: sources.picked(row, names))


class HubRows:
    """The rows of a `datasets.Dataset`."""

    def __init__(self, rows, name):
        self._rows = rows
        self._name = name

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def place(self, index):
        return f"{self._name}, row {index}"


def _through_files(name, split, fields, config, revision, token):
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    hub = huggingface_hub.HfApi(token=token)
    try:
        revision_read = revision or CONVERTED
        files = _asked(name, hub.list_repo_files, name, repo_type="dataset", revision=revision_read)
    except OSError as error:
        if revision is not None or not isinstance(error.__cause__, RevisionNotFoundError):
            raise
        revision_read, files = None, _asked(name, hub.list_repo_files, name, repo_type="dataset")
    chosen = files_of_split(name, files, split, config)
    paths = [
        _asked(name, hub.hf_hub_download, name, file, repo_type="dataset", revision=revision_read) for file in chosen
    ]
    return READERS[_format(chosen[0])](paths, fields)


def _asked(name, function, *args, **kwargs):
    """What a function of the Hub's library gives. Its errors have many kinds: its own, and of two libraries of HTTP."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise OSError(f"The data set {name!r} cannot be had from the Hub: {error}") from error


def files_of_split(name, files, split, config=None):
    """The files of a split, as their paths say it: `CONFIG/SPLIT/0.parquet`, `data/SPLIT-00000.parquet`, `SPLIT.csv`.

    Args:
        name: string, of the data set.
        files: list of paths in it.
        split, config: strings; see `from_hub`.

    Returns:
        A list of paths, of one format.

    Raises:
        ValueError: where there are none, or those of several configurations.
    """
    readable = [file for file in files if _format(file) in READERS]
    if not readable:
        raise ValueError(
            f"{name} has no files of {', '.join(READERS)}. Install `datasets`, which reads others. "
            f"It has: {', '.join(sorted(files)[:10])}"
        )
    configs = sorted({PurePosixPath(file).parts[0] for file in readable if len(PurePosixPath(file).parts) > 2})
    if config is None and len(configs) > 1:
        config = "default" if "default" in configs else None
        if config is None:
            raise ValueError(f"{name} has several configurations, of which `config` names one: {', '.join(configs)}")
    of_config = [file for file in readable if config is None or config in PurePosixPath(file).parts]
    if not of_config:
        raise ValueError(f"{name} has the configurations {', '.join(configs) or 'of none'}. Received: {config!r}")
    found = [file for file in of_config if split in _words(file)]
    if not found:
        raise ValueError(f"{name} has no split {split!r}. Its files are: {', '.join(of_config[:10])}")
    first = _format(found[0])
    return sorted(file for file in found if _format(file) == first)


def _format(file):
    return Path(compressed.without_suffix(file)).suffix


def _words(file):
    """The names of folders of a path, and the words of its file's name: not `train` for `partial-train/0.parquet`."""
    *folders, last = PurePosixPath(file).parts
    return {*folders, *re.split(r"[-_.]", last)}
