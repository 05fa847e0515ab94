"""`keras-gemma vocabulary`: texts → a SentencePiece vocabulary as Gemma's, in one file."""

from pathlib import Path

from keras_gemma.commands import checks
from keras_gemma.commands.arguments import add_command
from keras_gemma.commands.arguments import positive_int
from keras_gemma.commands.arguments import without_backend
from keras_gemma.staging import write_file

KEPT_BYTES = 1 << 20


def add(commands):
    parser = add_command(
        commands,
        "vocabulary",
        run,
        help="train a SentencePiece vocabulary on texts",
        description="Trains a SentencePiece vocabulary as Gemma's was trained: byte pairs, split digits, white space "
        "kept, bytes for unknown characters, turn markers. Models with it convert to every format.",
        epilog="""\
examples:
  keras-gemma vocabulary books/ --output vocabulary.spm --size 8192
  keras-gemma vocabulary web.jsonl.zst code.parquet --field content --output vocabulary.spm --most-lines 2000000

In Python: keras_gemma.models.GemmaTokenizer(proto="vocabulary.spm")

Needs the extra `train`: pip install 'keras_gemma[train]'""",
    )
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA", help=f"{checks.DATA_HELP}; of .txt files each is a document")
    add("--output", type=Path, required=True, metavar="FILE", help="the SentencePiece model to write")
    add("--field", metavar="FIELD", help="where the text is (default: text, or what prompts, responses, messages say)")
    add("--size", type=positive_int, default=32_000, metavar="V", help="pieces (default: %(default)s)")
    add("--newline-runs", type=positive_int, default=31, metavar="N", help="longest run of line breaks that is a piece")
    add("--space-runs", type=positive_int, default=31, metavar="N", help="longest run of spaces that is a piece")
    add("--most-lines", type=positive_int, metavar="N", help="learn from so many lines, drawn at random (default: all)")


def run(args):
    """Trains as the command's arguments say and prints what came of it."""
    for path in args.data:
        checks.check_examples(path)
    checks.check_writable(args.output.parent)
    without_backend()
    from keras_gemma import data
    from keras_gemma.models import GemmaTokenizer
    from keras_gemma.models import train_vocabulary

    # All of them are opened before anything is read.
    sources = [data.from_any(name) for name in args.data]
    texts = Counted(_texts(sources, args.field))
    proto = train_vocabulary(
        texts,
        args.size,
        newline_runs=args.newline_runs,
        space_runs=args.space_runs,
        most_lines=args.most_lines,
    )
    write_file(args.output, proto)
    tokenizer = GemmaTokenizer(proto=proto)
    tokens = sum(len(tokenizer.encode(text)) for text in texts.first)
    sample = sum(len(text.encode()) for text in texts.first)
    print(
        f"{args.output}: {tokenizer.vocabulary_size():,} pieces from {texts.count:,} texts of {texts.size / 1e6:,.1f} "
        f"MB; a token takes {sample / max(tokens, 1):.2f} bytes"
    )


class Counted:
    """Texts that are counted while they are read; the first of them are kept."""

    def __init__(self, texts):
        self._texts = texts
        self.count = self.size = 0
        self.first = []

    def __iter__(self):
        for text in self._texts:
            if self.size < KEPT_BYTES:
                self.first.append(text[:KEPT_BYTES])
            self.count += 1
            self.size += len(text.encode())
            yield text


def _texts(sources, field):
    from keras_gemma.data.sources import origin_of

    for source in sources:
        for example in source:
            try:
                yield from _texts_of(example, field)
            except ValueError as error:
                raise ValueError(f"{origin_of(example)}: {error}") from error


def _texts_of(example, field):
    from keras_gemma.data import text_checks

    example = text_checks.plain(example)
    for name in [field] if field else ["text"]:
        if example.get(name) is not None:
            return [text_checks.text(example[name], f"The field {name!r}")]
    if field is None and isinstance(example.get("messages"), list):
        return [text_checks.text(message["content"], "A message") for message in example["messages"]]
    if field is None and {"prompts", "responses"} <= set(example):
        return [text_checks.text(example[name], f"The field {name!r}") for name in ("prompts", "responses")]
    raise ValueError(
        f"{repr(field) if field else 'A text'} is missing or null; `--field` names where it is. "
        f"The fields are: {', '.join(example)}"
    )
