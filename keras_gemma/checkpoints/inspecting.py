"""What a checkpoint holds: its format, shapes, parameters and tokenizer, and whether its numbers look sane."""

import collections
import dataclasses
import json
import math
import pathlib

import numpy as np

from keras_gemma.checkpoints import besides_tensors
from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints.converting import opened
from keras_gemma.checkpoints.memory_needs import CONTEXT
from keras_gemma.checkpoints.memory_needs import LORA_RANK
from keras_gemma.checkpoints.memory_needs import bytes_on_disk
from keras_gemma.checkpoints.memory_needs import memory_needs
from keras_gemma.checkpoints.memory_needs import readable_bytes
from keras_gemma.checkpoints.tokenizer_files import number_of_pieces

# The models that were released, by layers and width.
RELEASED = {(18, 2048): "Gemma 2B", (28, 3072): "Gemma 7B"}
# Matrices of trained and of freshly initialised models lie well within.
SANE_DEVIATIONS = 1e-4, 10.0
JOBS = {
    "load": "load",
    "generate": f"generate ({CONTEXT} tokens)",
    "train_adapters": f"train LoRA adapters (rank {LORA_RANK}, Adam)",
    "train": "train all weights (Adam in float32)",
}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What the numbers of a tensor are like.

    Attributes:
        mean, deviation, largest: floats; the largest without its sign. Of the numbers that are finite.
        not_finite: int, how many are not.
    """

    mean: float
    deviation: float
    largest: float
    not_finite: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: string.
        format: string.
        sizes: `canonical.Sizes`.
        bytes_on_disk: int, size of the files that hold the tensors.
        memory: dict, bytes that loading, generating and training take. See `memory_needs.memory_needs`.
        embedding_parameters, other_parameters: ints, counted apart as in the report's Table 2.
        dtypes: dict of ints, how many tensors are of each dtype, or of each type that a quantised file has.
        tensors: dict of `{"shape", "dtype"}` by the names of `canonical`.
        pieces: int, of the tokenizer; `None` without one.
        has_head: bool, whether it is a reward model with a head.
        numbers: dict of `Numbers` by the names of `canonical`; empty where nobody looked.
        doubts: list of strings, what does not look sane.
    """

    path: str
    format: str
    sizes: canonical.Sizes
    bytes_on_disk: int
    memory: dict
    embedding_parameters: int
    other_parameters: int
    dtypes: dict
    tensors: dict
    pieces: int | None
    has_head: bool
    numbers: dict
    doubts: list

    @property
    def name(self):
        """The released model of these layers and width, or `None`."""
        return RELEASED.get((self.sizes.num_layers, self.sizes.hidden_dim))

    def to_json(self):
        """All of it as the text of a JSON object."""
        return json.dumps({**dataclasses.asdict(self), "sizes": self.sizes._asdict(), "name": self.name}, indent=2)

    def __str__(self):
        return "\n".join(_lines(self))


def inspect(path, numbers=True):
    """Looks at a checkpoint of any format that can be read.

    Args:
        path: path of a file or folder, hub handle, or name of a preset.
        numbers: bool. Whether to read the tensors, one at a time, and look at their numbers.

    Returns:
        An `Inspection`.

    Raises:
        ValueError, FileNotFoundError: as `converting.opened`; for tensors that are missing, additional or misshapen.

    Example:

    >>> from keras_gemma.checkpoints import inspect
    >>> found = inspect("gemma_tiny_en", numbers=False)
    >>> found.format, found.embedding_parameters, found.pieces
    ('keras', 1048576, 4096)
    """
    checkpoint = opened(path)
    tensors = checkpoint.tensors
    parameters = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    proto, besides, doubts_about_files = _described(checkpoint)
    seen = {name: _numbers(tensor) for name, tensor in tensors.items()} if numbers else {}
    pieces = number_of_pieces(proto, checkpoint.path) if proto else None
    return Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        sizes=checkpoint.sizes,
        bytes_on_disk=bytes_on_disk({pathlib.Path(tensor.file) for tensor in tensors.values()}),
        memory=memory_needs(checkpoint.sizes, sum(parameters.values())),
        embedding_parameters=parameters["embedding"],
        other_parameters=sum(parameters.values()) - parameters["embedding"],
        dtypes=dict(collections.Counter(tensor.kept_as for tensor in tensors.values())),
        tensors={name: {"shape": list(one.shape), "dtype": one.kept_as} for name, one in tensors.items()},
        pieces=pieces,
        has_head=besides.head is not None,
        numbers=seen,
        doubts=[
            *doubts_about_files,
            *_doubts_about_pieces(pieces, checkpoint.sizes),
            *_doubts_about_numbers(seen),
            *(_doubts_about_copies(checkpoint) if numbers else ()),
        ],
    )


def _described(checkpoint):
    """The vocabulary, `BesidesTensors`, and what the files that describe them make doubtful."""
    try:
        proto, besides = checkpoint.proto(), checkpoint.besides()
    except ValueError as error:
        return None, besides_tensors.NOTHING, [str(error)]
    if besides_tensors.is_gemmas(besides.chat_template):
        return proto, besides, besides.doubts
    return (
        proto,
        besides,
        [*besides.doubts, "the chat template writes other turns than Gemma's, so that dialogues are refused"],
    )


def _numbers(tensor):
    array = tensor.read()
    count, total, squares, largest, not_finite = 0, 0.0, 0.0, 0.0, 0
    for rows in canonical.some_rows(array):
        # Damaged numbers may be none that can be cast.
        with np.errstate(invalid="ignore"):
            chunk = np.asarray(array[rows]).astype("float64").ravel()
        finite = chunk[np.isfinite(chunk)]
        not_finite += chunk.size - finite.size
        count += finite.size
        total += finite.sum()
        squares += np.square(finite).sum()
        largest = max(largest, np.abs(finite).max(initial=0.0))
    mean = total / max(count, 1)
    variance = max(0.0, squares / max(count, 1) - mean**2)
    return Numbers(float(mean), math.sqrt(variance), float(largest), int(not_finite))


def _doubts_about_pieces(pieces, sizes):
    if pieces is not None and pieces > sizes.vocabulary_size:
        yield f"the tokenizer has {pieces:,} pieces, the embedding {sizes.vocabulary_size:,} rows"


def _doubts_about_copies(checkpoint):
    try:
        checkpoint.check_copies()
    except ValueError as error:
        yield str(error)


def _doubts_about_numbers(seen):
    low, high = SANE_DEVIATIONS
    for name, numbers in seen.items():
        if numbers.not_finite:
            yield f"{name}: {numbers.not_finite:,} numbers are not finite"
        elif not name.endswith("norm") and not low <= numbers.deviation <= high:
            yield f"{name}: the standard deviation is {numbers.deviation:.3g}, not between {low:g} and {high:g}"


def _lines(found):
    sizes, total = found.sizes, found.embedding_parameters + found.other_parameters
    yield f"{found.path}: {found.name or 'a Gemma of its own sizes'}, format {found.format}"
    yield (
        f"  {sizes.num_layers} layers, width {sizes.hidden_dim}, {sizes.num_query_heads} query and "
        f"{sizes.num_key_value_heads} key-value heads of {sizes.head_dim}, feed-forward {sizes.intermediate_dim // 2}"
    )
    yield f"  parameters {total:,}: embedding {found.embedding_parameters:,}, others {found.other_parameters:,}"
    yield from _memory_lines(found)
    yield "  dtypes " + ", ".join(f"{dtype} ({count} tensors)" for dtype, count in found.dtypes.items())
    yield f"  tokenizer {f'of {found.pieces:,} pieces' if found.pieces else 'none'}, {sizes.vocabulary_size:,} rows"
    if found.has_head:
        yield f"  head of a reward model, {sizes.hidden_dim} × 1"
    for kind, names in _by_kind(found.tensors).items():
        yield f"  {kind:16} {_shapes_and_dtypes(found.tensors, names)}{_summary(found.numbers, names)}"
    if found.numbers or found.doubts:
        yield "  doubts: " + ("; ".join(found.doubts) if found.doubts else "none")


def _memory_lines(found):
    yield f"  {readable_bytes(found.bytes_on_disk)} on disk; memory without activations, by the dtype of the weights:"
    for job, bytes_by_dtype in found.memory.items():
        needs = ", ".join(f"{dtype} {readable_bytes(count)}" for dtype, count in bytes_by_dtype.items())
        yield f"    {JOBS[job]:42} {needs}"


def _by_kind(tensors):
    kinds = collections.defaultdict(list)
    for name in tensors:
        kinds[name.rpartition(".")[2]].append(name)
    return kinds


def _shapes_and_dtypes(tensors, names):
    shape = " × ".join(map(str, tensors[names[0]]["shape"]))
    dtypes = dict.fromkeys(tensors[name]["dtype"] for name in names)
    return f"{shape:18} {'/'.join(dtypes):9}"


def _summary(numbers, names):
    """Averages over the layers, and the largest of all; nothing where nobody looked."""
    seen = [numbers[name] for name in names if name in numbers]
    if not seen:
        return ""
    mean, deviation = np.mean([[one.mean, one.deviation] for one in seen], axis=0)
    largest = max(one.largest for one in seen)
    return f" mean {mean:9.2e}  deviation {deviation:9.2e}  largest {largest:9.2e}"
