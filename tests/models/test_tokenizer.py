import io
import random

import keras
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf

from keras_gemma.models import GemmaTokenizer

SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<start_of_turn>": 5, "<end_of_turn>": 6}


def train(**kwargs):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "four five six"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **kwargs,
    )
    return model.getvalue()


@pytest.mark.parametrize("token, token_id", SPECIAL.items())
def test_special_tokens_are_found_by_name_and_by_id(tokenizer, token, token_id):
    assert tokenizer.token_to_id(token) == token_id
    assert tokenizer.id_to_token(token_id) == token


def test_special_tokens_have_attributes(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.end_token_id, tokenizer.start_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (3, 5, 6)
    assert (tokenizer.pad_token, tokenizer.end_token, tokenizer.start_token) == ("<pad>", "<eos>", "<bos>")
    assert sorted(tokenizer.special_token_ids) == [0, 1, 2]
    assert tokenizer.stop_token_ids == [1, 6]


def test_turn_markers_in_text_become_their_ids(tokenizer):
    assert tokenizer.encode("<start_of_turn>a<end_of_turn>") == [5, *tokenizer.encode("a"), 6]


@pytest.mark.parametrize(
    "text",
    [
        "<start_of_turn>user\nHi <mask><mask><end_of_turn>\n",
        "<<start_of_turn><start_of_<end_of_turn>turn> <start_of_turn",
        "<pad><bos><eos>  the License\n",
    ],
)
def test_special_tokens_in_text_stay_text_where_they_are_not_allowed(tokenizer, text):
    ids = tokenizer.encode(text, allow_special_tokens=False)
    assert not set(SPECIAL.values()) & set(ids)
    assert tokenizer.detokenize(ids) == text


def test_what_spells_no_special_token_has_the_same_ids_either_way(tokenizer):
    for text in (*TEXTS.values(), "<b>the</b>\n<0x41> <start_of_turn"):
        assert tokenizer.encode(text, allow_special_tokens=False) == tokenizer.encode(text)
        assert tokenizer.special_token_in(text) is None
    assert tokenizer.special_token_in("the <mask><end_of_turn>") == "<mask>"


def test_html_tags_and_white_space_are_no_special_tokens():
    pieces = {"pad_piece": "<pad>", "bos_piece": "<bos>", "eos_piece": "<eos>"}
    symbols = ["<tool>", "<tool>s", "<table>", "</h1>", "\n", "\n\n", "▁▁", "é", "[two▁words]"]
    tokenizer = GemmaTokenizer(
        proto=train(pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=symbols, **pieces)
    )
    for text in ("<table>one</h1>\n\n  é", "<tools>", "[twowords]"):
        assert tokenizer.special_token_in(text) is None
    for text, token in {"<tool>one": "<tool>", "a<tool>s": "<tool>s", "[two words]": "[two words]"}.items():
        assert tokenizer.special_token_in(text) == token
        ids = tokenizer.encode(text, allow_special_tokens=False)
        assert tokenizer.detokenize(ids) == text and len(ids) > len(tokenizer.encode(text))


def test_control_tokens_in_text_do_not(tokenizer):
    assert not {0, 1, 2} & set(tokenizer.encode("<pad><bos><eos>"))


TEXTS = {
    "empty": "",
    "digits": "0123456789 3.14159 1,000,000 ٣ ४",
    "runs of spaces": "  a   b" + " " * 70 + "c  ",
    "tabs": "\ta\t\tb\t",
    "CRLF": "one\r\ntwo\r\n\r\n\rthree\r",
    "newlines": "\n\na\n\n\nb\n \n",
    "other white space": "a\u00a0b\u2003c\u3000d\u200be\x0bf\x0cg\u2028h",
    "emoji": "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "combining accents": "e\u0301 a\u0308\u0301 vs é ä",
    "scripts": "日本語 العربية हिन्दी ไทย Ελληνικά 𝔘𝔫𝔦",
    "bytes by name": "<0x41> <0x0A>",
    "code": "def f(x):\n\treturn {'a': x ** 2}  # ~`@$%^&*\\|\n",
    "control characters": "a\x01b\x7fc\ufeff",
    "unassigned": "\U000e0001\uffff\ue000",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.detokenize(tokenizer.encode(text)) == text


def random_text(seed):
    rng = random.Random(seed)
    alphabet = [
        " ",
        " ",
        "\n",
        "\t",
        "\r\n",
        "7",
        "a",
        "the ",
        "License",
        "é",
        "e\u0301",
        "漢",
        "🙂",
        "\u00a0",
        "<",
        "0x41>",
    ]
    # Every plane, without surrogates and without U+2581, which stands for the space inside SentencePiece.
    ranges = [(1, 0x2581), (0x2582, 0xD800), (0xE000, 0x110000)]
    alphabet += [chr(rng.randrange(*rng.choice(ranges))) for _ in range(8)]
    return "".join(rng.choices(alphabet, k=rng.randrange(60)))


def test_random_text_comes_back_exactly(tokenizer):
    texts = [random_text(seed) for seed in range(400)]
    assert tokenizer.detokenize([tokenizer.encode(text) for text in texts]) == texts


def test_characters_outside_the_vocabulary_fall_back_to_bytes(tokenizer):
    pieces = [tokenizer.id_to_token(i) for i in tokenizer.encode("🙂")]
    assert pieces == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]


def test_every_digit_is_a_token(tokenizer):
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("1204")] == ["1", "2", "0", "4"]


def test_no_space_is_put_in_front(tokenizer):
    assert tokenizer.id_to_token(tokenizer.encode("License")[0])[0] != "▁"


def test_output_is_ragged_without_a_sequence_length(tokenizer):
    rows = tokenizer(["ab", "", "the License"])
    assert [list(map(int, row)) for row in rows] == [tokenizer.encode(text) for text in ("ab", "", "the License")]


@pytest.mark.multi_backend
def test_output_is_dense_with_a_sequence_length(vocabulary, tokenizer):
    dense = GemmaTokenizer(proto=vocabulary, sequence_length=4)
    rows = keras.ops.convert_to_numpy(dense(["a", "the License of 2004"]))
    assert rows.dtype == "int32"
    expected = [(tokenizer.encode(text) + [0] * 4)[:4] for text in ("a", "the License of 2004")]
    np.testing.assert_array_equal(rows, expected)


def test_one_string_gives_one_row(tokenizer):
    assert list(map(int, keras.ops.convert_to_numpy(tokenizer("the License")))) == tokenizer.encode("the License")


def test_encode_adds_cuts_and_pads_nothing(vocabulary, tokenizer):
    other = GemmaTokenizer(proto=vocabulary, sequence_length=3, add_bos=True, add_eos=True)
    assert other.encode("the License") == tokenizer.encode("the License")
    assert isinstance(other.encode("a"), list)


@pytest.mark.multi_backend
def test_tf_data_gives_the_ids_of_python(tokenizer):
    texts = [text for name, text in TEXTS.items()] + [random_text(seed) for seed in range(50)]
    ds = tf.data.Dataset.from_tensor_slices(texts).batch(10).map(tokenizer)
    rows = [row for batch in ds for row in batch.to_list()]
    assert rows == [tokenizer.encode(text) for text in texts]


@pytest.mark.multi_backend
def test_tf_data_gives_the_dense_ids_of_python(vocabulary):
    texts = ["", "the License", "🙂 12"]
    dense = GemmaTokenizer(proto=vocabulary, sequence_length=5)
    (rows,) = tf.data.Dataset.from_tensor_slices(texts).batch(3).map(dense)
    assert rows.shape == (3, 5)
    np.testing.assert_array_equal(rows, keras.ops.convert_to_numpy(dense(texts)))


@pytest.mark.multi_backend
def test_tf_data_tokenizes_one_string_at_a_time(vocabulary, tokenizer):
    ds = tf.data.Dataset.from_tensor_slices(["the License", ""])
    assert [row.tolist() for row in ds.map(tokenizer).as_numpy_iterator()] == [tokenizer.encode("the License"), []]
    dense = ds.map(GemmaTokenizer(proto=vocabulary, sequence_length=5))
    assert dense.element_spec.shape == (5,)
    assert [row.shape for row in dense] == [(5,), (5,)]


@pytest.mark.multi_backend
def test_tf_data_detokenizes(tokenizer):
    texts = ["the License 🙂", "12"]
    ragged = tf.data.Dataset.from_tensor_slices(texts).batch(2).map(tokenizer)
    assert [text.decode() for text in next(ragged.map(tokenizer.detokenize).as_numpy_iterator())] == texts
    dense = tf.data.Dataset.from_tensors([tokenizer.encode("1 2")])
    assert next(dense.map(tokenizer.detokenize).as_numpy_iterator()) == [b"1 2"]
    row = tf.data.Dataset.from_tensors(tokenizer.encode("1 2"))
    assert next(row.map(tokenizer.detokenize).as_numpy_iterator()) == b"1 2"


def test_tf_data_tokenizes_after_a_seed_was_set(tokenizer):
    # TensorFlow drops the resources of TensorFlow Text then.
    ds = tf.data.Dataset.from_tensor_slices(["12"]).map(tokenizer)
    keras.utils.set_random_seed(0)
    assert next(ds.as_numpy_iterator()).tolist() == tokenizer.encode("12")


@pytest.mark.parametrize("missing", ["bos", "eos", "pad"])
def test_a_vocabulary_without_a_special_token_is_refused_by_its_name(missing):
    pieces = {"pad_piece": "<pad>", "bos_piece": "<bos>", "eos_piece": "<eos>", f"{missing}_piece": "<other>"}
    with pytest.raises(ValueError, match=f"<{missing}>"):
        GemmaTokenizer(proto=train(pad_id=0, eos_id=1, bos_id=2, unk_id=3, **pieces))


def test_a_vocabulary_without_turn_markers_refuses_chat_only():
    proto = train(pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>")
    tokenizer = GemmaTokenizer(proto=proto)
    assert tokenizer.end_of_turn_id is None and tokenizer.start_of_turn_id is None
    assert tokenizer.stop_token_ids == [1]
    assert tokenizer.detokenize(tokenizer.encode("one two")) == "one two"
    with pytest.raises(ValueError, match="start_of_turn"):
        tokenizer.apply_chat_template([{"role": "user", "content": "one"}])


def test_a_tokenizer_without_vocabulary_says_so():
    with pytest.raises(ValueError, match="vocabulary"):
        GemmaTokenizer(proto=None).encode("a")


def test_a_vocabulary_may_be_a_path(vocabulary, tokenizer, tmp_path):
    path = tmp_path / "vocabulary.spm"
    path.write_bytes(vocabulary)
    assert GemmaTokenizer(proto=str(path)).encode("the License") == tokenizer.encode("the License")


def test_config_and_assets_restore_the_tokenizer(vocabulary, tokenizer, tmp_path):
    tokenizer.save_assets(str(tmp_path))
    restored = GemmaTokenizer.from_config(tokenizer.get_config())
    restored.load_assets(str(tmp_path))
    assert restored.encode("the License 🙂") == tokenizer.encode("the License 🙂")
    assert (restored.start_token_id, restored.end_of_turn_id) == (2, 6)
