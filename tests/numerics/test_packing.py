"""Packed rows, padding, and inputs that may be left out."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.numerics.references import batch
from tests.numerics.references import gradients
from tests.numerics.references import logits
from tests.numerics.references import ours

pytestmark = pytest.mark.multi_backend

SMALL = {
    "vocabulary_size": 40, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 1,
    "hidden_dim": 16, "intermediate_dim": 32, "head_dim": 8,
}  # fmt: skip
LENGTHS = (5, 3, 4)


def separate():
    return batch(SMALL["vocabulary_size"], lengths=LENGTHS)


def packed(rows):
    """The rows one after the other in a single one, with two columns of padding."""
    real = rows["padding_mask"].astype(bool)
    fields = {
        "token_ids": rows["token_ids"][real],
        "padding_mask": np.ones(sum(LENGTHS)),
        "segment_ids": np.repeat([1, 2, 3], LENGTHS),
        "positions": np.concatenate([np.arange(length) for length in LENGTHS]),
    }
    return {name: np.pad(field, (0, 2)).astype("int32")[None] for name, field in fields.items()}


def test_packed_rows_give_the_logits_of_separate_rows(shape):
    model, rows = ours(shape), separate()
    expected = logits(model, rows)[rows["padding_mask"].astype(bool)]
    received = logits(model, packed(rows))[0, : sum(LENGTHS)]
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_packed_rows_without_segments_would_differ():
    model, rows = ours(SMALL), separate()
    one_row = packed(rows)
    del one_row["segment_ids"]
    assert np.abs(logits(model, one_row) - logits(model, packed(rows)))[0, : sum(LENGTHS)].max() > 0.01


def test_packed_rows_give_the_gradients_of_separate_rows():
    rows = separate()
    targets = np.roll(rows["token_ids"], -1, axis=1)
    one_row = packed(rows)
    packed_targets = packed({**rows, "token_ids": targets})["token_ids"]
    expected = gradients(ours(SMALL), rows, targets, rows["padding_mask"].astype("float32"))
    received = gradients(ours(SMALL), one_row, packed_targets, one_row["padding_mask"].astype("float32"))
    for path, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-4, path
        np.testing.assert_allclose(received[path], gradient, rtol=0, atol=1e-5, err_msg=path)


def test_padding_changes_no_real_logit():
    model, rows = ours(SMALL), separate()
    longer = {name: np.pad(field, ((0, 0), (0, 7))) for name, field in rows.items()}
    longer["token_ids"][longer["padding_mask"] == 0] = 17
    real = rows["padding_mask"].astype(bool)
    received = logits(model, longer)[:, : real.shape[1]]
    np.testing.assert_allclose(received[real], logits(model, rows)[real], rtol=0, atol=1e-5)


def test_padding_in_front_changes_no_real_logit():
    # Behind a row the causal mask alone would hide the padding; here only the padding mask does.
    model, row = ours(SMALL), batch(SMALL["vocabulary_size"], lengths=(5,))
    later = {name: np.pad(field, ((0, 0), (3, 0)), constant_values=0) for name, field in row.items()}
    later["token_ids"][:, :3] = 17
    later["positions"] = np.array([[0, 0, 0, 0, 1, 2, 3, 4]], "int32")
    np.testing.assert_allclose(logits(model, later)[:, 3:], logits(model, row), rtol=0, atol=1e-5)
    seen = {**later, "padding_mask": np.ones_like(later["padding_mask"])}
    assert np.abs(logits(model, seen)[:, 3:] - logits(model, row)).max() > 0.01


def test_later_tokens_change_no_earlier_logit():
    model, rows = ours(SMALL), separate()
    changed = {**rows, "token_ids": rows["token_ids"].copy()}
    changed["token_ids"][0, 3:5] = [7, 8]
    np.testing.assert_array_equal(logits(model, changed)[0, :3], logits(model, rows)[0, :3])


def test_padded_rows_have_finite_logits():
    inputs = {"token_ids": np.zeros((1, 4), "int32"), "padding_mask": np.zeros((1, 4), "int32")}
    assert np.isfinite(logits(ours(SMALL), inputs)).all()


def test_a_boolean_mask_is_as_good_as_an_integer_one():
    model, rows = ours(SMALL), separate()
    boolean = {**rows, "padding_mask": rows["padding_mask"].astype(bool)}
    np.testing.assert_allclose(logits(model, boolean), logits(model, rows), atol=1e-5)


def as_none(rows):
    return {**rows, "segment_ids": None, "positions": None}


def as_given(rows):
    positions = np.tile(np.arange(rows["token_ids"].shape[1]), (len(rows["token_ids"]), 1))
    return {**rows, "segment_ids": rows["padding_mask"], "positions": positions.astype("int32")}


def test_packed_inputs_may_be_none_or_missing_in_a_call():
    model, rows = ours(SMALL), separate()
    tensors = {name: ops.convert_to_tensor(field) for name, field in rows.items()}
    expected = logits(model, as_given(rows))
    np.testing.assert_allclose(ops.convert_to_numpy(model(tensors)), expected, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(model(as_none(tensors))), expected, atol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.backbone(as_none(tensors))), ops.convert_to_numpy(model.backbone(tensors))
    )


@pytest.mark.parametrize("inputs_of", [dict, as_none, as_given])
def test_packed_inputs_may_be_none_or_missing_in_fit_and_predict(inputs_of):
    model, rows = ours(SMALL), separate()
    inputs, targets = inputs_of(rows), np.roll(rows["token_ids"], -1, axis=1)
    np.testing.assert_allclose(model.predict(inputs, verbose=0), logits(model, rows), atol=1e-5)
    model.compile(optimizer=keras.optimizers.SGD(0.0), weighted_metrics=None)
    history = model.fit(inputs, targets, sample_weight=rows["padding_mask"], batch_size=3, verbose=0)
    evaluated = model.evaluate(
        inputs, targets, sample_weight=rows["padding_mask"], batch_size=3, verbose=0, return_dict=True
    )
    assert history.history["loss"][0] == pytest.approx(evaluated["loss"], rel=1e-5)
    assert 0 < evaluated["loss"] < 20


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="jax.jit")
@pytest.mark.parametrize("inputs_of", [dict, as_none, as_given])
def test_packed_inputs_may_be_none_or_missing_under_jit(inputs_of):
    import jax

    model, rows = ours(SMALL), separate()

    @jax.jit
    def outputs_of(variables, inputs):
        outputs, _ = model.stateless_call(*variables, inputs)
        return outputs

    variables = tuple([v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables))
    np.testing.assert_allclose(outputs_of(variables, inputs_of(rows)), logits(model, rows), atol=1e-5)
