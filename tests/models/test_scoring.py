"""What the model thinks of texts, and where it puts them, beside transformers."""

import math

import keras
import numpy as np
import pytest

from keras_gemma.models import GemmaCausalLM

TEXTS = ["You may reproduce and distribute copies.", "a", "The license and the work, in any medium " * 4, "é€😀"]


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(num_layers=2, hidden_dim=16, head_dim=8)
    random = np.random.default_rng(0)
    for variable in model.backbone.trainable_variables:
        variable.assign(random.normal(0.0, 0.3, variable.shape))
    return model


def rows_of(model):
    return [model.preprocessor.prompt_ids(text) for text in TEXTS]


def test_as_transformers(model, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model.backbone.export_to_transformers(str(tmp_path))
    theirs = transformers.GemmaForCausalLM.from_pretrained(tmp_path).eval()
    scores = model.score_texts(TEXTS, batch_size=2)
    states = {pooling: model.embed(TEXTS, pooling, batch_size=3) for pooling in ("mean", "last", "max")}
    for i, (text, score, row) in enumerate(zip(TEXTS, scores, rows_of(model))):
        ids = torch.tensor([row])
        with torch.no_grad():
            outputs = theirs(ids, labels=ids, output_hidden_states=True)
        tokens = len(row) - 1
        assert score.tokens == tokens
        assert score.token_ids.tolist() == row[1:]
        np.testing.assert_allclose(score.log_prob, -outputs.loss.item() * tokens, rtol=1e-4)
        np.testing.assert_allclose(score.perplexity, math.exp(outputs.loss.item()), rtol=1e-4)
        bits = outputs.loss.item() * tokens / math.log(2)
        np.testing.assert_allclose(score.bits_per_byte, bits / len(text.encode()), rtol=1e-4)
        hidden = outputs.hidden_states[-1][0].numpy()
        for pooling, expected in {"mean": hidden.mean(0), "last": hidden[-1], "max": hidden.max(0)}.items():
            np.testing.assert_allclose(states[pooling][i], expected, atol=1e-4, err_msg=pooling)


@pytest.mark.multi_backend
def test_as_a_forward_pass(model):
    row = rows_of(model)[2]
    ids = np.array([row], "int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    log_probs = keras.ops.convert_to_numpy(keras.ops.log_softmax(model(inputs)))[0]
    expected = log_probs[np.arange(len(row) - 1), row[1:]]
    score = model.score_texts(TEXTS)[2]
    np.testing.assert_allclose(score.log_probs, expected, atol=1e-4)
    assert model.score_texts(TEXTS[2]).log_prob == pytest.approx(score.log_prob, abs=1e-3)

    # A response after its prompt; windows over what is longer than the context.
    answer = {"prompts": [TEXTS[2][:40]], "responses": [TEXTS[2][40:]]}
    (of_answer,) = model.score_texts(answer)
    prompt, response = (model.preprocessor.tokenizer.encode(answer[name][0]) for name in ("prompts", "responses"))
    assert of_answer.token_ids.tolist() == response
    assert of_answer.bytes == len(answer["responses"][0])
    if [row[0], *prompt, *response] == row:
        np.testing.assert_allclose(of_answer.log_probs, expected[-len(response) :], atol=1e-4)
    windowed = model.score_texts(TEXTS[2], max_length=32, stride=8)
    np.testing.assert_allclose(windowed.log_probs[:31], expected[:31], atol=1e-4)
    window = np.array([[row[0], *row[40 - 31 : 40]]], "int32")
    of_window = model({"token_ids": window, "padding_mask": np.ones_like(window)})
    of_window = keras.ops.convert_to_numpy(keras.ops.log_softmax(of_window))[0]
    np.testing.assert_allclose(windowed.log_probs[31:39], of_window[np.arange(23, 31), row[32:40]], atol=1e-4)
    assert windowed.tokens == len(row) - 1

    states = model.embed(TEXTS, normalize=True)
    assert (states.shape, states.dtype) == ((4, 16), "float32")
    np.testing.assert_allclose(np.linalg.norm(states, axis=-1), 1, rtol=1e-5)
    assert model.embed("a").shape == (16,)


def test_refused(model):
    cases = [
        (lambda: model.score_texts([TEXTS[0], ""]), "at least one token.*index 1"),
        (lambda: model.score_texts(TEXTS, max_length=20), "`max_length=20` tokens. Received one of .*`stride`"),
        (lambda: model.score_texts(TEXTS, max_length=20, stride=20), "`stride` is from 1"),
        (lambda: model.score_texts(TEXTS, batch_size=0), "`batch_size`"),
        (lambda: model.score_texts([[{"role": "user", "content": "a"}]]), "dialogue at index 0"),
        (lambda: model.embed(TEXTS, pooling="sum"), "'mean', 'last', 'max'"),
        (lambda: model.embed(TEXTS, max_length=20), "index 2"),
        (lambda: GemmaCausalLM(model.backbone).embed(TEXTS), "no preprocessor"),
        (lambda: GemmaCausalLM(model.backbone).score_texts(TEXTS), "no preprocessor"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
