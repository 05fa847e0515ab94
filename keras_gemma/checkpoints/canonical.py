"""Gemma's tensors under one set of names, whatever file they come from or go to.

V vocabulary, D width, N query heads, K key-value heads, H head dim, F feed-forward.

    embedding                       V, D
    blocks.0.attention_norm         D
    blocks.0.query                  N, D, H
    blocks.0.key, blocks.0.value    K, D, H
    blocks.0.output                 N, H, D
    blocks.0.ffw_norm               D
    blocks.0.gate, blocks.0.up      D, F
    blocks.0.down                   F, D
    final_norm                      D

Norms are stored without the one that is added to them. Each format has a table of `FileTensor`s: what its file has in
place of these. The table serves in both directions.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from keras_gemma.checkpoints.besides_tensors import BesidesTensors
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.damaged import reading
from keras_gemma.settings import check_backbone

SHOWN_NAMES = 3
ROWS_AT_ONCE = 1024
FLOATING = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# What all of Gemma 1 has: the base of RoPE, the norms' epsilon.
ROPE_BASE = 10_000.0
LAYER_NORM_EPSILON = 1e-6
# The rows after Gemma's 256,000 pieces, where a checkpoint has any, are padding for TPUs.
ROWS, ROWS_WITH_PADDING = 256_000, 256_128
BLOCK = {
    "attention_norm": "D",
    "query": "NDH",
    "key": "KDH",
    "value": "KDH",
    "output": "NHD",
    "ffw_norm": "D",
    "gate": "DF",
    "up": "DF",
    "down": "FD",
}


class Sizes(NamedTuple):
    """What Gemma's configurations differ in, under the names of `GemmaBackbone`."""

    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    hidden_dim: int
    intermediate_dim: int
    head_dim: int
    layer_norm_epsilon: float = LAYER_NORM_EPSILON

    @property
    def letters(self):
        """The size that each letter stands for."""
        return {
            "V": self.vocabulary_size,
            "D": self.hidden_dim,
            "N": self.num_query_heads,
            "K": self.num_key_value_heads,
            "H": self.head_dim,
            "F": self.intermediate_dim // 2,
        }


def checked(sizes, where):
    """The same `Sizes`, if they are those of a model.

    Args:
        sizes: `Sizes`, as a file says.
        where: path that the error names.

    Raises:
        ValueError: for values that no model can have.
    """
    try:
        check_backbone(sizes._asdict())
    except ValueError as error:
        raise ValueError(f"`{where}` does not describe a Gemma: {error}") from error
    return sizes


def shapes(sizes):
    """The shape of every tensor of a model, by name, in the order in which a token meets them."""
    letters = sizes.letters
    rows = {"embedding": "VD"}
    for index in range(sizes.num_layers):
        rows |= {f"blocks.{index}.{name}": row for name, row in BLOCK.items()}
    rows["final_norm"] = "D"
    return {name: tuple(letters[letter] for letter in row) for name, row in rows.items()}


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, and what it holds.

    Attributes:
        name: string, in the file.
        shape: tuple of ints, in the file.
        parts: tuple of names of this module.
        split: callable from the array of the file to the arrays of the parts, a tuple.
        join: callable from the arrays of the parts to the array of the file.
    """

    name: str
    shape: tuple
    parts: tuple
    split: Callable
    join: Callable


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in some format, of which nothing has been read but names, shapes and dtypes.

    Attributes:
        path: string, what was opened.
        format: string, its name.
        sizes: `Sizes`.
        table: list of `FileTensor`: what a model of these sizes has in this format.
        stored: dict of `StoredTensor` by their names in the files.
        where: string, what lists the tensors, for messages.
        ignored: tuple of names in the files that no model needs.
        copies: dict from a name among these to the name in the files of the tensor that it should repeat.
        proto: callable without arguments to the bytes of the SentencePiece model, `None` where there is none.
        besides: callable without arguments to `BesidesTensors`.
    """

    path: str
    format: str
    sizes: Sizes
    table: list
    stored: dict
    where: str
    ignored: tuple = ()
    copies: dict = dataclasses.field(default_factory=dict)
    proto: Callable = lambda: None
    besides: Callable = BesidesTensors

    def __post_init__(self):
        for name in ("proto", "besides"):
            object.__setattr__(self, name, functools.partial(_reading, self.path, getattr(self, name)))

    @functools.cached_property
    def tensors(self):
        """Dict of `StoredTensor` by the names of this module; none of them is read before it is asked for.

        Raises:
            ValueError: for a missing, additional or misshapen tensor, and for one without fractions, naming it.
        """
        _check_names(self.table, self.stored, self.where, self.ignored)
        of_parts, tensors = shapes(self.sizes), {}
        for entry in self.table:
            source = self.stored[entry.name]
            _check_shape(entry, source)
            check_floating(source)
            for place, part in enumerate(entry.parts):
                read = functools.partial(_part, taker(entry, place), source)
                tensors[part] = StoredTensor(
                    source.file, entry.name, of_parts[part], source.dtype, read, source.kept_as
                )
        return tensors

    def check_copies(self):
        """Refuses an output projection of its own: Gemma's is its embedding.

        Raises:
            ValueError: for numbers or a shape that are not the embedding's, and for an embedding that is not finite.
        """
        for name, repeated in self.copies.items():
            # One that is missing is named where all are.
            if repeated in self.stored:
                _check_copy(self.stored[name], self.stored[repeated])


def _reading(path, call):
    with reading(path):
        return call()


def _check_copy(copy, original):
    same = copy.shape == original.shape
    if same:
        ours, theirs = original.read(), copy.read()
        _check_finite(original, ours)
        same = all(np.array_equal(theirs[rows], ours[rows]) for rows in some_rows(ours))
    if not same:
        raise ValueError(
            f"Gemma's output projection is its embedding. `{copy.file}` keeps numbers of its own in `{copy.name}` of "
            f"shape {tuple(copy.shape)}, beside `{original.name}` of shape {tuple(original.shape)}."
        )


def _part(take, source):
    # What holds several parts is read again for each: to keep it would be one more large array in memory.
    return take(source.read())


def taker(entry, place):
    """Function from the array of a `FileTensor` to that of one of its parts."""
    return lambda array: entry.split(array)[place]


def arranged(table, tensors, dtype=None):
    """Tensors as a file of another format has them.

    Args:
        table: list of `FileTensor`, of the other format.
        tensors: dict of `StoredTensor`, of a `Checkpoint`.
        dtype: optional NumPy dtype to cast to.

    Returns:
        A list of `StoredTensor` in the order of the table. Each is put together, cast and looked at when it is read: a
        number that is not finite is a `ValueError` that names the tensor.
    """
    made = []
    for entry in table:
        parts = [tensors[part] for part in entry.parts]
        cast_to = np.dtype(dtype or np.result_type(*(part.dtype for part in parts)))
        read = functools.partial(_joined, entry, parts, cast_to)
        made.append(StoredTensor(parts[0].file, entry.name, tuple(entry.shape), cast_to, read))
    return made


def _joined(entry, parts, dtype):
    arrays = [part.read() for part in parts]
    for part, array in zip(parts, arrays):
        _check_finite(part, array)
    with np.errstate(over="ignore", invalid="ignore"):
        joined = entry.join(*arrays).astype(dtype, order="C", subok=False, copy=False)
    if any(part.dtype != dtype for part in parts) and not _is_finite(joined):
        raise ValueError(
            f"`{parts[0].file}` keeps a number in `{parts[0].name}` that is not finite as {dtype} in `{entry.name}`."
        )
    return joined


def some_rows(array):
    """Slices that together are all rows: what is made of some at a time takes little memory of its own."""
    return (slice(row, row + ROWS_AT_ONCE) for row in range(0, len(array), ROWS_AT_ONCE))


def _is_finite(array):
    return all(np.isfinite(array[rows]).all() for rows in some_rows(array))


def _check_finite(tensor, array):
    if not _is_finite(array):
        raise ValueError(f"`{tensor.file}` keeps a number that is not finite in `{tensor.name}`.")


def check_floating(tensor):
    """Refuses a `StoredTensor` of integers and the like."""
    if tensor.dtype not in FLOATING:
        raise ValueError(
            f"Weights have a floating dtype, one of {', '.join(np.dtype(dtype).name for dtype in FLOATING)}. "
            f"Received: {tensor.dtype} for `{tensor.name}` in `{tensor.file}`"
        )


def head_among(stored, name, bias, shape):
    """The head of a reward model.

    Args:
        stored: dict of `StoredTensor` by their names in the files.
        name, bias: strings, the head's and that of the bias which it may not have.
        shape: tuple of ints, of the head in the file.

    Returns:
        A `StoredTensor`, or `None` where there is none of that name.

    Raises:
        ValueError: for another shape, and for a bias that is not zero.
    """
    if name not in stored:
        return None
    head = stored[name]
    check_floating(head)
    if tuple(head.shape) != shape:
        raise ValueError(
            f"A reward model has one score, and a head of shape {shape}. Received: `{name}` of shape "
            f"{tuple(head.shape)} in `{head.file}`"
        )
    if bias in stored and np.any(np.asarray(stored[bias].read(), "float32")):
        raise ValueError(
            f"The head of a reward model has no bias: only differences of rewards count. Received: `{bias}` in "
            f"`{head.file}`, which is not zero"
        )
    return head


def check_epsilon(sizes, format):
    """Refuses `Sizes` with another epsilon than Gemma's, for formats that have no place for it."""
    if sizes.layer_norm_epsilon != LAYER_NORM_EPSILON:
        raise ValueError(
            f"The format {format!r} has `layer_norm_epsilon={LAYER_NORM_EPSILON}`. Received: {sizes.layer_norm_epsilon}"
        )


def without_padding(sizes, tensors, pieces):
    """A model without the rows of its embedding that are padding.

    Args:
        sizes: `Sizes`.
        tensors: dict of `StoredTensor`, of a `Checkpoint`.
        pieces: int, of the tokenizer, or `None`. Only its 256,000 say that no token has a row after them.

    Returns:
        A pair of `Sizes` and a dict of `StoredTensor`; those that were given, where nothing is padding.
    """
    if (sizes.vocabulary_size, pieces) != (ROWS_WITH_PADDING, ROWS):
        return sizes, tensors
    padded = tensors["embedding"]
    embedding = dataclasses.replace(
        padded, shape=(ROWS, *padded.shape[1:]), read=functools.partial(_part, lambda array: array[:ROWS], padded)
    )
    return sizes._replace(vocabulary_size=ROWS), {**tensors, "embedding": embedding}


def _check_shape(entry, source):
    if tuple(source.shape) != tuple(entry.shape):
        raise ValueError(
            f"`{source.file}` keeps `{entry.name}` in shape {tuple(source.shape)}, but a model of its other sizes "
            f"needs {tuple(entry.shape)}."
        )


def _check_names(table, stored, where, ignored):
    names = {entry.name for entry in table}
    missing = [entry.name for entry in table if entry.name not in stored]
    if missing:
        raise ValueError(f"`{where}` lacks {listed(missing)}.")
    extra = sorted(set(stored) - names - set(ignored))
    if extra:
        raise ValueError(f"`{stored[extra[0]].file}` holds {listed(extra)}, for which Gemma 1 has no variable.")


def listed(names):
    """Some names for a message."""
    shown = ", ".join(f"`{name}`" for name in names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown} and {len(names) - SHOWN_NAMES} more"


# === Sizes of a model whose files say them by shapes alone ===


def usual_shape(stored, where, pattern, letters, index=r"\d+", first="0"):
    """The shape that most blocks have a tensor in: one of another shape is then told from it.

    Args:
        stored: dict of `StoredTensor` by their names in the files.
        where: string, what lists them, for messages.
        pattern: string, a name in the file, with `{index}` where tensors of blocks have theirs.
        letters: string, one letter for each axis.
        index: string, a regular expression for what stands there.
        first: string, what stands there for the first block.

    Returns:
        A tuple of ints.

    Raises:
        ValueError: if no tensor has that name and as many axes.
    """
    named = re.compile(re.escape(pattern).replace(r"\{index\}", index))
    found = [tuple(tensor.shape) for name, tensor in stored.items() if named.fullmatch(name)]
    fitting = collections.Counter(shape for shape in found if len(shape) == len(letters))
    if not fitting:
        wanted = f"`{pattern.format(index=first)}` of shape ({', '.join(letters)})"
        raise ValueError(f"`{where}` lacks {wanted}, as Gemma 1 has it" + (f", but {found[0]}." if found else "."))
    return fitting.most_common(1)[0][0]


def number_of_blocks(stored, pattern):
    """One more than the highest index in names that begin with a regular expression, whose group is the index."""
    found = [re.match(pattern, name) for name in stored]
    return max((int(match[1] or 0) + 1 for match in found if match), default=0)


# === What tables are made of ===


def as_it_is(name, part, shape):
    """A tensor that a file has as this module has it."""
    return FileTensor(name, shape, (part,), lambda array: (array,), lambda array: array)


def transposed(name, part, shape):
    """A matrix that a file has with its axes exchanged."""
    return FileTensor(name, shape[::-1], (part,), lambda array: (array.T,), lambda array: array.T)


def heads_first(name, part, shape):
    """`(N, D, H)`, which a file has as `(N·H, D)`."""
    heads, width, head_dim = shape
    return FileTensor(
        name,
        (heads * head_dim, width),
        (part,),
        lambda array: (array.reshape(heads, head_dim, width).transpose(0, 2, 1),),
        lambda array: array.transpose(0, 2, 1).reshape(heads * head_dim, width),
    )


def heads_last(name, part, shape):
    """`(N, H, D)`, which a file has as `(D, N·H)`."""
    heads, head_dim, width = shape
    return FileTensor(
        name,
        (width, heads * head_dim),
        (part,),
        lambda array: (array.T.reshape(heads, head_dim, width),),
        lambda array: array.reshape(heads * head_dim, width).T,
    )


def of_blocks(sizes, pattern, rows):
    """Entries of all blocks.

    Args:
        sizes: `Sizes`.
        pattern: string with `{index}` and `{name}`, a name in the file.
        rows: dict of a name in the file and one of the functions above, by the name in `BLOCK`.

    Returns:
        A list of `FileTensor`.
    """
    wanted = shapes(sizes)
    return [
        make(pattern.format(index=index, name=name), f"blocks.{index}.{part}", wanted[f"blocks.{index}.{part}"])
        for index in range(sizes.num_layers)
        for part, (name, make) in rows.items()
    ]
