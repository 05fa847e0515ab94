"""Trains the preset `gemma_tiny_en` from nothing: Debian packages → text → vocabulary → `fit` → preset.

    apt-get update                               # as root, once
    pip install -e '.[examples]'
    python examples/pretrain_tiny.py             # about an hour on two cores

On Linux, glibc that keeps the large buffers of a step from one step to the next saved a sixth of the processor time:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:\\
    glibc.malloc.trim_threshold=17179869184 python examples/pretrain_tiny.py

It writes weights, vocabulary, training curve and README into `pretrained_tiny`; `--preset-dir presets/gemma_tiny_en`
made the preset that ships. Killed, it goes on from its last fifty steps when it is started again. See the README it
writes for the result.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

from tiny.options import Options
from tiny.options import run


def parsed_options():
    parser = Options(__doc__)
    parser.option("--preset-dir", Path("pretrained_tiny"), "folder for the preset", type=Path)
    cache = Path("~/.cache/keras_gemma/pretrain_tiny").expanduser()
    parser.option("--work-dir", cache, "folder for checkpoints and figures", type=Path)
    return parser.parse_args()


# Before the imports that take seconds: --help and a wrong option are answered at once.
options = parsed_options() if __name__ == "__main__" else None

import functools
import json
import math

import keras
import numpy as np
from tiny import baselines
from tiny import report
from tiny.corpus import load_corpus
from tiny.vocabulary import train_vocabulary

from keras_gemma import GemmaBackbone
from keras_gemma import GemmaCausalLM
from keras_gemma import GemmaCausalLMPreprocessor
from keras_gemma import GemmaTokenizer

VOCABULARY_SIZE = 4096
CONTEXT = 256
ARCHITECTURE = dict(
    vocabulary_size=VOCABULARY_SIZE,
    num_layers=4,
    num_query_heads=4,
    num_key_value_heads=1,
    hidden_dim=256,
    intermediate_dim=1280,
    head_dim=64,
)
ROWS_PER_STEP = 16
STEPS = 1500
STEPS_BETWEEN_REPORTS = 50
WARMUP_STEPS = 60
PEAK_LEARNING_RATE = 8e-3
ADAM_RATIO = 0.4
SEED = 2403_08295 % 2**31

# Every held-out token is predicted from at least CONTEXT - STRIDE tokens before it, where its document has them.
STRIDE = 64


class StreamBatches(keras.utils.PyDataset):
    """Rows of `CONTEXT` next-token predictions cut from one long stream of documents.

    Every pass over the stream starts at another offset, so that its rows are cut elsewhere. The batch of a step
    depends on nothing but the step: a run that was killed goes on with the batches it had not seen.
    """

    def __init__(self, stream, first_step=0):
        super().__init__()
        self.stream = stream
        self.rows_per_pass = (len(stream) - 1) // CONTEXT - 1
        self.first_step = first_step

    def __len__(self):
        return STEPS_BETWEEN_REPORTS

    def on_epoch_end(self):
        self.first_step += STEPS_BETWEEN_REPORTS

    def __getitem__(self, index):
        first_row = (self.first_step + index) * ROWS_PER_STEP
        return batch_of([self._row(number) for number in range(first_row, first_row + ROWS_PER_STEP)])

    def _row(self, number):
        number_of_pass, row = divmod(number, self.rows_per_pass)
        offset, order = self._cut(number_of_pass)
        start = offset + order[row] * CONTEXT
        return self.stream[start : start + CONTEXT + 1]

    @functools.cache  # noqa: B019 (the data set lives as long as the run)
    def _cut(self, number_of_pass):
        random = np.random.default_rng([SEED, number_of_pass])
        return random.integers(CONTEXT), random.permutation(self.rows_per_pass)


def batch_of(rows):
    rows = np.stack(rows).astype("int32")
    ones = np.ones((len(rows), CONTEXT), "int32")
    return {"token_ids": rows[:, :-1], "padding_mask": ones}, rows[:, 1:], ones


def encode(tokenizer, documents):
    """`<bos>`, tokens and `<eos>` of every document, as one array a document."""
    start, end = tokenizer.start_token_id, tokenizer.end_token_id
    return [np.array([start, *tokenizer.encode(document.text), end], "int32") for document in documents]


def sliding_windows(documents):
    """Windows of at most `CONTEXT` predictions `STRIDE` apart, each counting only what the one before it did not."""
    for ids in documents:
        for counted_to in range(0, len(ids) - 1, STRIDE):
            end = min(counted_to + STRIDE, len(ids) - 1)
            start = max(0, end - CONTEXT)
            padding = [(0, CONTEXT - (end - start))]
            inputs, targets = ids[start:end], ids[start + 1 : end + 1]
            weights = np.arange(start, end) >= counted_to
            yield tuple(np.pad(part, padding) for part in (inputs, np.ones_like(inputs), targets, weights))


def held_out_bits_per_byte(model, documents, size):
    """Bits per byte of the text, `<eos>` of every document included, `<bos>` not."""
    inputs, mask, targets, weights = (np.stack(parts) for parts in zip(*sliding_windows(documents)))
    features = {"token_ids": inputs, "padding_mask": mask}
    result = model.evaluate(features, targets, sample_weight=weights, batch_size=32, return_dict=True)
    return math.log2(result["perplexity"]) * weights.sum() / size


def build_model():
    keras.utils.set_random_seed(SEED)
    model = GemmaCausalLM(GemmaBackbone(**ARCHITECTURE))
    decay = keras.optimizers.schedules.CosineDecay(
        0.0, STEPS - WARMUP_STEPS, alpha=0.0, warmup_target=PEAK_LEARNING_RATE, warmup_steps=WARMUP_STEPS
    )
    # Muon (Liu et al., arXiv 2502.16982) for the feed-forward matrices, Adam for everything else.
    optimizer = keras.optimizers.Muon(
        decay, adam_lr_ratio=ADAM_RATIO, adam_beta_2=0.98, weight_decay=0.02, global_clipnorm=1.0
    )
    model.compile(optimizer=optimizer)
    return model


def train(model, stream, validation, work):
    """Runs `fit`, an epoch being fifty steps, and returns the path of its log."""
    log = work / "training.csv"
    done = len(log.read_text().splitlines()) - 1 if log.exists() else 0
    model.fit(
        StreamBatches(stream, first_step=max(done, 0) * STEPS_BETWEEN_REPORTS),
        epochs=STEPS // STEPS_BETWEEN_REPORTS,
        validation_data=validation,
        validation_freq=4,
        shuffle=False,
        callbacks=[
            keras.callbacks.BackupAndRestore(work / "backup", delete_checkpoint=False),
            keras.callbacks.CSVLogger(log, append=True),
        ],
    )
    return log


def run_figures(stream_length, parameters):
    """What the README states of a run."""
    return {
        "parameters": f"{parameters:,}",
        "tokens of training text": f"{stream_length:,}",
        "tokens seen": f"{STEPS * ROWS_PER_STEP * CONTEXT:,} in {STEPS:,} steps of {ROWS_PER_STEP} x {CONTEXT}",
        "peak learning rate": f"{PEAK_LEARNING_RATE} (Adam: times {ADAM_RATIO})",
        "architecture": ", ".join(f"{name} {value}" for name, value in ARCHITECTURE.items()),
    }


def main(options):
    work = options.work_dir
    work.mkdir(parents=True, exist_ok=True)

    corpus = load_corpus()
    proto = train_vocabulary((document.text for document in corpus.train), VOCABULARY_SIZE)
    preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer(proto), sequence_length=CONTEXT)
    train_documents = encode(preprocessor.tokenizer, corpus.train)
    held_out = encode(preprocessor.tokenizer, corpus.held_out)
    order = np.random.default_rng(SEED).permutation(len(train_documents))
    stream = np.concatenate([train_documents[i] for i in order])
    print(f"{len(stream):,} tokens to train on, {sum(map(len, held_out)):,} held out")

    model = build_model()
    held_out_stream = np.concatenate(held_out)
    starts = range(0, len(held_out_stream) - CONTEXT - 1, 8 * CONTEXT)
    validation = batch_of([held_out_stream[start : start + CONTEXT + 1] for start in starts])
    log = train(model, stream, validation, work)

    train_text = "\n\n".join(document.text for document in corpus.train).encode()
    held_out_text = "\n\n".join(document.text for document in corpus.held_out).encode()
    size = sum(len(document.text.encode()) for document in corpus.held_out)
    # The preset keeps it: greedy text of so small a model runs in circles.
    model.compile(sampler="top_k")
    report.write_preset(model, preprocessor, options.preset_dir)
    saved = GemmaCausalLM.from_preset(str(options.preset_dir), preprocessor=None)
    result = {
        "model": held_out_bits_per_byte(saved, held_out, size),
        "kneser_ney_5": baselines.kneser_ney_bits_per_byte(stream, held_out_stream, size, VOCABULARY_SIZE),
        **{
            f"xz_{name}": value
            for name, value in baselines.xz_bits_per_byte(train_text, held_out_text)._asdict().items()
        },
    }
    (work / "result.json").write_text(json.dumps(result, indent=4))
    report.write_curve(log, STEPS_BETWEEN_REPORTS, ROWS_PER_STEP * CONTEXT, options.preset_dir / "training_curve.png")
    run = run_figures(len(stream), model.count_params())
    report.write_readme(options.preset_dir, corpus, run, result)


if __name__ == "__main__":
    run(main, options, if_stopped="stopped. The same command goes on.")
