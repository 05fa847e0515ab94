"""Public-domain and permissive English prose from Debian packages.

    apt-get download → dpkg-deb -x → one reader per package → chapters → train and held-out documents

    corpus = load_corpus()
    corpus.train[0].source, corpus.train[0].licence, corpus.train[0].text

A document is a chapter, or about 8 kB of consecutive dictionary entries. A paragraph is one line, paragraphs are
separated by one blank line, verse keeps its line breaks. Quotation marks and dashes are plain ASCII throughout, as in
most of the sources. The same packages give the same documents in the same order.
"""

import gzip
import hashlib
import html
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/keras_gemma/tiny_corpus").expanduser()
HELD_OUT_SHARE = 0.03
DICTIONARY_DOCUMENT_CHARACTERS = 8000
SHORTEST_DOCUMENT = 400
LONGEST_VERSE_LINE = 50


@dataclass(frozen=True)
class Document:
    """A chapter. `name` identifies it: chapters with one name never fall on both sides of the split."""

    source: str
    licence: str
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    train: list[Document]
    held_out: list[Document]


@dataclass(frozen=True)
class Source:
    """A Debian package and how to read it."""

    name: str
    package: str
    licence: str
    read: Callable[[Path], Iterator[tuple[str, str]]]


def load_corpus(cache_dir: str | Path = DEFAULT_CACHE) -> Corpus:
    """Fetches what is missing from `cache_dir`, reads every source and splits off about 3% of each as held-out text.

    Raises:
        RuntimeError: a package can neither be found in the cache nor downloaded.
    """
    train, held_out = [], []
    for source in SOURCES:
        root = fetch_package(source.package, Path(cache_dir).expanduser())
        documents = [Document(source.name, source.licence, name, text) for name, text in source.read(root)]
        chosen = held_out_names(documents)
        train += [document for document in documents if document.name not in chosen]
        held_out += [document for document in documents if document.name in chosen]
    return Corpus(train, held_out)


def held_out_names(documents: list[Document], share: float = HELD_OUT_SHARE) -> set[str]:
    """Names in the order of their hash, until the documents that carry them make up `share` of the characters."""
    size: dict[str, int] = {}
    for document in documents:
        size[document.name] = size.get(document.name, 0) + len(document.text)
    wanted, chosen = share * sum(size.values()), set()
    for name in sorted(size, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if wanted <= 0:
            break
        chosen.add(name)
        wanted -= size[name]
    return chosen


# Packages


def fetch_package(package: str, cache: Path) -> Path:
    """Returns the folder with the unpacked files of `package`, downloading it when the cache lacks it."""
    root = cache / "unpacked" / package
    if root.exists():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    archive = next(cache.glob(f"{package}_*.deb"), None) or download_package(package, cache)
    # Unpacked beside its final place first: an interrupted run must not leave half a package that looks whole.
    partial = root.with_name(package + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
    return partial.rename(root)


def download_package(package: str, cache: Path) -> Path:
    try:
        done = subprocess.run(["apt-get", "download", package], cwd=cache, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"`apt-get` not found: the corpus is read from Debian packages, here {package!r}.") from None
    archive = next(cache.glob(f"{package}_*.deb"), None)
    if done.returncode or archive is None:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(
            f"`apt-get download {package}` failed ({reason}); run `apt-get update` as root and try again."
        )
    return archive


# Text: hard-wrapped lines → paragraphs → documents

PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "\u00a0": " ", "\ufeff": None}
)


def paragraphs(text: str) -> Iterator[str]:
    """Unwraps hard-wrapped text. Short lines that are all indented deeper than their surroundings are verse."""
    text = text.replace("\r\n", "\n").translate(PLAIN)
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        indented = len(lines) > 1 and all(line.startswith("    ") for line in lines)
        verse = indented and sum(len(line.strip()) for line in lines) < LONGEST_VERSE_LINE * len(lines)
        words = ("\n" if verse else " ").join(line.strip() for line in lines)
        words = re.sub(r"_([^_]+)_", r"\1", re.sub(r" {2,}", " ", words))
        if is_prose(words):
            yield words


def is_prose(words: str) -> bool:
    """Whether a paragraph is language: no table, drawing, code, rule or editor's bracket."""
    if not words or (words.startswith("[") and words.endswith("]")):
        return False
    letters = sum(character.isalpha() or character in " \n" for character in words)
    heading = len(words) <= 24
    return letters > (0.5 if heading else 0.75) * len(words)


def chapters(book: str, text: str, heading: str) -> Iterator[tuple[str, str]]:
    """Splits `text` before lines that match `heading`; what stands before the first heading is dropped."""
    text = re.split(r"\*\*\* ?END OF|End of (?:the )?Project Gutenberg", text.replace("\r\n", "\n"))[0]
    parts = re.split(rf"^[ \t]*(?=(?:{heading}))", text, flags=re.MULTILINE)[1:]
    for number, part in enumerate(parts):
        chapter = "\n\n".join(paragraphs(part))
        if len(chapter) >= SHORTEST_DOCUMENT:
            yield f"{book}/{number}", chapter


def grouped(book: str, entries: Iterator[str], size: int = DICTIONARY_DOCUMENT_CHARACTERS) -> Iterator[tuple[str, str]]:
    """Joins consecutive entries to documents of about `size` characters."""
    group: list[str] = []
    number = 0
    for entry in entries:
        group.append(entry)
        if sum(map(len, group)) >= size:
            yield f"{book}/{number}", "\n\n".join(group)
            group, number = [], number + 1
    if group:
        yield f"{book}/{number}", "\n\n".join(group)


# Readers: package folder → (document name, text)

CHAPTER = r"(?:CHAPTER|Chapter) (?:[IVXLC]+|\d+|[A-Z-]+)\b.{0,80}$"


def read_austen(root: Path) -> Iterator[tuple[str, str]]:
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for lines in r_string_vectors(r_lazy_load_objects(data)):
        yield from chapters(lines[0].title(), "\n".join(lines), CHAPTER)


def read_moby_dick(root: Path) -> Iterator[tuple[str, str]]:
    data = (root / "usr/lib/R/site-library/tokenizers/data/Rdata.rdb").read_bytes()
    book = max((vector[0] for vector in r_string_vectors(r_lazy_load_objects(data))), key=len)
    yield from chapters("Moby Dick", book, CHAPTER)


def read_wells_verne_dickens(root: Path) -> Iterator[tuple[str, str]]:
    """Three novels of a data frame of lines; its fourth, Pride and Prejudice, is among Austen's already."""
    data = gzip.decompress((root / "usr/lib/R/site-library/tidytext/extdata/books.rda").read_bytes())
    lines, titles = (vector for vector in r_string_vectors([data]) if len(vector) > 1000)
    for title in dict.fromkeys(titles):
        if title != "Pride and Prejudice":
            book = "\n".join(line for line, its_title in zip(lines, titles) if its_title == title)
            yield from chapters(title, book, CHAPTER)


def r_lazy_load_objects(data: bytes) -> Iterator[bytes]:
    """Objects of an R lazy-load database: each is its size, four bytes, and a zlib stream."""
    while data:
        stream = zlib.decompressobj()
        yield stream.decompress(data[4:])
        data = stream.unused_data


def r_string_vectors(objects) -> Iterator[list[str]]:
    """Character vectors within serialised R objects (XDR): type word ending in 16, length, then one CHARSXP each."""
    for data in objects:
        position = 0
        while found := re.compile(rb"\0\0[\0-\7]\x10").search(data, position):
            position = found.end()
            if vector := r_string_vector(data, position):
                position, strings = vector
                yield strings


def r_string_vector(data: bytes, position: int) -> tuple[int, list[str]] | None:
    """Reads length and strings at `position`; None where the bytes turn out to be something else."""
    charsxp, not_available = 9, -1
    (length,) = struct.unpack_from(">i", data, position)
    position += 4
    strings = []
    while len(strings) < length:
        if position + 8 > len(data):
            return None
        kind, size = struct.unpack_from(">Ii", data, position)
        if kind & 0xFF != charsxp or size < not_available:
            return None
        position += 8
        strings.append(data[position : position + max(size, 0)].decode("utf-8", "replace"))
        position += max(size, 0)
    return (position, strings) if strings else None


def read_sherlock_and_sawyer(root: Path) -> Iterator[tuple[str, str]]:
    folder = root / "usr/share/gocode/src/github.com/pierrec/lz4/testdata"
    adventure = r"ADVENTURE [IVX]+\. [A-Z -]+$|[IVX]+\. THE ADVENTURE OF .+$"
    yield from chapters("Sherlock Holmes", (folder / "pg1661.txt").read_text("utf-8"), adventure)
    yield from chapters("Tom Sawyer", (folder / "Mark.Twain-Tom.Sawyer.txt").read_text("utf-8"), CHAPTER)


def read_king_james(root: Path) -> Iterator[tuple[str, str]]:
    return sword_chapters(root / "usr/share/sword/modules/texts/ztext/engKJV2006eb")


def sword_chapters(module: Path) -> Iterator[tuple[str, str]]:
    """Chapters of a SWORD zText module whose blocks are books in OSIS markup."""
    for testament in ("ot", "nt"):
        index, blocks = (module / f"{testament}.bzs").read_bytes(), (module / f"{testament}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield from osis_chapters(zlib.decompress(blocks[start : start + size]).decode("utf-8"))


def osis_chapters(book: str) -> Iterator[tuple[str, str]]:
    """Chapters named after their OSIS id; verse numbers and notes are dropped."""
    parts = re.split(r'<chapter [^>]*sID="([^"]+)"/>', book)
    # A preface may share the block of the first book: the last title before the first chapter is the book's.
    titles = re.findall(r'<milestone n="([^"]+)" type="x-usfm-h"/>', parts[0])
    for name, chapter in zip(parts[1::2], parts[2::2]):
        text = osis_text(chapter)
        short_title, number = name.split(".")
        # The module cuts the Greek Esther after another count of verses and shuffles it in doing so.
        if len(text) >= SHORTEST_DOCUMENT and short_title != "EsthGr":
            yield f"Bible/{name}", f"{titles[-1] if titles else short_title} {number}\n\n{text}"


def osis_text(markup: str) -> str:
    markup = re.sub(
        r"</note>(?=(?:<[^>]*>)*\w)", "</note> ", markup
    )  # a note may hold the only space between two words
    markup = re.sub(r"<(note|title)\b[^>]*>.*?</\1>", "", markup, flags=re.DOTALL).replace("\n", " ")
    markup = re.sub(r'<div [^>]*sID=[^>]*type="x-p"[^>]*/>|<lg [^>]*sID=[^>]*>|¶', "\n\n", markup)
    markup = re.sub(r"<l [^>]*sID=[^>]*>", "\n", markup)
    text = html.unescape(re.sub(r"<[^>]*>", "", markup)).translate(PLAIN)
    lines = [re.sub(r" {2,}", " ", line).strip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_jargon(root: Path) -> Iterator[tuple[str, str]]:
    text = (
        gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes())
        .decode("utf-8")
        .translate(PLAIN)
    )
    text = text[text.index("\nChapter 1. Hacker Slang and") : text.rindex("\nBibliography")]
    # The lists of head words before the lexicon and before each letter begin with a line that holds that letter alone.
    text = re.sub(r"^ {2,3}[A-Z0-9]\n.*?(?=^ {3}:|^Appendix)", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^Chapter (?:3|10|12)\..*?(?=^Chapter|^ {3}:)", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^ {3}:(.+?):(?: */[^/\n]+/,?)? *", r"   \1: ", text, flags=re.MULTILINE)
    return grouped("Jargon File", paragraphs(text))


def read_devil(root: Path) -> Iterator[tuple[str, str]]:
    text = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("utf-8", "replace")
    text = text[text.index("_The Devil's Dictionary_ was begun") : text.rindex("\n\n")]
    return grouped("Devil's Dictionary", paragraphs(text))


GUTENBERG = "public domain (copyright expired; text of Project Gutenberg)"

SOURCES = (
    Source("Jane Austen, six novels", "r-cran-janeaustenr", f"{GUTENBERG}; package: MIT", read_austen),
    Source("Moby Dick", "r-cran-tokenizers", f"{GUTENBERG}; package: MIT", read_moby_dick),
    Source(
        "Wells, Verne, Dickens: three novels",
        "r-cran-tidytext",
        f"{GUTENBERG}; package: MIT",
        read_wells_verne_dickens,
    ),
    Source(
        "Sherlock Holmes, Tom Sawyer",
        "golang-github-pierrec-lz4-dev",
        f"{GUTENBERG}; package: BSD-3-clause",
        read_sherlock_and_sawyer,
    ),
    Source("King James Bible", "sword-text-kjv", "public domain (outside the United Kingdom)", read_king_james),
    Source("Jargon File 4.4.7", "jargon-text", "public domain", read_jargon),
    Source("The Devil's Dictionary", "dict-devil", "public domain (copyright expired)", read_devil),
)
