"""The small Gemma learns to say what a function is for, by its name and arguments; only adapters are trained.

    pip install -e ".[train]"
    python examples/finetune_lora.py

The pairs are the first lines of the documentation in Python's standard library. For pairs of one's own, JSON lines
with a "prompts" and a "responses" each, of which the first tenth is held out:

    python examples/finetune_lora.py --output mine --pairs pairs.jsonl

Expected: before, prose that answers nothing. A minute or two of training on 2 cores later, answers in the style of
documentation, if seldom true ones, and a perplexity of held-out responses of about 57 instead of 152. Adapters and a
merged preset lie in `finetuned`.
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from tiny.options import Options
from tiny.options import run

from keras_gemma import startup


def parsed_options():
    parser = Options(__doc__)

    parser.add_argument("--pairs", type=Path, metavar="FILE", help="JSON lines (default: of the standard library)")
    parser.option("--output", Path("finetuned"), "folder for adapters and merged preset", type=Path)
    parser.option("--preset", "gemma_tiny_en", "name, folder or handle of the model")
    parser.option("--rank", 8, "of the adapters")
    parser.option("--sequence-length", 128, "tokens of a row, which several pairs share")
    parser.option("--batch-size", 8, "rows of a step")
    parser.option("--epochs", 3, "passes over the pairs")
    parser.option("--learning-rate", 7e-3, "after ten steps")
    parser.option("--dtype", "float32", "of the model; mixed_bfloat16 is for accelerators")
    parser.option("--seed", 0, "of adapters and order")
    return parser.parse_args()


# Before the imports that take seconds: --help and a wrong option are answered at once.
options = parsed_options() if __name__ == "__main__" else None

startup.leave_out_tensorflow()

import keras
from tiny.standard_library import names_and_summaries

from keras_gemma import GemmaCausalLM
from keras_gemma import data
from keras_gemma import training


def read_pairs(path):
    pairs = list(data.from_jsonl(path, fields=["prompts", "responses"]))
    if len(pairs) < 2:
        raise ValueError(f"At least two pairs are needed, one of them to hold out. {path} has {len(pairs)}.")
    return {field: [pair[field] for pair in pairs] for field in pairs[0]}


def split(pairs):
    """Held-out pairs, at most 100, and pairs to train on. Every prompt becomes a line of its own."""
    pairs = {**pairs, "prompts": [f"{prompt}\n" for prompt in pairs["prompts"]]}
    cut = min(100, max(1, len(pairs["prompts"]) // 10))
    return ({field: values[part] for field, values in pairs.items()} for part in (slice(cut), slice(cut, None)))


def show(title, model, prompts):
    print(f"\n--- {title}")
    for prompt in prompts:
        answer = model.generate(prompt, max_new_tokens=24, strip_prompt=True)
        print(f"{prompt.strip()}\n    {' '.join(answer.split())}")


def perplexity(model, pairs):
    """Of the responses, their ends included."""
    return model.evaluate(pairs, batch_size=8, pack=True, verbose=0, return_dict=True)["perplexity"]


def main(options):
    keras.utils.set_random_seed(options.seed)
    held_out, pairs = split(read_pairs(options.pairs) if options.pairs else names_and_summaries())
    prompts = held_out["prompts"][:3]

    model = GemmaCausalLM.from_preset(options.preset, dtype=options.dtype)
    model.preprocessor.sequence_length = options.sequence_length
    show("before", model, prompts)

    parameters = model.count_params()
    model.backbone.enable_lora(rank=options.rank)
    adapters = model.count_params() - parameters
    learning_rate = training.WarmUp(options.learning_rate, warmup_steps=10, decay="constant")
    model.compile(training.AdamW(learning_rate, weight_decay=0.0))
    before = perplexity(model, held_out)
    print(f"\n--- {len(pairs['prompts']):,} pairs train {adapters:,} parameters beside {parameters:,} frozen ones")
    callbacks = [training.TrainingMonitor(), training.StopOnNonFiniteLoss()]
    model.fit(pairs, batch_size=options.batch_size, epochs=options.epochs, pack=True, callbacks=callbacks, verbose=2)
    after = perplexity(model, held_out)

    options.output.mkdir(parents=True, exist_ok=True)
    model.backbone.save_lora_weights(options.output / "adapters.lora.h5")
    model.save_to_preset(options.output / "preset")
    show(
        "after, from the preset with the adapters merged", GemmaCausalLM.from_preset(options.output / "preset"), prompts
    )
    print(f"\nperplexity of {len(held_out['prompts'])} held-out responses: {before:.1f} before, {after:.1f} after")
    print(f"adapters: {options.output / 'adapters.lora.h5'}, merged preset: {options.output / 'preset'}")


if __name__ == "__main__":
    run(main, options)
