"""Downloads and uploads through the hubs' own libraries from servers on this machine that answer as the hubs do."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import filelock
import keras_hub
import numpy as np
import pytest

from keras_gemma.checkpoints import convert
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

COMMIT = "1" * 40
# Without the pauses between one attempt to reach a server and the next.
COMMAND = """
import sys, time
from keras_gemma import cli
time.sleep = lambda seconds: None
sys.exit(cli.main(sys.argv[1:]))
"""
# Where kagglehub looks for the hub in its own tests.
KAGGLE_PORT = 7777
SHAPE = pytest.mark.parametrize("shape", ["2b"], indirect=True)


class Server(http.server.BaseHTTPRequestHandler):
    """Files of `server.folder`; the first answer with the largest of them breaks off in the middle."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        if self.server.closes_with and self.path.endswith(self.server.closes_with):
            self.server.shutdown()
            self.server.server_close()
            self.close_connection = True
        self._answer(body=True)

    def _send_file(self, name, body, headers):
        path = self.server.folder / name
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        content = path.read_bytes()
        self.send_response(206 if begin else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if body and name == self.server.largest and not self.server.broken:
            self.server.broken = True
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content[begin:])

    def _send(self, status, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *args):
        """Says nothing."""


class HuggingFace(Server):
    def _answer(self, body):
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.server.seen.append((self.command, revision, name, self.headers.get("Range")))
        path = self.server.folder / name
        if repository != "someone/gemma" or not path.is_file():
            self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self._send_file(name, body, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})


class Accepting(HuggingFace):
    """Also takes what is uploaded, into `server.folder`."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        where = self.path.removeprefix("/api/").partition("?")[0]
        self.server.seen.append(("POST", None, where, None))
        address = f"http://127.0.0.1:{self.server.server_port}/someone/gemma"
        answers = {
            "repos/create": lambda: {"url": address},
            "validate-yaml": dict,
            "models/someone/gemma/preupload/main": lambda: self._ways_to_upload(json.loads(content)),
            "models/someone/gemma/commit/main": lambda: self._commit(content, address),
        }
        answer = json.dumps(answers[where]()).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _ways_to_upload(self, asked):
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked["files"]]}

    def _commit(self, lines, address):
        for item in map(json.loads, lines.splitlines()):
            if item["key"] == "file":
                path = self.server.folder / item["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(item["value"]["content"]))
        return {"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT}


class Kaggle(Server):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(("POST", asked.get("versionNumber"), asked.get("path"), None))
        if asked["path"] == self.server.withheld:
            self._send(403)
            return
        found = (self.server.folder / asked["path"]).is_file()
        location = f"http://localhost:{KAGGLE_PORT}/{asked['path']}"
        self._send(*((302,) if found else (404,)), **({"Location": location} if found else {}))

    def _answer(self, body):
        name = self.path.lstrip("/")
        self.server.seen.append((self.command, None, name, self.headers.get("Range")))
        self._send_file(name, body, {})


@contextlib.contextmanager
def served_as_kaggle(folder, largest):
    """Kaggle's port is fixed: the tests of other processes wait for it."""
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"port_{KAGGLE_PORT}.lock")
    with lock, served(folder, Kaggle, largest, KAGGLE_PORT) as server:
        yield server


@contextlib.contextmanager
def served(folder, handler, largest, port=0):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.folder, server.seen, server.broken, server.largest = folder, [], False, largest
    server.closes_with, server.withheld = None, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def source(tmp_path, shape, reference_model):
    # Large enough for a part of the weights to be on the disk when the server breaks off: 25 MB.
    reference_model({**shape, "intermediate_dim": 2 * 16384}).save_to_preset(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def hugging_face(tmp_path, source):
    convert(source, tmp_path / "files", format="hugging_face", progress=False)
    with served(tmp_path / "files", HuggingFace, "model.safetensors") as server:
        yield server


def keras_gemma(tmp_path, *arguments, **environment):
    return python(tmp_path, COMMAND, *arguments, **environment)


def python(tmp_path, code, *arguments, **environment):
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "KAGGLEHUB_CACHE": str(tmp_path / "cache"), "KAGGLE_USERNAME": "someone", "KAGGLE_KEY": "key", **environment,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )


UPLOAD = """
import sys, keras_hub
keras_hub.upload_preset("hf://someone/gemma", sys.argv[1])
"""


@SHAPE
@pytest.mark.parametrize("made_by", ["save_to_preset", "convert"])
def test_keras_hub_uploads_what_is_saved(tmp_path, shape, make_preprocessor, logits, made_by):
    model, folder = GemmaCausalLM(GemmaBackbone(**shape), make_preprocessor()), tmp_path / "saved"
    model.save_to_preset(folder)
    if made_by == "convert":
        convert(folder, tmp_path / "files", format="hugging_face", progress=False)
        convert(tmp_path / "files", folder := tmp_path / "converted", format="keras", progress=False)
    (tmp_path / "arrived").mkdir()
    with served(tmp_path / "arrived", Accepting, None) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        done = python(tmp_path, UPLOAD, str(folder), HF_ENDPOINT=endpoint, HF_TOKEN="token")
    assert done.returncode == 0, done.stderr
    # With a card that keras-hub writes.
    assert names_in(tmp_path / "arrived") == {*names_in(folder), "README.md"}
    for load in (GemmaCausalLM.from_preset, keras_hub.models.GemmaCausalLM.from_preset):
        arrived = load(str(tmp_path / "arrived"))
        np.testing.assert_allclose(logits(arrived), logits(model), atol=1e-5)
        text = "as it is, 12\n"
        assert list(arrived.preprocessor.tokenizer(text)) == list(model.preprocessor.tokenizer(text))


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def begins(server, name):
    return [begin for command, _, asked, begin in server.seen if command == "GET" and asked == name]


@SHAPE
def test_a_pinned_revision_of_hugging_face_goes_on_where_it_broke_off(hugging_face, tmp_path):
    endpoint = f"http://127.0.0.1:{hugging_face.server_port}"
    handle = "hf://someone/gemma@v1.1"
    done = keras_gemma(tmp_path, "inspect", handle, "--json", HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["format"] == "hugging_face" and found["pieces"] == 500 and not found["doubts"]
    assert {revision for _, revision, name, _ in hugging_face.seen if name} == {"v1.1"}
    first, second = begins(hugging_face, "model.safetensors")
    assert first is None and int(second.removeprefix("bytes=").rstrip("-")) > 0
    requests = len(hugging_face.seen)
    assert keras_gemma(tmp_path, "inspect", handle, HF_ENDPOINT=endpoint).returncode == 0
    assert not [one for one in hugging_face.seen[requests:] if one[0] == "GET" and one[2]], (
        "what is there is not fetched again"
    )
    (hugging_face.folder / "model.safetensors").unlink()
    done = keras_gemma(tmp_path, "inspect", "hf://someone/gemma@main", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr.splitlines()[-1]


@SHAPE
def test_a_version_of_kaggle_comes_down_though_the_first_answer_breaks_off(source, tmp_path):
    handle = "kaggle://someone/gemma/keras/small/3"
    with served_as_kaggle(source, "model.weights.h5") as server:
        broken = keras_gemma(tmp_path, "inspect", handle, KAGGLE_API_ENVIRONMENT="TEST")
        assert broken.returncode == 1
        assert broken.stderr.splitlines()[-1].startswith("keras-gemma: error: ")
        done = keras_gemma(tmp_path, "inspect", handle, KAGGLE_API_ENVIRONMENT="TEST")
    assert done.returncode == 0, done.stderr
    assert "format keras" in done.stdout and "doubts: none" in done.stdout
    assert {version for command, version, _, _ in server.seen if command == "POST"} == {3}
    # kagglehub takes a single file in one answer, and from its beginning when that broke off.
    assert begins(server, "model.weights.h5") == [None, None]


@SHAPE
def test_a_hub_that_goes_away_is_not_one_without_a_tokenizer(source, tmp_path):
    convert(source, tmp_path / "files", format="hugging_face", progress=False)
    arguments = ("convert", "hf://someone/gemma", str(tmp_path / "target"), "--to", "keras")
    with served(tmp_path / "files", HuggingFace, None) as server:
        server.closes_with, endpoint = "model.safetensors", f"http://127.0.0.1:{server.server_port}"
        done = keras_gemma(tmp_path, *arguments, HF_ENDPOINT=endpoint)
    assert done.returncode == 1
    assert re.search("did not answer|cannot be reached", done.stderr.splitlines()[-1])
    assert not (tmp_path / "target").exists()
    # What was downloaded before is all there is, if one says so.
    done = keras_gemma(tmp_path, *arguments, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "target/assets").exists()


@SHAPE
def test_what_kaggle_withholds_is_not_missing(source, tmp_path):
    with served_as_kaggle(source, None) as server:
        server.withheld = "assets/tokenizer/vocabulary.spm"
        arguments = ("convert", "kaggle://someone/gemma/keras/small/3", str(tmp_path / "m.gguf"))
        done = keras_gemma(tmp_path, *arguments, KAGGLE_API_ENVIRONMENT="TEST")
    assert done.returncode == 1
    assert "does not hand out" in done.stderr and "vocabulary.spm" in done.stderr
    assert not (tmp_path / "m.gguf").exists()
