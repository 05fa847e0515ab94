"""Words and their first definitions, from WordNet 3.0 as Debian packages it.

    apt-get download → dpkg-deb -x → index, data, counts of senses → entries → parts that share no definition

    words = read_words(fetch_dictionary())
    words[0].word, words[0].part_of_speech, words[0].definition
    parts = split(words, {"train": 0.9, "held_out": 0.1})

The files are those of `man 5 wndb`. The same files give the same words in the same order.
"""

import bisect
import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from tiny.corpus import DEFAULT_CACHE
from tiny.corpus import fetch_package

PACKAGE = "wordnet-base"
# In the order in which they are preferred where no sense of a word was ever counted.
PARTS_OF_SPEECH = {"noun": "1", "verb": "2", "adj": "35", "adv": "4"}
WORD = re.compile(r"[a-z]{3,12}")
SHORTEST_DEFINITION = 8
LONGEST_DEFINITION = 80


@dataclass(frozen=True)
class Word:
    """A word, its part of speech and the first definition of its most frequent sense."""

    word: str
    part_of_speech: str
    definition: str


@dataclass(frozen=True)
class Dictionary:
    """A folder of WordNet's files, and the licence that came with it."""

    folder: Path
    licence: str


def fetch_dictionary(cache_dir=DEFAULT_CACHE):
    """Unpacks the Debian package, which is downloaded if the cache lacks it.

    Raises:
        RuntimeError: the package can neither be found in the cache nor downloaded.
    """
    root = fetch_package(PACKAGE, Path(cache_dir).expanduser())
    return open_dictionary(root / "usr/share/wordnet", root / f"usr/share/doc/{PACKAGE}/copyright")


def open_dictionary(folder, copyright_file=None):
    """A folder of files such as `data.noun` and `index.noun`; the licence is in a file of its own, or heads the data.

    Raises:
        FileNotFoundError: for a folder that lacks one of the files.
    """
    folder = Path(folder)
    names = [f"{kind}.{part}" for kind in ("index", "data") for part in PARTS_OF_SPEECH] + ["cntlist.rev"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"A dictionary has WordNet's files. {folder} lacks {', '.join(missing)}")
    if copyright_file is None:
        header = [line for line in _lines(folder / "data.noun") if line.startswith("  ")]
        return Dictionary(folder, "\n".join(re.sub(r"^ *\d+ ?", "", line).rstrip() for line in header))
    return Dictionary(folder, _licence_of_debian(Path(copyright_file).read_text("utf-8")))


def _licence_of_debian(text):
    """The first licence of a machine-readable copyright file, in which a dot stands for an empty line."""
    body = text.split("\nLicense:", 1)[1].split("\n\n", 1)[0].split("\n")[1:]
    return "\n".join("" if line.strip() == "." else line.strip() for line in body)


def read_words(dictionary):
    """Every word of lower-case letters that has a definition of fair length.

    A word comes once, as the part of speech in which its first sense is counted most often.

    Returns:
        A list of `Word` in alphabetical order.
    """
    counts = _counts(dictionary.folder / "cntlist.rev")
    best = {}
    for part in PARTS_OF_SPEECH:
        definition_of = dict(_definitions(dictionary.folder / f"data.{part}"))
        for word, sense in _first_senses(dictionary.folder / f"index.{part}"):
            written, definition = definition_of[sense]
            count = counts.get((word, part), 0)
            if word in written and is_fair(definition) and count > best.get(word, (-1,))[0]:
                best[word] = count, Word(word, part, definition)
    return [best[word][1] for word in sorted(best)]


def is_fair(definition):
    balanced = definition.count("(") == definition.count(")")
    return balanced and SHORTEST_DEFINITION <= len(definition) <= LONGEST_DEFINITION


def split(words, shares, salt=""):
    """Parts of the words. All words that have one definition are in one part, so that parts share no definition.

    Args:
        words: list of `Word`.
        shares: dict from a name to its share of the definitions; they sum up to 1.
        salt: string. Another one splits otherwise.

    Returns:
        A dict from a name to a list of `Word`, in the order of their hashes.
    """
    names, ends = list(shares), list(itertools.accumulate(shares.values()))[:-1]
    parts = {name: [] for name in names}
    for word in sorted(words, key=lambda word: _hash(salt + word.word)):
        place = _hash(salt + word.definition) / 2**64
        parts[names[bisect.bisect_right(ends, place)]].append(word)
    return parts


def one_word_per_definition(words):
    """The first of the words that share a definition."""
    return list({word.definition: word for word in reversed(words)}.values())[::-1]


def _hash(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _lines(path):
    return path.read_text("utf-8").splitlines()


def _entries(path):
    """Lines but for the licence, whose lines are indented."""
    return (line for line in _lines(path) if line and not line.startswith("  "))


def _counts(path):
    """How often the first sense of a word was seen, by word and part of speech."""
    part_of = {number: part for part, numbers in PARTS_OF_SPEECH.items() for number in numbers}
    counts = {}
    for line in _entries(path):
        key, sense_number, count = line.split()
        word, _, rest = key.rpartition("%")
        if sense_number == "1":
            counts[word, part_of[rest[0]]] = int(count)
    return counts


def _first_senses(path):
    """Words of letters, and the synset of the first sense of each."""
    for line in _entries(path):
        word, _, synsets, _, *rest = line.split()
        if WORD.fullmatch(word):
            yield word, rest[-int(synsets)]


def _definitions(path):
    """Synsets, and of each the words as they are written and the first definition."""
    for line in _entries(path):
        fields, _, gloss = line.partition(" | ")
        synset, _, _, count, *rest = fields.split()
        written = {re.sub(r"\(.*\)$", "", word) for word in rest[: 2 * int(count, 16) : 2]}
        yield synset, (written, first_definition(gloss))


def first_definition(gloss):
    """What a gloss says before its first semicolon or example, outside of brackets."""
    depth = 0
    for place, character in enumerate(gloss):
        depth += (character == "(") - (character == ")")
        if character == '"' or (character == ";" and depth <= 0):
            return gloss[:place].strip(" ;:")
    return gloss.strip()
