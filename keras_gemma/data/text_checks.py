"""What counts as text, as a list and as a set of fields, wherever examples and prompts come in.

Text is a `str`, or bytes of UTF-8, which is what `tf.data` and ArrayRecord give. A character NUL is a character as any
other: the tokenizer has a byte for it. A lone surrogate (half a character, as `json.loads` makes of `"\\ud83d"`) is no
character, so no tokenizer reads it. Lists are sequences of any kind: lists, tuples, NumPy arrays, pandas Series, Arrow
and Hugging Face columns. Fields are mappings, and tables: pandas DataFrames, Arrow tables, Hugging Face data sets.
"""

import collections.abc
import functools
import math
import reprlib

import numpy as np

# A batch, its fields, a dialogue, a message and its content. What lies deeper is no text.
DEEPEST = 8
# Fields that nobody reads, such as the arguments of a tool, may lie deeper.
MOST_LEVELS = 64
SHOWN_CHARACTERS = 200
NOT_UTF_8 = "bytes that are not UTF-8"
LONE_SURROGATE = "a lone surrogate, half of a character"


class TextError(ValueError):
    """A value that should be text and is not.

    Attributes:
        reason: string, the rule that it breaks, in few words and without the value.
    """

    # Keras would make another error of it, to which it adds the layer's arguments: all the texts of a batch.
    _keras_call_info_injected = True

    def __init__(self, message, reason):
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self):
        return self.args[0]


class ExampleError(ValueError):
    """An error about one of several examples.

    Attributes:
        number: int, which one, counted from 0.
        problem: string, what is wrong with it.
    """

    _keras_call_info_injected = True

    def __init__(self, number, problem):
        super().__init__(number, problem)
        self.number = number
        self.problem = problem

    def __str__(self):
        return f"Example {self.number}: {self.problem}"


def text(value, name="A text"):
    """A value as a `str`.

    Args:
        value: a string, bytes of UTF-8, or a NumPy, TensorFlow or Arrow scalar of one.
        name: string, what the value is called in errors.

    Raises:
        TextError: for a missing value, anything else that is no text, bytes that are not UTF-8, and lone surrogates.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.data.text_checks import text
    >>> text(np.bytes_("naïve".encode()))
    'naïve'
    >>> text(None, "A prompt")
    Traceback (most recent call last):
    keras_gemma.data.text_checks.TextError: A prompt is a string. Received: None, a missing value
    """
    value = scalar(value)
    if isinstance(value, (bytes, bytearray)):
        return _decoded(bytes(value), name)
    if not isinstance(value, str):
        if is_missing(value):
            raise TextError(f"{name} is a string. Received: {shown(value)}, a missing value", "a missing value")
        raise TextError(f"{name} is a string. Received: {shown(value)}", _kind(value))
    # A Python string whose characters are all ASCII knows it; the others are tried.
    if not value.isascii():
        _refuse_surrogates(value, name)
    return value if type(value) is str else str(value)


def _decoded(value, name):
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{name} in bytes is UTF-8. Received: {shown(value)}, whose byte {error.start} is "
            f"0x{value[error.start]:02X} ({error.reason})",
            NOT_UTF_8,
        ) from error


def _refuse_surrogates(value, name):
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"{name} has whole characters. Received: {shown(value)}, whose character {error.start} is the lone "
            f"surrogate U+{ord(value[error.start]):04X}, half of a character; "
            "`text.encode('utf-8', 'replace').decode()` puts '?' in its place",
            LONE_SURROGATE,
        ) from error


def is_missing(value):
    """Whether a value is `None`, NaN, or what pandas has for a missing one."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in _PANDAS_MISSING


_PANDAS_MISSING = ("NAType", "NaTType")


def is_text(value):
    """Whether a value is one string or one bytes object, and so no list."""
    return isinstance(scalar(value), (str, bytes, bytearray))


def scalar(value):
    """A scalar of NumPy, TensorFlow or Arrow as a Python value; anything else as it is."""
    if isinstance(value, (str, bytes, dict, list, tuple)):
        return value
    if hasattr(value, "as_py"):
        return value.as_py()
    if hasattr(value, "numpy") and getattr(value, "shape", None) == ():
        value = value.numpy()
    return value.item() if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 else value


def is_fields(value):
    """Whether a value has named fields: a mapping, or a table of pandas, Arrow or Hugging Face."""
    return isinstance(value, collections.abc.Mapping) or _column_names(value) is not None


def fields(value):
    """A mapping or table as a dict from name to field or column."""
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    return {name: value[name] for name in _column_names(value)}


def _column_names(value):
    names = getattr(value, "column_names", None)
    if names is None and hasattr(value, "iloc"):
        names = getattr(value, "columns", None)
    return None if names is None or not hasattr(value, "__getitem__") else list(names)


def is_list(value):
    """Whether a value is several in order: a sequence, an array or a column of a table; neither text nor fields."""
    if isinstance(value, (list, tuple)):
        return True
    if isinstance(value, (str, bytes, bytearray, memoryview)) or is_fields(value):
        return False
    if getattr(value, "shape", None) == () or not hasattr(value, "__len__"):
        return False
    return isinstance(value, collections.abc.Sequence) or any(hasattr(value, way) for way in _WAYS_TO_LIST)


# Of Arrow and Polars; of NumPy and pandas; of anything that NumPy takes.
_WAYS_TO_LIST = ("to_pylist", "to_list", "tolist", "__array__", "numpy")


def is_message(value):
    """Whether a value is a message of a dialogue: fields, among them a role."""
    return isinstance(value, collections.abc.Mapping) and "role" in value


def as_list(value):
    """What `is_list` accepts, as a list of Python values, or of lists of these."""
    if isinstance(value, collections.abc.Sequence):
        return list(value)
    if hasattr(value, "numpy"):
        value = value.numpy()
    for way in _WAYS_TO_LIST[:3]:
        if hasattr(value, way):
            return getattr(value, way)()
    return np.asarray(value).tolist()


def plain(value, depth=DEEPEST):
    """Containers of any kind as dicts and lists, and scalars as Python values, down to the depth that examples have.

    What lies deeper stays as it is: it is no text, and is refused as such where text is expected.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.data.text_checks import plain
    >>> plain({"prompts": np.array(["a", "b"]), "responses": ("c", "d")})
    {'prompts': ['a', 'b'], 'responses': ['c', 'd']}
    """
    if isinstance(value, (str, bytes)) or not depth:
        return value
    if is_fields(value):
        return {name: plain(field, depth - 1) for name, field in fields(value).items()}
    if is_list(value):
        return [plain(element, depth - 1) for element in as_list(value)]
    return scalar(value)


def refuse_deep(value):
    """Raises a `TextError` for lists and dicts so deep that a walk through them would end in a RecursionError."""
    if _is_deeper_than(MOST_LEVELS, value):
        raise TextError(f"Examples are nested at most {MOST_LEVELS} deep. Received: {shown(value)}", "nested too deep")


def _is_deeper_than(levels, value):
    if isinstance(value, collections.abc.Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return not levels or any(_is_deeper_than(levels - 1, inner) for inner in value)


def column(value):
    """A list-like value as one whose elements can be had by their place: a list or another sequence, or an array."""
    if isinstance(value, (np.ndarray, collections.abc.Sequence)) or not is_list(value):
        return value
    # A pandas Series is indexed by labels, and a TensorFlow tensor is slow by the element.
    return np.asarray(value) if hasattr(value, "__array__") and not hasattr(value, "to_pylist") else as_list(value)


def shown(value, length=SHOWN_CHARACTERS):
    """The beginning of a value's `repr`, however long or deep it is, in characters that any terminal writes."""
    try:
        described = _SHORT.repr(value)
    except Exception:
        described = f"a {type(value).__name__}"
    described = described.encode("utf-8", "backslashreplace").decode("utf-8")
    return described if len(described) <= length else f"{described[: length - 1]}…"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 5
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = SHOWN_CHARACTERS


def _kind(value):
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def each(function, examples):
    """`[function(example) for example in examples]`, where an error says which example it is about.

    Raises:
        ExampleError: for a `ValueError` of `function`, with the number of the example.
    """
    results = []
    for number, example in enumerate(examples):
        try:
            results.append(function(example))
        except ValueError as error:
            raise ExampleError(number, str(error)) from error
    return results


def refuse_bad_texts(examples):
    """Looks once through listed examples, before anything is trained, for texts that no tokenizer reads.

    Args:
        examples: list or array of examples, or fields of these. Numbers and what is not in memory are passed over.

    Raises:
        ExampleError: for a missing value, bytes that are not UTF-8 and a lone surrogate, with its number.
    """
    if is_fields(examples):
        for name, values in fields(examples).items():
            _refuse_bad_column(values, f"Its {name!r}")
    else:
        _refuse_bad_column(examples, "A text")


_NEEDED_FIELDS = ("prompts", "responses", "chosen", "rejected", "content")
_TEXT_FIELDS = (
    *_NEEDED_FIELDS, "text", "messages", "prompt", "completion", "instruction", "output", "response", "conversations",
    "value",
)  # fmt: skip


def _refuse_bad_column(values, name):
    if isinstance(values, (list, tuple)) or (isinstance(values, np.ndarray) and values.dtype.kind in "OUS"):
        are_texts = len(values) > 0 and isinstance(values[0], (str, bytes))
        check = text if are_texts else functools.partial(_refuse_bad_texts_in, depth=DEEPEST)
        each(lambda value: check(value, name=name), values)


def _refuse_bad_texts_in(value, name, depth):
    if isinstance(value, (str, bytes)) or is_missing(value):
        text(value, name)
    elif not depth:
        return
    elif isinstance(value, collections.abc.Mapping):
        # Tables have a null where a row goes without a field of others.
        given = [field for field in _TEXT_FIELDS if value.get(field) is not None]
        others = not set(_NEEDED_FIELDS).issuperset(given)
        lacking = [field for field in _NEEDED_FIELDS if field in value and value[field] is None and not others]
        for field in (*given, *lacking):
            _refuse_bad_texts_in(value[field], f"Its {field!r}", depth - 1)
    elif isinstance(value, (list, tuple)):
        for element in value:
            _refuse_bad_texts_in(element, name, depth - 1)
