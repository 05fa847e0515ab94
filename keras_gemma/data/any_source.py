"""A source by its name: a file, a folder, a glob, or a data set of TFDS or the Hub."""

import os
from pathlib import Path

from keras_gemma.data import compressed
from keras_gemma.data import hub
from keras_gemma.data import sources
from keras_gemma.data import text_files

TFDS, HUB = "tfds:", "hf:"
READERS = {
    ".jsonl": sources.from_jsonl,
    ".parquet": sources.from_parquet,
    ".array_record": sources.from_array_record,
    ".csv": text_files.from_csv,
    ".tsv": text_files.from_csv,
    ".txt": lambda paths, fields: text_files.from_text(paths),
}


def from_any(name, fields=None):
    """Examples of whatever a name stands for.

    Args:
        name: path of a file, a folder or a glob, of `.jsonl`, `.parquet`, `.array_record`, `.csv`, `.tsv` or `.txt`
            files, the text formats also compressed as `.gz` or `.zst`; `"tfds:NAME:SPLIT"`; or `"hf:NAME:SPLIT"` of the
            Hugging Face Hub. Without a split, `train`.
        fields: as of `from_jsonl`.

    Returns:
        A `grain.MapDataset` of dicts.

    Raises:
        FileNotFoundError: for a path that matches no file.
        ValueError: for files of another format or of several, and as the reader of the format.

    Example:

    >>> import os, tempfile
    >>> from keras_gemma.data import from_any
    >>> folder = tempfile.TemporaryDirectory()
    >>> with open(os.path.join(folder.name, "one.txt"), "w") as file:
    ...     _ = file.write("The sea was calm.")
    >>> from_any(folder.name)[0]
    {'text': 'The sea was calm.'}
    """
    name = os.fspath(name)
    for prefix, read in ((TFDS, sources.from_tfds), (HUB, hub.from_hub)):
        if name.startswith(prefix):
            of, _, split = name.removeprefix(prefix).partition(":")
            return read(of, split or "train", fields)
    files = sources.matching_files(name, tuple(READERS))
    formats = sorted({_format(file) for file in files})
    unknown = [kind for kind in formats if kind not in READERS]
    if unknown or len(formats) > 1:
        raise ValueError(
            f"Examples lie in files of one of {', '.join(READERS)}, or in {TFDS}NAME:SPLIT or {HUB}NAME:SPLIT. "
            f"Received: {', '.join(unknown or formats)} files in {name}"
        )
    return READERS[formats[0]](files, fields)


def _format(file):
    return Path(compressed.without_suffix(file)).suffix
