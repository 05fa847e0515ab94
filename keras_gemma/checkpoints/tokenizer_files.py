"""Gemma's vocabulary in the two forms that Hugging Face folders have it: `tokenizer.model` and `tokenizer.json`.

    tokenizer.json → pieces, types and scores → SentencePiece model
    SentencePiece model → vocabulary, merges and added tokens → tokenizer.json, and the small files beside it

SentencePiece joins whichever two neighbours make the piece of the highest score; `tokenizers` has a list of merges, the
first of which goes first. One follows from the other, as long as the list has every way of making a piece.
"""

import json

from keras_gemma.damaged import reading

# Tokens of the rows that Gemma 1 was trained on.
CONTEXT_LENGTH = 8192
VOCABULARY_FILE, TOKENIZER_FILE = "tokenizer.model", "tokenizer.json"

PAD = "<pad>"
EOS = "<eos>"
BOS = "<bos>"
UNK = "<unk>"
MASK = "<mask>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
TURNS = (START_OF_TURN, END_OF_TURN)

SPACE = "▁"
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}

# As sentencepiece_model.proto numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL_PIECES = {"pad": PAD, "eos": EOS, "bos": BOS, "unk": UNK}
SPECIAL_TYPES = {PAD: CONTROL, EOS: CONTROL, BOS: CONTROL, UNK: UNKNOWN}
TYPES = {**SPECIAL_TYPES, **dict.fromkeys(BYTES, BYTE)}

REPLACED_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# transformers adds it; after the spaces are replaced it finds nothing to split at.
IDLE_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def proto_of_tokenizer_json(content):
    """Rebuilds the SentencePiece model from which a `tokenizer.json` was made.

    A piece scores minus the rank of the first merge that makes it, and pieces that no merge makes score less than all
    others. `<pad>`, `<eos>` and `<bos>` become control pieces, `<0xNN>` bytes, other added tokens user-defined. A byte
    that the file has as its character, as Gemma's has the tab, is a byte again.

    Args:
        content: bytes or string, what the file holds.

    Returns:
        Bytes of a SentencePiece model whose ids are those of the file, save for special tokens that are spelled out in
        a text: those are text here. Files that do not replace spaces before they look for added tokens, as Gemma's
        own, cut runs of more than 16 spaces otherwise than SentencePiece.

    Raises:
        ValueError: for a vocabulary that SentencePiece would not tokenize as this file does, naming the rule.
    """
    described = _read(content)
    check_described(described)
    added = _added_tokens(described)
    pieces = _with_names_of_bytes(_pieces_by_id(described["model"]["vocab"], added))
    merges = _split_merges(described["model"]["merges"])
    types = [TYPES.get(piece, USER_DEFINED if piece in added else NORMAL) for piece in pieces]
    _check_merges(pieces, types, merges)
    ids = {name: pieces.index(piece) for name, piece in SPECIAL_PIECES.items()}
    return built(zip(pieces, _scores(pieces, types, merges), types), ids)


def hugging_face_files(proto, chat_template=None, opens_with_bos=True, stop_tokens=()):
    """The files of a Hugging Face folder that describe a tokenizer.

    Args:
        proto: bytes of a SentencePiece model such as `GemmaTokenizer` takes.
        chat_template: optional string, Jinja, where it is not Gemma's.
        opens_with_bos: bool. Whether texts begin with `<bos>`.
        stop_tokens: tokens that end an answer besides `<eos>` and `<end_of_turn>`: special ones, as these are.

    Returns:
        A dict from file name to bytes: `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json` and
        `special_tokens_map.json`. transformers puts `<bos>` in front of every text, and where the vocabulary has turn
        markers it formats dialogues as `GemmaTokenizer.apply_chat_template` does. Ids are those of the SentencePiece
        model, save for special tokens such as `<bos>` that are spelled out in a text: `tokenizers` takes them for
        the tokens.

    Raises:
        ValueError: for a SentencePiece model that `tokenizer.json` cannot describe, naming the rule.
    """
    model = parsed(proto)
    check_rules(model)
    _check_pieces(model.pieces)
    special = _special_tokens({piece.piece for piece in model.pieces})
    added = _added(model.pieces, stop_tokens)
    files = {
        TOKENIZER_FILE: _tokenizer_json(model, added, opens_with_bos),
        "tokenizer_config.json": _tokenizer_config(model, added, special, chat_template, opens_with_bos),
        "special_tokens_map.json": special,
    }
    as_bytes = {name: json.dumps(file, indent=2, ensure_ascii=False).encode() for name, file in files.items()}
    return {VOCABULARY_FILE: bytes(proto), **as_bytes}


def refuse_what_cannot_be_exported(proto):
    """Refuses a vocabulary that neither Hugging Face's `tokenizer.json` nor GGUF can describe, before it is trained on.

    Args:
        proto: bytes of a SentencePiece model.

    Raises:
        ValueError: naming the rule that it breaks.
    """
    try:
        model = parsed(proto)
        check_rules(model)
        _check_pieces(model.pieces)
        _names(model.pieces)
    except ValueError as error:
        raise ValueError(
            f"A model with this vocabulary could not be exported to Hugging Face or GGUF. {error} "
            "`keras_gemma.models.train_vocabulary` and `keras-gemma vocabulary` train one that can."
        ) from error


def checked(proto, rows, where="the vocabulary"):
    """How many pieces a SentencePiece model has.

    Args:
        proto: bytes.
        rows: int, of the embedding.
        where: path that the error names.

    Raises:
        DamagedFileError: as `number_of_pieces`.
        ValueError: for more pieces than rows.
    """
    pieces = number_of_pieces(proto, where)
    if pieces > rows:
        raise ValueError(
            f"Each piece needs a row of the embedding. Received: {pieces} pieces, {rows} rows in `{where}`"
        )
    return pieces


def number_of_pieces(proto, where):
    """How many pieces a SentencePiece model has.

    Args:
        proto: bytes.
        where: path that the error names.

    Raises:
        DamagedFileError: for bytes that are no SentencePiece model.
    """
    # Slow to import.
    import sentencepiece

    with reading(where, "SentencePiece model"):
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto) if proto else None
        pieces = processor.get_piece_size() if processor else 0
        if not pieces:
            raise ValueError("it has no pieces")
        # Each of them is text, which the library does not look at before.
        processor.id_to_piece(list(range(pieces)))
        return pieces


# === From tokenizer.json ===


def _read(content):
    try:
        described = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"A `tokenizer.json` is a JSON file. Received one that does not parse: {error}") from error
    if not isinstance(described, dict):
        raise ValueError("A `tokenizer.json` is a JSON object with a `model`. Received one without.")
    return described


def check_described(described):
    """Refuses the object of a `tokenizer.json` that treats a text otherwise than Gemma's, naming the rule."""
    if not isinstance(described.get("model"), dict):
        raise ValueError("A `tokenizer.json` is a JSON object with a `model`. Received one without.")
    _check_model(described["model"])
    _check_steps(described)


def _check_model(model):
    # Old files do not name their type, but only BPE has merges.
    kind = model.get("type", "BPE" if "merges" in model else None)
    _require("a BPE model", "model.type", kind, ["BPE"])
    _require("bytes for characters outside the vocabulary", "model.byte_fallback", model.get("byte_fallback"), [True])
    _require("one unknown token", "model.unk_token", model.get("unk_token"), [UNK])
    _require("merges without chance", "model.dropout", model.get("dropout"), [None, 0])
    _require("merges for every piece", "model.ignore_merges", model.get("ignore_merges"), [None, False])
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        _require("pieces that are spelled as the text", f"model.{mark}", model.get(mark), [None, ""])
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError("A BPE model has a `vocab` from pieces to ids and a list of `merges`. Received one without.")


def _check_steps(described):
    normalizers = [REPLACED_SPACES, {"type": "Sequence", "normalizers": [REPLACED_SPACES]}]
    _require("a text unchanged but for its spaces", "normalizer", described.get("normalizer"), normalizers)
    _require("texts in one part", "pre_tokenizer", described.get("pre_tokenizer"), [None, IDLE_SPLIT])


def _require(rule, field, received, valid):
    if received not in valid:
        raise ValueError(f"Gemma's tokenizer has {rule}: `{field}` is one of {valid}. Received: {received!r}")


def _added_tokens(described):
    added = {}
    for token in described.get("added_tokens") or []:
        check_added_token(token, TOKENIZER_FILE)
        # SentencePiece looks for its pieces after spaces were replaced.
        added[token["content"].replace(" ", SPACE)] = token["id"]
    return added


def check_added_token(token, file):
    """Refuses an added token that takes more of a text than its own spelling."""
    for option in ("single_word", "lstrip", "rstrip"):
        if token.get(option):
            raise ValueError(
                f"Gemma's tokenizer has added tokens as they are spelled, without `{option}`. Received: "
                f"{token.get('content')!r} with it in `{file}`"
            )


def is_spelled(piece, token):
    """Whether files that Hugging Face has call a SentencePiece piece so: a byte may be spelled as its character."""
    return piece == token or (piece in BYTES and BYTES[piece] < 0x80 and chr(BYTES[piece]) == token)


def placeholder(index):
    """What an id without a token is called, as llama.cpp calls it."""
    return f"[PAD{index}]"


def _pieces_by_id(vocabulary, added):
    ids = {**vocabulary, **added}
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(
            f"A vocabulary of n pieces has the ids from 0 to n - 1, each once. Received: {len(ids)} pieces with "
            f"{len(set(ids.values()))} ids from {min(ids.values(), default=None)} to {max(ids.values(), default=None)}"
        )
    _check_specials(ids)
    return sorted(ids, key=ids.get)


def _check_specials(names):
    missing = [token for token in SPECIAL_TYPES if token not in names]
    if missing:
        raise ValueError(f"Gemma's vocabulary has {', '.join(SPECIAL_TYPES)}. This one lacks {', '.join(missing)}.")


def _with_names_of_bytes(pieces):
    ids = {piece: index for index, piece in enumerate(pieces)}
    for name, byte in BYTES.items():
        if name in ids:
            continue
        if byte >= 0x80 or chr(byte) not in ids:
            raise ValueError(f"A vocabulary that falls back to bytes has a piece for each. This one lacks {name}.")
        pieces[ids[chr(byte)]] = name
    return pieces


def _split_merges(merges):
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"A merge joins two pieces. Received: {' '.join(pair)!r}")
    return pairs


def _check_merges(pieces, types, merges):
    names = set(pieces)
    for left, right in merges:
        if left + right not in names:
            raise ValueError(f"Merges make pieces of the vocabulary. Received: {left!r} and {right!r}, which make none")
    normal = {piece for piece, kind in zip(pieces, types) if kind == NORMAL}
    user_defined = {piece for piece, kind in zip(pieces, types) if kind == USER_DEFINED}
    joined = normal | set("".join(normal)) - user_defined
    listed = set(merges)
    for piece in normal:
        for pair in _ways_of_making(piece, joined):
            if pair not in listed:
                raise ValueError(
                    f"SentencePiece joins any two pieces that make a third, but these merges lack {pair[0]!r} with "
                    f"{pair[1]!r}, which make {piece!r}. Valid: the merges of a tokenizer that was SentencePiece's."
                )


def _scores(pieces, types, merges):
    ranks = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [float(-ranks.get(piece, len(merges))) if kind == NORMAL else 0.0 for piece, kind in zip(pieces, types)]


# === SentencePiece ===


def built(pieces, ids):
    """A SentencePiece model of pieces, with what else all vocabularies of Gemma have in common.

    Args:
        pieces: iterable of triples of a string, a float, its score, and an int, its type.
        ids: dict of ints: those of `"pad"`, `"eos"`, `"bos"` and `"unk"`.

    Returns:
        Bytes.
    """
    model = _protobuf().ModelProto()
    for piece, score, of_type in pieces:
        model.pieces.add(piece=piece, score=score, type=of_type)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.split_digits = True
    trainer.byte_fallback = any(piece.type == BYTE for piece in model.pieces)
    if any(_is_space(piece.piece) for piece in model.pieces):
        trainer.allow_whitespace_only_pieces = True
    trainer.user_defined_symbols.extend(piece.piece for piece in model.pieces if piece.type == USER_DEFINED)
    for name, index in ids.items():
        setattr(trainer, f"{name}_id", index)
        setattr(trainer, f"{name}_piece", model.pieces[index].piece)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.precompiled_charsmap = b""
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def _is_space(piece):
    return len(piece) > 1 and set(piece) == {SPACE}


def parsed(proto):
    """The message that bytes of a SentencePiece model are.

    Raises:
        ValueError: for other bytes.
    """
    from google.protobuf.message import DecodeError

    model = _protobuf().ModelProto()
    try:
        model.ParseFromString(proto)
    except DecodeError as error:
        raise ValueError(
            f"A `tokenizer.model` is a SentencePiece model. Received one that does not parse: {error}"
        ) from error
    return model


def _protobuf():
    # It wants a protobuf as new as itself, and most of the package works with any.
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def check_rules(model):
    """Refuses a SentencePiece model that treats a text otherwise than Gemma's, naming the rule."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    _require("a BPE model", "model_type", trainer.ModelType.Name(trainer.model_type), ["BPE"])
    _require("bytes for characters outside the vocabulary", "byte_fallback", trainer.byte_fallback, [True])
    _require("no rules that change a text", "precompiled_charsmap", normalizer.precompiled_charsmap, [b""])
    _require("no space put in front", "add_dummy_prefix", normalizer.add_dummy_prefix, [False])
    _require("white space as it is", "remove_extra_whitespaces", normalizer.remove_extra_whitespaces, [False])
    _require(f"spaces as {SPACE}", "escape_whitespaces", normalizer.escape_whitespaces, [True])


def _check_pieces(pieces):
    _check_specials({piece.piece for piece in pieces})
    for index, piece in enumerate(pieces):
        expected = (TYPES[piece.piece],) if piece.piece in TYPES else (NORMAL, USER_DEFINED)
        if (piece.piece, piece.type) == (placeholder(index), CONTROL):
            continue
        if piece.type not in expected:
            raise ValueError(
                f"Special pieces and bytes have types of their own, all others are normal or user-defined. Received: "
                f"{piece.piece!r} of type {piece.Type.Name(piece.type)}"
            )


def _tokenizer_json(model, added, opens_with_bos):
    names = _names(model.pieces)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **token} for index, token in added.items()],
        "normalizer": REPLACED_SPACES,
        "pre_tokenizer": None,
        "post_processor": _bos_in_front(names.index(BOS)) if opens_with_bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [" ".join(pair) for pair in _merges(model.pieces, names)],
        },
    }


def _names(pieces):
    """Spellings of the pieces. A byte that only longer pieces have as a character is spelled so: merges start there."""
    names = [piece.piece for piece in pieces]
    characters = set("".join(piece.piece for piece in pieces if piece.type == NORMAL))
    lacking = characters.difference(names)
    for character in sorted(lacking):
        if ord(character) >= 0x80:
            raise ValueError(
                f"Every character of a piece is a piece of its own or one byte, else no merge reaches it. Received: "
                f"{character!r} in {next(name for name in names if character in name)!r}"
            )
    return [chr(BYTES[name]) if name in BYTES and chr(BYTES[name]) in lacking else name for name in names]


def _merges(pieces, names):
    spelled = {
        name: index
        for index, (piece, name) in enumerate(zip(pieces, names))
        if piece.type in (NORMAL, USER_DEFINED) or len(name) == 1
    }
    by_score = sorted(spelled, key=lambda name: (-pieces[spelled[name]].score, spelled[name]))
    pairs = []
    for name in by_score:
        # Gemma's own file has them in this order.
        pairs += sorted(_ways_of_making(name, spelled), key=lambda pair: (spelled[pair[0]], spelled[pair[1]]))
    return pairs


def _ways_of_making(piece, names):
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    return [(left, right) for left, right in pairs if left in names and right in names]


def _added(pieces, stop_tokens):
    kinds = {index: piece for index, piece in enumerate(pieces) if piece.type not in (NORMAL, BYTE)}
    return {
        index: {
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # SentencePiece finds its pieces after spaces were replaced.
            "normalized": SPACE in piece.piece,
            "special": piece.piece in (*SPECIAL_TYPES, *TURNS, *stop_tokens),
        }
        for index, piece in kinds.items()
    }


def _bos_in_front(bos_id):
    def text(name, type_id):
        return [{"SpecialToken": {"id": BOS, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
    }


def _special_tokens(names):
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    if names.issuperset(TURNS):
        special["additional_special_tokens"] = list(TURNS)
    return special


def _tokenizer_config(model, added, special, chat_template, opens_with_bos):
    # transformers would add a mask of its own to a vocabulary without one.
    has_mask = any(piece.piece == MASK for piece in model.pieces)
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": opens_with_bos,
        "add_eos_token": False,
        **special,
        "mask_token": MASK if has_mask else None,
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "added_tokens_decoder": {str(index): token for index, token in added.items()},
    }
    chat_template = chat_template or chat_template_of(model)
    return {**config, "chat_template": chat_template} if chat_template else config


def chat_template_of(model):
    """Gemma's template, where a SentencePiece model has the turn markers, or `None`."""
    return CHAT_TEMPLATE if {piece.piece for piece in model.pieces}.issuperset(TURNS) else None


CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if not messages -%}
    {{- raise_exception('A dialogue has at least one message.') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set speaker = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- set content = message['content'] -%}
    {%- if speaker not in ['user', 'model'] -%}
        {{- raise_exception('Roles are user and model (or assistant); a system has none.') -}}
    {%- elif speaker != ('user' if loop.index0 % 2 == 0 else 'model') -%}
        {{- raise_exception('Turns alternate and the user begins.') -}}
    {%- elif content is not string -%}
        {{- raise_exception('The content of a message is a string.') -}}
    {%- elif '<start_of_turn>' in content or '<end_of_turn>' in content -%}
        {{- raise_exception('A message cannot contain a turn marker.') -}}
    {%- elif add_generation_prompt and loop.last and speaker == 'model' -%}
        {{- raise_exception('The model answers a message of the user, but the last message is its own.') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + speaker + '\\n' + (content | trim) + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
