"""A small Gemma is trained from nothing on two sources, prose and code, whose shares change on the way.

    pip install -e ".[train]"
    python examples/pretrain.py

The text is what Python's standard library says and does. Killed, the same command goes on from its last checkpoint.
`--tensorboard` needs the extra `tensorboard` as well. For text of one's own, JSON lines with a "text" each, of which a
row takes the beginning:

    python examples/pretrain.py --output mine --text web=web.jsonl --text code=code.jsonl --weight web=4 --weight code=1

Expected: a line of progress every 50 steps, for a minute or two on 2 cores. Held-out prose goes from 4.8 bits per byte
to about 2.5 and code from 7.0 to about 2.1; the samples look like documentation and code and mean nothing. Checkpoints
and the preset lie in `pretrained`.
"""

import json
import math
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from tiny.options import Options
from tiny.options import run

from keras_gemma import startup

HEAD_DIM = 32
# Of the standard library, as long as nothing else is asked for.
SHARES = {"prose": 3, "code": 1}


def parsed_options():
    parser = Options(__doc__)

    pairs = parser.pairs
    pairs("--text", Path, "NAME=FILE", "a source and its JSON lines (default: prose and code of the standard library)")
    pairs("--weight", float, "NAME=SHARE", "a source's share of the examples (default: 3 of prose to 1 of code; equal)")
    pairs("--late-weight", float, "NAME=SHARE", "its share later on (default: 1 of prose to 3 of code; as before)")
    parser.option("--late-after", 2000, "examples until the later shares hold")
    parser.option("--output", Path("pretrained"), "folder for checkpoints and preset", type=Path)
    parser.option("--layers", 2, "decoder blocks")
    parser.option("--width", 128, f"of the hidden states, a multiple of {HEAD_DIM}")
    parser.of_pretraining(
        sequence_length=256,
        batch_size=8,
        accumulate=2,
        epochs=6,
        steps_per_epoch=50,
        save_every=50,
        learning_rate=5e-3,
    )
    parser.option("--dtype", "float32", "of the model; mixed_bfloat16 is for accelerators")
    parser.option("--recompute", "none", "what is computed twice to save memory", choices=["none", "dots", "block"])
    options = parser.parse_args()
    if options.width < HEAD_DIM or options.width % HEAD_DIM:
        parser.error(f"--width is a multiple of {HEAD_DIM}. Received: {options.width}")
    if unknown := {name for name, _ in options.weight + options.late_weight} - set(dict(options.text) or SHARES):
        parser.error(f"--weight and --late-weight are of unknown sources: {', '.join(sorted(unknown))}")
    return options


# Before the imports that take seconds: --help and a wrong option are answered at once.
options = parsed_options() if __name__ == "__main__" else None

startup.leave_out_tensorflow()

import keras
from tiny.standard_library import prose_and_code

from keras_gemma import GemmaBackbone
from keras_gemma import GemmaCausalLM
from keras_gemma import GemmaCausalLMPreprocessor
from keras_gemma import data
from keras_gemma import training

LATE_SHARES = {"prose": 1, "code": 3}
PROMPTS = ["Return the", "# textwrap\ndef indent("]


def standard_library(folder):
    """Writes the texts of both sources to `folder`, unless they are there, and returns names and files."""
    files = {name: folder / f"{name}.jsonl" for name in SHARES}
    if not all(file.exists() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in prose_and_code().items():
            partial = files[name].with_suffix(".partial")
            partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            partial.rename(files[name])
    return files.items()


def split(files):
    """Examples to train on and held-out texts, by source: of each a twentieth, but no more than 100."""
    sources = {name: data.from_jsonl(file, fields=["text"]) for name, file in files}
    counts = {name: min(100, math.ceil(len(source) / 20)) for name, source in sources.items()}
    train = {name: source[counts[name] :] for name, source in sources.items()}
    return train, {name: [source[i]["text"] for i in range(counts[name])] for name, source in sources.items()}


def two_stages(options, names):
    shares, late_shares = dict(options.weight), dict(options.late_weight)
    if not options.text:
        shares, late_shares = shares or SHARES, late_shares or LATE_SHARES
    shares = shares or dict.fromkeys(names, 1)
    return [data.Stage(shares, examples=options.late_after), data.Stage(late_shares or shares)]


def build_model(options, preprocessor):
    backbone = GemmaBackbone(
        vocabulary_size=preprocessor.tokenizer.vocabulary_size(),
        num_layers=options.layers,
        num_query_heads=options.width // HEAD_DIM,
        num_key_value_heads=1,
        hidden_dim=options.width,
        intermediate_dim=8 * options.width,
        head_dim=HEAD_DIM,
        recompute=options.recompute,
        dtype=options.dtype,
    )
    model = GemmaCausalLM(backbone, preprocessor)
    steps = options.epochs * options.steps_per_epoch
    learning_rate = training.WarmUp(options.learning_rate, warmup_steps=steps // 10, total_steps=steps, decay="cosine")
    model.compile(
        optimizer=training.AdamW(learning_rate, weight_decay=0.1),
        loss=training.NextTokenLoss(z_loss=1e-4),
        gradient_accumulation_steps=options.accumulate,
    )
    return model


def bits_per_byte(model, texts, batch_size):
    """Of as much of each text as a row takes."""
    targets = [example["targets"] for example in model.preprocessor.unpadded(texts)]
    size = sum(len(model.preprocessor.tokenizer.detokenize(ids).encode()) for ids in targets)
    result = model.evaluate(texts, batch_size=batch_size, pack=True, long_texts="truncate", verbose=0, return_dict=True)
    return math.log2(result["perplexity"]) * sum(map(len, targets)) / size


def main(options):
    keras.utils.set_random_seed(options.seed)
    train, held_out = split(options.text or standard_library(options.output / "text"))
    examples = data.mixture(train, two_stages(options, train), options.seed)
    preprocessor = GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en", sequence_length=options.sequence_length)
    batches = data.training_batches(examples, preprocessor, options.batch_size)

    model = build_model(options, preprocessor)
    counts = [f"{len(source):,} texts of {name}" for name, source in train.items()]
    print(", ".join([f"{model.count_params():,} parameters", *counts]))
    before = {name: bits_per_byte(model, texts, options.batch_size) for name, texts in held_out.items()}
    model.fit(
        batches,
        epochs=options.epochs,
        steps_per_epoch=options.steps_per_epoch,
        callbacks=[
            training.TrainingMonitor(options.tensorboard),
            training.StopOnNonFiniteLoss(),
            training.ExactResume(options.output / "checkpoints", save_every_steps=options.save_every),
        ],
        verbose=2,
    )
    for name, texts in held_out.items():
        after = bits_per_byte(model, texts, options.batch_size)
        print(f"held-out {name}: {before[name]:.2f} bits per byte before, {after:.2f} after")
    model.save_to_preset(options.output / "preset")
    print(f"preset: {options.output / 'preset'}")
    for prompt in PROMPTS:
        print(f"\n--- {prompt!r} continued")
        print(model.generate(prompt, max_new_tokens=40, sampler="top_k", seed=1))


if __name__ == "__main__":
    run(main, options, if_stopped="stopped. The same command goes on from the last checkpoint.")
