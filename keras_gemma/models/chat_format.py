"""The dialogue format of Gemma's instruction-tuned models, as pieces of text.

    <bos><start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>

Turns alternate, the user begins, and no other role speaks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from keras_gemma.data import text_checks

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
TURN_MARKERS = (START_OF_TURN, END_OF_TURN)
PIECES_OF_A_MESSAGE = 3
ROLES = {"user": "user", "model": "model", "assistant": "model"}


@dataclass(frozen=True)
class Piece:
    """A stretch of a dialogue's text.

    Attributes:
        text: string.
        learned: bool, whether the model itself writes it.
        content: the beginning of `text` that a user or the model wrote, as opposed to what the format adds.
    """

    text: str
    learned: bool = False
    content: str = ""


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
        ValueError: for a system role (see `merge_system_message`), roles out of turn, missing fields, contents that are
            not text, and a generation prompt after the model's own turn.

    Example:

    >>> from keras_gemma.models.chat_format import dialogue_pieces
    >>> pieces = dialogue_pieces([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    >>> "".join(piece.text for piece in pieces)
    '<start_of_turn>user\\nHello<end_of_turn>\\n<start_of_turn>model\\n'
    """
    if not text_checks.is_list(messages) or not len(messages):
        raise ValueError(f"A dialogue is a list of at least one message. Received: {text_checks.shown(messages)}")
    pieces = []
    for turn, message in enumerate(text_checks.as_list(messages)):
        role, content = _checked_message(message, turn)
        learned = role == "model"
        pieces.append(Piece(f"{START_OF_TURN}{role}\n"))
        pieces.append(Piece(f"{content}{END_OF_TURN}", learned, content))
        pieces.append(Piece("\n"))
    if add_generation_prompt:
        if role == "model":
            raise ValueError("The model answers a user's message, but the last message is the model's own.")
        pieces.append(Piece(f"{START_OF_TURN}model\n"))
    return pieces


def refuse_turn_markers(pieces):
    """Raises a `ValueError` where a message spells a turn marker, for uses that cannot tell it from a real one."""
    for index, piece in enumerate(pieces):
        for marker in TURN_MARKERS:
            if marker in piece.content:
                raise ValueError(
                    f"A message cannot contain the turn marker {marker!r} here: it could not be told from a real one. "
                    f"Received in message {index // PIECES_OF_A_MESSAGE}."
                )


def without_turn_markers(text):
    """The text without what spells a turn marker."""
    return text.replace(START_OF_TURN, "").replace(END_OF_TURN, "")


def merge_system_message(messages):
    """Puts a system message in front of the first user message, as Gemma has no system role.

    Args:
        messages: list of `{"role", "content"}`. Dialogues that do not open with a system message stay as they are.

    Returns:
        A list of messages.

    Example:

    >>> from keras_gemma.models.chat_format import merge_system_message
    >>> merge_system_message([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}])
    [{'role': 'user', 'content': 'Be brief.\\n\\nWho?'}]
    """
    if not _opens_with_system(messages):
        return messages
    system, user, *others = messages
    return [{**user, "content": f"{system['content'].strip()}\n\n{user['content']}"}, *others]


def _opens_with_system(messages):
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages[:2]):
        return False
    roles = [message.get("role") for message in messages[:2]]
    return roles == ["system", "user"] and all(isinstance(message.get("content"), str) for message in messages[:2])


def _checked_message(message, turn):
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(
            f"A message is a dict with 'role' and 'content'. Received for message {turn}: {text_checks.shown(message)}"
        )
    role, content = text_checks.scalar(message["role"]), message["content"]
    if role == "system":
        raise ValueError(
            "Gemma 1 has no system role. Put the instructions in front of the first user message, which "
            f"`merge_system_messages=True` of the preprocessor does. Received for message {turn}: {role!r}"
        )
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"Gemma's dialogues know the roles {', '.join(map(repr, ROLES))} and no other. "
            f"Received for message {turn}: {text_checks.shown(role)}"
        )
    expected = "user" if turn % 2 == 0 else "model"
    if ROLES[role] != expected:
        raise ValueError(
            f"Turns alternate and the user begins: message {turn} must be by {expected!r}. Received: {role!r}"
        )
    content = text_checks.text(content, f"The content of message {turn}")
    return ROLES[role], content.strip()
