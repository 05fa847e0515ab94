"""An embedding may have more rows than the vocabulary has tokens. Their ids are never written, and are no text."""

import jax
import keras
import numpy as np
import pytest

from keras_gemma.rlhf import ReinforceTrainer

BEYOND = 60
PROMPTS = ["The license", "a copy of"]


@pytest.fixture(scope="module")
def model(make_model, tokenizer):
    """A model whose likeliest ids are those without a token."""
    keras.utils.set_random_seed(0)
    model = make_model(vocabulary_size=tokenizer.vocabulary_size() + BEYOND, sequence_length=24)
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        values = random.normal(0, 0.3, variable.shape)
        if "embedding" in variable.path:
            values[-BEYOND:] *= 5
        variable.assign(values)
    model.compile(keras.optimizers.SGD(1e-2))
    return model


def test_they_are_never_written(model, tokenizer):
    batch = model.preprocessor.generate_preprocess(PROMPTS, sequence_length=16)
    logits = keras.ops.convert_to_numpy(model(batch))
    assert (logits.argmax(-1) >= tokenizer.vocabulary_size()).mean() > 0.9
    for sampler in ("random", "beam"):
        written = model.generate(batch, sampler=sampler, stop_token_ids=None)["token_ids"]
        assert written.max() < tokenizer.vocabulary_size()
    assert len("".join(model.stream(PROMPTS[0], max_new_tokens=4, stop_token_ids=None)))
    model.preprocessor, preprocessor = None, model.preprocessor
    try:
        written = model.generate(batch, stop_token_ids=None)["token_ids"]
    finally:
        model.preprocessor = preprocessor
    # Without a vocabulary, nothing says that they have no token.
    assert written.max() >= tokenizer.vocabulary_size()


def test_they_are_no_text(tokenizer, make_preprocessor):
    ids = tokenizer.encode("a copy")
    row = [ids[0], 500, *ids[1:], 559, 2**31 - 1]
    assert tokenizer.detokenize(row) == "a copy"
    assert tokenizer.detokenize([row, [500], ids]) == ["a copy", "", "a copy"]
    assert tokenizer.detokenize(np.array([[500, 501]])) == [""]
    assert make_preprocessor().decode(row) == "a copy"


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="policies are trained on JAX")
def test_a_policy_is_scored_by_the_distribution_that_it_was_drawn_from(model, tokenizer):
    trainer = ReinforceTrainer(
        model, lambda prompts, texts: [len(text) for text in texts], group_size=2, max_new_tokens=6, microbatch_size=4
    )
    rollouts = trainer._rollouts(trainer.prompt_rows(PROMPTS), 2, seed=1)
    logps, entropies = trainer.update.log_probabilities(rollouts.microbatches(4))
    ids = np.zeros((4, 16), "int32")
    for row, prompt, response in zip(ids, rollouts.prompts, rollouts.responses):
        row[: len(prompt) + len(response)] = prompt + response
    logits = model({"token_ids": ids, "padding_mask": ids > 0})[:, :, : tokenizer.vocabulary_size()]
    everything = np.array(jax.nn.log_softmax(logits))
    for row, (prompt, response) in enumerate(zip(rollouts.prompts, rollouts.responses)):
        count = len(response)
        expected = everything[row, len(prompt) - 1 :][:count]
        np.testing.assert_allclose(logps[0, row, :count], expected[range(count), response], atol=1e-5)
        np.testing.assert_allclose(entropies[0, row, :count], -(np.exp(expected) * expected).sum(-1), atol=1e-5)
    before = np.array(model.backbone.token_embedding.embeddings)
    history = trainer.fit(PROMPTS, batch_size=2, steps=1, verbose=0).history
    after = np.array(model.backbone.token_embedding.embeddings)
    assert abs(history["kl"][0]) < 1e-4
    assert np.array_equal(before[-BEYOND:], after[-BEYOND:])
    assert not np.array_equal(before, after)
