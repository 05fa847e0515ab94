"""A Hugging Face folder whose files say more of the tokenizer than `tokenizer.model`, or something else."""

import json

import pytest
import sentencepiece
import tokenizers

from keras_gemma.checkpoints.tokenizer_files import hugging_face_files
from keras_gemma.checkpoints.tokenizer_files import parsed
from keras_gemma.checkpoints.tokenizer_folder import eos_tokens
from keras_gemma.checkpoints.tokenizer_folder import proto_of_files

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED = "added_tokens.json"
TEXT = "<|im_start|>user\nHello, <my token> 12<|im_end|>"


@pytest.fixture
def files(vocabulary):
    return hugging_face_files(vocabulary)


def changed(files, name, change):
    described = json.loads(files[name])
    change(described)
    return {**files, name: json.dumps(described).encode()}


def named(index, content, **options):
    takes = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": True, **takes, **options}


def with_added(files, *tokens):
    return changed(files, JSON, lambda described: described["added_tokens"].extend(tokens))


def renamed(files, index, content):
    """As zephyr-7b-gemma renames the turn markers."""

    def change(described):
        (token,) = [token for token in described["added_tokens"] if token["id"] == index]
        vocabulary = described["model"]["vocab"]
        vocabulary[content] = vocabulary.pop(token["content"])
        token["content"] = content

    files = changed(files, CONFIG, lambda one: one["added_tokens_decoder"][str(index)].update(content=content))
    return changed(_without_turns(files), JSON, change)


def _without_turns(files):
    files = changed(files, CONFIG, lambda one: one.pop("additional_special_tokens"))
    return {name: content for name, content in files.items() if name != "special_tokens_map.json"}


def encoded(proto, text=TEXT):
    return sentencepiece.SentencePieceProcessor(model_proto=proto).Encode(text)


def test_files_that_say_the_same_change_nothing(files, vocabulary):
    assert proto_of_files(files) is files[MODEL] == vocabulary


@pytest.mark.parametrize("without_model", [False, True])
def test_added_and_renamed_tokens_have_the_ids_of_tokenizers(files, without_model):
    files = with_added(files, named(500, "<|im_start|>"), named(501, "<my token>"))
    files = renamed(files, 6, "<|im_end|>")
    expected = tokenizers.Tokenizer.from_str(files[JSON].decode()).encode(TEXT, add_special_tokens=False).ids
    assert {500, 501, 6} <= set(expected)
    if without_model:
        del files[MODEL]
    proto = proto_of_files(files)
    assert encoded(proto) == expected
    assert sentencepiece.SentencePieceProcessor(model_proto=proto).Decode(expected) == TEXT
    # And in files that are made of it.
    again = hugging_face_files(proto)
    assert tokenizers.Tokenizer.from_str(again[JSON].decode()).encode(TEXT, add_special_tokens=False).ids == expected
    assert proto_of_files(again) == proto


@pytest.mark.parametrize("file", [ADDED, CONFIG])
def test_a_gap_before_an_added_token_is_filled(files, file, vocabulary):
    if file == ADDED:
        files[ADDED] = json.dumps({"<|im_end|>": 503}).encode()
    else:
        decoder = {"503": named(503, "<|im_end|>")}
        files = changed(files, CONFIG, lambda config: config["added_tokens_decoder"].update(decoder))
    proto = proto_of_files({name: files[name] for name in (MODEL, CONFIG, ADDED) if name in files})
    assert encoded(proto, "<|im_end|>") == [503]
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert len(processor) == 504
    assert processor.Decode([500, 501, 502]) == ""
    assert encoded(proto, "[PAD500]") == encoded(vocabulary, "[PAD500]")
    assert hugging_face_files(proto)[MODEL] == proto


def test_what_ends_a_text_by_the_word_of_files(files):
    files = with_added(files, named(500, "<|im_end|>"))
    files = changed(files, CONFIG, lambda config: config.update(eos_token={"content": "<|im_end|>"}))
    assert eos_tokens(files) == ["<|im_end|>", "<eos>"]
    assert proto_of_files(files)


def _of_another_model(described):
    described["model"]["vocab"] = {piece: index for piece, index in described["model"]["vocab"].items() if index != 499}


@pytest.mark.parametrize(
    "change, parts",
    [
        # Two files, one id.
        (lambda files: {**with_added(files, named(500, "<a>")), ADDED: b'{"<b>": 500}'}, ["500", "<a>", "<b>", JSON]),
        (lambda files: {**renamed(files, 5, "<a>"), ADDED: b'{"<start_of_turn>": 5}'}, ["id 5", "<a>", ADDED]),
        (lambda files: {**files, ADDED: b'{"<x>": 300}'}, ["id 300", "<x>", JSON, ADDED]),
        (lambda files: {**files, ADDED: b'{"<begin>": 2}'}, ["id 2", "<bos>", "<begin>"]),
        # One token, two ids.
        (lambda files: {**files, ADDED: b'{"<start_of_turn>": 500}'}, ["two ids", "<start_of_turn>", "5", "500"]),
        # Files of another model.
        (lambda files: changed(files, JSON, _of_another_model), ["lacks 1 pieces", MODEL]),
        (
            lambda files: changed(files, JSON, lambda one: one["model"]["vocab"].update(zzz=500)),
            ["no added tokens", "'zzz'"],
        ),
        (lambda files: with_added(files, named(5, "<a>")), ["id 5", "<start_of_turn>", "<a>"]),
        (lambda files: with_added(files, named(510, "<a>")), ["501 pieces", JSON]),
        # What SentencePiece cannot do.
        (lambda files: with_added(files, named(500, "<a>", lstrip=True)), ["lstrip", "<a>"]),
        # Special tokens.
        (lambda files: changed(files, CONFIG, lambda one: one.update(eos_token="<none>")), ["<none>", "no file gives"]),
        (lambda files: changed(files, CONFIG, lambda one: one.update(bos_token="<mask>")), ["<bos>", "<mask>"]),
        (lambda files: {**files, ADDED: b"[1"}, [ADDED, "not a complete JSON"]),
        (lambda files: {**files, ADDED: b'{"<a>": "b"}'}, [ADDED, "`id`"]),
    ],
)
def test_differences_are_refused_by_name(files, change, parts):
    with pytest.raises(ValueError) as raised:
        proto_of_files(change(files))
    for part in parts:
        assert part in str(raised.value)


def test_pieces_of_the_changed_model_are_those_of_the_first_but_for_the_change(files, vocabulary):
    files = renamed(files, 5, "<|im_start|>")
    before, after = parsed(vocabulary).pieces, parsed(proto_of_files(files)).pieces
    assert [index for index in range(500) if before[index] != after[index]] == [5]
