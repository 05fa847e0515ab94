"""The search with a compiler that knows what each candidate takes."""

import importlib

import pytest

from keras_gemma import cli
from keras_gemma.planning import search
from keras_gemma.planning import topology
from keras_gemma.planning.plan import Plan

# Bytes for each row and layer, more than is estimated where nothing is computed again.
BYTES_OF_A_ROW = {"none": 9e9, "dots": 3e9, "block": 0.6e9}
SPEED = {"none": 1.0, "dots": 0.95, "block": 0.75}


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, in order."""
    made = []

    def plan(preset, config, length, batch_size, recompute, phase, model, accumulate):
        parts = 16 // model
        peak = 3e9 + BYTES_OF_A_ROW[recompute] * batch_size / parts / accumulate / model
        chip = topology.CHIPS["v5e"]
        made.append(
            Plan(
                preset=preset,
                configuration=config,
                phase=phase,
                dtype="mixed_bfloat16",
                recompute=recompute,
                accumulate=accumulate,
                devices=16,
                mesh={"replica": 1, "data": parts, "model": model},
                parts=parts,
                batch_size=batch_size,
                sequence_length=length,
                fits=peak <= chip.memory * topology.GIB,
                memory_limit=chip.memory * topology.GIB,
                memory={"peak": peak},
                compile_seconds=1.0,
                model_flops=1e15,
                executed_flops=1e15,
                seconds={"compute": batch_size * length / (1e5 * SPEED[recompute])},
                chip=chip._asdict(),
            )
        )
        return made[-1]

    # The package has the function under the name of the module.
    monkeypatch.setattr(importlib.import_module("keras_gemma.planning.search"), "plan", plan)
    return made


def test_the_fastest_that_fits_comes_first(compiled):
    told = []
    plans = search("gemma_2b_en", "gemma_2b_v5e_16", most=6, tell=told.append)
    assert told == compiled and len(compiled) <= 6
    assert plans[0].fits
    assert plans[0].tokens_per_second == max(one.tokens_per_second for one in plans if one.fits)
    assert [one.fits for one in plans] == sorted((one.fits for one in plans), reverse=True)


def test_what_did_not_fit_is_not_tried_again_with_more(compiled, monkeypatch):
    # More than is estimated, so that what seems to fit does not.
    for recompute, size in BYTES_OF_A_ROW.items():
        monkeypatch.setitem(BYTES_OF_A_ROW, recompute, 20 * size)
    search("gemma_2b_en", "gemma_2b_v5e_16", most=6)
    refused = [one for one in compiled if not one.fits]
    assert refused and refused[0] is not compiled[-1]
    for index, one in enumerate(compiled):
        for earlier in compiled[:index]:
            alike = (one.recompute, one.mesh) == (earlier.recompute, earlier.mesh)
            assert not (earlier in refused and alike and one.batch_size > earlier.batch_size)


def test_a_batch_is_kept_and_cut_into_microbatches(compiled):
    plans = search("gemma_2b_en", "gemma_2b_v5e_16", batch_size=128)
    assert {one.batch_size for one in plans} == {128}
    assert plans[0].fits and plans[0].accumulate > 1
    assert f"gradient_accumulation_steps={plans[0].accumulate}" in plans[0].settings


def test_where_nothing_seems_to_fit_what_needs_least_is_tried(compiled):
    (made,) = search("gemma_7b_en", "gemma_7b_v5e_16", sequence_length=2**20, most=1)
    assert made.recompute == "block" and made.batch_size == made.parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "local_data"}, "chips of one kind"),
        ({"config": "gemma_2b_v5e_16", "batch_size": 7}, "cuts such a batch"),
        ({"config": "gemma_2b_v5e_8_serving"}, "Received: 'gemma_2b_v5e_8_serving', which is for serving"),
    ],
)
def test_what_cannot_be_searched(arguments, message):
    with pytest.raises(ValueError, match=message):
        search("gemma_2b_en", **arguments)


@pytest.mark.parametrize(
    "given", ["--context 2", "--model 2", "--accumulate 1", "--recompute block", "--phase train", "--lora-rank 4"]
)
def test_a_search_takes_no_settings_that_it_looks_for(compiled, capsys, given):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--search", "1", *given.split()])
    assert f"argument {given.split()[0]}: --search" in capsys.readouterr().err
    assert not compiled


def test_the_command(compiled, capsys):
    assert cli.main(["plan", "--search", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("compiled gemma_2b_v5e_16(") == len(compiled) <= 2
    assert "to run it: gemma_2b_v5e_16(" in captured.out
