"""Vocabularies trained as Gemma's was, and what every format takes of them."""

import json

import pytest
import sentencepiece

from keras_gemma import cli
from keras_gemma.checkpoints.tokenizer_files import hugging_face_files
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer
from keras_gemma.models import train_vocabulary
from tests.conftest import LICENSE

TEXTS = LICENSE.read_text().split("\n\n")
HARD = ["", "  two   spaces", "\n\n\nlines\n", "2024-11-28", "naïve ▅ 漢\0字", "\t\ttabs\r\n", "a " * 40, "<mask> x"]


@pytest.fixture(scope="module")
def trained():
    return train_vocabulary(TEXTS, size=500, newline_runs=3, space_runs=4)


def test_texts_come_back_and_specials_stand_where_gemmas_do(trained):
    tokenizer = GemmaTokenizer(proto=trained)
    assert tokenizer.vocabulary_size() == 500
    assert [tokenizer.id_to_token(i) for i in range(7)] == [
        "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
    ]  # fmt: skip
    assert tokenizer.stop_token_ids == [1, 6]
    for text in [*HARD, *TEXTS[:20]]:
        assert tokenizer.detokenize([tokenizer.encode(text)]) == [text]
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained)
    assert processor.encode("\n\n\n\n2024    x", out_type=str)[:6] == ["\n\n\n", "\n", "2", "0", "2", "4"]
    assert trained == train_vocabulary(iter(TEXTS), size=500, newline_runs=3, space_runs=4)


def test_hugging_face_reads_the_same_ids(trained):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(hugging_face_files(trained)["tokenizer.json"].decode())
    ours = GemmaTokenizer(proto=trained)
    for text in [*HARD, *TEXTS[:20]]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text


def test_lines_that_sentencepiece_would_leave_out_are_learned():
    long_line = "thequickbrownfox " * 70_000
    proto = train_vocabulary([long_line, "zebra▅zebra " * 50], size=300, newline_runs=1, space_runs=1)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert len(processor.encode("thequickbrownfox")) < 12
    assert len(processor.encode("zebra")) < 5


@pytest.mark.parametrize(
    "texts, kwargs, rule",
    [
        (TEXTS, {"size": 100}, "`size` is above .* take so many pieces"),
        (TEXTS, {"size": 300, "newline_runs": 1, "space_runs": 1}, r"take \d+ pieces. Received: a `size` of 300"),
        (["ab"] * 3, {"size": 30_000}, r"at most \d+ pieces. Received: a `size` of 30000"),
        ([], {"size": 400}, "none that says anything"),
        (["a", None], {"size": 400}, "Text 1 is a string. Received: None"),
        (["a", "\ud83d"], {"size": 400}, "Text 1 has whole characters"),
        (TEXTS, {"newline_runs": 0}, "`newline_runs` is at least 1"),
        (TEXTS, {"character_coverage": 1.5}, "at most 1. Received: 1.5"),
    ],
)
def test_what_makes_no_vocabulary_is_refused(texts, kwargs, rule):
    with pytest.raises(ValueError, match=rule):
        train_vocabulary(texts, **kwargs)


def test_a_new_vocabulary_that_cannot_be_exported_is_refused_before_it_is_trained_on(make_model, tmp_path):
    path = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path), model_type="unigram", vocab_size=300, pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    tokenizer = GemmaTokenizer(proto=f"{path}.model")
    model = GemmaCausalLM(make_model().backbone, GemmaCausalLMPreprocessor(tokenizer, sequence_length=8))
    model.compile()
    with pytest.raises(ValueError, match=r"could not be exported.*`model_type` is one of \['BPE'\]"):
        model.fit(["a work"], verbose=0)


def test_the_command_trains_on_whatever_holds_texts(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS[:10]):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    rows = [{"prompts": "Who?", "responses": text} for text in TEXTS[10:20]]
    rows += [{"messages": [{"role": "user", "content": text}]} for text in TEXTS[20:30]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "new" / "vocabulary.spm"
    runs = ["--newline-runs", "2", "--space-runs", "2"]
    command = ["vocabulary", str(tmp_path / "texts"), str(tmp_path / "rows.jsonl"), "--output", str(output), *runs]
    assert cli.main([*command, "--size", "400"]) == 0
    printed = capsys.readouterr().out
    assert f"{output}: 400 pieces from 40 texts of" in printed and "a token takes" in printed
    assert GemmaTokenizer(proto=str(output)).vocabulary_size() == 400
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b \\ud83d"}')
    assert cli.main([*command, "--size", "410"]) == 1
    assert "rows.jsonl, line 2: The field 'text' has whole characters" in capsys.readouterr().err
    assert GemmaTokenizer(proto=str(output)).vocabulary_size() == 400
    assert cli.main([*command, "--field", "body"]) == 1
    assert "'body' is missing or null; `--field` names where it is. The fields are: text" in capsys.readouterr().err
