import importlib
import json
import os
import subprocess
import sys

import keras
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

    def test_keras_that_took_tensorflow_first_is_left_alone_and_warned_of_once(self, tmp_path):
        code = (
            "import keras, os, warnings\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    import keras_gemma\n"
            "    keras_gemma.models\n"
            "(warned,) = [one for one in caught if 'keras_gemma' in str(one.message)]\n"
            "assert 'KERAS_BACKEND=jax' in str(warned.message)\n"
            "assert 'import keras_gemma before keras' in str(warned.message)\n"
            "print(os.environ.get('KERAS_BACKEND'), warned.filename)\n"
            "try:\n"
            "    keras_gemma.rlhf.DPOTrainer(None)\n"
            "except ValueError as error:\n"
            "    print(error)"
        )
        shown = run(code, tmp_path).stdout.splitlines()
        assert shown[0] == "None <string>", "the warning points at the line that imports keras_gemma"
        assert shown[1].startswith("DPOTrainer needs JAX: set KERAS_BACKEND=jax")

    @pytest.mark.filterwarnings("error")
    def test_keras_that_was_told_its_backend_is_not_warned_of(self):
        keras_gemma.startup.default_to_jax()


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

    def test_packages_are_attributes_that_are_imported_when_they_are_used(self):
        for name in ["checkpoints", "data", "distribution", "generation", "models", "planning", "rlhf", "training"]:
            assert name in dir(keras_gemma)
            assert keras_gemma.__getattr__(name) is importlib.import_module(f"keras_gemma.{name}")

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'Gemini'"):
            keras_gemma.Gemini  # noqa: B018


def test_the_classes_are_found_under_models_as_in_keras_hub():
    assert keras_gemma.models.GemmaCausalLM is keras_gemma.GemmaCausalLM


@pytest.mark.multi_backend
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="it works on JAX")
@pytest.mark.parametrize(
    "name, call",
    [
        ("ReinforceTrainer", lambda: keras_gemma.rlhf.ReinforceTrainer(None, len)),
        ("ReinforceTrainer", lambda: keras_gemma.rlhf.rloo_trainer(None, len)),
        ("plan", lambda: keras_gemma.planning.plan()),
        ("planning.search", lambda: keras_gemma.planning.search("gemma_2b_en", "gemma_2b_v5e_16")),
        ("local_data", lambda: keras_gemma.distribution.local_data()),
        ("distribution.initialize", lambda: keras_gemma.distribution.initialize()),
    ],
)
def test_what_needs_jax_says_so_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name} needs JAX: set KERAS_BACKEND=jax .* Received: the backend"):
        call()
