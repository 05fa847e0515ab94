"""Files of text, and of comma-separated values → single examples that can be read in any order."""

import csv
import io
import os
from pathlib import Path

from keras_gemma.data import compressed
from keras_gemma.data import long_texts
from keras_gemma.data import sources
from keras_gemma.data.extras import required

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def from_text(paths):
    """Documents, one a file, in UTF-8.

    Files that are empty are left out, and a warning counts them.

    Args:
        paths: path of a file, a folder, whose `.txt` files and those of its folders are taken, a glob, or a list of
            these. Files may be compressed, `.txt.gz` or `.txt.zst`.

    Returns:
        A `grain.MapDataset` of dicts with the field `text`.

    Raises:
        FileNotFoundError: for a path that matches no file.
        ValueError: where all files are empty, and, when it is read, for a file that is not UTF-8; naming it.
        ImportError: without the extra `train`.
    """
    files = sources.matching_files(paths, (".txt",))
    written = [file for file in files if os.path.getsize(file)]
    if not written:
        raise ValueError(f"At least one file needs a text. Received: {len(files)} empty files, the first {files[0]}")
    if len(written) < len(files):
        long_texts.warn([f"{len(files) - len(written):,} of {len(files):,} files are empty and are left out."])
    return sources.records_of([Documents(written)], _document)


def _document(content):
    # A mark of the byte order is no part of a text.
    return {"text": content.decode("utf-8-sig")}


class Documents:
    """The contents of files, as bytes."""

    def __init__(self, files):
        self._files = files

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        return compressed.contents(self._files[index])

    def place(self, index):
        return os.fspath(self._files[index])


def from_csv(paths, fields=None, delimiter=None):
    """Examples of comma-separated values, in UTF-8, whose first line names the fields.

    All values are strings. Those with commas or line ends stand in double quotes. The rows of a file are in memory.

    Args:
        paths, fields: as of `from_jsonl`; a folder's `.csv` and `.tsv` files are taken.
        delimiter: optional string between two values. By default a tab in `.tsv` files and a comma in others.

    Returns:
        A `grain.MapDataset` of dicts.

    Raises:
        FileNotFoundError, ImportError: as `from_jsonl`.
        ValueError: for a file without rows, with rows of several lengths, fields of one name or another encoding, and
            one that lacks a field; naming the file, and the row, counted from 0, where it is one.
    """
    names = sources.field_names(fields)
    files = [CsvRows(path, delimiter) for path in sources.matching_files(paths, tuple(DELIMITERS))]
    return sources.records_of(files, lambda row: sources.picked(row, names))


class CsvRows:
    """The rows of a file as dicts of strings."""

    def __init__(self, path, delimiter):
        self._path = os.fspath(path)
        suffix = Path(compressed.without_suffix(path)).suffix
        delimiter = delimiter or DELIMITERS.get(suffix, ",")
        content = compressed.contents(path)
        try:
            names = _header(content, delimiter)
            self._table = _table(content, names, delimiter)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as values between {delimiter!r}: {error}") from error
        if not len(self._table):
            raise ValueError(f"{path} has no rows.")

    def __len__(self):
        return len(self._table)

    def __getitem__(self, index):
        return self._table.slice(index, 1).to_pylist()[0]

    def place(self, index):
        return f"{self._path}, row {index}"


def _header(content, delimiter):
    names = next(csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline=""), delimiter=delimiter), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"a field has a name of its own, but there are several {', '.join(map(repr, twice))}")
    return names


def _table(content, names, delimiter):
    arrow, arrow_csv = required("pyarrow"), required("pyarrow.csv")
    return arrow_csv.read_csv(
        io.BytesIO(content),
        # The numbers of rows in errors are those of a single thread.
        read_options=arrow_csv.ReadOptions(use_threads=False),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        # A text may look like a number, or say "null".
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(names, arrow.string()), strings_can_be_null=False
        ),
    )
