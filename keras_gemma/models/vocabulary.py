"""Texts → a SentencePiece vocabulary such as Gemma's: digits split, white space kept, bytes for unknown characters."""

import io
import re
import sys
from collections.abc import Iterable
from collections.abc import Iterator

import tqdm

from keras_gemma.checkpoints import tokenizer_files
from keras_gemma.data import text_checks

GEMMA_SIZE = 256_000
# Of Gemma's own vocabulary.
LONGEST_RUN = 31
MARKS = (tokenizer_files.MASK, *tokenizer_files.TURNS)
LONGEST_LINE_BYTES = 1 << 20
# SentencePiece leaves lines with it out, since it marks unknown characters there.
RESERVED = "\N{LOWER FIVE EIGHTHS BLOCK}"
TOO_HIGH = re.compile(r"Please set it to a value <= (\d+)")
TOO_LOW = re.compile(r"required_chars\. \d+ vs (\d+)")


def train_vocabulary(
    texts: Iterable[str],
    size: int = GEMMA_SIZE,
    *,
    newline_runs: int = LONGEST_RUN,
    space_runs: int = LONGEST_RUN,
    character_coverage: float = 0.9999,
    most_lines: int | None = None,
    progress: bool | None = None,
) -> bytes:
    """Trains a SentencePiece vocabulary as Gemma's was trained: byte pairs, split digits, bytes as a fallback.

    Texts come back from it exactly as they went in. The ids 0 to 3 are `<pad>`, `<eos>`, `<bos>` and `<unk>`; then come
    `<mask>`, `<start_of_turn>`, `<end_of_turn>`, runs of line breaks and runs of spaces. The same texts in the same
    order give the same bytes.

    Args:
        texts: iterable of strings.
        size: int, `V`, how many pieces.
        newline_runs: int, the longest run of line breaks that is a piece of its own, one at least: a word is then not
            learned twice, once with a line break glued to it.
        space_runs: int, the longest run of spaces that is a piece; 1 for none but the single space.
        character_coverage: float, the share of all characters that have pieces; the rarest others are spelled in bytes.
        most_lines: optional int. Learns from so many lines, drawn at random, which bounds memory and time.
        progress: optional bool, whether to show a progress bar. By default where standard error is a terminal.

    Returns:
        Bytes of a SentencePiece model, for `GemmaTokenizer(proto=...)`. It can be exported to every format that
        `keras-gemma convert` writes.

    Raises:
        ValueError: for texts that are none or too few, and a size that is too small or too large for them.

    Example:

    >>> from keras_gemma.models import GemmaTokenizer, train_vocabulary
    >>> proto = train_vocabulary(["The sea was calm.\\n"] * 9, size=290, newline_runs=1, space_runs=1)
    >>> tokenizer = GemmaTokenizer(proto=proto)
    >>> tokenizer.vocabulary_size(), tokenizer.detokenize([tokenizer.encode("At 12, the sea…\\n")])
    (290, ['At 12, the sea…\\n'])
    """
    import sentencepiece

    _check_settings(size, newline_runs, space_runs, character_coverage, most_lines)
    symbols = [*MARKS, *("\n" * n for n in range(1, newline_runs + 1))]
    symbols += [tokenizer_files.SPACE * n for n in range(2, space_runs + 1)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(_with_progress(texts, progress)),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece=tokenizer_files.PAD,
            eos_piece=tokenizer_files.EOS,
            bos_piece=tokenizer_files.BOS,
            unk_piece=tokenizer_files.UNK,
            user_defined_symbols=symbols,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=character_coverage,
            max_sentence_length=LONGEST_LINE_BYTES,
            input_sentence_size=most_lines or 0,
            shuffle_input_sentence=most_lines is not None,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_reason(error, size)) from error
    tokenizer_files.refuse_what_cannot_be_exported(model.getvalue())
    return model.getvalue()


def _check_settings(size, newline_runs, space_runs, character_coverage, most_lines):
    given = {"newline_runs": newline_runs, "space_runs": space_runs, "most_lines": most_lines}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is at least 1. Received: {value}")
    if not 0 < character_coverage <= 1:
        raise ValueError(f"`character_coverage` is above 0 and at most 1. Received: {character_coverage}")
    fixed = len(tokenizer_files.TYPES) + len(MARKS) + newline_runs + space_runs - 1
    if size <= fixed:
        raise ValueError(
            f"`size` is above {fixed}: special tokens, bytes and runs of line breaks and spaces take so many pieces "
            f"(`newline_runs` and `space_runs` make them fewer). Received: {size}"
        )


def _reason(error, size):
    if found := TOO_HIGH.search(str(error)):
        return f"So few texts make at most {found[1]} pieces. Received: a `size` of {size}"
    if found := TOO_LOW.search(str(error)):
        return (
            f"The characters of these texts and what every vocabulary has take {found[1]} pieces. Received: a `size` "
            f"of {size}. Raise it, or lower `character_coverage`"
        )
    if "sentences_.empty()" in str(error):
        return "A vocabulary is learned from texts. Received none that says anything."
    return f"SentencePiece cannot learn a vocabulary of these texts: {error}"


def _with_progress(texts, progress):
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm.tqdm(texts, desc="texts", unit="", disable=not shown)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for number, value in enumerate(texts):
        text = text_checks.text(value, f"Text {number}")
        for line in re.split(f"[\n{RESERVED}]", text):
            yield from _short_enough(line)


def _short_enough(line):
    # A character has four bytes at most. SentencePiece would leave a longer line out.
    most = LONGEST_LINE_BYTES // 4
    while len(line) > most:
        cut = line.rfind(" ", 1, most)
        yield line[: cut if cut > 0 else most]
        line = line[cut if cut > 0 else most :]
    if line:
        yield line
