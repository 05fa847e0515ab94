import io
import resource
import subprocess
import sys

import pytest

from keras_gemma import cli

ANSWER = ["Sun", "ny ", "days."]


class FakeModel:
    """Answers everything with `ANSWER` and remembers what it was asked."""

    def __init__(self, sequence_length=1000):
        self.preprocessor = self
        self.sequence_length = sequence_length
        self.asked = []
        self.sampling = []

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
    monkeypatch.setattr(cli, "load_model", lambda args: fake)
    return fake


def typed(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def keras_gemma(*arguments, **kwargs):
    command = [sys.executable, "-m", "keras_gemma.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def processor_seconds_of_children():
    """Of all processes that ended: the same on a busy machine, where the clock on the wall runs on."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class TestStart:
    def test_help_comes_within_a_second_and_names_every_command(self):
        before = processor_seconds_of_children()
        done = keras_gemma("--help")
        assert done.returncode == 0
        assert not done.stderr
        assert all(command in done.stdout for command in ("generate", "chat", "presets", "examples:"))
        assert processor_seconds_of_children() - before < 1

    @pytest.mark.parametrize("command", ["generate", "chat", "presets"])
    def test_help_of_a_command_imports_nothing_heavy(self, command):
        code = (
            "import sys; from keras_gemma import cli\n"
            f"try: cli.main([{command!r}, '--help'])\n"
            "except SystemExit: pass\n"
            "heavy = {'keras', 'jax', 'numpy', 'tensorflow', 'keras_hub'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

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
        monkeypatch.setattr(cli, "load_model", lambda args: pytest.fail("loaded a model"))
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2
        assert "error:" in capsys.readouterr().err.splitlines()[-1]

    def test_a_failure_is_one_line_and_exits_with_1(self, capsys, monkeypatch):
        def load_model(args):
            raise ValueError("No preset 'gemma_9b'.\n  Known: gemma_tiny_en")

        monkeypatch.setattr(cli, "load_model", load_model)
        assert cli.main(["generate", "Hello"]) == 1
        assert capsys.readouterr().err == "keras-gemma: error: No preset 'gemma_9b'. Known: gemma_tiny_en\n"
        with pytest.raises(ValueError):
            cli.main(["generate", "--traceback", "Hello"])

    def test_control_c_exits_with_130(self, monkeypatch):
        def load_model(args):
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "load_model", load_model)
        assert cli.main(["generate", "Hello"]) == 130


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
        arguments = ["--max-new-tokens", "7", "--seed", "3", "--sampler", "top_k", "--k", "9", "--temperature", "0.5"]
        assert cli.main(["generate", *arguments, "Hello"]) == 0
        (sampling,) = model.sampling
        sampler = sampling.pop("sampler")
        assert sampling == {"max_new_tokens": 7, "seed": 3}
        assert (type(sampler).__name__, sampler.k, sampler.temperature) == ("TopKSampler", 9, 0.5)

    @pytest.mark.parametrize("name", cli.SAMPLERS)
    def test_every_sampler_can_be_built(self, model, name):
        assert cli.main(["generate", "--sampler", name, "Hello"]) == 0


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
        assert model.asked[-1][1]["content"] == "Well."

    def test_quit_and_reset(self, model, monkeypatch):
        typed(monkeypatch, "Hello", "/reset", "Again", "/quit", "Not read")
        assert cli.main(["chat"]) == 0
        assert [len(messages) for messages in model.asked] == [1, 1]

    def test_a_refused_message_is_forgotten(self, model, capsys, monkeypatch):
        typed(monkeypatch, "Hello", "too long", "Short")
        assert cli.main(["chat"]) == 0
        assert capsys.readouterr().err == "keras-gemma: A prompt must be shorter than the whole sequence.\n"
        assert [message["content"] for message in model.asked[-1]] == ["Hello", "Sunny days.", "Short"]

    def test_the_oldest_exchanges_make_room(self, model, monkeypatch):
        model.sequence_length = 60
        typed(monkeypatch, "a" * 20, "b" * 20, "c" * 20)
        assert cli.main(["chat", "--max-new-tokens", "5"]) == 0
        contents = [[message["content"][:1] for message in messages] for messages in model.asked]
        assert contents == [["a"], ["a", "S", "b"], ["b", "S", "c"]]

    def test_control_c_ends_it(self, model, monkeypatch):
        def interrupted(prompt):
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", interrupted)
        assert cli.main(["chat"]) == 0
