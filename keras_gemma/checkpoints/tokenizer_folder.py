"""What the files of a Hugging Face folder say of its tokenizer, together.

    tokenizer.model            pieces by their places
    tokenizer.json             all of them again, and tokens that were added or renamed later
    added_tokens.json, tokenizer_config.json (added_tokens_decoder)   tokens that were added or renamed
    tokenizer_config.json, special_tokens_map.json                    which token opens and ends a text
    tokenizer_config.json, chat_template.jinja                        how a dialogue becomes text

What one file says and another leaves open is taken from it. What two say differently is refused.
"""

import json

from keras_gemma.checkpoints import tokenizer_files
from keras_gemma.checkpoints.tokenizer_files import BOS
from keras_gemma.checkpoints.tokenizer_files import SPACE
from keras_gemma.checkpoints.tokenizer_files import TOKENIZER_FILE
from keras_gemma.checkpoints.tokenizer_files import VOCABULARY_FILE

ADDED_FILE = "added_tokens.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
FILES = (VOCABULARY_FILE, TOKENIZER_FILE, ADDED_FILE, CONFIG_FILE, SPECIAL_FILE, TEMPLATE_FILE)
JSON_FILES = (ADDED_FILE, CONFIG_FILE, SPECIAL_FILE)
SHOWN_PIECES = 3


def proto_of_files(contents):
    """The SentencePiece model of a folder, with the tokens that were added to it or renamed.

    An added token is a user-defined piece at its id. Ids before it that no file names are filled with pieces that no
    text becomes and that become no text.

    Args:
        contents: dict from file name to bytes; `tokenizer.model` or `tokenizer.json` among them.

    Returns:
        Bytes; those of `tokenizer.model` where the other files say the same.

    Raises:
        ValueError: for files that say different things, naming them, the id and both tokens; for an added token that
            SentencePiece would find elsewhere in a text; for special tokens without an id or other than Gemma's.
    """
    described = _parsed_json(contents, (TOKENIZER_FILE, *JSON_FILES))
    named = _tokens_by_id(described)
    if VOCABULARY_FILE in contents:
        base, proto = VOCABULARY_FILE, contents[VOCABULARY_FILE]
    else:
        base, proto = TOKENIZER_FILE, tokenizer_files.proto_of_tokenizer_json(contents[TOKENIZER_FILE])
        named.pop(TOKENIZER_FILE)
    # A file that says nothing new is not looked at any closer.
    if not any(named.values()) and not _specials(described):
        return proto
    model = tokenizer_files.parsed(proto)
    if base == VOCABULARY_FILE and TOKENIZER_FILE in described:
        _check_same_pieces(model, described[TOKENIZER_FILE], named[TOKENIZER_FILE])
    changes = _changes(model, base, named)
    proto = _changed(model, changes) if changes else proto
    _check_specials(described, {piece.piece for piece in model.pieces})
    return proto


def tokenizer_model(*folders):
    """`proto_of_files` of the first of some folders (`pathlib.Path`) that has a `tokenizer.model`, or `None`."""
    for folder in folders:
        if (folder / VOCABULARY_FILE).is_file():
            paths = {name: folder / name for name in FILES}
            return proto_of_files({name: path.read_bytes() for name, path in paths.items() if path.is_file()})
    return None


def eos_tokens(contents):
    """Spellings of the tokens that end a text by the word of a folder's files, a list."""
    described = _parsed_json(contents)
    return list(dict.fromkeys(token for _, key, token in _specials(described) if key == "eos_token"))


def opens_with_bos(contents):
    """Whether texts begin with `<bos>`: `None` where no file says so."""
    return _parsed_json(contents).get(CONFIG_FILE, {}).get("add_bos_token")


def chat_template(contents):
    """The Jinja template of dialogues, or `None`.

    Raises:
        ValueError: for two files with different ones.
    """
    listed = _parsed_json(contents).get(CONFIG_FILE, {}).get("chat_template")
    if isinstance(listed, list):
        # Several by name, as transformers allows.
        listed = {entry.get("name"): entry.get("template") for entry in listed}.get("default")
    in_file = contents.get(TEMPLATE_FILE)
    in_file = None if in_file is None else in_file.decode("utf-8")
    if listed is not None and in_file is not None and listed.strip() != in_file.strip():
        raise ValueError(f"`{CONFIG_FILE}` and `{TEMPLATE_FILE}` hold different chat templates. Remove the wrong one.")
    return in_file if listed is None else listed


# === What each file says ===


def _parsed_json(contents, names=JSON_FILES):
    described = {}
    for name in names:
        if name in contents:
            try:
                described[name] = json.loads(contents[name])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"`{name}` is not a complete JSON file: {error}") from error
            if not isinstance(described[name], dict):
                raise ValueError(f"`{name}` holds a JSON object. Received: {type(described[name]).__name__}")
    return described


def _tokens_by_id(described):
    """Of each file, tokens by their ids; of `tokenizer.json` all pieces."""
    named = {}
    if TOKENIZER_FILE in described:
        whole = described[TOKENIZER_FILE]
        tokenizer_files.check_described(whole)
        pieces = {index: piece for piece, index in whole["model"]["vocab"].items()}
        named[TOKENIZER_FILE] = _with_added(pieces, _of_added_tokens(TOKENIZER_FILE, whole.get("added_tokens") or []))
    if ADDED_FILE in described:
        listed = [{"id": index, "content": token} for token, index in described[ADDED_FILE].items()]
        named[ADDED_FILE] = _of_added_tokens(ADDED_FILE, listed)
    decoder = described.get(CONFIG_FILE, {}).get("added_tokens_decoder") or {}
    listed = [{**token, "id": index} for index, token in decoder.items() if isinstance(token, dict)]
    named[CONFIG_FILE] = _of_added_tokens(CONFIG_FILE, listed)
    return named


def _with_added(pieces, added):
    """All pieces of a `tokenizer.json`; `tokenizers` gives ids of its own where they are not as here."""
    for index, token in added.items():
        if not tokenizer_files.is_spelled(pieces.setdefault(index, token), token):
            raise ValueError(
                f"`{TOKENIZER_FILE}` gives id {index} to {pieces[index]!r} in its vocabulary, and to {token!r} among "
                "its added tokens."
            )
    if not all(index in pieces for index in range(len(pieces))):
        raise ValueError(f"`{TOKENIZER_FILE}` has {len(pieces)} pieces, but not the ids from 0 to {len(pieces) - 1}.")
    return pieces


def _of_added_tokens(file, tokens):
    by_id = {}
    for token in tokens:
        try:
            index, content = int(token["id"]), token["content"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"An added token has an `id` and a `content`. Received: {token!r} in `{file}`") from error
        if index < 0 or not isinstance(content, str) or not content:
            raise ValueError(f"An added token is text at an id from 0 on. Received: {content!r} at {index} in `{file}`")
        tokenizer_files.check_added_token(token, file)
        # SentencePiece looks for its pieces after spaces were replaced.
        content = content.replace(" ", SPACE)
        if by_id.setdefault(index, content) != content:
            raise ValueError(f"`{file}` gives id {index} to {by_id[index]!r} and to {content!r}.")
    return by_id


def _specials(described):
    """What files say of special tokens: triples of file, key and spelling."""
    found = []
    for file in (CONFIG_FILE, SPECIAL_FILE):
        for key in ("bos_token", "eos_token", "additional_special_tokens", "extra_special_tokens"):
            value = described.get(file, {}).get(key)
            values = list(value.values()) if isinstance(value, dict) and "content" not in value else value
            for token in values if isinstance(values, list) else [values]:
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    found.append((file, key, token.replace(" ", SPACE)))
    return found


def _check_specials(described, pieces):
    for file, key, token in _specials(described):
        if token not in pieces:
            raise ValueError(f"`{file}` names {token!r} in `{key}`, a token to which no file gives an id.")
        if key == "bos_token" and token != BOS:
            raise ValueError(f"Gemma's texts begin with {BOS!r}. Received: `{key}` = {token!r} in `{file}`")


# === Merging ===


def _check_same_pieces(model, described, named):
    added = {content for content in _of_added_tokens(TOKENIZER_FILE, described.get("added_tokens") or []).values()}
    count = len(model.pieces)
    missing = [piece.piece for index, piece in enumerate(model.pieces) if index not in named]
    if missing:
        raise ValueError(
            f"`{TOKENIZER_FILE}` lacks {len(missing)} pieces of `{VOCABULARY_FILE}`, {_shown(missing)}. Remove the "
            "file that is of another model."
        )
    trained = [token for index, token in named.items() if index >= count and token not in added]
    if trained:
        raise ValueError(
            f"`{TOKENIZER_FILE}` has {len(trained)} pieces more than `{VOCABULARY_FILE}` that are no added tokens, "
            f"{_shown(trained)}. Remove the file that is of another model."
        )


def _shown(pieces):
    shown = ", ".join(map(repr, pieces[:SHOWN_PIECES]))
    return shown if len(pieces) <= SHOWN_PIECES else f"{shown} among them"


def _changes(model, base, named):
    """Tokens by their ids that differ from the pieces of the model or come after them."""
    changes, said_by = {}, {}
    for file, tokens in named.items():
        for index, token in tokens.items():
            if index < len(model.pieces) and tokenizer_files.is_spelled(model.pieces[index].piece, token):
                continue
            if changes.setdefault(index, token) != token:
                raise _difference(index, said_by[index], changes[index], file, token)
            said_by.setdefault(index, file)
    for index, token in changes.items():
        file = said_by[index]
        for other, tokens in named.items():
            # A file of added tokens that names the piece as it was.
            if tokens.get(index, token) != token:
                raise _difference(index, other, tokens[index], file, token)
        if index < len(model.pieces):
            _check_renamed(model.pieces[index], index, token, base, file)
    _check_each_once(model, changes, base, said_by)
    return changes


def _difference(index, file, token, other, other_token):
    return ValueError(
        f"Two files give id {index} to different tokens: `{file}` to {token!r}, `{other}` to {other_token!r}. "
        "Remove or mend the one that is wrong."
    )


def _check_renamed(piece, index, token, base, file):
    if piece.type not in (tokenizer_files.USER_DEFINED, tokenizer_files.UNUSED):
        raise _difference(index, base, piece.piece, file, token)


def _check_each_once(model, changes, base, said_by):
    ids = {piece.piece: index for index, piece in enumerate(model.pieces) if index not in changes}
    for index, token in sorted(changes.items()):
        if token in ids:
            file = said_by[index]
            before = said_by.get(ids[token], base)
            raise ValueError(f"{token!r} has two ids: {ids[token]} in `{before}`, {index} in `{file}`.")
        ids[token] = index


def _changed(model, changes):
    """Bytes of the model after it took the changes over."""
    count = max(len(model.pieces), *(index + 1 for index in changes))
    while len(model.pieces) < count:
        index = len(model.pieces)
        model.pieces.add(piece=tokenizer_files.placeholder(index), score=0.0, type=tokenizer_files.CONTROL)
    for index, token in changes.items():
        piece = model.pieces[index]
        piece.piece, piece.score, piece.type = token, 0.0, tokenizer_files.USER_DEFINED
    trainer = model.trainer_spec
    trainer.vocab_size = len(model.pieces)
    del trainer.user_defined_symbols[:]
    trainer.user_defined_symbols.extend(
        piece.piece for piece in model.pieces if piece.type == tokenizer_files.USER_DEFINED
    )
    return model.SerializeToString()
