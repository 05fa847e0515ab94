"""Text folders, csv, compressed files and data sets of the Hub, each as other sources are read."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import threading

import cloudpickle
import pyarrow
import pytest
from pyarrow import parquet

from keras_gemma.data import from_any
from keras_gemma.data import from_csv
from keras_gemma.data import from_hub
from keras_gemma.data import from_jsonl
from keras_gemma.data import from_text
from keras_gemma.data.hub import files_of_split

ROWS = [{"prompts": f"Line {i},\n“{i}”", "responses": "007" if i else ""} for i in range(5)]


def compressed(content, suffix):
    if suffix == ".gz":
        return gzip.compress(content)
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def as_bytes(rows, kind):
    if kind == ".jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    between = "," if kind == ".csv" else "\t"
    lines = [["prompts", "responses"], *([f'"{row["prompts"]}"', row["responses"]] for row in rows)]
    return "\n".join(between.join(line) for line in lines).encode("utf-8-sig")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compressed(content, path.suffix) if path.suffix in (".gz", ".zst") else content)
        return path

    return write


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv"])
def test_rows_come_back_from_every_form(write, tmp_path, kind):
    for suffix in ("", ".gz", ".zst"):
        path = write(f"of{kind}{suffix}/rows{kind}{suffix}", as_bytes(ROWS, kind))
        source = from_any(path)
        assert [dict(source[i]) for i in (4, 0, 3, 1, 2)] == [ROWS[i] for i in (4, 0, 3, 1, 2)]
        (copy,) = (cloudpickle.loads(cloudpickle.dumps(parent)) for parent in source.parents)
        assert dict(copy[2]) == ROWS[2]
    everything = from_any(tmp_path / "**" / f"*{kind}*")
    assert len(everything) == 3 * len(ROWS) == len(from_any(tmp_path))
    renamed = from_any(path, fields={"text": "prompts"})
    assert dict(renamed[1]) == {"text": ROWS[1]["prompts"]}
    with pytest.raises(ValueError, match=r"rows.*'body'"):
        from_any(path, fields=["body"])


def test_a_temporary_copy_goes_with_its_source(write, monkeypatch, tmp_path):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    source = from_jsonl(write("rows.jsonl.gz", as_bytes(ROWS, ".jsonl")))
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del source
    assert not list((tmp_path / "temporary").iterdir())


def test_every_file_of_a_folder_is_a_document(write, tmp_path):
    write("texts/b/two.txt.gz", "zwei\n\nAbsätze\r\n".encode())
    write("texts/a.txt", "\N{ZERO WIDTH NO-BREAK SPACE}eins".encode())
    write("texts/c.txt.zst", b"drei")
    write("texts/readme.md", b"no text")
    documents = ["eins", "zwei\n\nAbsätze\r\n", "drei"]
    assert [example["text"] for example in from_text(tmp_path / "texts")] == documents
    assert [example["text"] for example in from_any(tmp_path / "texts")] == documents
    assert [example["text"] for example in from_text([tmp_path / "texts" / "c*", tmp_path / "texts" / "b"])] == [
        "drei",
        documents[1],
    ]
    write("texts/empty.txt", b"")
    with pytest.warns(UserWarning, match="1 of 4 files are empty"):
        assert len(from_text(tmp_path / "texts")) == 3


def test_damaged_files_are_named_with_their_row(write, tmp_path):
    for name, content in {"a.jsonl.gz": b"{}", "a.csv.zst": b"a,b\n1,2", "a.txt.gz": b"text"}.items():
        path = write(name, content)
        path.write_bytes(path.read_bytes()[:-7] + b"\0\0")
        with pytest.raises(ValueError, match=rf"{name}.*damaged"):
            from_any(path)
        path.write_bytes(b"plain")
        with pytest.raises(ValueError, match=rf"{name}.*damaged"):
            from_any(path)
    latin = write("latin.txt", b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: .*utf-8"):
        from_text(latin)
    for content, reason in {
        b"a,b\n1,2\n3": r"#3: Expected 2 columns, got 1",
        b"a,a\n1,2": "a field has a name of its own.*'a'",
        b"a,b\n": "has no rows",
        b"a,b\ncaf\xe9,1": "utf-8",
    }.items():
        with pytest.raises(ValueError, match=rf"(?s)rows\.csv.*{reason}"):
            from_csv(write("rows.csv", content))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No file of \.txt lies in the folder"):
        from_text(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"one of \.jsonl.*Received: \.csv, \.jsonl files"):
        write("mixed/a.jsonl", b"{}")
        write("mixed/b.csv", b"a\n1")
        from_any(tmp_path / "mixed")


# === The Hub ===


class Hub(http.server.BaseHTTPRequestHandler):
    """A data set as the Hub answers for it: files by revision."""

    def do_GET(self):
        kind, *parts = self.path.strip("/").split("?")[0].split("/")
        if kind == "api":
            self._tree(parts[-1].replace("%2F", "/"))
        else:
            revision, path = parts[3].replace("%2F", "/"), "/".join(parts[4:])
            self._send(self.server.revisions[revision][path], path)

    do_HEAD = do_GET

    def _tree(self, revision):
        files = self.server.revisions.get(revision)
        if files is None:
            return self._send(b"{}", "", 404, {"X-Error-Code": "RevisionNotFound"})
        listed = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
        return self._send(json.dumps(listed).encode(), "")

    def _send(self, content, name, status=200, headers=()):
        self.send_response(status)
        tag = hashlib.sha256(content).hexdigest()
        about = {"Content-Length": len(content), "ETag": f'"{tag}"', "X-Repo-Commit": "1" * 40, **dict(headers)}
        for header in about.items():
            self.send_header(header[0], str(header[1]))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        """Says nothing."""


@contextlib.contextmanager
def served(revisions):
    server = http.server.ThreadingHTTPServer(("localhost", 0), Hub)
    server.revisions = revisions
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def as_parquet(rows):
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def test_a_data_set_of_the_hub_is_downloaded_by_its_split(monkeypatch, tmp_path):
    monkeypatch.setattr("keras_gemma.data.hub.has_datasets", lambda: False)
    converted = {"default/train/0000.parquet": as_parquet(ROWS[:3]), "default/train/0001.parquet": as_parquet(ROWS[3:])}
    own = {
        "data/train.jsonl": as_bytes(ROWS, ".jsonl"),
        "data/test.jsonl": as_bytes(ROWS[:1], ".jsonl"),
        "README.md": b"",
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def use(endpoint):
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    for revisions in ({"refs/convert/parquet": converted, "main": own}, {"main": own}):
        with served(revisions) as endpoint:
            use(endpoint)
            assert [dict(row) for row in from_any("hf:me/pairs")] == ROWS
            with pytest.raises(ValueError, match="me/pairs has no split 'dev'"):
                from_hub("me/pairs", "dev")
    with served({"main": own}) as endpoint:
        use(endpoint)
        assert [dict(row) for row in from_hub("me/pairs", "test", fields={"text": "prompts"})] == [
            {"text": "Line 0,\n“0”"}
        ]
        with pytest.raises(OSError, match="me/pairs"):
            from_hub("me/pairs", revision="none")
    # Nobody answers.
    with pytest.raises(OSError, match="me/pairs"):
        from_hub("me/pairs")


def test_the_rows_of_the_datasets_library_are_read(monkeypatch):
    import sys
    import types

    class Rows(list):
        """As `datasets.Dataset`: a length and rows by their number."""

    asked = {}
    fake = types.ModuleType("datasets")
    fake.__spec__ = types.SimpleNamespace(origin="datasets/__init__.py")
    fake.load_dataset = lambda name, config, **kwargs: asked.update(name=name, config=config, **kwargs) or Rows(ROWS)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert dict(from_hub("me/pairs", "train[:5]", config="a")[4]) == ROWS[4]
    assert asked == {"name": "me/pairs", "config": "a", "split": "train[:5]", "revision": None, "token": None}
    with pytest.raises(ValueError, match=r"me/pairs, split train, row 0: 'body'"):
        from_hub("me/pairs", fields=["body"])


def test_files_of_a_split_are_told_by_their_paths():
    files = ["a/train/0.parquet", "a/partial-train/0.parquet", "b/train/0.parquet", "b/test/0.parquet"]
    assert files_of_split("n", files, "train", "a") == ["a/train/0.parquet"]
    with pytest.raises(ValueError, match=r"several configurations.*a, b"):
        files_of_split("n", files, "train")
    with pytest.raises(ValueError, match="no split 'test'"):
        files_of_split("n", files, "test", "a")
    with pytest.raises(ValueError, match="Received: 'c'"):
        files_of_split("n", files, "train", "c")
    with pytest.raises(ValueError, match="Install `datasets`"):
        files_of_split("n", ["train.webm", "README.md"], "train")
    assert files_of_split(
        "n", ["data/train-0-of-2.csv.gz", "data/train-1-of-2.csv.gz", "data/test-0.csv.gz"], "train"
    ) == [
        "data/train-0-of-2.csv.gz",
        "data/train-1-of-2.csv.gz",
    ]
