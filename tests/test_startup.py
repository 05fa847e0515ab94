import json
import os
import subprocess
import sys

import pytest

import keras_gemma

BACKEND = "import keras_gemma, os; print(os.environ.get('KERAS_BACKEND'))"
KERAS_DEFAULTS = {"floatx": "float32", "epsilon": 1e-07, "backend": "tensorflow", "image_data_format": "channels_last"}


def run(code, keras_home, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "KERAS_HOME": str(keras_home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


class TestBackend:
    def test_jax_when_nobody_chose_and_again_after_keras_wrote_its_file(self, tmp_path):
        code = "import keras_gemma, keras; print(keras.backend.backend())"
        assert run(code, tmp_path).stdout == "jax\n"
        assert run(BACKEND, tmp_path).stdout == "jax\n"
        assert json.loads((tmp_path / "keras.json").read_text()) == KERAS_DEFAULTS

    def test_the_configuration_file_is_a_choice(self, tmp_path):
        (tmp_path / "keras.json").write_text(json.dumps({**KERAS_DEFAULTS, "backend": "torch"}))
        assert run(BACKEND, tmp_path).stdout == "None\n"

    def test_the_environment_is_a_choice(self, tmp_path):
        assert run(BACKEND, tmp_path, KERAS_BACKEND="tensorflow").stdout == "tensorflow\n"

    def test_a_broken_configuration_file_is_left_to_keras(self, tmp_path):
        (tmp_path / "keras.json").write_text("{")
        assert run(BACKEND, tmp_path).stdout == "jax\n"

    def test_keras_that_runs_already_is_left_alone(self, tmp_path):
        code = "import keras, os, keras_gemma; print(os.environ.get('KERAS_BACKEND'))"
        assert run(code, tmp_path).stdout == "None\n"


class TestQuiet:
    def test_importing_the_models_prints_nothing(self, tmp_path):
        done = run("from keras_gemma import GemmaCausalLM; import keras; keras.ops.zeros(2)", tmp_path)
        assert (done.stdout, done.stderr) == ("", "")

    def test_other_lines_of_an_import_are_handed_on(self, tmp_path):
        code = (
            "import os\n"
            "from keras_gemma import startup\n"
            "with startup._without_lines(startup.TENSORFLOW_NOISE):\n"
            "    os.write(2, b'I0000 cudart_stub.cc:31] no GPU\\nheed me\\n')"
        )
        assert run(code, tmp_path).stderr == "heed me\n"

    def test_tensorflow_can_be_left_out_unless_it_is_the_backend(self, tmp_path):
        code = (
            "from keras_gemma import startup; startup.leave_out_tensorflow()\n"
            "import keras_gemma.models, sys\n"
            "print(sys.modules['tensorflow'] is not None)"
        )
        assert run(code, tmp_path, KERAS_BACKEND="jax").stdout == "False\n"
        assert run(code, tmp_path, KERAS_BACKEND="tensorflow").stdout == "True\n"


class TestPublicNames:
    @pytest.mark.parametrize("name", keras_gemma.__all__)
    def test_every_name_is_there_and_listed(self, name):
        assert getattr(keras_gemma, name)
        assert name in dir(keras_gemma)

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'Gemini'"):
            keras_gemma.Gemini  # noqa: B018


def test_the_classes_are_found_under_models_as_in_keras_hub(tmp_path):
    code = "import keras_gemma; print(keras_gemma.models.GemmaCausalLM is keras_gemma.GemmaCausalLM)"
    assert run(code, tmp_path).stdout == "True\n"
