"""A SentencePiece vocabulary as in the Gemma report: digits split, white space kept, bytes for unknown characters.

proto = train_vocabulary(document.text for document in corpus.train)
processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
"""

import io
from collections.abc import Iterable
from collections.abc import Iterator

import sentencepiece

# In this order they get the ids 4, 5, ... Newlines are pieces of their own, so that no word is learnt twice, once with
# a line break glued to it.
USER_DEFINED = ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]
LONGEST_LINE_BYTES = 1 << 20


def train_vocabulary(texts: Iterable[str], size: int = 4096) -> bytes:
    """Trains a byte-pair vocabulary of `size` pieces and returns the serialised SentencePiece model.

    The same texts in the same order give the same bytes.

    Raises:
        ValueError: a line is longer than the trainer accepts, which it would otherwise drop without a word.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=USER_DEFINED,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9999,
        max_sentence_length=LONGEST_LINE_BYTES,
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if len(line.encode("utf-8")) > LONGEST_LINE_BYTES:
                raise ValueError(
                    f"A line must have at most {LONGEST_LINE_BYTES} bytes, received {len(line.encode('utf-8'))}."
                )
            if line:
                yield line
