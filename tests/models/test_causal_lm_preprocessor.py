import contextlib

import keras
import numpy as np
import pytest

from keras_gemma.models.preprocessor_outputs import numpy_outputs

PAD, EOS, BOS, EOT = 0, 1, 2, 6
DIALOGUE = [{"role": "user", "content": "Hi"}, {"role": "model", "content": "Yo"}]

pytestmark = pytest.mark.multi_backend


def rows_of(batch):
    """Ids with their weights, for each row up to its padding: the first input and then every label."""
    x, y, weights = keras.tree.map_structure(keras.ops.convert_to_numpy, batch)
    ids = np.concatenate([x["token_ids"][..., :1], y], axis=-1)
    weights = np.concatenate([np.zeros_like(weights[..., :1]), weights], axis=-1)
    return ids, weights


def learned(tokenizer, batch):
    """The text of every row that carries weight."""
    ids, weights = rows_of(batch)
    return ["".join(tokenizer.id_to_token(int(i)) for i in row[weight > 0]) for row, weight in zip(ids, weights)]


@pytest.fixture(autouse=True)
def arrays(request):
    """What rows hold is looked at in NumPy arrays; a test of its own looks at tensors."""
    with contextlib.nullcontext() if "gives_tensors" in request.node.name else numpy_outputs():
        yield


def assert_batches_equal(received, expected):
    keras.tree.assert_same_structure(received, expected)
    for left, right in zip(keras.tree.flatten(received), keras.tree.flatten(expected)):
        np.testing.assert_array_equal(left, right)
        assert keras.backend.standardize_dtype(left.dtype) == keras.backend.standardize_dtype(right.dtype)


# === Strings ===


def test_a_string_stands_between_bos_and_eos(tokenizer, make_preprocessor):
    x, y, weights = make_preprocessor()(["Hi you"])
    ids = [BOS, *tokenizer.encode("Hi you"), EOS]
    n = len(ids)
    np.testing.assert_array_equal(x["token_ids"][0], (ids + [PAD] * 12)[:12])
    np.testing.assert_array_equal(x["padding_mask"][0], np.arange(12) < n)
    np.testing.assert_array_equal(y[0], (ids[1:] + [PAD] * 12)[:12])
    np.testing.assert_array_equal(weights[0], np.arange(12) < n - 1)
    dtypes = [keras.backend.standardize_dtype(part.dtype) for part in (*x.values(), y, weights)]
    assert dtypes == ["int32", "bool", "int32", "float32"]


def test_truncated_text_gets_no_eos(tokenizer, make_preprocessor):
    text = "the License " * 20
    ids, weights = rows_of(make_preprocessor()([text]))
    assert ids.tolist() == [[BOS, *tokenizer.encode(text)[:12]]]
    assert weights.tolist() == [[0.0] + [1.0] * 12]


@pytest.mark.parametrize("spare, last", [(0, EOS), (-1, None)])
def test_eos_stands_where_it_just_fits(tokenizer, make_preprocessor, spare, last):
    count = len(tokenizer.encode("123456"))
    ids, weights = rows_of(make_preprocessor(sequence_length=count + 1 + spare)(["123456"]))
    assert ids[0, -1] == (tokenizer.encode("6")[0] if last is None else last)
    assert weights[0, 1:].all()


@pytest.mark.parametrize("text", ["<bos>Hi", "Hi", "<bos>", "", "<bos><bos>Hi"])
def test_exactly_one_bos_opens_every_row(make_preprocessor, text):
    preprocessor = make_preprocessor(sequence_length=40)
    for row in (preprocessor([text])[0], preprocessor.generate_preprocess([text])):
        ids = row["token_ids"][0].tolist()
        assert ids[0] == BOS and ids.count(BOS) == 1


def test_bos_in_a_string_is_the_one_that_is_added(make_preprocessor):
    assert_batches_equal(make_preprocessor()(["<bos>Hi"]), make_preprocessor()(["Hi"]))


def test_start_and_end_tokens_can_be_left_out(tokenizer, make_preprocessor):
    bare = make_preprocessor(add_start_token=False, add_end_token=False)
    ids = tokenizer.encode("Hi you")
    assert bare(["Hi you"])[0]["token_ids"][0].tolist() == (ids + [PAD] * 12)[:12]
    assert bare.generate_preprocess(["Hi you"])["token_ids"][0].tolist() == (ids + [PAD] * 12)[:12]
    both = {"prompts": ["Hi "], "responses": ["you"]}
    assert rows_of(bare(both))[0][0].tolist() == (tokenizer.encode("Hi ") + tokenizer.encode("you") + [PAD] * 13)[:13]
    for dialogue in (
        bare([DIALOGUE], sequence_length=60)[0],
        bare.generate_preprocess([DIALOGUE[:1]], sequence_length=20),
    ):
        assert BOS not in np.asarray(dialogue["token_ids"])


HAND_MADE = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


def test_what_users_type_is_text_and_that_is_said_once(tokenizer, make_preprocessor):
    literal = tokenizer.encode(HAND_MADE, allow_special_tokens=False)
    forms = {
        "string": (HAND_MADE, [BOS, *literal, EOS]),
        "pair": ({"prompts": HAND_MADE, "responses": HAND_MADE}, [BOS, *literal, *literal, EOS]),
    }
    for example, expected in forms.values():
        preprocessor = make_preprocessor()
        with pytest.warns(UserWarning, match="'<start_of_turn>'.*allow_special_tokens=True") as caught:
            assert preprocessor.row(example).ids == expected
            assert preprocessor.prompt_ids(HAND_MADE) == [BOS, *literal]
            assert preprocessor.prompt_ids({"prompts": HAND_MADE}) == [BOS, *literal]
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="'<mask>'"):
        make_preprocessor().row([{"role": "user", "content": "<end_of_turn> <mask>"}])


def test_prompts_made_by_hand_are_turns_where_special_tokens_are_allowed(tokenizer, make_preprocessor):
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    preprocessor = make_preprocessor(allow_special_tokens=True)
    assert preprocessor.prompt_ids(f"<bos>{HAND_MADE}") == expected
    assert make_preprocessor().prompt_ids(HAND_MADE, allow_special_tokens=True) == expected
    assert preprocessor.row(HAND_MADE).ids == [*expected, EOS]
    restored = type(preprocessor).from_config({**preprocessor.get_config(), "tokenizer": tokenizer})
    assert restored.allow_special_tokens and not restored.merge_system_messages


# === Prompts and responses ===


def test_only_the_response_and_its_eos_are_learned(tokenizer, make_preprocessor):
    batch = make_preprocessor(sequence_length=20)({"prompts": ["Say it: ", ""], "responses": ["12", "3"]})
    assert learned(tokenizer, batch) == ["12<eos>", "3<eos>"]
    ids, _ = rows_of(batch)
    assert ids[0].tolist()[: len(tokenizer.encode("Say it: ")) + 1] == [BOS, *tokenizer.encode("Say it: ")]


def test_a_truncated_response_learns_what_is_left_of_it(tokenizer, make_preprocessor):
    batch = make_preprocessor(sequence_length=5)({"prompts": ["123"], "responses": ["4567"]})
    assert learned(tokenizer, batch) == ["45"]


def test_a_prompt_that_fills_the_row_learns_nothing_and_says_so(make_preprocessor):
    with pytest.warns(UserWarning, match="leave no room"):
        _, _, weights = make_preprocessor(sequence_length=3)({"prompts": ["12345"], "responses": ["6"]})
    assert weights.sum() == 0


# === Dialogues ===


@pytest.mark.parametrize("form", [lambda d: d, lambda d: {"messages": d}], ids=["list", "messages"])
def test_every_turn_of_the_model_and_its_end_is_learned(tokenizer, make_preprocessor, form):
    dialogue = [*DIALOGUE, {"role": "user", "content": "12"}, {"role": "model", "content": "34"}]
    batch = make_preprocessor(sequence_length=80)(form([dialogue, DIALOGUE]))
    assert learned(tokenizer, batch) == ["Yo<end_of_turn>34<end_of_turn>", "Yo<end_of_turn>"]
    ids, _ = rows_of(batch)
    expected = tokenizer.apply_chat_template(dialogue)
    assert ids[0].tolist() == expected + [PAD] * (81 - len(expected))
    assert EOS not in ids


def test_of_a_dialogue_and_its_answer_the_answer_alone_is_learned(tokenizer, make_preprocessor):
    preprocessor, dialogue = make_preprocessor(sequence_length=80), [*DIALOGUE, {"role": "user", "content": "12"}]
    whole = preprocessor([[*dialogue, {"role": "model", "content": "34"}]])
    for form in ({"prompts": dialogue, "responses": "34"}, {"prompts": [dialogue], "responses": ["34"]}):
        batch = preprocessor([form] if isinstance(form["responses"], str) else form)
        np.testing.assert_array_equal(batch[0]["token_ids"], whole[0]["token_ids"])
        assert learned(tokenizer, batch) == ["34<end_of_turn>"]


def test_refusals_of_the_chat_format_reach_the_user(make_preprocessor):
    with pytest.raises(ValueError, match="system"):
        make_preprocessor()([[{"role": "system", "content": "x"}]])


# === Forms of input ===


def test_a_single_example_gives_a_single_row(make_preprocessor):
    preprocessor = make_preprocessor(sequence_length=40)
    pair = {"prompts": "Hi", "responses": "Yo"}
    for single, batch in [
        ("Hi", ["Hi"]),
        (pair, {"prompts": ["Hi"], "responses": ["Yo"]}),
        (pair, [pair]),
        (DIALOGUE, [DIALOGUE]),
        ({"messages": DIALOGUE}, [{"messages": DIALOGUE}]),
    ]:
        row = preprocessor(single)
        assert row[1].shape == (40,)
        assert_batches_equal(keras.tree.map_structure(lambda array: array[None], row), preprocessor(batch))


def test_bytes_numpy_and_tensorflow_strings_are_strings(make_preprocessor):
    import tensorflow as tf

    preprocessor, texts = make_preprocessor(), ["Hé", "you"]
    encoded = [text.encode() for text in texts]
    expected = preprocessor(texts)
    for form in (
        encoded,
        np.array(texts),
        np.array(texts, dtype=object),
        np.array(encoded, dtype=object),
        tf.constant(texts),
        list(tf.constant(texts)),
    ):
        assert_batches_equal(preprocessor(form), expected)
    single = preprocessor("Hé")
    for form in ("Hé".encode(), np.array("Hé"), tf.constant("Hé"), np.str_("Hé")):
        assert_batches_equal(preprocessor(form), single)


def test_a_tuple_of_examples_and_weights_is_unpacked(make_preprocessor):
    expected = make_preprocessor()(["Hi", "you"], sample_weight=[1.0, 0.5])
    assert_batches_equal(make_preprocessor()((["Hi", "you"], None, np.array([1.0, 0.5]))), expected)


@pytest.mark.multi_backend
def test_a_call_gives_tensors_that_the_backend_computes_with(make_preprocessor):
    preprocessor = make_preprocessor()
    outputs = [preprocessor(["Hi", "you"], sample_weight=[1.0, 2.0]), preprocessor("Hi")]
    outputs += [preprocessor.generate_preprocess("Hi"), preprocessor.generate_preprocess(["Hi"])]
    assert all(keras.ops.is_tensor(tensor) for tensor in keras.tree.flatten(outputs))
    # Keras refuses to mix its own tensors with NumPy arrays on some backends.
    assert (outputs[0][2] * keras.ops.ones((2, 1))).shape == (2, 12)


def test_sample_weight_weighs_whole_examples(make_preprocessor):
    plain = make_preprocessor()(["Hi", "you"])[2]
    weighted = make_preprocessor()(["Hi", "you"], sample_weight=[2.0, 0.0])[2]
    np.testing.assert_array_equal(weighted, np.asarray(plain) * [[2.0], [0.0]])
    assert make_preprocessor()("Hi", sample_weight=0.5)[2].max() == 0.5


def test_the_sequence_length_can_be_given_in_the_call(make_preprocessor):
    assert make_preprocessor()(["Hi"], sequence_length=7)[1].shape == (1, 7)


@pytest.mark.parametrize(
    "x, rule",
    [
        ([], "at least one"),
        ([1, 2], "Received: 1"),
        (np.zeros((2, 3)), "Received"),
        ({"prompts": ["a"]}, "responses"),
        ([{"prompts": "a"}], "responses"),
        ({"responses": ["a"]}, "prompts"),
        ({"prompts": ["a", "b"], "responses": ["c"]}, "Every prompt"),
        ({"text": ["a"]}, "text"),
        ({"prompts": ["a"], "responses": ["b"], "extra": ["c"]}, "extra"),
        ([None], "None"),
    ],
)
def test_what_is_not_text_is_refused(make_preprocessor, x, rule):
    with pytest.raises(ValueError, match=rule):
        make_preprocessor()(x)


def test_labels_are_refused(make_preprocessor):
    with pytest.raises(ValueError, match="next tokens"):
        make_preprocessor()(["Hi"], ["you"])


# === Generation ===


def test_prompts_are_padded_and_get_no_eos(tokenizer, make_preprocessor):
    batch = make_preprocessor().generate_preprocess(["Hi", "123"], sequence_length=6)
    rows = [[BOS, *tokenizer.encode(text)] for text in ("Hi", "123")]
    assert batch["token_ids"].tolist() == [row + [PAD] * (6 - len(row)) for row in rows]
    assert batch["padding_mask"].sum(axis=1).tolist() == [len(row) for row in rows]


def test_a_dialogue_is_prompted_with_the_models_turn_opened(tokenizer, make_preprocessor):
    row = make_preprocessor().generate_preprocess(DIALOGUE[:1], sequence_length=50)
    expected = tokenizer.apply_chat_template(DIALOGUE[:1], add_generation_prompt=True)
    assert row["token_ids"][row["padding_mask"]].tolist() == expected


def test_prompts_of_pairs_are_prompts(make_preprocessor):
    preprocessor = make_preprocessor()
    expected = preprocessor.generate_preprocess(["Hi"])
    assert_batches_equal(preprocessor.generate_preprocess({"prompts": ["Hi"]}), expected)
    assert_batches_equal(preprocessor.generate_preprocess({"prompts": ["Hi"], "responses": ["x"]}), expected)


@pytest.mark.parametrize("digits, fits", [(10, True), (11, False), (50, False)])
def test_a_prompt_must_leave_room_to_generate(make_preprocessor, digits, fits):
    preprocessor = make_preprocessor()
    if fits:
        assert preprocessor.generate_preprocess("1" * digits)["padding_mask"].sum() == 11
        return
    with pytest.raises(ValueError, match=f"{digits + 1} tokens for a length of 12"):
        preprocessor.generate_preprocess(["1", "1" * digits])


def test_generated_ids_become_text_without_special_tokens(tokenizer, make_preprocessor):
    ids = [[BOS, *tokenizer.encode("Hi you"), EOS], [BOS, *tokenizer.encode("12"), EOT]]
    width = max(map(len, ids)) + 2
    x = {
        "token_ids": np.array([row + [tokenizer.encode("9")[0]] * (width - len(row)) for row in ids]),
        "padding_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }
    preprocessor = make_preprocessor()
    assert preprocessor.generate_postprocess(x) == ["Hi you", "12"]
    assert preprocessor.generate_postprocess({name: array[0] for name, array in x.items()}) == "Hi you"
    tensors = {name: keras.ops.convert_to_tensor(array) for name, array in x.items()}
    assert preprocessor.generate_postprocess(tensors) == ["Hi you", "12"]


# === Pipelines ===

EXAMPLES = {
    "strings": ["Hi", "<bos>Hé 🙂", "the License " * 9, ""],
    "pairs": {"prompts": ["a: ", "b: ", "", "<bos>d"], "responses": ["12", "the License of 2004 and so on", "é", ""]},
}


def as_list(examples):
    if isinstance(examples, dict):
        return [dict(zip(examples, values)) for values in zip(*examples.values())]
    return examples


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_tf_data_gives_the_rows_of_python(make_preprocessor, examples, batch_first):
    import tensorflow as tf

    preprocessor = make_preprocessor()
    ds = tf.data.Dataset.from_tensor_slices(examples)
    ds = ds.batch(2).map(preprocessor) if batch_first else ds.map(preprocessor).batch(2)
    first, second = ds.as_numpy_iterator()
    x_spec, y_spec, weights_spec = ds.element_spec
    assert [spec.shape[1] for spec in (x_spec["token_ids"], x_spec["padding_mask"], y_spec, weights_spec)] == [12] * 4
    assert_batches_equal(first, preprocessor(as_list(examples)[:2]))
    assert_batches_equal(second, preprocessor(as_list(examples)[2:]))


def test_tf_data_carries_sample_weights(make_preprocessor):
    import tensorflow as tf

    preprocessor, weights = make_preprocessor(), np.array([0.5, 2.0], "float32")
    ds = tf.data.Dataset.from_tensor_slices((["Hi", "you"], weights)).batch(2)
    (received,) = ds.map(lambda text, weight: preprocessor(text, sample_weight=weight)).as_numpy_iterator()
    assert_batches_equal(received, preprocessor(["Hi", "you"], sample_weight=weights))


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_grain_gives_the_rows_of_python(make_preprocessor, examples, batch_first):
    import grain

    preprocessor = make_preprocessor()
    ds = grain.MapDataset.source(as_list(examples))
    ds = ds.batch(2).map(preprocessor) if batch_first else ds.map(preprocessor).batch(2)
    first, second = list(ds)
    assert_batches_equal(first, preprocessor(as_list(examples)[:2]))
    assert_batches_equal(second, preprocessor(as_list(examples)[2:]))


def test_grain_carries_dialogues(make_preprocessor):
    import grain

    preprocessor = make_preprocessor(sequence_length=40)
    (batch,) = grain.MapDataset.source([DIALOGUE, DIALOGUE[:1]]).map(preprocessor).batch(2)
    assert_batches_equal(batch, preprocessor([DIALOGUE, DIALOGUE[:1]]))
    (batch,) = grain.MapDataset.source([DIALOGUE, DIALOGUE[:1]]).batch(2, batch_fn=list).map(preprocessor)
    assert_batches_equal(batch, preprocessor([DIALOGUE, DIALOGUE[:1]]))


def test_the_configuration_restores_the_preprocessor(tokenizer, make_preprocessor):
    config = make_preprocessor(sequence_length=9, add_end_token=False).get_config()
    assert (config["sequence_length"], config["add_start_token"], config["add_end_token"]) == (9, True, False)


# === Prompts inside tf.data ===


@pytest.mark.parametrize("batched", [True, False])
def test_prompts_and_texts_pass_through_tf_data_as_through_python(make_preprocessor, batched):
    import tensorflow as tf

    preprocessor, texts = make_preprocessor(sequence_length=12), ["12", "3 4"]
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    dataset = (dataset.batch(2) if batched else dataset).map(preprocessor.generate_preprocess)
    expected = preprocessor.generate_preprocess(texts if batched else texts[0])
    first = next(dataset.as_numpy_iterator())
    assert dataset.element_spec["token_ids"].shape[-1] == 12
    for name, value in expected.items():
        np.testing.assert_array_equal(first[name], value)
    decoded = next(dataset.map(preprocessor.generate_postprocess).as_numpy_iterator())
    assert decoded.tolist() == [b"12", b"3 4"] if batched else decoded == b"12"


def test_any_number_of_literal_starts_is_one_start(make_preprocessor):
    ids = make_preprocessor()("<bos><bos>12")[0]["token_ids"]
    np.testing.assert_array_equal(ids, make_preprocessor()("12")[0]["token_ids"])


def test_texts_of_rows_are_those_of_each(make_preprocessor):
    preprocessor = make_preprocessor()
    special = preprocessor.tokenizer.special_token_ids
    rows = [preprocessor.tokenizer.encode("12"), [*special], [], preprocessor.tokenizer.encode("3 4") + special[-1:]]
    assert preprocessor.decode_rows(rows) == [preprocessor.decode(row) for row in rows] == ["12", "", "", "3 4"]
    assert preprocessor.decode_rows([]) == []
