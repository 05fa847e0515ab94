"""What a model has besides tensors goes along into every format, or is missed by name."""

import json

import keras
import numpy as np
import pytest
from canonical_tensors import refuses

from keras_gemma.checkpoints import convert
from keras_gemma.checkpoints import inspect
from keras_gemma.checkpoints.converting import opened
from keras_gemma.checkpoints.tokenizer_files import CHAT_TEMPLATE
from keras_gemma.checkpoints.tokenizer_files import hugging_face_files
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaRewardModel
from keras_gemma.models import GemmaRewardModelPreprocessor
from keras_gemma.models import GemmaTokenizer

SHAPE = {
    "vocabulary_size": 512, "num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 2, "hidden_dim": 24,
    "intermediate_dim": 32, "head_dim": 8,
}  # fmt: skip
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
DIALOGUE = [{"role": "user", "content": "Hello"}]
PAIRS = ["The licence", "May I?"], [" is short.", "Yes"]


def quietly(source, target, **options):
    return convert(source, target, progress=False, **options)


def of_reward(preprocessor):
    keras.utils.set_random_seed(0)
    return GemmaRewardModel(GemmaBackbone(**SHAPE), preprocessor)


@pytest.fixture(scope="module")
def reward_model(tokenizer):
    return of_reward(GemmaRewardModelPreprocessor(tokenizer, sequence_length=24))


@pytest.fixture(scope="module")
def model(make_preprocessor):
    """In a shape that keras-hub's own exporter writes wrongly."""
    return GemmaCausalLM(GemmaBackbone(**SHAPE), make_preprocessor())


@pytest.fixture(scope="module")
def chatml(model, vocabulary, tmp_path_factory):
    """A folder as transformers saves a model that was tuned on ChatML."""
    folder = tmp_path_factory.mktemp("chatml") / "hf"
    model.export_to_transformers(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    for index, content in ((500, "<|im_start|>"), (501, "<|im_end|>")):
        described["added_tokens"].append({"id": index, "content": content, "special": True, "normalized": False})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 2, "eos_token_id": [1, 501], "temperature": 0.7, "top_k": 40}'
    )
    return folder


def test_a_reward_model_is_a_classifier_of_transformers_and_back(reward_model, tmp_path):
    import torch
    import transformers

    expected = reward_model.score(*PAIRS)
    reward_model.export_to_transformers(tmp_path / "exported")
    reward_model.save_to_preset(tmp_path / "keras")
    quietly(tmp_path / "keras", tmp_path / "hf", format="hugging_face")
    quietly(tmp_path / "hf", tmp_path / "again", format="keras")
    for name in ("exported", "hf", "again"):
        loaded = GemmaRewardModel.from_preset(tmp_path / name, **({} if name == "again" else {"sequence_length": 24}))
        np.testing.assert_allclose(loaded.score(*PAIRS), expected, rtol=1e-6)
        assert inspect(tmp_path / name, numbers=False).has_head
    rows = [reward_model.preprocessor.scored_row(*pair) for pair in zip(*PAIRS)]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        for row, score in zip(rows, expected):
            np.testing.assert_allclose(theirs(torch.tensor([row])).logits.numpy(), [[score]], atol=1e-5)


def test_a_head_that_a_target_cannot_hold_is_refused(reward_model, tmp_path):
    reward_model.save_to_preset(tmp_path / "keras")
    for name in ("m.gguf", "m.weights.h5"):
        refuses(
            lambda name=name: quietly(tmp_path / "keras", tmp_path / name), "head of a reward model", "hugging_face"
        )
    refuses(lambda: quietly(tmp_path / "keras", tmp_path / "flax", format="flax"), "head of a reward model", "keras")
    assert [path.name for path in tmp_path.iterdir()] == ["keras"]


def test_heads_that_are_none(reward_model, tmp_path):
    from safetensors.numpy import load_file
    from safetensors.numpy import save_file

    reward_model.export_to_transformers(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)

    def refused(change, *parts):
        save_file({**tensors, **change}, path)
        refuses(lambda: GemmaRewardModel.from_preset(tmp_path / "hf"), *parts)
        refuses(lambda: quietly(tmp_path / "hf", tmp_path / "keras", format="keras"), *parts)

    refused({"score.bias": np.ones(1, "float32")}, "no bias", "score.bias", "model.safetensors")
    refused({"score.weight": np.ones((3, 24), "float32")}, "one score", "(3, 24)")
    del tensors["score.weight"]
    refused({}, "lacks `score.weight`")


def test_a_model_exported_to_transformers_is_the_model(model, tmp_path):
    import torch
    import transformers

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "README.md").write_text("mine")
    model.export_to_transformers(str(tmp_path / "hf"))
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"}
    names |= {"tokenizer_config.json", "special_tokens_map.json", "README.md"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = model.preprocessor.tokenizer
    ids = ours.apply_chat_template(DIALOGUE, add_generation_prompt=True)
    assert list(tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True)["input_ids"]) == ids
    assert theirs.generation_config.eos_token_id == ours.stop_token_ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    received = model({"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)))})
    np.testing.assert_allclose(keras.ops.convert_to_numpy(received), expected, atol=1e-4)
    # The parts of it by themselves.
    model.backbone.export_to_transformers(tmp_path / "backbone")
    assert transformers.AutoModel.from_pretrained(tmp_path / "backbone").config.head_dim == 8
    model.preprocessor.export_to_transformers(tmp_path / "tokenizer")
    assert tokenizer("as it is").input_ids == ours_of(tmp_path / "tokenizer")("as it is").input_ids


def ours_of(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def test_dialogues_of_others_go_along_and_are_not_written_as_gemmas(chatml, tmp_path):
    import gguf

    quietly(chatml, tmp_path / "keras", format="keras")
    quietly(tmp_path / "keras", tmp_path / "m.gguf")
    quietly(tmp_path / "m.gguf", tmp_path / "hf", format="hugging_face")
    GemmaCausalLM.from_preset(tmp_path / "hf").save_to_preset(tmp_path / "saved")
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["eos_token_id"]) == (0.7, 40, [1, 6, 501])
    for name in ("keras", "hf", "saved"):
        tokenizer = GemmaCausalLM.from_preset(tmp_path / name).preprocessor.tokenizer
        assert tokenizer.stop_token_ids == [1, 6, 501]
        assert tokenizer.encode("<|im_start|>user") == [500, *tokenizer.encode("user")]
        assert tokenizer.chat_template == CHATML
        refuses(lambda tokenizer=tokenizer: tokenizer.apply_chat_template(DIALOGUE), "tuned on other dialogues")
        assert "other turns than Gemma's" in str(inspect(tmp_path / name, numbers=False))
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[500:502] == ["<|im_start|>", "<|im_end|>"]
    assert fields["tokenizer.chat_template"].contents() == CHATML
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")] == [1, 6, 501]
    refuses(lambda: quietly(chatml, tmp_path / "flax", format="flax"), "no place for", "end an answer", "gguf")
    # keras-hub reads the preset as any other.
    import keras_hub

    assert keras_hub.tokenizers.GemmaTokenizer.from_preset(str(tmp_path / "keras")).vocabulary_size() == 502


def test_a_gguf_file_of_gemma_has_its_dialogues(model, tmp_path):
    import gguf

    model.preprocessor.add_start_token = False
    try:
        model.save_to_preset(tmp_path / "keras")
    finally:
        model.preprocessor.add_start_token = True
    quietly(tmp_path / "keras", tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 6
    quietly(tmp_path / "m.gguf", tmp_path / "hf", format="hugging_face")
    assert GemmaCausalLM.from_preset(tmp_path / "hf").preprocessor.add_start_token is False
    besides = opened(tmp_path / "m.gguf").besides()
    assert (besides.chat_template, besides.stop_tokens) == (None, ())


def test_files_that_contradict_each_other(chatml, model, tmp_path):
    generation = chatml / "generation_config.json"
    before = generation.read_text()
    for content, parts in (
        ('{"bos_token_id": 3}', ["bos_token_id", "generation_config.json", "3"]),
        ('{"eos_token_id": 700}', ["700", "generation_config.json"]),
    ):
        generation.write_text(content)
        refuses(lambda: GemmaCausalLM.from_preset(chatml), *parts)
        assert parts[0] in str(inspect(chatml, numbers=False).doubts)
    generation.write_text(before)
    (chatml / "adapter_config.json").write_text("{}")
    refuses(lambda: GemmaBackbone.from_preset(chatml), "adapter_config.json", "load_adapters")
    (chatml / "adapter_config.json").unlink()

    model.save_to_preset(tmp_path)
    for name, change, parts in (
        ("config.json", {"vocabulary_size": 400}, ["task.json", "config.json", "vocabulary_size", "400", "512"]),
        ("config.json", {"num_layers": 2}, ["task.json", "num_layers"]),
    ):
        content = (tmp_path / name).read_text()
        described = json.loads(content)
        described["config"].update(change)
        (tmp_path / name).write_text(json.dumps(described))
        refuses(lambda: GemmaCausalLM.from_preset(tmp_path), *parts)
        if "vocabulary_size" in change:
            (tmp_path / "task.json").rename(tmp_path / "away.json")
            refuses(lambda: GemmaCausalLM.from_preset(tmp_path), "500 pieces", "400 rows")
            (tmp_path / "away.json").rename(tmp_path / "task.json")
        (tmp_path / name).write_text(content)
    path = tmp_path / "preprocessor.json"
    path.write_text(path.read_text().replace('"sequence_length": 12', '"sequence_length": 99'))
    assert "differ in `sequence_length`: 12 and 99" in str(inspect(tmp_path, numbers=False).doubts)


def test_an_index_that_lies(model, tmp_path):
    model.save_to_preset(tmp_path / "keras")
    quietly(tmp_path / "keras", tmp_path / "hf", format="hugging_face", max_shard_size=4.7e-5)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    norm = next(name for name, file in index["weight_map"].items() if file == last)
    for change in (lambda said: said.update({norm: first}), lambda said: said.pop(norm)):
        said = dict(index["weight_map"])
        change(said)
        path.write_text(json.dumps({"weight_map": said}))
        refuses(lambda: GemmaBackbone.from_preset(tmp_path / "hf"), norm, last, "index.json")


@pytest.mark.parametrize(
    "name, change, part",
    [
        ("config.json", lambda content: content.update(weights="../model.weights.h5"), "'../model.weights.h5'"),
        ("config.json", lambda content: content.update(weights="/etc/model.weights.h5"), "'/etc/model.weights.h5'"),
        ("task.json", lambda content: proto_of(content, "/etc/hostname"), "/etc/hostname"),
    ],
)
def test_paths_that_lead_out_of_a_preset_are_refused(model, tmp_path, name, change, part):
    model.save_to_preset(tmp_path)
    content = json.loads((tmp_path / name).read_text())
    change(content)
    (tmp_path / name).write_text(json.dumps(content))
    refuses(lambda: GemmaCausalLM.from_preset(tmp_path), part, "own")


def proto_of(task, proto):
    task["config"]["preprocessor"]["config"]["tokenizer"]["config"]["proto"] = proto


def test_stop_tokens_are_of_the_vocabulary(vocabulary):
    with pytest.raises(ValueError, match="<none>"):
        GemmaTokenizer(vocabulary, stop_tokens=["<none>"])
    tokenizer = GemmaTokenizer(vocabulary, stop_tokens=["<mask>"])
    assert GemmaTokenizer.from_config({**tokenizer.get_config(), "proto": vocabulary}).stop_token_ids[-1] == 4
    assert "chat_template" not in tokenizer.get_config()
    assert hugging_face_files(vocabulary)
