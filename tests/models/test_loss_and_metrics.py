import keras
import numpy as np
import pytest

pytestmark = pytest.mark.multi_backend

LENGTH = 4


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(with_preprocessor=False)
    # Far from uniform, so that tokens differ in their loss.
    model.backbone.token_embedding.embeddings.assign(model.backbone.token_embedding.embeddings * 3.0)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def rows(model):
    """Five rows of which only some tokens count, and their cross-entropies as NumPy computes them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, model.backbone.vocabulary_size, (5, LENGTH + 1)).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((5, LENGTH), "int32")}
    weights = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0.5, 1], [0, 0, 2, 0], [1, 1, 1, 1]], "float32")
    logits = model.predict(x, verbose=0).astype("float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probabilities, ids[:, 1:, None].astype(int), axis=-1)[..., 0]
    hits = logits.argmax(-1) == ids[:, 1:]
    return {"x": x, "y": ids[:, 1:], "weights": weights, "losses": losses, "hits": hits}


def evaluate(model, rows, chosen, batch_size):
    x = {name: field[chosen] for name, field in rows["x"].items()}
    return model.evaluate(
        x, rows["y"][chosen], sample_weight=rows["weights"][chosen], batch_size=batch_size, verbose=0, return_dict=True
    )


def test_the_loss_is_divided_by_the_weights_and_not_by_the_positions(model, rows):
    # 2 of 8 weights: the mean over positions would be a quarter of it.
    expected = (rows["losses"][0, 0] + rows["losses"][1, 3]) / 2
    assert evaluate(model, rows, slice(0, 2), 2)["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_loss_takes_fractional_weights(model, rows):
    weights, losses = rows["weights"][2:4], rows["losses"][2:4]
    expected = (weights * losses).sum() / weights.sum()
    assert evaluate(model, rows, slice(2, 4), 2)["loss"] == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_that_of_all_tokens_of_the_epoch(model, rows):
    # Three batches of uneven size and weight: neither their mean loss nor their mean perplexity would do.
    per_token = (rows["weights"] * rows["losses"]).sum() / rows["weights"].sum()
    assert evaluate(model, rows, slice(None), 2)["perplexity"] == pytest.approx(np.exp(per_token), rel=1e-3)


def test_token_accuracy_is_weighted(model, rows):
    hits = rows["hits"].copy()
    y = rows["y"].copy()
    best = model.predict(rows["x"], verbose=0).argmax(-1)
    y[2], y[4, :2], hits[2], hits[4, :2] = best[2], best[4, :2], True, True
    expected = (rows["weights"] * hits).sum() / rows["weights"].sum()
    received = evaluate(model, {**rows, "y": y}, slice(None), 2)["token_accuracy"]
    assert 0.3 < expected < 0.9
    assert received == pytest.approx(expected, rel=1e-4)


def test_a_batch_without_weight_has_no_loss_and_no_nan(model, rows):
    nothing = {**rows, "weights": np.zeros_like(rows["weights"])}
    result = evaluate(model, nothing, slice(0, 2), 2)
    assert result["loss"] == 0 and np.isfinite(result["perplexity"])
