"""Files → single examples that can be read in any order.

ArrayRecord, jsonl, parquet, TFDS → `grain.MapDataset` of dicts; text and csv in `text_files`, the Hub in `hub`
"""

import glob
import json
import os
import threading

import jax
import numpy as np

from keras_gemma.damaged import reading
from keras_gemma.data import compressed
from keras_gemma.data.extras import required
from keras_gemma.staging import staged

SCAN_BYTES = 1 << 26
ROW_GROUPS_IN_MEMORY = 8
NEWLINE = ord("\n")
WHITE_SPACE = tuple(b" \t\r\v\f")


def from_array_record(paths, fields=None, decode=json.loads):
    """Examples of ArrayRecord files.

    Args:
        paths: path of a file or a folder, or a glob, or a list of these; of a folder the files that end with
            `.array_record`, those in its folders too. Write the files with a group size of 1, as `write_array_record`
            does: a larger one slows reading in random order down.
        fields: optional names of the fields to keep; or a dict from the name an example shall have to the name in the
            file, such as `{"prompts": "question", "responses": "answer"}`.
        decode: callable from the bytes of a record to a dict. By default a record is a JSON object in UTF-8.

    Returns:
        A `grain.MapDataset` of dicts.

    Raises:
        FileNotFoundError: for a path that matches no file.
        ValueError: for a file that is empty or no ArrayRecord, and, when it is read, for a record that cannot be
            decoded or lacks a field; naming the file and the record, counted from 0.
        ImportError: without the extra `train`.
    """
    return records_of(array_record_files(paths), _decoder(decode, fields))


def from_jsonl(paths, fields=None):
    """Examples of files with one JSON object a line, in UTF-8, also compressed as `.jsonl.gz` or `.jsonl.zst`.

    Lines that are empty or white space alone are skipped.

    Opening scans the files for their line ends and keeps 8 bytes for each line. What is compressed is written out to a
    temporary file first.

    Args:
        paths, fields: as of `from_array_record`.

    Returns:
        A `grain.MapDataset` of dicts.

    Raises:
        FileNotFoundError, ImportError: as `from_array_record`.
        ValueError: for a file without lines, and, when it is read, for a line that is no JSON object or lacks a field;
            naming the file and the line, counted from 1.
    """
    return records_of([JsonLines(path) for path in _files(paths, (".jsonl",))], _decoder(json.loads, fields))


def from_parquet(paths, fields=None):
    """Examples of parquet files.

    A row group is read as a whole, and the last few stay in memory. To read large files in random order, convert them
    once: `write_array_record(from_parquet(…), path)`.

    Args:
        paths, fields: as of `from_array_record`.

    Returns:
        A `grain.MapDataset` of dicts.

    Raises:
        FileNotFoundError, ImportError: as `from_array_record`.
        ValueError: for a file that has no rows, is no parquet file or lacks a column, and, when it is read, for a null
            in one of `fields`; naming the file and the row, counted from 0.
    """
    names = field_names(fields)
    columns = None if names is None else sorted(set(names.values()))
    files = [ParquetRows(path, columns) for path in _files(paths, (".parquet",))]
    return records_of(files, lambda row: picked(row, names))


def from_tfds(name, split, fields=None, **kwargs):
    """Examples of a TensorFlow Datasets data set, prepared in a format of random access such as ArrayRecord.

    TensorFlow itself is not needed. Text comes as strings, everything else as TFDS decodes it.

    Args:
        name: name of the data set, with its configuration and version if wanted.
        split: name or slice of a split, such as `"train[:90%]"`.
        fields: as of `from_array_record`.
        **kwargs: passed to `tfds.data_source`, such as `data_dir` and `download`.

    Returns:
        A `grain.MapDataset` of dicts.

    Raises:
        ValueError: for a split that is unknown or without examples, and, when it is read, for an example that lacks a
            field.
        ImportError: without the extra `train`.
    """
    tfds = required("tensorflow_datasets")
    place = f"{name}, split {split}"
    try:
        source = tfds.data_source(name, split=split, **kwargs)
        len(source)
    except ValueError as error:
        raise ValueError(f"{place}, cannot be read: {error}") from error
    features = source.dataset_info.features
    texts = [feature for feature, kind in features.items() if isinstance(kind, tfds.features.Text)]
    names = field_names(fields)

    def decode(example):
        return picked({**example, **{text: example[text].decode("utf-8") for text in texts}}, names)

    return records_of([TfdsSplit(source, place)], decode)


def write_array_record(examples, path):
    """Writes examples as JSON, one a record, to an ArrayRecord file that `from_array_record` reads.

    The file appears under its name when it is complete.

    Args:
        examples: iterable of dicts of strings, numbers, and lists and dicts of these.
        path: path of the file to write.

    Raises:
        ValueError: where there is no example.
        TypeError: for values that JSON does not have.
        ImportError: without the extra `train`.
    """
    write_records(path, (json.dumps(example, ensure_ascii=False).encode("utf-8") for example in examples))


def write_records(path, records):
    """Writes `records`, an iterable of bytes, to an ArrayRecord file. See `write_array_record`."""
    array_record_module = required("array_record.python.array_record_module")
    count = 0
    with staged(path, replace=True) as unfinished:
        # Grain reads single records.
        writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1")
        try:
            for record in records:
                writer.write(record)
                count += 1
        finally:
            writer.close()
        if not count:
            raise ValueError(f"At least one example is needed to write {path}. Received none.")


def records_of(files, decode):
    """A `grain.MapDataset` over the decoded records of `files`, which have `len`, `[index]` and `place(index)`.

    Raises:
        ValueError: for a file whose first record cannot be decoded; later ones when they are read.
    """
    datasets = required("grain").MapDataset
    decoded = [Decoded(file, decode) for file in files]
    for file in decoded:
        file[0]
    return datasets.concatenate([datasets.source(file) for file in decoded])


class Decoded:
    """The records of one file through `decode`. Errors say where they arose."""

    def __init__(self, file, decode):
        self._file = file
        self._decode = decode

    def __len__(self):
        return len(self._file)

    def __getitem__(self, index):
        try:
            example = self._decode(self._file[index])
        # A damaged file is an error of many kinds, by the library that reads it.
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise ValueError(f"{self._file.place(index)}: {error}") from error
        return Example(example, Origin(self._file, index)) if isinstance(example, dict) else example


class Example(dict):
    """The fields of one example, which knows the file and row that it comes from.

    Copies, batches and other processes have the fields alone.
    """

    __slots__ = ("origin",)

    def __init__(self, fields, origin):
        super().__init__(fields)
        self.origin = origin

    def __reduce__(self):
        return dict, (dict(self),)


# Grain builds batches of pytrees, and JAX knows a dict by its very type.
jax.tree_util.register_pytree_with_keys(
    Example,
    lambda example: ([(jax.tree_util.DictKey(name), example[name]) for name in sorted(example)], sorted(example)),
    lambda names, values: dict(zip(names, values)),
)


class Origin:
    """Where an example comes from, as text when it is asked for: in a long file, a line's number has to be counted."""

    def __init__(self, file, index):
        self._file = file
        self._index = index

    def __str__(self):
        return self._file.place(self._index)


def origin_of(example):
    """The `Origin` of an example of a file, or `None`."""
    return getattr(example, "origin", None) if isinstance(example, Example) else None


def with_origin(fields, example):
    """`fields` as an example from where `example` comes from."""
    origin = origin_of(example)
    return fields if origin is None else Example(fields, origin)


def _decoder(decode, fields):
    names = field_names(fields)
    return lambda record: picked(decode(record), names)


def field_names(fields):
    """`fields` as a dict from the name that an example shall have to the name in the file; or `None`, for all."""
    if fields is None or isinstance(fields, dict):
        return fields
    if isinstance(fields, str):
        raise ValueError(f"`fields` is a list of names, or a dict from new to old names. Received: {fields!r}")
    return {name: name for name in fields}


def picked(record, names):
    """The fields of a record that `field_names` names.

    Raises:
        ValueError: for a record without fields, and a field that is missing or null.
    """
    if not isinstance(record, dict):
        raise ValueError(f"an example is an object with fields. Received: {str(record)[:200]!r}")
    if names is None:
        return record
    missing = [field for field in names.values() if record.get(field) is None]
    if missing:
        raise ValueError(f"{', '.join(map(repr, missing))} is missing or null. The fields are: {', '.join(record)}")
    return {name: record[field] for name, field in names.items()}


def matching_files(paths, suffixes):
    """The files that paths name.

    Args:
        paths: path of a file or a folder, or a glob, or a list of these.
        suffixes: tuple of strings. Of a folder, files with these are taken, compressed ones too.

    Returns:
        A list of strings.

    Raises:
        FileNotFoundError: for a path that matches no file.
    """
    patterns = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not patterns:
        raise ValueError("At least one path is needed. Received none.")
    return [file for pattern in patterns for file in _matching(os.fspath(pattern), suffixes)]


def _files(paths, suffixes):
    files = matching_files(paths, suffixes)
    for file in files:
        if os.path.getsize(file) == 0:
            raise ValueError(f"{file} is empty.")
    return files


def _matching(pattern, suffixes):
    # A file may have brackets in its name.
    if os.path.isfile(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        found = [os.path.join(folder, file) for folder, _, names in os.walk(pattern) for file in names]
        files = sorted(file for file in found if compressed.without_suffix(file).endswith(suffixes))
        if not files:
            raise FileNotFoundError(f"No file of {', '.join(suffixes)} lies in the folder {pattern!r}.")
        return files
    files = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        raise FileNotFoundError(f"No file is or matches {pattern!r}.")
    return files


def array_record_files(paths):
    """The ArrayRecord files that `paths` name, as files of `records_of`."""
    return [ArrayRecords(path) for path in _files(paths, (".array_record",))]


class ArrayRecords:
    """The records of an ArrayRecord file."""

    def __init__(self, path):
        self._path = path
        with reading(path, "ArrayRecord file"):
            self._records = required("grain").sources.ArrayRecordDataSource(path)
        if not len(self._records):
            raise ValueError(f"{path} has no records.")

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]

    def place(self, index):
        return f"{self._path}, record {index}"


class JsonLines:
    """The lines of a text file as bytes."""

    def __init__(self, path):
        self._path = path
        self._contents = compressed.Contents(path)
        self._starts, self._ends = _lines(self._contents.path)
        if not len(self._starts):
            raise ValueError(f"{path} has no lines.")
        self._file = None

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, index):
        start, end = int(self._starts[index]), int(self._ends[index])
        if self._file is None:
            self._file = open(self._contents.path, "rb", buffering=0)  # noqa: SIM115
        # Several threads read, so there must be no common position in the file.
        return os.pread(self._file.fileno(), end - start, start)

    def place(self, index):
        start = int(self._starts[index])
        contents = np.memmap(self._contents.path, np.uint8, mode="r")[:start]
        chunks = (contents[offset : offset + SCAN_BYTES] for offset in range(0, start, SCAN_BYTES))
        return f"{self._path}, line {sum(int(np.sum(chunk == NEWLINE)) for chunk in chunks) + 1}"

    def __getstate__(self):
        return {**self.__dict__, "_file": None}


def _lines(path):
    """Where the lines of a file that are not blank start and end."""
    contents = np.memmap(path, np.uint8, mode="r")
    ends = [
        np.flatnonzero(contents[offset : offset + SCAN_BYTES] == NEWLINE) + offset
        for offset in range(0, len(contents), SCAN_BYTES)
    ]
    ends = np.concatenate([*ends, [len(contents)]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    blank = ends == starts
    # No JSON object begins with white space for long; the few lines that do are looked at whole.
    first = contents[np.minimum(starts, len(contents) - 1)]
    for line in np.flatnonzero(~blank & np.isin(first, WHITE_SPACE)):
        blank[line] = not contents[starts[line] : ends[line]].tobytes().strip()
    return starts[~blank], ends[~blank]


class ParquetRows:
    """The rows of a parquet file as dicts."""

    def __init__(self, path, columns):
        parquet = required("pyarrow.parquet")
        self._path = path
        self._columns = columns
        with reading(path, "parquet file"):
            self._metadata = parquet.read_metadata(path)
            names = self._metadata.schema.to_arrow_schema().names
            counts = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        missing = sorted(set(columns or ()) - set(names))
        if missing:
            raise ValueError(f"{path} lacks {', '.join(map(repr, missing))}. The fields are: {', '.join(names)}")
        self._group_ends = np.cumsum(counts)
        if not sum(counts):
            raise ValueError(f"{path} has no rows.")
        self._groups, self._lock = {}, threading.Lock()

    def __len__(self):
        return int(self._group_ends[-1])

    def __getitem__(self, index):
        group = int(np.searchsorted(self._group_ends, index, side="right"))
        first = int(self._group_ends[group - 1]) if group else 0
        return self._group(group).slice(index - first, 1).to_pylist()[0]

    def place(self, index):
        return f"{self._path}, row {index}"

    def _group(self, index):
        with self._lock:
            if index not in self._groups:
                while len(self._groups) >= ROW_GROUPS_IN_MEMORY:
                    del self._groups[next(iter(self._groups))]
                self._groups[index] = self._read(index)
            return self._groups[index]

    def _read(self, group):
        with required("pyarrow.parquet").ParquetFile(self._path, metadata=self._metadata) as file:
            return file.read_row_group(group, columns=self._columns)

    def __getstate__(self):
        return {**self.__dict__, "_groups": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update({**state, "_lock": threading.Lock()})


class TfdsSplit:
    """The examples of a split."""

    def __init__(self, source, name):
        self._source = source
        self._name = name

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]

    def place(self, index):
        return f"{self._name}, example {index}"
