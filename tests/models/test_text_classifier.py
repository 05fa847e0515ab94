"""The classifier of texts: what it reads, what it learns, and how it is kept."""

import keras
import keras_hub
import numpy as np
import pytest

from keras_gemma.models import GemmaTextClassifier
from keras_gemma.models import GemmaTextClassifierPreprocessor

TEXTS = ["You may copy", "the Work", "You may reproduce the Work", "the License", "You may not", "a Work"]
LABELS = [1, 0, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def preprocessor(tokenizer):
    return GemmaTextClassifierPreprocessor(tokenizer, sequence_length=12)


@pytest.fixture(scope="module")
def make_classifier(make_model, preprocessor):
    def make(num_classes=2, **kwargs):
        keras.utils.set_random_seed(0)
        return GemmaTextClassifier(make_model().backbone, num_classes, preprocessor, **kwargs)

    return make


def test_rows(preprocessor, tokenizer):
    x, y, weights = preprocessor(TEXTS, LABELS, [1.0] * 6)
    assert keras.ops.is_tensor(x["token_ids"])
    assert [keras.ops.convert_to_numpy(part).tolist() for part in (y, weights)] == [LABELS, [1.0] * 6]
    row = keras.ops.convert_to_numpy(x["token_ids"])[0][keras.ops.convert_to_numpy(x["padding_mask"])[0]]
    assert row.tolist() == [tokenizer.start_token_id, *tokenizer.encode(TEXTS[0])]
    assert preprocessor(TEXTS[0])["token_ids"].shape == (12,)
    with pytest.warns(UserWarning, match="lose their end"):
        long = preprocessor([TEXTS[2] * 9])
    assert keras.ops.convert_to_numpy(long["padding_mask"]).all()
    with pytest.raises(ValueError, match="text or a dialogue"):
        preprocessor({"prompts": ["a"], "responses": ["b"]})


@pytest.mark.multi_backend
def test_learns_and_is_kept(make_classifier, tmp_path):
    classifier = make_classifier(dropout=0.1)
    assert isinstance(classifier, keras_hub.models.TextClassifier)
    classifier.compile(optimizer=keras.optimizers.Adam(3e-2))
    history = classifier.fit(
        np.array(TEXTS), LABELS, batch_size=3, epochs=12, validation_data=(TEXTS[:2], LABELS[:2]), verbose=0
    ).history
    assert history["loss"][-1] < 0.2
    assert history["val_sparse_categorical_accuracy"][-1] == 1
    logits = classifier.predict(TEXTS, verbose=0)
    assert logits.argmax(-1).tolist() == LABELS
    # Padding and neighbours change nothing.
    np.testing.assert_allclose(classifier.predict(TEXTS[1:2], verbose=0)[0], logits[1], atol=1e-5)
    loss, accuracy = classifier.evaluate(TEXTS, LABELS, verbose=0)
    expected = -np.mean([row[label] - np.log(np.exp(row).sum()) for row, label in zip(logits, LABELS)])
    np.testing.assert_allclose((loss, accuracy), (expected, 1), atol=1e-4)

    classifier.save_to_preset(str(tmp_path / "preset"))
    loaded = GemmaTextClassifier.from_preset(str(tmp_path / "preset"))
    assert loaded.get_config()["dropout"] == 0.1
    np.testing.assert_allclose(loaded.predict(TEXTS, verbose=0), logits, atol=1e-5)
    # As in keras-hub: `num_classes` asks for a new head.
    assert GemmaTextClassifier.from_preset(str(tmp_path / "preset"), num_classes=3).num_classes == 3
    classifier.save(tmp_path / "whole.keras")
    whole = keras.saving.load_model(tmp_path / "whole.keras")
    np.testing.assert_allclose(whole.predict(TEXTS, verbose=0), logits, atol=1e-5)


def test_from_a_preset_of_text_generation(make_model, tmp_path):
    model = make_model()
    model.save_to_preset(str(tmp_path))
    classifier = GemmaTextClassifier.from_preset(str(tmp_path), num_classes=3, activation="softmax", sequence_length=20)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(classifier.backbone.token_embedding.embeddings),
        keras.ops.convert_to_numpy(model.backbone.token_embedding.embeddings),
    )
    np.testing.assert_allclose(classifier.predict(TEXTS, verbose=0).sum(-1), 1, rtol=1e-5)
    assert not classifier.loss.get_config()["from_logits"]
    with pytest.raises(ValueError, match="'num_classes'"):
        GemmaTextClassifier.from_preset(str(tmp_path))


def test_as_transformers(make_classifier, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    classifier = make_classifier(3)
    classifier.output_dense.kernel.assign(np.random.default_rng(0).normal(0, 1, (8, 3)))
    classifier.backbone.export_to_transformers(str(tmp_path))
    theirs = transformers.GemmaForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=0).eval()
    kernel = keras.ops.convert_to_numpy(classifier.output_dense.kernel)
    theirs.score.weight.data = torch.tensor(kernel.T)
    x = classifier.preprocessor(TEXTS)
    ids, mask = (torch.tensor(keras.ops.convert_to_numpy(x[name])).long() for name in ("token_ids", "padding_mask"))
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(classifier.predict(TEXTS, verbose=0), expected, atol=1e-4)


def test_refused(make_classifier):
    classifier = make_classifier()
    for labels in ([0, 1, 0, 1, 0, 2], [-1] * 6, [0.5] * 6):
        with pytest.raises(ValueError, match="from 0 to 1"):
            classifier.fit(TEXTS, labels, verbose=0)
    with pytest.raises(ValueError, match="`num_classes`"):
        make_classifier(0)
    for method in ("fit", "evaluate"):
        with pytest.raises(ValueError, match=rf"`{method}` needs.*`compile\(\)`"):
            getattr(make_classifier(compile=False), method)(TEXTS, LABELS)
