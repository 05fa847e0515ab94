import errno
import io
import json
import subprocess
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from keras_gemma import cli
from keras_gemma.commands import arguments
from keras_gemma.commands import chat
from keras_gemma.commands import failures
from keras_gemma.commands import generate

ANSWER = ["Sun", "ny ", "days."]


class FakeModel:
    """Answers everything with `ANSWER` and remembers what it was asked."""

    def __init__(self, sequence_length=1000):
        self.preprocessor = self
        self.sequence_length = sequence_length
        self.asked = []
        self.sampling = []
        self.engine = self
        self.fixed = None

    def fix_sizes(self, columns):
        self.fixed = columns

    def prompt_ids(self, messages):
        return [0] * sum(len(message["content"]) for message in messages)

    def stream(self, prompt, **sampling):
        self.asked.append(prompt)
        self.sampling.append(sampling)
        if prompt == "too long" or (isinstance(prompt, list) and prompt[-1]["content"] == "too long"):
            raise ValueError("A prompt must be shorter\nthan the whole sequence.")
        yield from ANSWER

    def generate(self, prompts, strip_prompt=False, **sampling):
        self.asked.append(prompts)
        self.sampling.append(sampling)
        return [("" if strip_prompt else prompt) + "".join(ANSWER) for prompt in prompts]


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    for command in (generate, chat):
        monkeypatch.setattr(command, "load_model", lambda args: fake)
    return fake


def typed(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


class TestStart:
    @pytest.mark.parametrize(
        "line, status, said",
        [
            ("--help", 0, "examples:"),
            ("generate --help", 0, "--max-new-tokens"),
            ("chat --help", 0, "/system TEXT"),
            ("sft --help", 0, "--warmup-steps"),
            ("presets", 0, "gemma_tiny_en"),
            ("generate --preset gemma_tiny_em Hi", 1, "Did you mean gemma_tiny_en?"),
            ("generate --preset LICENSE Hi", 1, "LICENSE is a file, not a preset folder"),
            ("generate --preset some.gguf Hi", 1, "Convert it first: keras-gemma convert some.gguf some --to keras"),
            ("chat --preset tests", 1, "no config.json"),
            ("generate --max-new-token 3 Hi", 2, "did you mean --max-new-tokens?"),
            ("generate --dtype bfloat Hi", 2, "did you mean bfloat16?"),
            ("plan --config gemma_2b_v5e_17", 2, "did you mean gemma_2b_v5e_16?"),
            ("convert nothing.gguf out", 1, "No preset, file or folder 'nothing.gguf'"),
            ("convert gemma_tiny_en LICENSE --to keras", 1, "LICENSE exists already"),
            ("inspect README.mt", 1, "Did you mean README.md?"),
            ("sft none.jsonl --output out", 1, "No file or folder 'none.jsonl'"),
            ("sft LICENSE --output out", 1, ".jsonl, .parquet, .array_record"),
        ],
    )
    def test_what_needs_no_model_imports_nothing_heavy_and_says_one_line(self, line, status, said, tmp_path):
        for name in ("LICENSE", "README.md", "some.gguf"):
            (tmp_path / name).write_text("")
        (tmp_path / "tests").mkdir()
        code = (
            "import sys; from keras_gemma import cli\n"
            f"try: status = cli.main({line.split()!r})\n"
            "except SystemExit as exit: status = exit.code\n"
            "heavy = {'keras', 'jax', 'numpy', 'tensorflow', 'keras_hub', 'rich'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "sys.exit(status)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == (status != 0)

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as exit:
            cli.main(["--version"])
        assert exit.value.code == 0
        assert capsys.readouterr().out.startswith("keras-gemma ")


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["sing"],
            ["generate"],
            ["generate", "--max-new-tokens", "0", "Hello"],
            ["generate", "--max-new-tokens", "many", "Hello"],
            ["generate", "--temperature", "-1", "Hello"],
            ["generate", "--temperature", "nan", "Hello"],
            ["generate", "--temperature", "inf", "Hello"],
            ["generate", "--p", "1.5", "Hello"],
            ["generate", "--sampler", "sorcery", "Hello"],
            ["generate", "--sampler", "greedy", "--temperature", "2", "Hello"],
            ["generate", "--sampler", "top_k", "--p", "0.5", "Hello"],
            ["chat", "--sampler", "random", "--k", "3"],
        ],
    )
    def test_wrong_usage_exits_with_2_before_anything_is_loaded(self, arguments, capsys, monkeypatch):
        for command in (generate, chat):
            monkeypatch.setattr(command, "load_model", lambda args: pytest.fail("loaded a model"))
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "error:" in line and "--help)" in line

    def test_a_failure_is_one_line_and_exits_with_1(self, capsys, monkeypatch):
        def load_model(args):
            raise ValueError("No preset 'gemma_9b'.\n  Known: gemma_tiny_en")

        monkeypatch.setattr(generate, "load_model", load_model)
        assert cli.main(["generate", "Hello"]) == 1
        assert capsys.readouterr().err == "keras-gemma: error: No preset 'gemma_9b'. Known: gemma_tiny_en\n"
        with pytest.raises(ValueError):
            cli.main(["generate", "--traceback", "Hello"])

    def test_control_c_exits_with_130(self, monkeypatch):
        def load_model(args):
            raise KeyboardInterrupt

        monkeypatch.setattr(generate, "load_model", load_model)
        assert cli.main(["generate", "Hello"]) == 130


class FakeResponse:
    status_code = 403


class ConnectError(Exception):
    """As an HTTP library calls it."""


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def withheld():
    error = RuntimeError("403 Client Error for url https://...")
    error.response = FakeResponse()
    return error


@pytest.mark.parametrize(
    "error, said",
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "No file or folder a.txt."),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "No permission to read or write a.txt."),
        (OSError(errno.ENOSPC, "No space left on device", "a.txt"), "The disk is full: a.txt could not be written."),
        (FileNotFoundError("The preset lacks the file `x`."), "The preset lacks the file `x`."),
        (ModuleNotFoundError("No module named 'grain.x'", name="grain.x"), "pip install 'keras_gemma[train]'"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), "--dtype bfloat16"),
        (raised_from(ValueError("x"), ConnectError("[Errno -3] name resolution")), "The hub cannot be reached."),
        (raised_from(ValueError("x"), withheld()), "accepted Gemma's terms"),
        (ValueError("two\n  lines"), "two lines"),
        (KeyError(), "KeyError"),
    ],
)
def test_errors_become_sentences_with_the_next_step(error, said):
    sentence = failures.sentence_of(error)
    assert said in sentence and "\n" not in sentence and "[Errno 2]" not in sentence


class TestGenerate:
    def test_streams_each_prompt_with_its_continuation(self, model, capsys):
        assert cli.main(["generate", "Good: ", "Bad: "]) == 0
        assert capsys.readouterr().out == "Good: Sunny days.\n\nBad: Sunny days.\n"
        assert model.asked == ["Good: ", "Bad: "]

    @pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
    def test_strip_prompt(self, model, capsys, stream):
        assert cli.main(["generate", "--strip-prompt", stream, "Good: "]) == 0
        assert capsys.readouterr().out == "Sunny days.\n"

    def test_no_stream_decodes_one_batch(self, model, capsys):
        assert cli.main(["generate", "--no-stream", "Good: ", "Bad: "]) == 0
        assert capsys.readouterr().out == "Good: Sunny days.\n\nBad: Sunny days.\n"
        assert model.asked == [["Good: ", "Bad: "]]

    def test_a_dash_reads_the_prompt_from_standard_input(self, model, capsys, monkeypatch):
        typed(monkeypatch, "one", "two")
        assert cli.main(["generate", "-"]) == 0
        assert model.asked == ["one\ntwo"]

    def test_options_reach_the_model(self, model):
        arguments = [
            "--max-new-tokens", "7", "--seed", "3", "--top-k", "9", "--top-p", "0.8", "--min-p", "0.1", "--temperature",
            "0.5", "--repetition-penalty", "1.2", "--stop", "a", "--stop", "b",
        ]  # fmt: skip
        assert cli.main(["generate", *arguments, "Hello"]) == 0
        assert model.sampling == [
            {
                "max_new_tokens": 7, "seed": 3, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 0.5,
                "repetition_penalty": 1.2, "stop": ["a", "b"],
            }
        ]  # fmt: skip

    def test_samplers_are_shorthands_and_nothing_is_chosen_for_who_chooses_nothing(self, model):
        asked = [["--sampler", name] for name in arguments.SAMPLERS] + [["--sampler", "top_k", "--k", "5"], []]
        for options in asked:
            assert cli.main(["generate", *options, "Hello"]) == 0
        shaped = [{k: v for k, v in sampling.items() if k != "max_new_tokens"} for sampling in model.sampling]
        assert shaped == [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 5}, {}]


class TestChat:
    def test_keeps_the_dialogue_and_ends_with_the_input(self, model, capsys, monkeypatch):
        typed(monkeypatch, "Hello", "", "How so?")
        assert cli.main(["chat"]) == 0
        assert capsys.readouterr().out == "Sunny days.\nSunny days.\n"
        assert [message["content"] for message in model.asked[-1]] == ["Hello", "Sunny days.", "How so?"]
        assert [message["role"] for message in model.asked[-1]] == ["user", "model", "user"]

    def test_a_reply_with_a_turn_marker_can_stand_in_the_dialogue(self, model, monkeypatch):
        monkeypatch.setattr(sys.modules[__name__], "ANSWER", ["Well<start_of", "_turn>."])
        typed(monkeypatch, "Hello", "How so?")
        assert cli.main(["chat"]) == 0
        assert model.asked[-1][1]["content"] == "Well<start_of_turn>."

    def test_quit_and_reset(self, model, monkeypatch):
        typed(monkeypatch, "Hello", "/reset", "Again", "/quit", "Not read")
        assert cli.main(["chat"]) == 0
        assert [len(messages) for messages in model.asked] == [1, 1]

    def test_a_refused_message_is_forgotten(self, model, capsys, monkeypatch):
        typed(monkeypatch, "Hello", "too long", "Short")
        assert cli.main(["chat"]) == 0
        assert capsys.readouterr().err == "keras-gemma: A prompt must be shorter than the whole sequence.\n"
        assert [message["content"] for message in model.asked[-1]] == ["Hello", "Sunny days.", "Short"]

    def test_commands(self, model, capsys, monkeypatch, tmp_path):
        saved = tmp_path / "dialogue.json"
        typed(
            monkeypatch, "/system Be brief.", "Hello", f"/save {saved}", "/resett", "/settings temperature 0.5",
            "/settings temperature warm", "/settings warmth 1", "/reset", "/retry", f"/load {saved}", "/retry",
            "/load nowhere.json", "/etc/hosts is a file",
        )  # fmt: skip
        assert cli.main(["chat"]) == 0
        assert json.loads(saved.read_text()) == {
            "system": "Be brief.",
            "messages": [{"role": "user", "content": "Hello"}, {"role": "model", "content": "Sunny days."}],
        }
        asked = [[message["content"] for message in messages] for messages in model.asked]
        first = "Be brief.\n\nHello"
        assert asked == [[first], [first], [first, "Sunny days.", "/etc/hosts is a file"]]
        assert [sampling.get("temperature") for sampling in model.sampling] == [None, 0.5, 0.5]
        said = capsys.readouterr().err
        for part in ("Did you mean /reset?", "received 'warm'", "No setting 'warmth'", "no message to answer again"):
            assert part in said
        assert "No file or folder nowhere.json" in said
        # One cache and one program for messages of all lengths.
        assert model.fixed == model.sequence_length

    def test_control_c_stops_the_answer_and_keeps_the_dialogue(self, model, capsys, monkeypatch):
        def stream(prompt, **sampling):
            model.asked.append(prompt)
            yield "Sunny"
            if len(model.asked) == 1:
                raise KeyboardInterrupt
            yield " days."

        monkeypatch.setattr(model, "stream", stream)
        typed(monkeypatch, "Hello", "Go on")
        assert cli.main(["chat"]) == 0
        assert capsys.readouterr().out == "Sunny (stopped)\nSunny days.\n"
        assert [message["content"] for message in model.asked[-1]] == ["Hello", "Sunny", "Go on"]

    def test_a_terminal_edits_lines_and_keeps_pasted_ones_together(self, model, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
            terminal = chat.InteractiveTerminal()
            keys.send_text("Helo\x1b[Dl\r")
            assert terminal.read() == "Hello"
            keys.send_text("\x1b[200~two\nlines\x1b[201~\r")
            assert terminal.read() == "two\nlines"
            # Up within the two lines, and to the message before.
            keys.send_text("\x1b[A\x1b[A\x1b[A\r")
            assert terminal.read() == "Hello"
            keys.send_text("\x03\x04")
            assert terminal.read() is None
        with terminal.waiting("thinking"):
            pass
        terminal.begin_reply("Sunny")
        terminal.end_reply()
        assert capsys.readouterr().out == "Sunny\n"

    def test_the_oldest_exchanges_make_room(self, model, monkeypatch):
        model.sequence_length = 60
        typed(monkeypatch, "a" * 20, "b" * 20, "c" * 20)
        assert cli.main(["chat", "--max-new-tokens", "5"]) == 0
        contents = [[message["content"][:1] for message in messages] for messages in model.asked]
        assert contents == [["a"], ["a", "S", "b"], ["b", "S", "c"]]

    def test_control_c_ends_it(self, model, monkeypatch):
        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", interrupted)
        assert cli.main(["chat"]) == 0
