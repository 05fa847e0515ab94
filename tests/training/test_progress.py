"""What someone who watches sees: lines that fit, and the numbers that matter."""

import io
import re

import keras
import pytest

from keras_gemma.training import ProgressBar
from keras_gemma.training import ProgressLines
from keras_gemma.training import TrainingMonitor
from keras_gemma.training.progress import StopAtStep

TEXTS = ["the Work of the License", "a copy of the Source", "any form", "You in the Work"] * 2


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model()
    model.compile(keras.optimizers.Adam(1e-3))
    return model


def lines_of(printed):
    """What a bar ends with in a terminal, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed).replace("\b", "")
    lines = [line.split("\r")[-1].rstrip() for line in plain.splitlines()]
    return [line for line in lines if re.match(r"(\d)/\1 ", line)]


def test_the_bar_fits_a_line_and_leaves_the_rest_to_the_history(model, capsys):
    validated = {"validation_data": (TEXTS[:2],), "callbacks": [TrainingMonitor()]}
    history = model.fit(TEXTS, batch_size=2, epochs=2, **validated).history
    shown = lines_of(capsys.readouterr().out)
    assert len(shown) >= 2 and max(map(len, shown)) <= 100
    for line in [line for line in shown if "val_loss" in line]:
        assert all(part in line for part in (" loss:", " accuracy:", " val_loss:"))
        assert "perplexity" not in line and "gradient_norm" not in line
    assert {"perplexity", "gradient_norm", "learning_rate", "tokens_per_second", "val_perplexity"} <= set(history)

    model.fit(TEXTS, batch_size=2)
    line = lines_of(capsys.readouterr().out)[-1]
    assert "tokens/s:" in line and len(line) <= 100
    model.evaluate(TEXTS, batch_size=2)
    line = lines_of(capsys.readouterr().out)[-1]
    assert "accuracy:" in line and "perplexity" not in line
    model.fit(TEXTS, batch_size=2, verbose=0)
    # One's own bar stays the only one.
    model.fit(TEXTS, batch_size=2, callbacks=[keras.callbacks.ProgbarLogger()])
    assert "perplexity" in capsys.readouterr().out


def test_lines_of_progress(model):
    out = io.StringIO()
    model.fit(TEXTS, batch_size=2, epochs=2, verbose=0, callbacks=[ProgressLines(every=3, file=out)])
    lines = out.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 3/8", "step 6/8"]
    assert all("loss" in line and "tokens/s" in line and "left" in line and "nan" not in line for line in lines)


def test_training_ends_in_the_middle_of_an_epoch(model):
    before = int(model.optimizer.iterations)
    model.fit(TEXTS, batch_size=2, epochs=3, steps_per_epoch=2, verbose=0, callbacks=[StopAtStep(5, 2)])
    assert int(model.optimizer.iterations) - before == 5


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ProgressLines(every=0)
    assert issubclass(ProgressBar, keras.callbacks.ProgbarLogger)


def test_models_say_what_they_are(make_model):
    model = make_model()
    assert re.fullmatch(r"<GemmaCausalLM \w+: 4\.\dK parameters, float32, \w+>", repr(model))
    model.backbone.enable_lora(rank=2)
    assert "LoRA of rank 2 (" in repr(model) and "trainable)" in repr(model.backbone)
    assert "bfloat16, " in repr(make_model(dtype="bfloat16"))
    quantized = make_model()
    quantized.quantize("int8")
    assert "quantized to int8" in repr(quantized)


def test_quantizing_shows_its_blocks_and_no_warnings(make_model, monkeypatch, recwarn):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    make_model(num_layers=2).quantize("int8")
    assert "int8 blocks: 100%" in terminal.getvalue() and "2/2" in terminal.getvalue()
    chosen = make_model(num_layers=2)
    chosen.quantize("int8", filters="query")
    modes = {
        layer.name: layer.quantization_mode
        for layer in chosen.backbone.transformer_layers[1].attention._layers
        if hasattr(layer, "quantization_mode")
    }
    assert modes["query"] == "int8" and modes["key"] is None
    assert not [str(warning.message) for warning in recwarn.list if warning.category is UserWarning]
