import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from tiny import definitions
from tiny import judging
from tiny import rlhf_report
from tiny.dictionary import Word
from tiny.dictionary import one_word_per_definition
from tiny.dictionary import open_dictionary
from tiny.dictionary import read_words
from tiny.dictionary import split
from tiny.phases import Phases

from keras_gemma import GemmaBackbone
from keras_gemma import GemmaCausalLM

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "presets" / "gemma_tiny_instruct_en"
HEADER = "  1 Use it for any purpose,  \n  2 with this notice.  \n"
NUMBERS = {"noun": "1", "verb": "2", "adj": "3", "adv": "4"}


def write_dictionary(folder, synsets, senses, counts=()):
    """Files of WordNet's format.

    Args:
        synsets: dict from a part of speech to rows of a synset's number, its words and its gloss.
        senses: dict from a part of speech to a dict from a word to its synsets.
        counts: rows of a sense's key, its number and its count.
    """
    folder.mkdir()
    for part in NUMBERS:
        data, index = [HEADER], [HEADER]
        for synset, words, gloss in synsets.get(part, ()):
            written = " ".join(f"{word} 0" for word in words)
            data.append(f"{synset:08} 03 {part[0]} {len(words):02x} {written} 001 @ 00001740 n 0000 | {gloss}  \n")
        for word, of_word in senses.get(part, {}).items():
            offsets = " ".join(f"{synset:08}" for synset in of_word)
            index.append(f"{word} {part[0]} {len(of_word)} 2 @ ~ {len(of_word)} 0 {offsets}  \n")
        (folder / f"data.{part}").write_text("".join(data))
        (folder / f"index.{part}").write_text("".join(index))
    lines = [f"{word}%{NUMBERS[part]}:03:00:: {sense} {count}\n" for word, part, sense, count in counts]
    (folder / "cntlist.rev").write_text("".join(lines))
    return open_dictionary(folder)


def test_a_word_has_the_first_definition_of_its_most_frequent_sense(tmp_path):
    synsets = {
        "noun": [
            (1, ["piety", "piousness"], "righteousness by virtue of being pious"),
            (2, ["run"], 'a score in baseball; the "tally"'),
            (3, ["living_thing"], "a living (or once living) entity"),
            (4, ["Pietism"], "a movement in the Lutheran Church"),
            (5, ["run", "tally"], 'a race (on foot; or in spikes) between two posts; a contest; "he ran a run"'),
        ],
        "verb": [(6, ["run"], 'move fast by using the feet; "Don\'t run"')],
        "adj": [(7, ["ready(p)", "up(a)"], "easy to reach"), (8, ["bad"], "not fit")],
    }
    senses = {
        "noun": {"living_thing": [3], "pietism": [4], "piety": [1], "piousness": [1], "run": [5, 2], "tally": [5]},
        "verb": {"run": [6]},
        "adj": {"ready": [7], "up": [7], "bad": [8]},
    }
    # The second sense of the noun does not count, however frequent.
    counts = [("run", "noun", 1, 5), ("run", "noun", 2, 90), ("run", "verb", 1, 30), ("bad", "adj", 1, 9)]
    dictionary = write_dictionary(tmp_path / "dictionary", synsets, senses, counts)
    assert dictionary.licence == "Use it for any purpose,\nwith this notice."
    assert read_words(dictionary) == [
        Word("piety", "noun", "righteousness by virtue of being pious"),
        Word("piousness", "noun", "righteousness by virtue of being pious"),
        Word("ready", "adj", "easy to reach"),
        Word("run", "verb", "move fast by using the feet"),
        Word("tally", "noun", "a race (on foot; or in spikes) between two posts"),
    ]


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks index.noun, .*cntlist.rev"):
        open_dictionary(tmp_path)


def some_words(count=400):
    """Words of two parts of speech, every fourth a synonym of the one before it."""
    letters = ["".join(letters) for letters in itertools.islice(itertools.product("abcdefgh", repeat=4), count)]
    meaning = [n - (n % 4 == 3) for n in range(count)]
    kinds = ["noun", "verb"]
    return [
        Word(word, kinds[m % 3 == 0], f"a {'very ' * (m % 5)}small thing of {letters[m]}")
        for word, m in zip(letters, meaning)
    ]


def test_parts_share_no_definition_and_lose_no_word():
    words = some_words()
    parts = split(words, {"many": 0.7, "some": 0.2, "few": 0.1})
    assert sorted(word.word for part in parts.values() for word in part) == sorted(word.word for word in words)
    for one, other in itertools.combinations(parts.values(), 2):
        assert not {word.definition for word in one} & {word.definition for word in other}
    assert 220 < len(parts["many"]) < 340 and len(parts["few"]) < len(parts["some"])
    assert split(words[::-1], {"many": 0.7, "some": 0.2, "few": 0.1}) == parts
    assert split(words, {"many": 0.7, "some": 0.2, "few": 0.1}, salt="other") != parts


def test_one_word_of_each_definition_stays():
    words = some_words(8)
    assert one_word_per_definition(words) == [words[n] for n in (0, 1, 2, 4, 5, 6)]


def test_words_exchange_their_definitions():
    words = split(some_words(200), {"all": 1.0})["all"]
    found = definitions.definitions_of_others(words)
    kept = [(word, text) for word, text in zip(words, found) if text]
    of_part = {word.definition: word.part_of_speech for word in words}
    assert len(kept) > 180
    assert sorted(word.definition for word, _ in kept) == sorted(text for _, text in kept)
    assert all(text != word.definition and of_part[text] == word.part_of_speech for word, text in kept)
    assert max(abs(len(text) - len(word.definition)) for word, text in kept) <= 5


class WrittenAnswers:
    """Stands for a model that answers from a list."""

    def __init__(self, answers, preprocessor):
        self.answers, self.preprocessor = answers, preprocessor

    def generate(self, prompts, seed, **options):
        return [self.answers[prompt.strip()][seed > 1_000_000] for prompt in prompts]


def test_the_written_answer_that_ended_with_the_nearer_length_is_rejected():
    preprocessor = GemmaCausalLM.preprocessor_cls.from_preset("gemma_tiny_en")
    words = [Word(name, "noun", "an animal of the sea") for name in ("nearer", "endless", "same", "twice")]
    answers = {
        "nearer": ["a house", "an animal of the land"],
        "endless": ["the " * 40, " a sail "],
        "same": ["an animal of the sea", ""],
        "twice": ["a ship", "a ship"],
    }
    written = definitions.written_definitions(words, WrittenAnswers(answers, preprocessor), seed=0)
    assert written == ["an animal of the land", "a sail", "", "a ship"]


def test_length_tells_nothing_where_it_is_the_same():
    pairs = [{"chosen": "abc", "rejected": text} for text in ("ab", "abcd", "xyz", "x")]
    assert definitions.share_longer(pairs) == 0.625


def test_the_larger_side_loses_its_largest_differences():
    lengths = [(3, 9), (3, 5), (3, 4), (3, 3), (6, 3)]
    pairs = [{"chosen": "a" * chosen, "rejected": "b" * rejected} for chosen, rejected in lengths]
    assert definitions.balanced_in_length(pairs) == pairs[2:]
    mirrored = [{"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    assert definitions.balanced_in_length(mirrored) == mirrored[2:]
    assert definitions.balanced_in_length(pairs[2:]) == pairs[2:]
    assert definitions.share_longer(pairs[2:]) == 0.5


def test_habits():
    texts = ["a sea bird", "a sea bird", "one who is one who is", "the act of the act"]
    assert definitions.habits(texts) == {"words": 4.25, "different": 0.75, "repeating": 0.25}


def test_intervals():
    accuracy = judging.share_right(np.arange(100) < 80, np.zeros(100))
    np.testing.assert_allclose(accuracy, (0.8, 0.711, 0.867), atol=1e-3)
    rng = np.random.default_rng(0)
    wins = judging.win_rate(rng.normal(0.5, 1, 1000), rng.normal(0, 1, 1000))
    normal = 1.96 * np.sqrt(wins.value * (1 - wins.value) / 1000)
    np.testing.assert_allclose((wins.low, wins.high), (wins.value - normal, wins.value + normal), atol=5e-3)
    assert wins.low > 0.55
    assert judging.win_rate([1, 2, 3, 0], [1, 2, 2, 1]).value == 0.5
    assert judging.win_rate([1, 2], [0, 1]) == (1, 1, 1)


def test_a_stage_is_done_once_and_never_by_halves(tmp_path):
    def fail(folder):
        (folder / "begun").touch()
        raise OSError("full")

    phases = Phases(tmp_path, {"steps": 1})
    with pytest.raises(OSError):
        phases.run("one", fail)
    assert not (tmp_path / "one").exists()
    done = phases.run("one", lambda folder: (folder / "made").touch())
    assert [file.name for file in done.iterdir() if file.name != "seconds.json"] == ["made"]
    again = Phases(tmp_path, {"steps": 1})
    assert again.run("one", fail) == done
    assert list(again.seconds()) == ["one"]
    with pytest.raises(ValueError, match="other settings"):
        Phases(tmp_path, {"steps": 2})


@pytest.fixture
def untrained(tmp_path):
    """A preset with the vocabulary of the small one and hardly any weights."""
    backbone = GemmaBackbone(
        4096, 1, num_query_heads=2, num_key_value_heads=1, hidden_dim=32, intermediate_dim=64, head_dim=16
    )
    preprocessor = GemmaCausalLM.preprocessor_cls.from_preset("gemma_tiny_en")
    GemmaCausalLM(backbone, preprocessor).save_to_preset(tmp_path / "untrained")
    return tmp_path / "untrained"


def test_the_three_stages_run_from_a_dictionary_to_a_preset(untrained, tmp_path):
    words = some_words(800)
    synsets = {
        part: [(n, [word.word], word.definition) for n, word in enumerate(words) if word.part_of_speech == part]
        for part in ("noun", "verb")
    }
    senses = {part: {word: [n] for n, (word,), _ in rows} for part, rows in synsets.items()}
    write_dictionary(tmp_path / "dictionary", synsets, senses)
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("work", "preset")]
    size = ["--dictionary", tmp_path / "dictionary", "--preset", untrained, "--words=40", "--steps=5"]
    done = subprocess.run(
        [sys.executable, "examples/rlhf.py", *map(str, [*folders, *size])],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    result = json.loads((tmp_path / "preset" / "result.json").read_text())
    assert result["perplexity"]["tuned"] < result["perplexity"]["base"]
    assert result["words"]["tuning"] == 40
    readme = (tmp_path / "preset" / "README.md").read_text()
    assert rlhf_report.table(result) in readme
    assert "> Use it for any purpose,\n> with this notice." in readme
    assert {"tuning_curve.png", "reinforce_curve.png", "config.json"} <= {
        f.name for f in (tmp_path / "preset").iterdir()
    }
    model = GemmaCausalLM.from_preset(tmp_path / "preset")
    assert isinstance(model.generate("abcd\n", max_new_tokens=4), str)


# === The preset that ships ===


def test_the_shipped_preset_defines_and_ends():
    model = GemmaCausalLM.from_preset("gemma_tiny_instruct_en")
    first, second = (model.generate("piety\n", max_new_tokens=24, strip_prompt=True) for _ in range(2))
    assert first == second
    assert 1 < len(first.split()) < 20
    assert len(model.preprocessor.tokenizer.encode(first)) < 24
    assert sum(file.stat().st_size for file in PRESET.rglob("*") if file.is_file()) < 12e6


def test_the_shipped_figures_are_those_of_the_run():
    result = json.loads((PRESET / "result.json").read_text())
    readme = (PRESET / "README.md").read_text()
    assert rlhf_report.table(result) in readme
    assert result["perplexity"]["tuned"] < result["perplexity"]["base"] / 2
    assert result["accuracy"]["reward"]["all"][1] > 0.5
    assert result["drawn"]["gain"]["rater"][1] > 0
    assert result["drawn"]["win_rate"]["rater"][1] > 0.5
    header = (ROOT / "examples" / "rlhf.py").read_text().split('"""')[1]
    assert f"{result['perplexity']['base']:.1f}" in header and f"{result['perplexity']['tuned']:.1f}" in header
    assert f"{result['drawn']['win_rate']['rater'][0]:.3f}" in header
