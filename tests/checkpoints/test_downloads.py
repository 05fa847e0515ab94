"""Downloads through huggingface_hub from a server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from keras_gemma.checkpoints import convert

COMMIT = "1" * 40
SHAPE = pytest.mark.parametrize("shape", ["2b"], indirect=True)


class Hub(http.server.BaseHTTPRequestHandler):
    """Files of `server.folder` under every revision; the first answer with weights breaks off in the middle."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        path = self.server.folder / name
        self.server.seen.append((self.command, revision, name, self.headers.get("Range")))
        if repository != "someone/gemma" or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body and name.endswith(".safetensors") and not begin and not self.server.broken:
            self.server.broken = True
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content[begin:])

    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture
def hub(tmp_path, shape, reference_model):
    # Large enough for a part of the weights to be on the disk when the server breaks off: 25 MB.
    reference_model({**shape, "intermediate_dim": 2 * 16384}).save_to_preset(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "files", format="hugging_face", progress=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.seen, server.broken = tmp_path / "files", [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def keras_gemma(hub, tmp_path, *arguments):
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "keras_gemma.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


@SHAPE
def test_a_pinned_revision_comes_down_and_goes_on_where_it_broke_off(hub, tmp_path):
    done = keras_gemma(hub, tmp_path, "inspect", "hf://someone/gemma@v1.1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["format"] == "hugging_face" and found["pieces"] == 500 and not found["doubts"]
    assert {revision for _, revision, name, _ in hub.seen if name} == {"v1.1"}
    ranges = [begin for command, _, name, begin in hub.seen if command == "GET" and name == "model.safetensors"]
    first, second = ranges
    assert first is None and int(second.removeprefix("bytes=").rstrip("-")) > 0
    requests = len(hub.seen)
    assert keras_gemma(hub, tmp_path, "inspect", "hf://someone/gemma@v1.1").returncode == 0
    assert not [one for one in hub.seen[requests:] if one[0] == "GET"], "what is there is not fetched again"


@SHAPE
def test_what_the_hub_does_not_have(hub, tmp_path):
    (hub.folder / "model.safetensors").unlink()
    done = keras_gemma(hub, tmp_path, "inspect", "hf://someone/gemma@main")
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr.splitlines()[-1]
