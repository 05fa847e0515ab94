"""A small Gemma is trained from nothing on two sources, prose and code, whose shares change on the way.

    python examples/pretrain.py

It reads what Python's standard library says and does, or JSON lines with a "text" each, of which the first twentieth
is held out and of long texts the first row is read:

    python examples/pretrain.py --text web=web.jsonl --text code=code.jsonl --weight web=0.8 --weight code=0.2

Killed, the same command goes on from its last checkpoint. The preset is written at the end.

Expected:
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from keras_gemma import startup

startup.leave_out_tensorflow()

import keras
from tiny.standard_library import prose_and_code

from keras_gemma import GemmaBackbone
from keras_gemma import GemmaCausalLM
from keras_gemma import GemmaCausalLMPreprocessor
from keras_gemma import data
from keras_gemma import training

HELD_OUT_SHARE = 1 / 20
MOST_HELD_OUT = 100
PROMPTS = ["Return the number of", "# textwrap\ndef indent("]


def standard_library(folder):
    """Writes the texts of both sources to `folder`, where that has not been done, and returns names and files."""
    files = {name: folder / f"{name}.jsonl" for name in ("prose", "code")}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in prose_and_code().items():
            partial = files[name].with_suffix(".partial")
            partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            partial.rename(files[name])
    return files.items()


def split(files):
    """Examples to train on and held-out texts, by source."""
    sources = {name: data.from_jsonl(file, fields=["text"]) for name, file in files}
    counts = {name: min(MOST_HELD_OUT, math.ceil(len(source) * HELD_OUT_SHARE)) for name, source in sources.items()}
    train = {name: source[counts[name] :] for name, source in sources.items()}
    return train, {name: [sources[name][i]["text"] for i in range(count)] for name, count in counts.items()}


def build_model(options, preprocessor):
    backbone = GemmaBackbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        num_layers=options.layers,
        num_query_heads=options.width // 32,
        num_key_value_heads=1,
        head_dim=32,
        hidden_dim=options.width,
        intermediate_dim=8 * options.width,
        recompute=options.recompute,
        dtype=options.dtype,
    )
    steps = options.epochs * options.steps_per_epoch
    schedule = training.WarmUp(options.learning_rate, warmup_steps=steps // 10, total_steps=steps, decay="cosine")
    model = GemmaCausalLM(backbone, preprocessor)
    model.compile(
        optimizer=training.AdamW(schedule, weight_decay=0.1),
        loss=training.NextTokenLoss(z_loss=1e-4),
        gradient_accumulation_steps=options.accumulate,
    )
    return model


def bits_per_byte(model, texts, batch_size):
    """Of the part of each text that a row has room for."""
    preprocessor = model.preprocessor
    targets = [example["targets"] for example in preprocessor.unpadded(texts)]
    bytes_ = sum(len(preprocessor.tokenizer.detokenize(ids).encode()) for ids in targets)
    perplexity = model.evaluate(texts, batch_size=batch_size, pack=True, verbose=0, return_dict=True)["perplexity"]
    return math.log2(perplexity) * sum(map(len, targets)) / bytes_


def main(options):
    keras.utils.set_random_seed(options.seed)
    sources = options.text or standard_library(options.output / "text")
    train, held_out = split(sources)
    early = dict(options.weight) or dict.fromkeys(train, 1.0)
    stages = [data.Stage(early, examples=options.late_after), data.Stage(dict(options.late_weight) or early)]
    preprocessor = GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en", sequence_length=options.sequence_length)
    batches = data.training_batches(data.mixture(train, stages, options.seed), preprocessor, options.batch_size)

    model = build_model(options, preprocessor)
    counts = ", ".join(f"{len(source):,} texts of {name}" for name, source in train.items())
    print(f"{model.count_params():,} parameters, {counts}")
    before = {name: bits_per_byte(model, texts, options.batch_size) for name, texts in held_out.items()}
    model.fit(
        batches,
        epochs=options.epochs,
        steps_per_epoch=options.steps_per_epoch,
        callbacks=[
            training.TrainingMonitor(options.tensorboard, every=5),
            training.StopOnNonFiniteLoss(),
            training.ExactResume(options.output / "checkpoints", save_every_steps=options.save_every),
        ],
        verbose=options.verbose,
    )
    for name, texts in held_out.items():
        after = bits_per_byte(model, texts, options.batch_size)
        print(f"held-out {name}: {before[name]:.2f} bits per byte before, {after:.2f} after")
    model.save_to_preset(options.output / "preset")
    print(f"preset: {options.output / 'preset'}")
    for prompt in PROMPTS:
        print(f"\n--- sample\n{model.generate(prompt, max_new_tokens=40, sampler='top_k', seed=1)}")


def parsed_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name, default, help, **kwargs):
        kwargs.setdefault("type", type(default))
        parser.add_argument(name, default=default, help=f"{help} (default: %(default)s)", **kwargs)

    def pairs(name, convert, help):
        parser.add_argument(name, action="append", type=named(convert), default=[], help=help)

    pairs("--text", Path, "a source and its file, NAME=FILE.jsonl (default: prose and code of the standard library)")
    pairs("--weight", float, "a source's share of the examples at first, NAME=SHARE (default: alike)")
    pairs("--late-weight", float, "a source's share later on, NAME=SHARE (default: as at first)")
    option("--late-after", 2000, "examples until the later shares hold")
    option("--output", Path("pretrained"), "folder for checkpoints and preset", type=Path)
    option("--layers", 2, "decoder blocks")
    option("--width", 128, "width of the hidden states, a multiple of 32")
    option("--sequence-length", 256, "tokens of a row")
    option("--batch-size", 16, "rows of a step")
    option("--accumulate", 2, "parts that a batch is cut into, one of which is in memory at a time")
    option("--epochs", 6, "lines of progress")
    option("--steps-per-epoch", 25, "steps between them")
    option("--save-every", 25, "steps between checkpoints")
    option("--learning-rate", 5e-3, "at its peak")
    option("--dtype", "float32", "of the model; mixed_bfloat16 pays on accelerators")
    option("--recompute", "none", "what training computes twice to save memory", choices=["none", "dots", "block"])
    option("--seed", 0, "of weights and order")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="folder for event files")
    parser.add_argument("--verbose", type=int, default=1, choices=[0, 1, 2], help="as of fit (default: %(default)s)")
    options = parser.parse_args()
    if options.width % 32:
        parser.error(f"--width is a multiple of 32. Received: {options.width}")
    return options


def named(convert):
    def pair(text):
        name, _, value = text.partition("=")
        if not (name and value):
            raise argparse.ArgumentTypeError(f"NAME=VALUE is expected. Received: {text!r}")
        return name, convert(value)

    return pair


if __name__ == "__main__":
    try:
        main(parsed_options())
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        sys.exit(f"pretrain.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("pretrain.py: stopped; the same command goes on from the last checkpoint.")
