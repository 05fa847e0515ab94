"""One object that holds the stages together and a compiled program per bucket of sizes."""

import functools
import threading
import time
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma import kernels
from keras_gemma.distribution import whole
from keras_gemma.generation import decode
from keras_gemma.generation import prefill
from keras_gemma.generation import sampling
from keras_gemma.generation import scoring
from keras_gemma.generation.buckets import bucket
from keras_gemma.generation.cache import empty_cache
from keras_gemma.generation.cache import update_cache
from keras_gemma.generation.cache import with_capacity
from keras_gemma.generation.network import LayerNetwork
from keras_gemma.generation.network import Memory
from keras_gemma.generation.network import network_of
from keras_gemma.generation.programs import Program
from keras_gemma.generation.sampler_settings import check_settings

SMALLEST_PROMPT = 32
# Tokens of a prompt that run at once where sizes are fixed.
PROMPT_CHUNK = 64
SMALLEST_CAPACITY = 256
SMALLEST_STOP_LIST = 4
NO_TOKEN = -1
# A stream shows text about so often, and never more tokens at once.
STREAM_SECONDS = 0.05
MOST_STREAMED = 8


@dataclass
class Request:
    """A batch of prompts and how to continue them.

    Args:
        prompts: list of lists of token ids, none of them empty.
        new_tokens: list of ints from 1, the most new tokens of each prompt.
        stop_token_ids: list of ids that end a row. The row includes the one that ended it.
        sampler: a keras-hub sampler that chooses tokens.
        sampler_values: the values of its variables, see `sampling.seeded_values`.
        continuations: int, continuations of each prompt, which is run once for all of them. They come beside each
            other, and `new_tokens` is of prompts.
        most_columns: optional int, prompt and new tokens that no request of a caller exceeds: a cache is no larger.
        repetition_penalty: optional float, see `logits_processors.penalize_repetition`.
        keep_log_probs: bool. Keeps the log-probability of every new token.
    """

    prompts: list
    new_tokens: list
    stop_token_ids: list
    sampler: Any
    sampler_values: tuple
    continuations: int = 1
    most_columns: int | None = None
    repetition_penalty: float | None = None
    keep_log_probs: bool = False

    def __post_init__(self):
        if not self.prompts:
            raise ValueError("A batch needs at least one prompt. Received an empty one.")
        if self.continuations < 1:
            raise ValueError(f"A prompt is continued at least once. Received: continuations={self.continuations}")
        for prompt, new_tokens in zip(self.prompts, self.new_tokens):
            if not len(prompt):
                raise ValueError("A prompt needs at least one token, such as <bos>. Received an empty one.")
            if new_tokens < 1:
                raise ValueError(f"At least one new token must be asked for. Received: {new_tokens}")
        check_settings(repetition_penalty=self.repetition_penalty)
        if sampling.has_own_loop(self.sampler) and (self.repetition_penalty is not None or self.keep_log_probs):
            raise ValueError(
                "A repetition penalty and log-probabilities go with samplers that choose token by token. "
                f"Received: {type(self.sampler).__name__}"
            )


@dataclass(frozen=True)
class FixedSizes:
    """Sizes that do not depend on a request. See `Engine.fix_sizes`."""

    chunk: int
    capacity: int

    def hold(self, request):
        """Whether a request has room."""
        longest = max(map(len, request.prompts))
        return self.prompt_columns(longest) + max(request.new_tokens) <= self.capacity

    def prompt_columns(self, length):
        """Columns of a prompt: whole chunks."""
        return -(-length // self.chunk) * self.chunk


@dataclass
class Decoding:
    """A batch in the middle of being decoded. See `make_decode` for the tensors."""

    network: Any
    weights: Any
    sampler_key: Any
    sampler: Any
    rows: int
    prompt_length: int
    most_columns: int
    cache: Any
    tokens: Any
    column: Any
    end_column: Any
    stop_token_ids: Any
    sampler_values: tuple
    settings: dict
    log_probs: Any

    @property
    def capacity(self):
        return self.tokens.shape[1]

    @property
    def longest(self):
        """The column at which the last row ends, as far as is known."""
        return int(np.max(whole(self.end_column)))

    @property
    def finished(self):
        return int(self.column) >= self.longest

    def new_ids(self):
        """The new token ids of every row so far, a list of lists."""
        ends = np.minimum(whole(self.end_column), int(self.column))
        tokens = whole(self.tokens)
        return [tokens[row, self.prompt_length : ends[row]].tolist() for row in range(self.rows)]

    def ended(self):
        """Which rows have ended, a list of bools."""
        return (whole(self.end_column)[: self.rows] <= int(self.column)).tolist()

    def new_log_probs(self):
        """The log-probabilities of `new_ids()`, a list of float32 arrays, under the model itself.

        Neither temperature nor anything else that shapes what is drawn from changes them.
        """
        log_probs = whole(self.log_probs)
        return [log_probs[row, self.prompt_length :][: len(ids)] for row, ids in enumerate(self.new_ids())]

    def end_rows(self, lengths):
        """Ends rows early. `lengths` has the number of new tokens that a row keeps, by row."""
        if lengths:
            end_column = np.array(whole(self.end_column))
            for row, length in lengths.items():
                end_column[row] = self.prompt_length + length
            self.end_column = _on_device(end_column)


class Engine:
    """Generates token ids with one backbone.

    Sizes are rounded up to buckets and the number of new tokens is a tensor, so that calls of new lengths compile
    nothing as long as their buckets are known. The cache begins small and grows as decoding goes on, so that
    attention reads little more than is filled.

    Args:
        backbone: a `GemmaBackbone`.
        vocabulary_size: optional int, ids that stand for a token. An embedding may have more rows, as padding: these
            are never chosen. By default every row is a token.

    Attributes:
        programs: dict of compiled `Program`s by what they do.
    """

    def __init__(self, backbone, vocabulary_size=None):
        self.backbone = backbone
        self.vocabulary_size = vocabulary_size
        self.programs = {}
        self.memory = Memory()
        self._making = threading.Lock()
        self._fixed = None

    def fix_sizes(self, columns, chunk=PROMPT_CHUNK):
        """Runs all requests of up to `columns` columns with the same programs, whatever their lengths.

        Prompts pass through the network in chunks, and every cache has all columns from the start. That suits a
        dialogue, where no message should wait for a compiler. Longer requests and beam search are run as before.

        Args:
            columns: int, most tokens of a prompt and its continuation together.
            chunk: int, tokens of a prompt that run at once.

        Raises:
            ValueError: for sizes below 1.
        """
        if columns < 1 or chunk < 1:
            raise ValueError(f"Sizes are at least 1. Received: columns={columns}, chunk={chunk}")
        # A prompt is padded to whole chunks.
        self._fixed = FixedSizes(chunk, columns + chunk)

    @property
    def compilations(self):
        """How many programs and shapes were compiled so far."""
        return sum(program.compilations for program in self.programs.values())

    def generate(self, request):
        """Continues a batch to its end.

        Returns:
            A list of lists, the new token ids of every prompt; and the sampler's values afterwards.
        """
        if sampling.has_own_loop(request.sampler):
            return self._search(request)
        decoding = self.start(request)
        while not decoding.finished:
            self.advance(decoding)
        return decoding.new_ids(), decoding.sampler_values

    def stream(self, request):
        """Continues prompts, yielding their new ids as of `generate` so far, and the sampler's values."""
        for decoding in self.decodings(request):
            yield decoding.new_ids(), decoding.sampler_values

    def decodings(self, request, new_tokens=None):
        """Continues prompts and yields their `Decoding` as it goes on, whose rows may be ended on the way.

        Args:
            request: a `Request` whose sampler chooses token by token.
            new_tokens: optional int, columns from one time to the next. By default as few as a reader needs to see
                text flow.
        """
        decoding = self.start(request)
        streamed = 1
        while not decoding.finished:
            began = time.monotonic()
            self.advance(decoding, new_tokens or streamed)
            # Waits for the device.
            int(decoding.column)
            seconds = time.monotonic() - began
            yield decoding
            streamed = min(2 * streamed, MOST_STREAMED) if seconds < STREAM_SECONDS else 1

    def start(self, request):
        """Runs the prompts of a `Request` and returns its `Decoding`, which `advance` continues."""
        network = network_of(self.backbone, self.memory)
        weights = network.weights()
        copies = request.continuations
        fixed = self._fixed if self._fixed and self._fixed.hold(request) else None
        token_ids, first_column = _right_aligned(request.prompts, fixed.prompt_columns if fixed else None)
        rows, length = len(request.prompts) * copies, token_ids.shape[1]
        # Rows that only fill the batch up have ended before they begin.
        end_column = np.full(len(token_ids) * copies, length, "int32")
        end_column[:rows] += np.repeat(np.asarray(request.new_tokens, "int32"), copies)
        longest = int(end_column.max())
        most_columns = max(longest, request.most_columns or capacity_bucket(longest))
        if fixed:
            capacity = most_columns = fixed.capacity
            cache = self._prefill_in_chunks(network, weights, token_ids, first_column, fixed, copies)
        else:
            capacity = min(_first_capacity(length, longest), most_columns)
            cache, _ = self._prefill(network, weights, token_ids, first_column, capacity, copies)
        tokens = np.pad(np.repeat(token_ids, copies, axis=0), ((0, 0), (0, capacity - length)))
        sampler_key, sampler = sampling.key_and_twin(request.sampler)
        return Decoding(
            network=network,
            weights=weights,
            sampler_key=sampler_key,
            sampler=sampler,
            rows=rows,
            prompt_length=length,
            most_columns=most_columns,
            cache=cache,
            tokens=_on_device(tokens),
            column=_scalar(length),
            end_column=_on_device(end_column),
            stop_token_ids=ops.convert_to_tensor(_stop_list(request.stop_token_ids)),
            sampler_values=request.sampler_values,
            settings=_settings(request),
            log_probs=_on_device(np.zeros(tokens.shape, "float32")) if request.keep_log_probs else (),
        )

    def advance(self, decoding, new_tokens=None):
        """Decodes up to `new_tokens` more columns, or as many as the cache has room for."""
        column = int(decoding.column)
        if column == decoding.capacity:
            self._grow(decoding)
        until = decoding.capacity if new_tokens is None else min(column + new_tokens, decoding.capacity)
        self._decode(decoding, until)

    def _decode(self, decoding, until):
        program = self._program(
            ("decode", decoding.network.key, decoding.sampler_key, self.vocabulary_size),
            lambda: decode.make_decode(decoding.network, decoding.sampler, self.vocabulary_size),
            donated=(1,),
        )
        state = program(
            decoding.weights,
            decoding.cache,
            decoding.tokens,
            decoding.column,
            decoding.end_column,
            decoding.stop_token_ids,
            _scalar(until),
            decoding.sampler_values,
            decoding.settings,
            decoding.log_probs,
        )
        decoding.cache, decoding.tokens, decoding.column, decoding.end_column = state[:4]
        decoding.sampler_values, decoding.log_probs = state[4:]

    def forward(self, token_ids, cache, column):
        """Logits `[B, T, V]`, hidden states and the new cache of tokens `[B, T]` at the columns from `column` on."""
        network = LayerNetwork(self.backbone)

        def run(weights, token_ids, cache, column):
            hidden, cache = update_cache(network, weights, token_ids, cache, column)
            return network.ends(weights["ends"]).logits(hidden), hidden, cache

        program = self._program(("forward", network.key), lambda: run, donated=(2,))
        return program(network.weights(), token_ids, cache, column)

    def log_probs(self, rows):
        """What the model thinks of tokens that are there.

        Args:
            rows: list of lists of token ids, none of them empty.

        Returns:
            A list of float32 NumPy arrays as long as the rows: the log-probability of each token after those before
            it, and 0 for the first.
        """
        network, weights, token_ids, _, x = self._through_blocks(rows)
        program = self._program(
            ("log_probs", network.key, self.vocabulary_size),
            lambda: scoring.make_log_probs(network, self.vocabulary_size),
        )
        log_probs = whole(program(weights["ends"], x, token_ids))
        return [np.concatenate([np.zeros(1, "float32"), log_probs[i, -len(row) :][1:]]) for i, row in enumerate(rows)]

    def pooled_states(self, rows, pooling):
        """One float32 state `[D]` for each row, of its tokens' final hidden states. See `scoring.make_pooled`."""
        network, weights, _, first_column, x = self._through_blocks(rows)
        program = self._program(("pooled", network.key, pooling), lambda: scoring.make_pooled(network, pooling))
        return list(whole(program(weights["ends"], x, first_column))[: len(rows)])

    def _through_blocks(self, rows):
        network = network_of(self.backbone, self.memory)
        weights = network.weights()
        token_ids, first_column = map(_on_device, _right_aligned(rows))
        x = self._program(("embed", network.key), lambda: prefill.make_embed(network))(weights["ends"], token_ids)
        for index, block_weights in enumerate(weights["blocks"]):
            kind = network.representatives[index]
            make = functools.partial(scoring.make_whole_block, network, kind)
            x = self._program(("block", network.key, kind), make)(block_weights, x, first_column)
        return network, weights, token_ids, first_column, x

    def _grow(self, decoding):
        capacity = min(capacity_bucket(min(decoding.longest, 2 * decoding.capacity)), decoding.most_columns)
        program = self._program(("grow", capacity), lambda: lambda columns: with_capacity(columns, capacity))
        layers = list(decoding.cache.pop("layers"))
        for index, (key, value) in enumerate(layers):
            # One layer at a time, so that no second cache stands beside the first.
            layers[index] = (program(key), program(value))
        decoding.cache["layers"] = tuple(layers)
        room = [(0, 0), (0, capacity - decoding.capacity)]
        decoding.tokens = ops.pad(decoding.tokens, room)
        if not isinstance(decoding.log_probs, tuple):
            decoding.log_probs = ops.pad(decoding.log_probs, room)

    def _prefill(self, network, weights, token_ids, first_column, capacity, copies=1, with_hidden=False):
        """The cache of right-aligned prompts, copies of a row beside each other; and hidden states where asked for.

        Returns:
            The cache, and the hidden states `[B, P, D]` of the prompts or `None`.
        """
        first_columns = _on_device(np.repeat(first_column, copies))
        first_column = _on_device(first_column)
        embed = self._program(("embed", network.key), lambda: prefill.make_embed(network))
        x = embed(weights["ends"], _on_device(token_ids))
        layers = []
        for index, block_weights in enumerate(weights["blocks"]):
            last = index == len(weights["blocks"]) - 1 and not with_hidden
            outputs = self._prefill_block(network, index, capacity, copies, last)(block_weights, x, first_column)
            x = None if last else outputs[0]
            layers.append(tuple(outputs[-2:]))
        cache = {"layers": tuple(layers), "first_column": first_columns}
        if not with_hidden:
            return cache, None
        hidden = self._program(("hidden", network.key), lambda: prefill.make_hidden(network))
        return cache, hidden(weights["ends"], x, first_column)

    def _prefill_in_chunks(self, network, weights, token_ids, first_column, fixed, copies):
        """The cache of right-aligned prompts, whose columns are a multiple of the chunk."""

        def run(weights, token_ids, cache, column):
            return update_cache(network, weights, token_ids, cache, column)[1]

        program = self._program(("chunk", network.key), lambda: run, donated=(2,))
        token_ids = np.repeat(token_ids, copies, axis=0)
        cache = empty_cache(self.backbone, len(token_ids), fixed.capacity)
        cache["layers"] = tuple(tuple(map(kernels.cache_apart, layer)) for layer in cache["layers"])
        cache["first_column"] = _on_device(np.repeat(first_column, copies))
        for column in range(0, token_ids.shape[1], fixed.chunk):
            chunk = _on_device(token_ids[:, column : column + fixed.chunk])
            cache = program(weights, chunk, cache, _scalar(column))
        return cache

    def _prefill_block(self, network, index, capacity, copies, last):
        make = prefill.make_last_block if last else prefill.make_block
        index = network.representatives[index]
        key = make.__name__, network.key, index, capacity, copies
        return self._program(key, lambda: make(network, index, capacity, copies))

    def _search(self, request):
        network = network_of(self.backbone, self.memory)
        weights = network.weights()
        prompts = [prompt for prompt in request.prompts for _ in range(request.continuations)]
        new_tokens = np.repeat(request.new_tokens, request.continuations)
        token_ids, first_column = _right_aligned(prompts)
        length = token_ids.shape[1]
        total = length + max(request.new_tokens)
        room = [(0, 0), (0, total - length)]
        cache, hidden_states = self._prefill(
            network, weights, token_ids, first_column, capacity_bucket(total), with_hidden=True
        )
        stop_token_ids = tuple(request.stop_token_ids) or None
        sampler_key, sampler = sampling.key_and_twin(request.sampler)
        program = self._search_program(network, sampler_key, sampler, stop_token_ids)
        tokens, sampler_values = program(
            weights,
            cache,
            _on_device(np.pad(token_ids, room)),
            ops.pad(hidden_states, [*room, (0, 0)]),
            _scalar(length),
            request.sampler_values,
        )
        rows = whole(tokens)[: len(prompts), length:]
        return [_cut(row, n, request.stop_token_ids) for row, n in zip(rows, new_tokens)], sampler_values

    def _search_program(self, network, sampler_key, sampler, stop_token_ids):
        return self._program(
            ("search", network.key, sampler_key, stop_token_ids, self.vocabulary_size),
            lambda: decode.make_search(network, sampler, stop_token_ids, self.vocabulary_size),
        )

    def _program(self, key, make, donated=()):
        # Of threads that need the same program, one makes it.
        with self._making:
            if key not in self.programs:
                self.programs[key] = Program(make(), donated)
            return self.programs[key]


def _right_aligned(prompts, columns=None):
    """Token ids `[B, P]` with both sizes rounded up, and the first column `[B]` of every row.

    Rows that only fill the batch up are copies of the first.
    """
    batch = batch_bucket(len(prompts))
    length = (columns or prompt_bucket)(max(map(len, prompts)))
    prompts = [*prompts, *[prompts[0]] * (batch - len(prompts))]
    token_ids = np.zeros((batch, length), "int32")
    for row, prompt in zip(token_ids, prompts):
        row[length - len(prompt) :] = prompt
    return token_ids, np.array([length - len(prompt) for prompt in prompts], "int32")


def batch_bucket(size):
    """The batch size compiled for: a bucket, and a multiple of the devices that share the batch."""
    devices = kernels.shards_of_batch()
    return devices * bucket(-(-size // devices))


def prompt_bucket(length):
    """The number of columns that prompts are compiled for."""
    return bucket(length, SMALLEST_PROMPT)


def capacity_bucket(columns):
    """The number of columns that a cache is compiled for."""
    return bucket(columns, SMALLEST_CAPACITY)


def _first_capacity(prompt_length, longest):
    return capacity_bucket(min(longest, max(SMALLEST_CAPACITY, 2 * prompt_length)))


def _stop_list(stop_token_ids):
    length = bucket(len(stop_token_ids), SMALLEST_STOP_LIST)
    return np.array([*stop_token_ids, *[NO_TOKEN] * (length - len(stop_token_ids))], "int32")


def _cut(row, new_tokens, stop_token_ids):
    """The ids of a row up to its limit or its first stop token, that one included."""
    row = row[:new_tokens].tolist()
    ends = [i + 1 for i, token in enumerate(row) if token in stop_token_ids]
    return row[: ends[0]] if ends else row


def _settings(request):
    settings = sampling.settings_of(request.sampler)
    if request.repetition_penalty is not None:
        settings[decode.PENALTY] = ops.convert_to_tensor(request.repetition_penalty, "float32")
    return settings


def _scalar(value):
    return ops.convert_to_tensor(value, "int32")


def _on_device(array):
    """A tensor with the batch first, laid out as `keras.distribution` lays out data."""
    tensor = ops.convert_to_tensor(array)
    distribution = keras.distribution.distribution()
    layout = distribution and distribution.get_data_layout(tensor.shape)
    return keras.distribution.distribute_tensor(tensor, layout) if layout else tensor
