"""One call of `generate` or `stream`: prompts as users pass them → a request of token ids → texts.

inputs ─→ prompts ─→ `generation.Request` ─→ rows of new ids ─→ text before the stop strings
"""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import numbers
from dataclasses import dataclass
from dataclasses import field

import keras
import keras_hub
import numpy as np

from keras_gemma import generation
from keras_gemma.models import text_generation
from keras_gemma.models.stop_strings import StopStrings
from keras_gemma.models.stop_strings import StopWatch

# Text is looked through for stop strings so often; a row goes on for no longer.
COLUMNS_BETWEEN_LOOKS = 16
DETERMINISTIC = (
    keras_hub.samplers.GreedySampler,
    keras_hub.samplers.BeamSampler,
    keras_hub.samplers.ContrastiveSampler,
)


@dataclass
class GeneratedText:
    """A text that `generate` wrote, and what the model thought of it.

    Attributes:
        text: string, as `generate` returns it otherwise.
        token_ids: int32 array `[n]` of the new tokens, with the one that ended the text.
        log_probs: float32 array `[n]`, the natural logarithm of the probability that the model gives each new token.
            It is the model's own: no temperature and nothing else that shapes what is drawn from changes it.
    """

    text: str
    token_ids: np.ndarray
    log_probs: np.ndarray


@dataclass
class NewRow:
    """The new ids of a row, and their log-probabilities where they were asked for."""

    ids: list
    log_probs: np.ndarray | None = None


@dataclass
class Options:
    """How a call continues prompts. See `GemmaCausalLM.generate`."""

    sampling: generation.Sampling
    stop_token_ids: list
    stop: StopStrings = field(default_factory=StopStrings)
    max_length: int | None = None
    max_new_tokens: int | None = None
    strip_prompt: bool = False
    repetition_penalty: float | None = None
    num_return_sequences: int | None = None
    return_log_probs: bool = False
    allow_special_tokens: bool | None = None

    @property
    def continuations(self):
        return 1 if self.num_return_sequences is None else int(self.num_return_sequences)


def options_of(
    model, stop_token_ids, stop, sampler, seed, temperature, top_k, top_p, min_p, repetition_penalty, **others
):
    """`Options` from the arguments of a call, all of them checked.

    Raises:
        ValueError: for arguments that contradict each other or name nothing valid.
    """
    sampler = _sampler_of(model, sampler, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    generation.check_settings(repetition_penalty=repetition_penalty)
    stop, further_ids = _stop_strings(model.preprocessor, stop)
    stop_token_ids = text_generation.stop_token_list(model.preprocessor, stop_token_ids)
    options = Options(
        generation.Sampling(sampler, seed),
        stop_token_ids=[*stop_token_ids, *further_ids],
        stop=stop,
        repetition_penalty=repetition_penalty,
        **others,
    )
    _check_continuations(options.num_return_sequences, sampler)
    return options


def _sampler_of(model, sampler, **settings):
    given = {name: value for name, value in settings.items() if value is not None}
    size = text_generation.vocabulary_size_of(model.preprocessor) or model.backbone.vocabulary_size
    if not given:
        # A model that was never compiled has none.
        return generation.resolve_sampler(sampler or getattr(model, "sampler", None) or "greedy", size)
    if sampler is not None:
        raise ValueError(
            "`temperature`, `top_k`, `top_p` and `min_p` take the place of a sampler: give them, or `sampler` with "
            f"settings of its own. Received: sampler={sampler!r} and {', '.join(given)}"
        )
    generation.check_settings(size, **given)
    return generation.resolve_sampler(generation.CombinedSampler(**given), size)


def _stop_strings(preprocessor, stop):
    stop = StopStrings(stop)
    if not stop:
        return stop, []
    if preprocessor is None:
        raise ValueError(
            "`stop` is looked for in text, and this model has no preprocessor to make it. Pass `stop_token_ids`."
        )
    tokenizer = preprocessor.tokenizer
    # Text never shows them.
    special = {tokenizer.id_to_token(i): i for i in {*tokenizer.special_token_ids, *tokenizer.stop_token_ids}}
    return stop.without_tokens(special)


def _check_continuations(count, sampler):
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"`num_return_sequences` is an integer of at least 1. Received: {count!r}")
    if count > 1 and type(sampler) in DETERMINISTIC:
        raise ValueError(
            f"{type(sampler).__name__} would write the same text {count} times. For different ones pass `temperature` "
            f"above 0, or a sampler that draws. Received: num_return_sequences={count}"
        )


# === Whole texts ===


def generate(model, inputs, options):
    """What `GemmaCausalLM.generate` returns."""
    with options.sampling:
        if not text_generation.is_data_set(inputs):
            return _one_batch(model, inputs, options)
        outputs = [
            (_one_batch(model, batch, options), text_generation.is_batch(batch))
            for batch in text_generation.batches_of(inputs)
        ]
    return text_generation.joined(outputs)


def _one_batch(model, inputs, options):
    if text_generation.is_token_batch(inputs):
        return _token_rows(model, inputs, options)
    prompts, batched = text_generation.prompts_of_text(model.preprocessor, inputs, options.allow_special_tokens)
    rows = _new_rows(model, prompts, options, model.preprocessor.sequence_length)
    texts = _texts_of(model.preprocessor, _repeated(prompts, options), rows, options)
    if options.return_log_probs:
        texts = [
            GeneratedText(text, np.array(row.ids, "int32"), np.asarray(row.log_probs, "float32"))
            for text, row in zip(texts, rows)
        ]
    if options.num_return_sequences is not None:
        count = options.continuations
        texts = [texts[i : i + count] for i in range(0, len(texts), count)]
    return texts if batched else texts[0]


def _token_rows(model, inputs, options):
    prompts, width = text_generation.prompts_of_tokens(inputs, model.backbone.vocabulary_size)
    rows = _new_rows(model, prompts, options, width)
    prompts = [[] if options.strip_prompt else prompt for prompt in _repeated(prompts, options)]
    width = 1 if options.strip_prompt else width
    outputs = text_generation.token_rows([prompt + row.ids for prompt, row in zip(prompts, rows)], width)
    if options.return_log_probs:
        log_probs = np.zeros(outputs["token_ids"].shape, "float32")
        for of_row, prompt, row in zip(log_probs, prompts, rows):
            of_row[len(prompt) : len(prompt) + len(row.ids)] = row.log_probs
        outputs["log_probs"] = log_probs
    return outputs


def _repeated(prompts, options):
    return [prompt for prompt in prompts for _ in range(options.continuations)]


def _texts_of(preprocessor, prompts, rows, options):
    texts = preprocessor.decode_rows(
        [row.ids if options.strip_prompt else p + row.ids for p, row in zip(prompts, rows)]
    )
    if not options.stop:
        return texts
    new = texts if options.strip_prompt else preprocessor.decode_rows([row.ids for row in rows])
    cut = [len(text) - len(options.stop.cut(text)) for text in new]
    return [text[: len(text) - n] for text, n in zip(texts, cut)]


def _new_rows(model, prompts, options, default_length):
    """A `NewRow` for every prompt, those that continue one prompt beside each other."""
    if model.overrides("generate_step", "make_generate_function"):
        return _rows_of_own_step(model, prompts, options, default_length)
    request = _request(prompts, options, default_length)
    watch = StopWatch(
        options.stop, model.preprocessor and model.preprocessor.decode_rows, len(prompts) * options.continuations
    )
    if generation.has_own_loop(request.sampler) or not (options.stop or options.return_log_probs):
        rows, options.sampling.values = model.engine.generate(request)
        ends = watch.ends(rows) if options.stop else {}
        return [NewRow(ids[: ends.get(row)]) for row, ids in enumerate(rows)]
    columns = COLUMNS_BETWEEN_LOOKS if options.stop else max(request.new_tokens)
    for decoding in model.engine.decodings(request, columns):
        options.sampling.values = decoding.sampler_values
        if options.stop:
            decoding.end_rows(watch.ends(decoding.new_ids()))
    if not options.return_log_probs:
        return [NewRow(ids) for ids in decoding.new_ids()]
    return [NewRow(*row) for row in zip(decoding.new_ids(), decoding.new_log_probs())]


# === A `generate_step` of a subclass ===

# Model and options of the call in progress, which the base's `generate_step` goes on with.
_IN_PROGRESS = contextvars.ContextVar("call_in_progress", default=(None, None))


def _rows_of_own_step(model, prompts, options, default_length):
    """As `_new_rows`, through the model's own `generate_step`, as keras-hub generates."""
    if options.return_log_probs:
        raise ValueError(
            "An overridden `generate_step` says nothing of log-probabilities. Received: return_log_probs=True"
        )
    limits = _request(prompts, options, default_length).new_tokens
    prompts = _repeated(prompts, options)
    limits = [limit for limit in limits for _ in range(options.continuations)]
    width = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, text_generation.token_rows(prompts, width))
    token = _IN_PROGRESS.set((model, options))
    try:
        outputs = model.make_generate_function()(inputs, stop_token_ids=tuple(options.stop_token_ids) or None)
    finally:
        _IN_PROGRESS.reset(token)
    rows, _ = text_generation.prompts_of_tokens(
        {name: outputs[name] for name in ("token_ids", "padding_mask")}, model.backbone.vocabulary_size
    )
    rows = [row[len(prompt) :][:limit] for row, prompt, limit in zip(rows, prompts, limits)]
    watch = StopWatch(options.stop, model.preprocessor and model.preprocessor.decode_rows, len(rows))
    ends = watch.ends(rows) if options.stop else {}
    return [NewRow(ids[: ends.get(row)]) for row, ids in enumerate(rows)]


def generate_step(model, inputs, stop_token_ids):
    """What `GemmaCausalLM.generate_step` returns."""
    of_model, options = _IN_PROGRESS.get()
    if of_model is not model:
        options = Options(generation.Sampling(_sampler_of(model, None)), [])
    options = Options(
        options.sampling,
        text_generation.stop_token_list(model.preprocessor, stop_token_ids),
        repetition_penalty=options.repetition_penalty,
    )
    prompts, width = text_generation.prompts_of_tokens(inputs, model.backbone.vocabulary_size)
    request = _request(prompts, options, width)
    with contextlib.nullcontext() if of_model is model else options.sampling:
        rows, options.sampling.values = model.engine.generate(request)
    return text_generation.token_rows([prompt + row for prompt, row in zip(prompts, rows)], width)


def _request(prompts, options, default_length):
    max_length = options.max_length
    if max_length is None and options.max_new_tokens is None:
        max_length = default_length
    return generation.Request(
        prompts,
        text_generation.new_token_limits(prompts, max_length, options.max_new_tokens),
        options.stop_token_ids,
        options.sampling.sampler,
        options.sampling.values,
        continuations=options.continuations,
        repetition_penalty=options.repetition_penalty,
        keep_log_probs=options.return_log_probs,
    )


# === Text as it comes ===


def stream(model, inputs, options):
    """What `GemmaCausalLM.stream` returns."""
    sampler = options.sampling.sampler
    if generation.has_own_loop(sampler):
        raise ValueError(f"Only samplers that choose token by token can stream. Received: {type(sampler).__name__}")
    if model.overrides("generate_step", "make_generate_function"):
        raise ValueError(
            "`stream` writes token by token, which an overridden `generate_step` does not: call `generate`."
        )
    prompts, batched = text_generation.prompts_of_text(model.preprocessor, inputs, options.allow_special_tokens)
    request = _request(prompts, options, model.preprocessor.sequence_length)
    pieces = _pieces(model, request, options)
    return pieces if batched else (piece for _, piece in pieces)


def _pieces(model, request, options):
    """Yields pairs of a row and its next piece of text."""
    decode_rows = model.preprocessor.decode_rows
    watch = StopWatch(options.stop, decode_rows, len(request.prompts))
    texts = [text_generation.GrowingText(options.stop) for _ in request.prompts]
    with options.sampling:
        for decoding in model.engine.decodings(request):
            options.sampling.values = decoding.sampler_values
            if options.stop:
                decoding.end_rows(watch.ends(decoding.new_ids()))
            ended = decoding.ended()
            for row, text in enumerate(decode_rows(decoding.new_ids())):
                if piece := texts[row].grow(text, complete=ended[row]):
                    yield row, piece


def in_thread(iterator):
    """An asynchronous iterator over an iterator that runs in a thread of its own.

    The thread sees the `keras.distribution` of the caller. Leaving early closes the iterator.
    """
    distribution = keras.distribution.distribution()
    return _in_thread(iterator, distribution)


async def _in_thread(iterator, distribution):
    loop, end = asyncio.get_running_loop(), object()
    with_distribution = (keras.distribution.set_distribution, (distribution,)) if distribution else (None, ())
    thread = concurrent.futures.ThreadPoolExecutor(1, "keras_gemma_stream", *with_distribution)
    try:
        while (piece := await loop.run_in_executor(thread, next, iterator, end)) is not end:
            yield piece
    finally:
        # After the step that may still run there.
        thread.submit(iterator.close)
        thread.shutdown(wait=False)
