"""Prompts with responses, dialogues, or pairs of answers → what `fit` learns from, and an account of what was left out.

source ─→ form ─→ filters ─→ length ─→ examples
            └────────┴──────────┴────→ `Dropped`
"""

import json
import sys
from dataclasses import dataclass
from dataclasses import field

import numpy as np
import tqdm

from keras_gemma.data import batches
from keras_gemma.data import record_formats
from keras_gemma.data import sources
from keras_gemma.data import text_checks
from keras_gemma.data.batches import count_examples

FIELDS = ({"prompts", "responses"}, {"messages"})
PAIR_FIELDS = ("prompts", "chosen", "rejected")
SHOWN_CHARACTERS = 80


@dataclass
class Dropped:
    """What was left out of a source, and why.

    Attributes:
        total: int, examples of the source.
        by_reason: dict from a reason to the numbers of the examples, counted from 0.
        first: dict from a reason to the beginning of the first of them.
        places: dict from a reason to the file and row of the first of them, where it comes from a file.
    """

    total: int = 0
    by_reason: dict = field(default_factory=dict)
    first: dict = field(default_factory=dict)
    places: dict = field(default_factory=dict)

    @property
    def count(self):
        """How many examples were left out."""
        return sum(map(len, self.by_reason.values()))

    def add(self, number, reason, example):
        """Notes the example `number` under `reason`."""
        self.by_reason.setdefault(reason, []).append(number)
        if reason not in self.first:
            self.first[reason] = _beginning(example)
            if origin := sources.origin_of(example):
                self.places[reason] = str(origin)

    def to_json(self):
        """All of it as a dict that `json` writes."""
        return {
            "total": self.total,
            "kept": self.total - self.count,
            "dropped": {
                reason: {"count": len(numbers), "examples": numbers} for reason, numbers in self.by_reason.items()
            },
        }

    def __str__(self):
        lines = [f"{self.total - self.count:,} of {self.total:,} examples kept"]
        for reason, numbers in sorted(self.by_reason.items(), key=lambda pair: -len(pair[1])):
            place = f", {self.places[reason]}" if reason in self.places else ""
            lines.append(f"  {len(numbers):,} dropped: {reason} (number {numbers[0]}{place}: {self.first[reason]})")
        return "\n".join(lines)


def _beginning(example):
    try:
        written = json.dumps(example, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        # Nested too deep or in a circle, or with keys that JSON lacks.
        return text_checks.shown(example, SHOWN_CHARACTERS)
    return written[:SHOWN_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")


def tuning_examples(source, preprocessor, filters=(), progress=None):
    """Examples to tune on: complete, short enough for a row, and passed by every filter.

    Nothing is changed or cut. What a model could not learn whole, or ought not to, is left out and accounted for.

    Args:
        source: `{"prompts": [...], "responses": [...]}`, a list or an iterable of `{"prompts", "responses"}`,
            `{"messages"}`, dialogues, or records of TRL, Alpaca and ShareGPT (see `record_formats`), or a Grain
            `MapDataset` of these, such as `from_jsonl`, `from_parquet` and `from_tfds` give. Further fields are left
            aside.
        preprocessor: a `GemmaCausalLMPreprocessor`, whose `sequence_length` is the longest row.
        filters: functions of what the user says and what the model answers in an example to a reason, or to `None`;
            see `keras_gemma.data.filters`.
        progress: optional bool, whether to show a progress bar. By default where standard error is a terminal.

    Returns:
        A list for `fit`, of dicts `{"prompts", "responses"}` or of dialogues, and a `Dropped`.

    Raises:
        ValueError: for prompts and dialogues in one source, and where nothing is left.

    Example:

    >>> from keras_gemma.models import GemmaCausalLMPreprocessor
    >>> from keras_gemma.data import tuning_examples
    >>> preprocessor = GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en", sequence_length=16)
    >>> source = {"prompts": ["cat\\n", "dog\\n", "sun\\n"], "responses": ["An animal.", "", "A star. " * 20]}
    >>> examples, dropped = tuning_examples(source, preprocessor)
    >>> examples
    [{'prompts': 'cat\\n', 'responses': 'An animal.'}]
    >>> sorted(dropped.by_reason)
    ['empty response', 'longer than 16 tokens']
    """

    def read(example):
        reason, readable = _read_tuning(example)
        return reason or _refused(readable, preprocessor, filters), readable

    kept, dropped = _kept(source, read, progress)
    if len({isinstance(example, dict) for example in kept}) > 1:
        raise ValueError("A source has either prompts and responses, or dialogues. Received both.")
    return kept, dropped


def preference_pairs(source, preprocessor, filters=(), progress=None):
    """Pairs of answers to compare: complete, different, short enough for a row, and passed by every filter.

    Args:
        source: as of `tuning_examples`, with the fields `prompts`, `chosen`, `rejected`, and `margins` where there are
            any. Prompts are strings, or dialogues that end with the user; answers are strings or messages, which may
            repeat the prompt (see `record_formats.pair`).
        preprocessor: a `GemmaRewardModelPreprocessor`, whose `sequence_length` is the longest row.
        filters: as of `tuning_examples`, asked about both answers.
        progress: as of `tuning_examples`.

    Returns:
        A list of dicts for `GemmaRewardModel.fit`, and a `Dropped`.

    Raises:
        ValueError: where nothing is left.

    Example:

    >>> from keras_gemma.models import GemmaRewardModelPreprocessor
    >>> from keras_gemma.data import preference_pairs
    >>> preprocessor = GemmaRewardModelPreprocessor.from_preset("gemma_tiny_en", sequence_length=16)
    >>> source = {"prompts": ["cat:", "sun:"], "chosen": [" An animal.", " A star."], "rejected": [" A star."] * 2}
    >>> pairs, dropped = preference_pairs(source, preprocessor)
    >>> len(pairs), dropped.by_reason
    (1, {'equal answers': [1]})
    """

    def read(example):
        reason, readable = _read_pair(example)
        return reason or _refused_pair(readable, preprocessor, filters), readable

    return _kept(source, read, progress)


def _kept(source, read, progress):
    """The readable ones of a source, and what was dropped; `read` gives a reason or `None`, and an example."""
    kept, dropped = [], Dropped()
    for example in _with_progress(_listed(source), progress):
        number, dropped.total = dropped.total, dropped.total + 1
        reason, readable = read(example)
        if reason:
            dropped.add(number, reason, example)
        else:
            kept.append(readable)
    if not kept:
        raise ValueError(f"No example is left. {dropped}")
    return kept, dropped


def _listed(source):
    if text_checks.is_fields(source):
        columns = batches.indexable(source)
        return ({name: values[i] for name, values in columns.items()} for i in range(count_examples(columns)))
    if batches.is_grain_dataset(source) and hasattr(source, "__len__") and len(source) >= batches.ENDLESS:
        raise ValueError("Tuning reads all examples once. Received a data set without end.")
    if isinstance(source, (str, bytes)) or not hasattr(source, "__iter__"):
        raise ValueError(
            "A source is fields of lists, a list or an iterable of examples, or a Grain data set. "
            f"Received: {text_checks.shown(source)}"
        )
    return source


def _with_progress(examples, progress):
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm.tqdm(examples, desc="examples", unit="", disable=not shown)


def _read_tuning(example):
    """A reason to drop an example for its form, and the example in the form that `fit` takes."""
    example = text_checks.plain(example)
    if isinstance(example, list):
        example = {"messages": example}
    if not isinstance(example, dict):
        return "neither prompt and response nor a dialogue", None
    try:
        example = record_formats.tuning_fields(example)
    except ValueError as error:
        return str(error).split(" Received")[0], None
    # Tables have a null where a row goes without a field of others.
    present = {name for name, value in example.items() if not text_checks.is_missing(value)}
    fields = next((fields for names in (present, set(example)) for fields in FIELDS if fields <= names), None)
    if fields is None:
        return "missing fields: 'prompts' and 'responses', or 'messages'", None
    if "messages" in fields:
        return _read_dialogue(record_formats.messages(example["messages"]))
    return _read_prompt_and_answers({name: example[name] for name in ("prompts", "responses")})


def _read_pair(example):
    """As `_read_tuning`, of a pair of answers."""
    try:
        example = record_formats.pair(text_checks.plain(example))
    except ValueError as error:
        return str(error).split(" Received")[0], None
    if not isinstance(example, dict) or not set(PAIR_FIELDS) <= set(example):
        return f"missing fields: {', '.join(map(repr, PAIR_FIELDS))}", None
    pair = {name: example[name] for name in (*PAIR_FIELDS, "margins") if name in example}
    reason, texts = _read_prompt_and_answers({name: pair[name] for name in PAIR_FIELDS})
    if reason:
        return reason, None
    margin = pair.get("margins", 0.0)
    if not isinstance(margin, (int, float)) or not np.isfinite(margin):
        return "margins that are not finite", None
    if texts["chosen"].strip() == texts["rejected"].strip():
        return "equal answers", None
    return None, {**pair, **texts}


def _read_prompt_and_answers(values):
    """As `_read_texts`, of a prompt, which may be a dialogue, and its answers."""
    prompt = values["prompts"]
    is_dialogue = isinstance(prompt, list)
    reason, texts = _read_texts({name: text for name, text in values.items() if name != "prompts" or not is_dialogue})
    if is_dialogue and not reason:
        reason, dialogue = _read_dialogue(prompt)
        texts = {"prompts": dialogue, **texts}
    return reason, texts


def _read_texts(values):
    """A reason to drop an example for one of its texts, and its texts, by their names, as strings."""
    texts = {}
    for name, value in values.items():
        try:
            texts[name] = text_checks.text(value)
        except text_checks.TextError as error:
            return _no_text(name, error), None
        if not texts[name].strip():
            return f"empty {name.removesuffix('s')}{' (white space alone)' if texts[name] else ''}", None
    return None, texts


def _no_text(name, error):
    is_string = error.reason in (text_checks.NOT_UTF_8, text_checks.LONE_SURROGATE)
    return f"{name} that are no {'text' if is_string else 'strings'} ({error.reason})"


def _read_dialogue(messages):
    """A reason to drop a dialogue for a text in it, and the dialogue with its texts as strings."""
    if not isinstance(messages, list):
        return None, messages
    read = []
    for message in messages:
        try:
            has_content = isinstance(message, dict) and "content" in message
            read.append({**message, "content": text_checks.text(message["content"])} if has_content else message)
        except text_checks.TextError as error:
            return _no_text("contents of messages", error), None
    return None, read


def _refused(example, preprocessor, filters):
    try:
        ids = preprocessor.row(example).ids
    except ValueError as error:
        return f"not Gemma's form: {str(error).split(' Received')[0]}"
    said, answered = _sides(example)
    if not answered.strip():
        return "empty response"
    for one in filters:
        if reason := one(said, answered):
            return reason
    if len(ids) > preprocessor.sequence_length + 1:
        return f"longer than {preprocessor.sequence_length} tokens"
    return None


def _refused_pair(pair, preprocessor, filters):
    try:
        rows = [preprocessor.scored_row(pair["prompts"], pair[answer]) for answer in ("chosen", "rejected")]
    except ValueError as error:
        return f"not Gemma's form: {str(error).split(' Received')[0]}"
    prompt = pair["prompts"]
    said = prompt if isinstance(prompt, str) else _sides(prompt)[0]
    for one in filters:
        if reason := one(said, f"{pair['chosen']}\n{pair['rejected']}"):
            return reason
    if max(map(len, rows)) > preprocessor.sequence_length:
        return f"longer than {preprocessor.sequence_length} tokens"
    return None


def _sides(example):
    """What the user says and what the model answers, a string each."""
    if isinstance(example, dict):
        prompt = example["prompts"]
        return prompt if isinstance(prompt, str) else _sides(prompt)[0], example["responses"]
    sides = {"user": [], "model": []}
    for message in example:
        sides["model" if message["role"] in ("model", "assistant") else "user"].append(message["content"])
    return "\n".join(sides["user"]), "\n".join(sides["model"])
