"""Logits and gradients are as near to a float64 computation as those of keras-hub and transformers, weights alike."""

import numpy as np
import pytest

from tests.numerics.precision import assert_as_exact
from tests.numerics.precision import exact_gradients
from tests.numerics.precision import exact_logits
from tests.numerics.references import as_transformers
from tests.numerics.references import batch
from tests.numerics.references import gradients
from tests.numerics.references import keras_hub_twin
from tests.numerics.references import logits
from tests.numerics.references import ours
from tests.numerics.references import transformers_logits
from tests.numerics.references import transformers_twin


def assert_as_exact_where_real(model, shape, inputs, peer, positions=None):
    real = inputs["padding_mask"].astype(bool)
    exact = exact_logits(as_transformers(model), shape, inputs["token_ids"], positions)
    assert np.abs(exact[real]).max() > 1.0, "logits near zero would agree whatever the network does"
    received = logits(model, inputs if positions is None else {**inputs, "positions": positions.astype("int32")})
    assert_as_exact(received[real], peer[real], exact[real])


@pytest.mark.multi_backend
def test_logits_equal_keras_hubs_with_right_padding(shape):
    model, inputs = ours(shape), batch(shape["vocabulary_size"])
    assert_as_exact_where_real(model, shape, inputs, logits(keras_hub_twin(model, shape), inputs))


@pytest.mark.multi_backend
def test_logits_equal_transformers_with_right_padding(shape):
    model, inputs = ours(shape), batch(shape["vocabulary_size"])
    assert_as_exact_where_real(model, shape, inputs, transformers_logits(transformers_twin(model, shape), inputs))


@pytest.mark.multi_backend
def test_logits_equal_transformers_at_positions_up_to_8191(shape):
    # Far apart, since scores depend on differences of positions only.
    positions = np.array([[0, 1, 7, 300, 4000, 4001, 8190, 8191], [0, 2, 255, 257, 1024, 6000, 6001, 8191]])
    model, inputs = ours(shape), batch(shape["vocabulary_size"], lengths=(8, 8))
    peer = transformers_logits(transformers_twin(model, shape), inputs, positions)
    assert_as_exact_where_real(model, shape, inputs, peer, positions)


def test_a_row_of_8192_tokens_ends_as_transformers_ends_it():
    shape = {
        "vocabulary_size": 50, "num_layers": 1, "num_query_heads": 1, "num_key_value_heads": 1,
        "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 8,
    }  # fmt: skip
    model, inputs = ours(shape), batch(50, lengths=(8192,))
    assert_as_exact_where_real(model, shape, inputs, transformers_logits(transformers_twin(model, shape), inputs))


def test_a_row_of_8192_tokens_equals_keras_hub_over_four_layers():
    shape = {
        "vocabulary_size": 50, "num_layers": 4, "num_query_heads": 1, "num_key_value_heads": 1,
        "hidden_dim": 16, "intermediate_dim": 32, "head_dim": 8,
    }  # fmt: skip
    model, inputs = ours(shape), batch(50, lengths=(8192,))
    assert_as_exact_where_real(model, shape, inputs, logits(keras_hub_twin(model, shape), inputs))


def test_gradients_equal_transformers(shape):
    import torch

    model, inputs = ours(shape), batch(shape["vocabulary_size"])
    targets = np.roll(inputs["token_ids"], -1, axis=1)
    weights = np.random.default_rng(1).uniform(0, 1, targets.shape).astype("float32") * inputs["padding_mask"]
    twin = transformers_twin(model, shape)
    outputs = twin(
        input_ids=torch.from_numpy(inputs["token_ids"]).long(),
        attention_mask=torch.from_numpy(inputs["padding_mask"]).long(),
    ).logits
    losses = torch.nn.functional.cross_entropy(
        outputs.flatten(0, 1), torch.from_numpy(targets).long().flatten(), reduction="none"
    )
    token_weights = torch.from_numpy(weights).flatten()
    ((losses * token_weights).sum() / token_weights.sum()).backward()
    expected = {name: parameter.grad.numpy() for name, parameter in twin.named_parameters()}

    exact = exact_gradients(as_transformers(model), shape, inputs["token_ids"], targets, weights)
    received = as_transformers(model, gradients(model, inputs, targets, weights))
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-4, name
        assert_as_exact(received[name], gradient, exact[name], name)


def test_gelu_is_the_tanh_approximation():
    import torch

    shape = {
        "vocabulary_size": 50, "num_layers": 4, "num_query_heads": 2, "num_key_value_heads": 1,
        "hidden_dim": 16, "intermediate_dim": 64, "head_dim": 8,
    }  # fmt: skip
    model, inputs = ours(shape), batch(50)
    twin = transformers_twin(model, shape)
    tanh = transformers_logits(twin, inputs)
    for layer in twin.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    exact = transformers_logits(twin, inputs)
    assert np.abs(exact - tanh).max() > 5e-4, "the test could not tell them apart"
    assert_as_exact_where_real(model, shape, inputs, tanh)
