"""JSON files as they are meant: an object, each name once, numbers that are finite, no deep nests."""

import json

from keras_gemma.damaged import reading


def read_json(path):
    """The object in a JSON file.

    Raises:
        DamagedFileError: for a file that is not JSON or holds no object, and for what `parsed_json` refuses.
    """
    with open(path, "rb") as file:
        return parsed_json(file.read(), path)


def parsed_json(content, path):
    """The object that bytes or a string of JSON are.

    Args:
        content: bytes in UTF-8, or a string.
        path: the file that an error names.

    Returns:
        A dict.

    Raises:
        DamagedFileError: for anything but one object, for a name that an object has twice, numbers that are not finite,
            and deep nests.
    """
    with reading(path, "JSON file"):
        text = content if isinstance(content, str) else bytes(content).decode()
        parsed = json.loads(text, object_pairs_hook=_once_each, parse_constant=_refuse_constant, parse_float=_finite)
        if not isinstance(parsed, dict):
            raise ValueError(f"it must hold a JSON object. Received: {type(parsed).__name__}")
        return parsed


def _once_each(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _finite(digits):
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is no number that a computer has")
    return number


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON")
