import dataclasses
import json

import jax
import keras
import pytest

from keras_gemma import cli
from keras_gemma.planning import plan
from keras_gemma.planning.compiling import _required_memory
from keras_gemma.training import training_flops_per_token

SETTINGS = {"sequence_length": 64, "batch_size": 2, "dtype": "float32"}


CHIP = {"flops": 1e12, "memory_bandwidth": 1e11, "link_bandwidth": 1e10, "pod_bandwidth": 1e9}


@pytest.fixture(scope="module")
def model_of_plan():
    from keras_gemma import GemmaCausalLM

    return GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32")


@pytest.fixture(scope="module")
def made():
    return plan("gemma_tiny_en", "local_data", devices=jax.devices()[:1], **SETTINGS)


def test_a_plan_of_the_bundled_preset(made, model_of_plan):
    model = model_of_plan
    weights = sum(variable.numpy().nbytes for variable in model.backbone.variables)
    assert made.fits
    # Metrics and random generators besides.
    assert weights <= made.memory["weights"] < weights + 1000
    # Adam keeps two numbers a weight.
    assert made.memory["optimizer"] == pytest.approx(2 * weights, rel=1e-3)
    assert made.memory["peak"] > made.memory["weights"] + made.memory["optimizer"]
    per_token = training_flops_per_token(model.backbone.get_config(), 64, causal=True)
    assert made.model_flops == per_token * 2 * 64
    # Blocks are computed again, and attention looks at what is masked too.
    assert 1.0 < made.executed_flops / made.model_flops < 1.5
    assert not made.within_pods and not made.across_pods


def test_without_recomputation_there_is_less_to_do(made):
    kept = plan("gemma_tiny_en", "local_data", devices=jax.devices()[:1], recompute="none", **SETTINGS)
    assert kept.executed_flops < made.executed_flops


@pytest.mark.slow
def test_microbatches_take_less_memory(made):
    cut = plan("gemma_tiny_en", "local_data", devices=jax.devices()[:1], accumulate=2, **SETTINGS)
    assert cut.accumulate == 2 and "2 microbatches" in str(cut)
    assert cut.model_flops == made.model_flops
    # Of a batch whose activations take more than the sums of gradients, which come on top.
    large = {**SETTINGS, "sequence_length": 256, "batch_size": 16, "recompute": "none", "devices": jax.devices()[:1]}
    at_once, in_turn = (plan("gemma_tiny_en", "local_data", accumulate=parts, **large) for parts in (1, 8))
    assert in_turn.memory["temporaries"] < at_once.memory["temporaries"] / 2


def test_a_plan_of_prefill(model_of_plan):
    made = plan("gemma_tiny_en", "local_model", 64, 3, phase="prefill", dtype="float32", devices=jax.devices()[:1])
    backbone = model_of_plan.backbone
    per_column = 2 * backbone.num_key_value_heads * backbone.head_dim * 4
    assert made.memory["cache"] == 3 * 64 * per_column * backbone.num_layers + 3 * 4
    assert made.memory["weights"] == sum(variable.numpy().nbytes for variable in backbone.variables)
    # The last block gives keys and values only; attention looks at what is masked too.
    assert 1.0 < made.executed_flops / made.model_flops < 1.5


def test_a_plan_of_decoding(model_of_plan):
    # `generate` rounds up: 5 rows to 6, and 200 columns to 256.
    made = plan("gemma_tiny_en", "local_model", 200, 5, dtype="float32", devices=jax.devices()[:1])
    assert (made.phase, made.batch_size, made.sequence_length) == ("decode", 6, 256)
    # One token for each row, with logits and all columns of the cache.
    assert made.executed_flops == pytest.approx(made.model_flops, rel=0.05)
    assert "a token for each row" in str(dataclasses.replace(made, seconds={"compute": 1.0}, chip=CHIP))


def test_a_plan_leaves_nothing_behind(made):
    assert keras.distribution.distribution() is None
    # Variables made later have values.
    assert float(keras.Variable(1.0).numpy()) == 1.0


def test_a_plan_is_read_by_people_and_programs(made):
    assert "fits" in str(made) and "temporaries" in str(made)
    # What a chip of no known kind takes is not guessed.
    assert made.step_seconds is None and "at best" not in str(made)
    assert json.loads(made.to_json())["memory"] == made.memory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "gemma_3b"}, "Configurations are gemma_2b_v5e_8"),
        ({"config": "local_data"}, "give `devices`"),
        ({"config": "gemma_2b_v5e_16", "batch_size": 5}, "into 16 parts"),
        ({"config": "gemma_2b_v5e_16", "batch_size": 16, "accumulate": 2}, "2 microbatches"),
        ({"config": "gemma_2b_v5e_16", "accumulate": 0}, "`accumulate` is at least 1. Received: 0"),
        ({"config": "gemma_2b_v5e_8_serving", "accumulate": 2}, "of training alone. Received: accumulate=2, .*decode"),
        ({"config": "gemma_2b_v5e_16", "lora_rank": 0}, "`lora_rank` is at least 1. Received: 0"),
        ({"config": "gemma_2b_v5e_8_serving", "lora_rank": 2}, "of training alone. Received: lora_rank=2, .*decode"),
        ({"config": "gemma_2b_v5e_16", "model": 3}, "has 16"),
        ({"config": "gemma_2b_v5e_16", "phase": "sleep"}, "Phases are train, prefill, decode"),
    ],
)
def test_what_cannot_be_planned(arguments, message, monkeypatch):
    monkeypatch.setattr("keras_gemma.planning.topology.tpu_devices", lambda *_: _sixteen_devices())
    with pytest.raises(ValueError, match=message):
        plan("gemma_tiny_en", **arguments)


def _sixteen_devices():
    return [jax.devices()[0]] * 16


def test_the_command(monkeypatch, capsys, made):
    given = {}
    monkeypatch.setattr("keras_gemma.planning.plan", lambda *arguments, **options: given.update(options) or made)
    settings = ["--context", "4", "--model", "2", "--accumulate", "3", "--lora-rank", "5", "--recompute", "dots"]
    assert cli.main(["plan", "--json", *settings]) == 0
    expected = {"context": 4, "model": 2, "accumulate": 3, "lora_rank": 5, "recompute": "dots"}
    assert given == {**expected, "phase": "train"}
    assert json.loads(capsys.readouterr().out)["configuration"] == "local_data"


def test_loops_of_unknown_length_are_told(made):
    assert made.unknown_loops == 0 and "nobody knows" not in str(made)
    assert "2 loops that turn nobody knows how often" in str(dataclasses.replace(made, unknown_loops=2))


def test_a_picture(tmp_path, made):
    known = dataclasses.replace(made, memory_limit=16.0 * 2**30, seconds={"compute": 1.0, "memory": 0.5}, chip=CHIP)
    for one in (made, known):
        one.plot(tmp_path / "plan.png")
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_a_picture_of_each_phase(tmp_path, monkeypatch, made):
    monkeypatch.setattr("keras_gemma.planning.plan", lambda *_, phase, **__: dataclasses.replace(made, phase=phase))
    assert cli.main(["plan", "--config", "gemma_2b_v5e_8_serving", "--plot", str(tmp_path / "plan.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.decode.png", "plan.prefill.png"]
    assert cli.main(["plan", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").exists()


def test_adapters(made):
    settings = {"devices": jax.devices()[:1], **SETTINGS}
    adapted = plan("gemma_tiny_en", "local_data", lora_rank=2, **settings)
    assert adapted.lora_rank == 2 and "adapters of rank 2" in str(adapted)
    assert adapted.memory["optimizer"] < made.memory["optimizer"] / 10
    assert adapted.memory["weights"] > made.memory["weights"]
    # The products for the gradients of weights, a third of all, are not needed.
    assert adapted.model_flops < made.model_flops
    assert made.lora_rank is None


def test_a_configuration_for_adapters_has_them(monkeypatch):
    monkeypatch.setattr("keras_gemma.planning.topology.tpu_devices", lambda *_: [jax.devices()[0]] * 8)
    seen = {}

    def stop(*arguments, **settings):
        seen.update(settings)
        raise InterruptedError

    monkeypatch.setattr("keras_gemma.planning.abstract.model_without_memory", stop)
    with pytest.raises(InterruptedError):
        plan("gemma_tiny_en", "gemma_7b_v5e_8")
    assert seen["lora_rank"] == 8


def test_what_does_not_fit(monkeypatch, capsys, made):
    limit = 16.0 * 2**30
    refused = dataclasses.replace(made, fits=False, memory={"peak": limit + 2**30}, memory_limit=limit)
    monkeypatch.setattr("keras_gemma.planning.plan", lambda *arguments, **options: refused)
    assert cli.main(["plan"]) == 1
    captured = capsys.readouterr()
    assert "17.0 GiB a chip, 1.0 GiB more than there are" in captured.out
    assert "recompute" in captured.out and "does not fit" in captured.err


def test_a_program_too_large_for_a_chip_that_is_not_known(monkeypatch):
    said = "RESOURCE_EXHAUSTED: the total memory (74.50G) exceeds available HBM (16.00G)."

    def refuse(*arguments, **settings):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr("jax.stages.Lowered.compile", refuse)
    refused = plan("gemma_tiny_en", "local_data", devices=jax.devices()[:1], **SETTINGS)
    assert not refused.fits and refused.memory_limit == 16 * 2**30
    assert "74.5 GiB a chip, 58.5 GiB more than there are" in str(refused)


@pytest.mark.parametrize(
    ("message", "gib", "limit"),
    [
        ("total memory required for HLO temporaries (74.50G) exceeds available HBM (15.75G).", 74.5, 15.75),
        ("total memory required for HLO temporaries (512.0M) exceeds available HBM (256M).", 0.5, 0.25),
    ],
)
def test_what_the_compiler_says_of_too_large_a_program(message, gib, limit):
    found = _required_memory(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, the {message}")
    assert found == (gib * 2**30, limit * 2**30)
    assert _required_memory("INVALID_ARGUMENT: another error") is None
