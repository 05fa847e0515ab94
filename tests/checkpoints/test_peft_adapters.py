"""Adapters there and back: what they add to the weights is the same, and PEFT agrees."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from keras_gemma.checkpoints import load_adapters
from keras_gemma.checkpoints import peft_adapters
from keras_gemma.checkpoints import save_adapters
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

ALL = ["query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"]
ONE_SHAPE = pytest.mark.parametrize("shape", ["2b"], indirect=True)


@pytest.fixture
def make_backbone(shape):
    def make():
        backbone = GemmaBackbone(**{**shape, "num_layers": 2})
        random = np.random.default_rng(0)
        for variable in backbone.variables:
            variable.assign(random.normal(0.0, 0.2, variable.shape))
        return backbone

    return make


def adapted(backbone, names=ALL, rank=3):
    backbone.enable_lora(rank, target_layer_names=names)
    random = np.random.default_rng(1)
    for variable in backbone.trainable_variables:
        variable.assign(random.normal(0.0, 0.2, variable.shape))
    return backbone


def outputs(backbone, logits):
    return logits(GemmaCausalLM(backbone))


@pytest.mark.parametrize("names", [["query", "value"], ALL])
def test_there_and_back(make_backbone, tmp_path, logits, names):
    backbone = adapted(make_backbone(), names)
    save_adapters(backbone, tmp_path / "adapters")
    other = make_backbone()
    assert np.abs(outputs(other, logits) - outputs(backbone, logits)).max() > 0.1
    load_adapters(other, tmp_path / "adapters")
    np.testing.assert_allclose(outputs(other, logits), outputs(backbone, logits), atol=1e-4)
    # Others are not adapted.
    assert {layer.name for layer in other._flatten_layers() if getattr(layer, "lora_enabled", False)} == set(names)


def test_adapters_that_cannot_be_written_leave_nothing(make_backbone, tmp_path, monkeypatch):
    def write(path, tensors):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(peft_adapters, "write_safetensors", write)
    with pytest.raises(OSError, match="space"):
        save_adapters(adapted(make_backbone(), ["query"]), tmp_path / "new" / "adapters")
    assert not list(tmp_path.iterdir())


def peft_model(backbone, tmp_path):
    import transformers

    from keras_gemma.checkpoints import convert

    GemmaCausalLM(backbone).save_to_preset(tmp_path / "preset")
    convert(tmp_path / "preset", tmp_path / "hf", format="hugging_face", progress=False)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(1, 13).reshape(2, 6)).logits.numpy()


def test_peft_reads_ours(make_backbone, tmp_path, logits):
    model = peft_model(make_backbone(), tmp_path)
    backbone = adapted(make_backbone())
    save_adapters(backbone, tmp_path / "adapters", base_model="gemma")
    import peft

    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapters")
    np.testing.assert_allclose(outputs(backbone, logits), torch_logits(model), atol=1e-4)


PER_LAYER = {r"model.layers.1.self_attn.q_proj": 64, r"layers\.0\.mlp\.(up|gate)_proj": 2}
OVERLAPPING = {r"layers\.1\..*": 64, "q_proj": 2}
SETTINGS = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"down_proj": 32}},
    "a pattern for a layer": {"rank_pattern": {r"layers\.1\..*q_proj": 1}, "alpha_pattern": PER_LAYER},
    "the first of several patterns": {"alpha_pattern": OVERLAPPING},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_we_read_those_of_peft(make_backbone, tmp_path, logits, settings):
    model = peft_model(make_backbone(), tmp_path)
    import peft
    import torch

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapters")
    # Its file has patterns in another order, so that PEFT itself may find another one first.
    model = peft.PeftModel.from_pretrained(model.unload(), tmp_path / "adapters")
    backbone = make_backbone()
    load_adapters(backbone, tmp_path / "adapters")
    np.testing.assert_allclose(outputs(backbone, logits), torch_logits(model), atol=1e-4)


@ONE_SHAPE
def test_adapters_that_were_loaded_go_on_in_keras_files(make_backbone, tmp_path, logits):
    save_adapters(adapted(make_backbone()), tmp_path / "adapters")
    backbone = make_backbone()
    load_adapters(backbone, tmp_path / "adapters")
    backbone.save_lora_weights(tmp_path / "adapters.lora.h5")
    other = adapted(make_backbone(), rank=backbone._lora_rank)
    other.load_lora_weights(tmp_path / "adapters.lora.h5")
    np.testing.assert_array_equal(outputs(other, logits), outputs(backbone, logits))


@ONE_SHAPE
def test_refusals(make_backbone, tmp_path):
    folder, backbone = tmp_path / "adapters", make_backbone()
    with pytest.raises(ValueError, match="enable_lora"):
        save_adapters(backbone, folder)
    assert not folder.exists()
    save_adapters(adapted(make_backbone()), folder)
    with pytest.raises(FileExistsError, match="does not exist"):
        save_adapters(adapted(make_backbone()), folder)
    with pytest.raises(ValueError, match="enable_lora"):
        load_adapters(adapted(make_backbone()), folder)
    refused(backbone, folder, "adapter_config.json", {"peft_type": "IA3"}, "IA3")
    for other in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True},
                  {"alora_invocation_tokens": [1, 2]}, {"init_lora_weights": "pissa"}, {"target_parameters": ["w"]},
                  {"trainable_token_indices": [3]}, {"of_a_later_version": {"a": 1}}):  # fmt: skip
        refused(backbone, folder, "adapter_config.json", other, *other, "nothing else")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    refused(backbone, folder, "adapter_model.safetensors", {name: None}, "layers.1.self_attn.q_proj")
    refused(backbone, folder, "adapter_model.safetensors", {name: np.zeros((3, 5), "float32")}, name)
    stray = name.replace("layers.1", "layers.2")
    everything = dict.fromkeys(load_file(folder / "adapter_model.safetensors"))
    refused(backbone, folder, "adapter_model.safetensors", everything, "adapter_model.safetensors", "no adapters")
    refused(backbone, folder, "adapter_model.safetensors", {stray: np.zeros((3, 5), "float32")}, stray)
    assert not any(getattr(layer, "lora_enabled", False) for layer in backbone._flatten_layers())


def refused(backbone, folder, name, changes, *parts):
    path = folder / name
    content = path.read_bytes()
    if name.endswith(".json"):
        path.write_text(json.dumps({**json.loads(content), **changes}))
    else:
        changed = {**load_file(path), **changes}
        save_file({key: value for key, value in changed.items() if value is not None}, path)
    with pytest.raises(ValueError) as raised:
        load_adapters(backbone, folder)
    for part in parts:
        assert part in str(raised.value)
    path.write_bytes(content)
