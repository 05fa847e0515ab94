import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from tiny.baselines import KneserNey
from tiny.baselines import kneser_ney_bits_per_byte
from tiny.baselines import xz_bits_per_byte
from tiny.vocabulary import train_vocabulary

BOS, EOS = 2, 1


def random_documents(rng, documents, vocabulary_size):
    """Token ids with skewed frequencies, so that n-grams of every count occur."""
    parts = []
    for _ in range(documents):
        words = 3 + (rng.exponential(3, size=rng.integers(0, 40)).astype(int) % (vocabulary_size - 3))
        parts.append(np.concatenate([[BOS], words, [EOS]]))
    return np.concatenate(parts)


@pytest.mark.parametrize("order", [2, 3, 5])
def test_kneser_ney_probabilities_sum_to_one(order):
    rng, size = np.random.default_rng(0), 30
    model = KneserNey(random_documents(rng, 60, size), size, order)
    seen, _ = model.pad(random_documents(rng, 3, size))
    contexts = np.concatenate(
        [
            rng.integers(0, size, (50, order - 1)),
            np.lib.stride_tricks.sliding_window_view(seen, order - 1)[:50],
            np.full((1, order - 1), BOS),
        ]
    )
    for context in contexts:
        rows = np.concatenate([np.tile(context, (size, 1)), np.arange(size)[:, None]], axis=1)
        probabilities = model.probabilities(rows)
        assert probabilities.min() > 0
        np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-12)


def test_kneser_ney_bigram_by_hand():
    """a b a c: discounts, continuation counts and back-off written out."""
    a, b, c, size = 3, 4, 5, 6
    model = KneserNey(np.array([BOS, a, b, a, c, EOS]), size, order=2)
    # Bigrams: bos a, a b, b a, a c, c eos, each once. A count of counts that is 0 is taken as 1.
    y = 5 / (5 + 2 * 1)
    d1 = 1 - 2 * y * 1 / 5
    # Different tokens before each: a 2, b 1, c 1, eos 1, five in all; three unigrams occur once and one twice.
    y1 = 3 / (3 + 2 * 1)
    u1, u2 = 1 - 2 * y1 * 1 / 3, np.clip(2 - 3 * y1 * 1 / 1, 0, 2)
    unigram_b = (1 - u1) / 5 + (3 * u1 + u2) / 5 / size
    expected = (1 - d1) / 2 + 2 * d1 / 2 * unigram_b
    np.testing.assert_allclose(model.probabilities(np.array([[a, b]])), [expected])


def test_kneser_ney_contexts_stay_within_a_document():
    rng, size = np.random.default_rng(1), 20
    train = random_documents(rng, 40, size)
    first, second = random_documents(rng, 1, size), random_documents(rng, 1, size)
    both = np.concatenate([first, second])
    separate = kneser_ney_bits_per_byte(train, first, 1, size) + kneser_ney_bits_per_byte(train, second, 1, size)
    np.testing.assert_allclose(kneser_ney_bits_per_byte(train, both, 1, size), separate)


def test_kneser_ney_refuses_ids_without_bos():
    with pytest.raises(ValueError, match="must open with bos"):
        KneserNey(np.array([5, 6, 7]), 10)


def test_xz_finds_the_held_out_text_in_the_training_text():
    text = np.random.default_rng(0).bytes(20_000)
    sizes = xz_bits_per_byte(text, text)
    assert sizes.alone > 7.9
    assert sizes.conditional < 0.2


@pytest.fixture(scope="module")
def small_vocabulary():
    text = "".join(
        f"It was the {word} of times, and the {word} was not {n}.\n\n"
        for n, word in enumerate(["best", "worst", "age"] * 40)
    )
    return [text], train_vocabulary([text], size=330)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It was the best of times.",
        "\n",
        "\n\n",
        "\n\n\n",
        "a\tb",
        " leading",
        "trailing ",
        "a    b",
        "\r\n",
        "   ",
        "naïve café",
        "日本語",
        "🙂👩‍👩‍👧",
        "1984",
        "<start_of_turn>user\nHi<end_of_turn>\n",
    ],
)
def test_vocabulary_round_trip(small_vocabulary, text):
    processor = sentencepiece.SentencePieceProcessor(model_proto=small_vocabulary[1])
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert processor.unk_id() not in ids


def test_vocabulary_special_pieces(small_vocabulary):
    processor = sentencepiece.SentencePieceProcessor(model_proto=small_vocabulary[1])
    pieces = [processor.id_to_piece(n) for n in range(9)]
    assert pieces == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]
    assert [processor.id_to_piece(n) for n in processor.encode("1984")] == ["1", "9", "8", "4"]
    assert processor.encode("it\n\nwas").count(8) == 1


def test_vocabulary_is_reproducible(small_vocabulary):
    texts, proto = small_vocabulary
    assert train_vocabulary(texts, size=330) == proto
