"""The dialogue format of Gemma's instruction-tuned models, as pieces of text.

    <bos><start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>

Turns alternate, the user begins, and no other role speaks.
"""

from dataclasses import dataclass

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
ROLES = {"user": "user", "model": "model", "assistant": "model"}


@dataclass(frozen=True)
class Piece:
    """A stretch of a dialogue's text; `learned` where the model itself writes it."""

    text: str
    learned: bool = False


def dialogue_pieces(messages, add_generation_prompt=False):
    """Cuts a dialogue into pieces of text, without its `<bos>`.

    The cuts fall where a model starts and stops writing, so that training and generating tokenize alike.

    Args:
        messages: list of `{"role": ..., "content": ...}`; roles `user` and `model` (or `assistant`) in turn,
            `user` first. Contents are stripped of outer white space.
        add_generation_prompt: bool. Opens the model's turn at the end.

    Returns:
        A list of `Piece`s.

    Raises:
        ValueError: for a system role, roles out of turn, missing fields, contents that are not text or that
            contain a turn marker, and a generation prompt after the model's own turn.

    Example:

    >>> from keras_gemma.models.chat_format import dialogue_pieces
    >>> pieces = dialogue_pieces([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    >>> "".join(piece.text for piece in pieces)
    '<start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\n'
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"A dialogue is a list of at least one message. Received: {messages!r}")
    pieces = []
    for turn, message in enumerate(messages):
        role, content = _checked_message(message, turn)
        learned = role == "model"
        pieces.append(Piece(f"{START_OF_TURN}{role}\n"))
        pieces.append(Piece(f"{content}{END_OF_TURN}", learned))
        pieces.append(Piece("\n"))
    if add_generation_prompt:
        if role == "model":
            raise ValueError("The model answers a user's message, but the last message is the model's own.")
        pieces.append(Piece(f"{START_OF_TURN}model\n"))
    return pieces


def _checked_message(message, turn):
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"A message is a dict with 'role' and 'content'. Received for message {turn}: {message!r}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(
            f"Gemma's dialogues know the roles {', '.join(map(repr, ROLES))} and no other "
            f"(put instructions of a system into the first user message). Received for message {turn}: {role!r}"
        )
    expected = "user" if turn % 2 == 0 else "model"
    if ROLES[role] != expected:
        raise ValueError(
            f"Turns alternate and the user begins: message {turn} must be by {expected!r}. Received: {role!r}"
        )
    if not isinstance(content, str):
        raise ValueError(f"The content of a message is a string. Received for message {turn}: {content!r}")
    for marker in (START_OF_TURN, END_OF_TURN):
        if marker in content:
            raise ValueError(f"A message cannot contain the turn marker {marker!r}. Received in message {turn}.")
    return ROLES[role], content.strip()
