"""`keras-gemma sft` from files to a preset."""

import csv
import gzip
import json

import keras
import numpy as np
import pytest

from keras_gemma import GemmaCausalLM
from keras_gemma import cli
from keras_gemma.data import write_array_record

WORDS = ["the Work", "You", "any", "Source", "the License", "a copy", "form", "in"]
PAIRS = [{"q": f"{a}:", "a": f" {b}"} for a in WORDS for b in WORDS[:3]]


@pytest.fixture
def preset(make_model, tmp_path):
    keras.utils.set_random_seed(0)
    make_model(hidden_dim=16, intermediate_dim=32, sequence_length=24).save_to_preset(tmp_path / "preset")
    return str(tmp_path / "preset")


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in [*PAIRS, {"q": "You:", "a": ""}, {"q": "No answer"}]))
    return str(path)


@pytest.fixture
def prepared_by_tfds(tmp_path):
    """The name of a data set where TFDS looks for those that it has prepared."""
    import tensorflow_datasets as tfds

    class SpokenAnswers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path / "package"

        def _info(self):
            features = tfds.features.FeaturesDict({"q": tfds.features.Text(), "a": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(PAIRS)

    SpokenAnswers(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path / "tfds")
    return "spoken_answers"


def sft(*arguments):
    return cli.main(["sft", *map(str, arguments)])


def test_a_model_is_tuned(preset, pairs, tmp_path, capsys):
    output = tmp_path / "tuned"
    command = [
        pairs, "--prompts", "q", "--responses", "a", "--preset", preset, "--output", output, "--validation-share", 0.25,
        "--epochs", 4, "--learning-rate", 3e-2, "--filter", "mistaken_identity", "--logging-steps", 1,
    ]  # fmt: skip
    assert sft(*command) == 0
    printed = capsys.readouterr().out
    assert "24 of 26 examples kept" in printed and "empty response" in printed and "missing fields" in printed
    names = {path.name for path in output.iterdir()}
    assert names == {"checkpoints", "curve.png", "dropped.json", "history.json", "preset", "settings.json"}
    assert json.loads((output / "dropped.json").read_text())["training"]["dropped"]["empty response"] == {
        "count": 1,
        "examples": [24],
    }
    history = json.loads((output / "history.json").read_text())
    best = min(history["val_perplexity"])
    assert best < 0.7 * history["val_perplexity"][0] and f"held out: {best:.2f}" in printed
    # The preset is the model of that epoch.
    model = GemmaCausalLM.from_preset(output / "preset")
    held_out = [{"prompts": pair["q"], "responses": pair["a"]} for pair in PAIRS[::4]]
    result = model.evaluate(held_out, batch_size=8, pack=True, verbose=0, return_dict=True)
    np.testing.assert_allclose(result["perplexity"], best, rtol=1e-3)

    # Three answers and the way to more; nothing that is not a number.
    assert printed.count("sample: ") == 3 and f"keras-gemma chat --preset {output / 'preset'}" in printed
    assert "step 3/" in printed and "nan" not in printed.lower()

    assert sft(*command) == 0
    assert json.loads((output / "history.json").read_text()) == history
    # Other settings, or other data under the same name, are another run.
    capsys.readouterr()
    assert sft(*command, "--seed", 1) == 1
    assert "seed was 0, is now 1" in capsys.readouterr().err
    with open(pairs, "a") as file:
        file.write(json.dumps({"q": "One more:", "a": " pair"}) + "\n")
    assert sft(*command) == 1
    assert "contents was" in capsys.readouterr().err
    assert json.loads((output / "history.json").read_text()) == history
    assert sft(*command, "--overwrite") == 0
    assert "25 of 27 examples kept" in capsys.readouterr().out
    assert json.loads((output / "history.json").read_text()) != history


def test_steps_schedule_and_adapters_are_as_asked(preset, pairs, tmp_path, capsys):
    output = tmp_path / "tuned"
    status = sft(
        pairs, "--prompts", "q", "--responses", "a", "--preset", preset, "--output", output, "--batch-size", 2,
        "--steps", 5, "--warmup-steps", 2, "--decay", "linear", "--learning-rate", 1e-2, "--eval-steps", 2,
        "--logging-steps", 1, "--lora-rank", 2, "--lora-alpha", 4, "--lora-targets", "query", "ffw_linear",
        "--recompute", "block",
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("step ")] == [
        f"step {step}/5" for step in range(1, 6)
    ]
    assert "tokens/s" in printed
    history = json.loads((output / "history.json").read_text())
    assert len(history["val_loss"]) == 3
    # Of steps 1, 3 and 4, counted from 0: the last of each stretch.
    np.testing.assert_allclose(history["learning_rate"], [5e-3, 1e-2 * 2 / 3, 1e-2 / 3], rtol=1e-5)
    adapted = GemmaCausalLM.from_preset(preset)
    adapted.backbone.load_lora_weights(str(output / "adapters.lora.h5"))
    layers = {layer.name: layer for layer in adapted.backbone.transformer_layers[0]._flatten_layers()}
    adapters = {name: layer.lora_alpha for name, layer in layers.items() if getattr(layer, "lora_enabled", False)}
    assert adapters == {"query": 4, "ffw_linear": 4}


def test_a_split_of_tfds(preset, prepared_by_tfds, tmp_path, capsys):
    status = sft(
        f"tfds:{prepared_by_tfds}:train[:50%]", "--prompts", "q", "--responses", "a", "--preset", preset, "--output",
        tmp_path / "tuned", "--epochs", 1,
    )  # fmt: skip
    assert status == 0
    assert f"{len(PAIRS) // 2} of {len(PAIRS) // 2} examples kept" in capsys.readouterr().out


def test_adapters_and_files_of_other_kinds(preset, tmp_path, capsys):
    (tmp_path / "training").mkdir()
    with gzip.open(tmp_path / "training" / "a.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("prompts", "responses"), *((pair["q"], pair["a"]) for pair in PAIRS[1:])])
    write_array_record(
        [{"prompts": pair["q"], "responses": pair["a"]} for pair in PAIRS[:2]], tmp_path / "v.array_record"
    )
    output = tmp_path / "tuned"
    status = sft(
        tmp_path / "training", "--validation", tmp_path / "v.array_record", "--preset", preset, "--output",
        output, "--rank", 2, "--epochs", 1, "--filter", "duplicates",
    )  # fmt: skip
    assert status == 0
    # What is held out is not trained on.
    assert "22 of 23 examples kept\n  1 dropped: duplicate" in capsys.readouterr().out
    assert (output / "adapters.lora.h5").exists()
    assert sft(__file__, "--output", output) == 1
    assert "Examples lie in files of .jsonl, .parquet, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["a.jsonl", "--messages", "m", "--prompts", "p"], "not both"),
        (["a.jsonl", "--validation", "b.jsonl", "--validation-share", 0.1], "not both"),
        (["a.jsonl", "--validation-share", 1.5], "below 1, received 1.5"),
        (["a.jsonl", "--epochs", 1, "--steps", 5], "not both"),
        (["a.jsonl", "--lora-alpha", 2], "need --lora-rank"),
        (["a.jsonl", "--early-stopping", 2, "--validation-share", 0], "needs validation examples"),
        (["a.jsonl", "--config", "gemma_2b_v5e_17"], "gemma_2b_v5e_16"),
    ],
)
def test_wrong_usage(arguments, part, tmp_path, capsys):
    output = tmp_path / "tuned"
    with pytest.raises(SystemExit) as exit:
        sft(*arguments, "--output", output)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert not output.exists()


def test_a_folder_of_unknown_origin_is_left_alone(pairs, tmp_path, capsys):
    (tmp_path / "tuned" / "preset").mkdir(parents=True)
    assert sft(pairs, "--output", tmp_path / "tuned") == 1
    assert "another run" in capsys.readouterr().err
