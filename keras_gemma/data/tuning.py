"""Prompts and responses, or dialogues → what a model is tuned on, and an account of what was left out.

source ─ fields ─→ form ─→ filters ─→ length ─→ examples for `fit`
                     └────────┴──────────┴────→ `Dropped`
"""

import json
import sys
from dataclasses import dataclass
from dataclasses import field

import tqdm

from keras_gemma.data import batches
from keras_gemma.data.batches import count_examples

FIELDS = ({"prompts", "responses"}, {"messages"})
SHOWN_CHARACTERS = 80


@dataclass
class Dropped:
    """What was left out of a source, and why.

    Attributes:
        total: int, examples of the source.
        by_reason: dict from a reason to the numbers of the examples, counted from 0.
        first: dict from a reason to the beginning of the first of them.
    """

    total: int = 0
    by_reason: dict = field(default_factory=dict)
    first: dict = field(default_factory=dict)

    @property
    def count(self):
        """How many examples were left out."""
        return sum(map(len, self.by_reason.values()))

    def add(self, number, reason, example):
        """Notes the example `number` under `reason`."""
        self.by_reason.setdefault(reason, []).append(number)
        self.first.setdefault(reason, json.dumps(example, ensure_ascii=False, default=str)[:SHOWN_CHARACTERS])

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
            lines.append(f"  {len(numbers):,} dropped: {reason} (number {numbers[0]}: {self.first[reason]})")
        return "\n".join(lines)


def tuning_examples(source, preprocessor, filters=(), progress=None):
    """Examples to tune on: complete, short enough for a row, and passed by every filter.

    Nothing is changed or cut. What a model could not learn whole, or ought not to, is left out and accounted for.

    Args:
        source: `{"prompts": [...], "responses": [...]}`, a list or an iterable of `{"prompts", "responses"}`,
            `{"messages"}` or dialogues, or a Grain `MapDataset` of these, such as `from_jsonl`, `from_parquet` and
            `from_tfds` give. Further fields are left aside.
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
    kept, dropped = [], Dropped()
    for example in _with_progress(_listed(source), progress):
        number, dropped.total = dropped.total, dropped.total + 1
        reason, readable = _read(example)
        reason = reason or _refused(readable, preprocessor, filters)
        if reason:
            dropped.add(number, reason, example)
        else:
            kept.append(readable)
    if not kept:
        raise ValueError(f"No example is left to tune on. {dropped}")
    if len({isinstance(example, dict) for example in kept}) > 1:
        raise ValueError("A source has either prompts and responses, or dialogues. Received both.")
    return kept, dropped


def _listed(source):
    if isinstance(source, dict):
        count = count_examples(source)
        return [{name: values[i] for name, values in source.items()} for i in range(count)]
    if batches.is_grain_dataset(source) and hasattr(source, "__len__") and len(source) >= batches.ENDLESS:
        raise ValueError("Tuning reads all examples once. Received a data set without end.")
    return source


def _with_progress(examples, progress):
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm.tqdm(examples, desc="examples", unit="", disable=not shown)


def _read(example):
    """A reason to drop an example for its form, and the example in the form that `fit` takes."""
    if isinstance(example, (list, tuple)):
        example = {"messages": example}
    if not isinstance(example, dict):
        return "neither prompt and response nor a dialogue", None
    fields = next((fields for fields in FIELDS if fields <= set(example)), None)
    if fields is None:
        return "missing fields: 'prompts' and 'responses', or 'messages'", None
    if "messages" in fields:
        return None, example["messages"]
    texts = {name: example[name] for name in ("prompts", "responses")}
    for name, text in texts.items():
        if not isinstance(text, str):
            return f"{name} that are no strings", None
        if not text.strip():
            return f"empty {name.removesuffix('s')}", None
    return None, texts


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


def _sides(example):
    """What the user says and what the model answers, a string each."""
    if isinstance(example, dict):
        return example["prompts"], example["responses"]
    sides = {"user": [], "model": []}
    for turn, message in enumerate(example):
        sides["model" if turn % 2 else "user"].append(message["content"])
    return "\n".join(sides["user"]), "\n".join(sides["model"])
