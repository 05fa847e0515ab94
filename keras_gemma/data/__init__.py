"""Files or Python examples → packed batches for `fit`.

ArrayRecord, jsonl, parquet, csv, text, TFDS, Hugging Face Hub
  │ sources         single examples in any order; `write_array_record`
  │ record_formats  fields of TRL, Alpaca and ShareGPT as ours
  │ tuning          for prompts and responses: `filters`, form and length, and an account of what was dropped
  │ mixture         each host's share of every source, shuffled, mixed stage by stage
  │ loader          token ids, on the fly or by `tokenize_ahead` and `from_tokens`
  │ packing         several examples in a row, none of which sees another
  ▼
batches ──────────────────────────────────────────────┐
lists and arrays ── packed_examples, batches ─────────┼→ (x, y, sample_weight) → fit
PyDataset, tf.data, Grain, generator, torch ── batches┘

    sources = {"web": from_array_record("web-*.array_record"), "code": from_jsonl("code.jsonl", fields=["text"])}
    stages = [Stage({"web": 0.8, "code": 0.2}, examples=10**6), Stage({"web": 0.5, "code": 0.5})]
    batches = training_batches(mixture(sources, stages, seed=1), model.preprocessor, batch_size=16)
    model.fit(batches, steps_per_epoch=1000, epochs=20)
"""

from keras_gemma.data.any_source import from_any
from keras_gemma.data.batches import count_examples
from keras_gemma.data.batches import preprocessed
from keras_gemma.data.batches import split_off_validation
from keras_gemma.data.batches import yields_batches
from keras_gemma.data.filters import duplicates
from keras_gemma.data.filters import mistaken_identity
from keras_gemma.data.filters import personal_data
from keras_gemma.data.filters import unsafe
from keras_gemma.data.hub import from_hub
from keras_gemma.data.loader import from_tokens
from keras_gemma.data.loader import tokenize_ahead
from keras_gemma.data.loader import training_batches
from keras_gemma.data.mixture import Stage
from keras_gemma.data.mixture import mixture
from keras_gemma.data.packed_examples import packed
from keras_gemma.data.packed_examples import padded
from keras_gemma.data.resumable import Place
from keras_gemma.data.resumable import resumable
from keras_gemma.data.sources import from_array_record
from keras_gemma.data.sources import from_jsonl
from keras_gemma.data.sources import from_parquet
from keras_gemma.data.sources import from_tfds
from keras_gemma.data.sources import write_array_record
from keras_gemma.data.text_files import from_csv
from keras_gemma.data.text_files import from_text
from keras_gemma.data.token_checks import TokenRules
from keras_gemma.data.token_checks import checked
from keras_gemma.data.token_checks import is_iterator
from keras_gemma.data.token_checks import refuse_ids_outside
from keras_gemma.data.token_checks import refuse_rows_outside
from keras_gemma.data.tuning import Dropped
from keras_gemma.data.tuning import preference_pairs
from keras_gemma.data.tuning import tuning_examples

__all__ = [
    "Dropped",
    "Place",
    "Stage",
    "TokenRules",
    "checked",
    "count_examples",
    "duplicates",
    "from_any",
    "from_array_record",
    "from_csv",
    "from_hub",
    "from_jsonl",
    "from_parquet",
    "from_text",
    "from_tfds",
    "from_tokens",
    "is_iterator",
    "mistaken_identity",
    "mixture",
    "packed",
    "padded",
    "personal_data",
    "preference_pairs",
    "preprocessed",
    "refuse_ids_outside",
    "refuse_rows_outside",
    "resumable",
    "split_off_validation",
    "tokenize_ahead",
    "training_batches",
    "tuning_examples",
    "unsafe",
    "write_array_record",
    "yields_batches",
]
