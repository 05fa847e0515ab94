"""Files in, dicts out, in any order; and errors that say where."""

import json
import subprocess
import sys
import textwrap

import cloudpickle
import numpy as np
import pytest

from keras_gemma import data

EXAMPLES = [{"id": i, "text": f"the License {i}\nsays “{i}”"} for i in range(7)]
PAIRS = [{"question": "Hi?", "answer": "Yo", "url": "a"}, {"question": "12?", "answer": "34", "url": "b"}]


def write_jsonl(path, examples):
    path.write_text("\n".join(json.dumps(example, ensure_ascii=False) for example in examples) + "\n", "utf-8")


def write_parquet(path, examples):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(examples), path, row_group_size=3)


def write_array_record(path, examples):
    data.write_array_record(examples, path)


FORMATS = {
    "jsonl": (write_jsonl, data.from_jsonl),
    "parquet": (write_parquet, data.from_parquet),
    "array_record": (write_array_record, data.from_array_record),
}


@pytest.fixture(params=FORMATS)
def files(request, tmp_path):
    """`files(examples, name)` writes a file and gives its path; `files.read` reads a source."""
    write, read = FORMATS[request.param]

    def make(examples=EXAMPLES, name="a"):
        path = tmp_path / f"{name}.{request.param}"
        write(path, examples)
        return path

    make.read = read
    make.folder = tmp_path
    make.format = request.param
    return make


# === What is read ===


def test_examples_come_back_in_any_order(files):
    source = files.read(files())
    assert len(source) == 7
    assert [source[i] for i in (6, 0, 3, 2, 5, 1, 4)] == [EXAMPLES[i] for i in (6, 0, 3, 2, 5, 1, 4)]


def test_many_threads_read_the_same_examples(files):
    source = files.read([files(), files(EXAMPLES[::-1], "b")])
    assert list(source.repeat(20)) == (EXAMPLES + EXAMPLES[::-1]) * 20


def test_globs_lists_and_several_files_make_one_source(files):
    first, second = files(EXAMPLES[:2], "part-0"), files(EXAMPLES[2:], "part-1")
    for paths in (str(files.folder / "part-*"), [first, second], [str(files.folder / "part-0*"), str(second)]):
        assert list(files.read(paths)) == EXAMPLES
    assert list(files.read([second, first])) == EXAMPLES[2:] + EXAMPLES[:2]


def test_a_path_with_brackets_is_a_file(files):
    assert list(files.read(files(name="a[1]"))) == EXAMPLES


def test_fields_are_picked_and_renamed(files):
    path = files(PAIRS)
    assert list(files.read(path, fields=["answer"])) == [{"answer": "Yo"}, {"answer": "34"}]
    renamed = files.read(path, fields={"prompts": "question", "responses": "answer"})
    assert list(renamed) == [{"prompts": "Hi?", "responses": "Yo"}, {"prompts": "12?", "responses": "34"}]


def test_dialogues_come_back(files):
    dialogues = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "model", "content": "Yo"}]}] * 2
    assert list(files.read(files(dialogues))) == dialogues


def test_a_source_goes_to_other_processes(files):
    source = files.read(files())
    assert source[0] == EXAMPLES[0]
    copies = [cloudpickle.loads(cloudpickle.dumps(parent)) for parent in source.parents]
    assert [copy[i] for copy in copies for i in range(len(copy))] == EXAMPLES


def test_lines_end_as_on_any_machine_and_blank_ones_are_skipped(tmp_path, monkeypatch):
    # Blocks of 4 bytes, as if the file were large.
    monkeypatch.setattr(data.sources, "SCAN_BYTES", 4)
    (tmp_path / "a").write_bytes(b'\n{"a": 1}\r\n\r\n\n{"a": 2}\n{"a": 3}')
    assert list(data.from_jsonl(tmp_path / "a")) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_records_of_another_encoding_are_decoded(tmp_path):
    data.sources.write_records(tmp_path / "a", [b"Hi", b"Yo"])
    source = data.from_array_record(tmp_path / "a", decode=lambda record: {"text": record.decode()})
    assert list(source) == [{"text": "Hi"}, {"text": "Yo"}]


# === TFDS ===


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a small data set in ArrayRecord, made without a network."""
    import tensorflow_datasets as tfds

    class Sayings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path_factory.mktemp("package")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"said": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"said": f"“{i}”", "number": i}) for i in range(6))

    folder = tmp_path_factory.mktemp("tfds")
    Sayings(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_is_read_with_strings(prepared):
    source = data.from_tfds("sayings", "train", data_dir=prepared)
    assert sorted((example["number"], example["said"]) for example in source) == [(i, f"“{i}”") for i in range(6)]
    renamed = data.from_tfds("sayings", "train[:50%]", fields={"text": "said"}, data_dir=prepared)
    assert len(renamed) == 3 and set(renamed[0]) == {"text"}


def test_tfds_errors_name_the_split(prepared):
    with pytest.raises(ValueError, match=r"sayings, split train, example 0: 'text' is missing.*said"):
        data.from_tfds("sayings", "train", fields=["text"], data_dir=prepared)
    with pytest.raises(ValueError, match=r"sayings, split train.*, cannot be read"):
        data.from_tfds("sayings", "train[:0]", data_dir=prepared)


@pytest.mark.slow
def test_tfds_needs_no_tensorflow(prepared):
    script = f"""
        from importlib.machinery import PathFinder

        find = PathFinder.find_spec
        hidden = "tensorflow", "tensorflow_text"
        PathFinder.find_spec = lambda name, *args: None if name.partition(".")[0] in hidden else find(name, *args)
        from keras_gemma import data
        source = data.from_tfds("sayings", "train", data_dir={str(prepared)!r})
        print(sorted(example["said"] for example in source)[0])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stdout.strip() == "“0”", done.stderr


# === Errors ===


def test_missing_files_are_named(files):
    for path in (files.folder / "nothing", f"{files.folder}/no-*"):
        with pytest.raises(FileNotFoundError, match=r"nothing|no-\*"):
            files.read(path)
    with pytest.raises(ValueError, match="At least one path"):
        files.read([])


def test_empty_files_are_named(files):
    path = files.folder / "empty"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty is empty"):
        files.read([files(), path])


def test_files_of_another_format_are_named(files):
    path = files.folder / "other"
    path.write_bytes(b"what is this " * 1000)
    with pytest.raises(ValueError, match="other"):
        files.read(path)


def test_a_missing_field_is_named_with_its_file_at_once(files):
    path = files(PAIRS)
    with pytest.raises(ValueError, match=r"a\.\w+.*'text'.*question, answer, url"):
        files.read(path, fields=["text"])
    with pytest.raises(ValueError, match="list of names"):
        files.read(path, fields="text")


def test_a_field_that_a_later_example_lacks_is_named_with_its_place(files):
    path = files([{"text": "a"}, {"text": "b"}, {"text": None}])
    place = {"jsonl": "line 3", "parquet": "row 2", "array_record": "record 2"}[files.format]
    source = files.read(path, fields=["text"])
    assert source[1] == {"text": "b"}
    with pytest.raises(ValueError, match=rf"a\.\w+, {place}: 'text' is missing or null"):
        source[2]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n')
    source = data.from_jsonl(path)
    for index, line in ((1, 3), (2, 4), (3, 5)):
        with pytest.raises(ValueError, match=rf"a\.jsonl, line {line}: "):
            source[index]


def test_a_broken_record_is_named(tmp_path):
    data.sources.write_records(tmp_path / "a", [b"{}", b"{"])
    with pytest.raises(ValueError, match="a, record 1: "):
        data.from_array_record(tmp_path / "a")[1]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    data.write_array_record(EXAMPLES, path)
    for broken in (iter([{"text": "a"}, {"text": object()}]), []):
        with pytest.raises((TypeError, ValueError), match=r"JSON|At least one"):
            data.write_array_record(broken, path)
    assert list(data.from_array_record(path)) == EXAMPLES
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("module, read", [("grain", "from_jsonl"), ("pyarrow.parquet", "from_parquet")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, read):
    path = tmp_path / "a"
    path.write_text("{}")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "keras_gemma\[train\]"'):
        getattr(data, read)(path)
