"""The small Gemma learns to say what a function does from its name and arguments, by adapters alone.

    python examples/finetune_lora.py

It learns from Python's standard library, or from JSON lines with a "prompts" and a "responses" each:

    python examples/finetune_lora.py --pairs pairs.jsonl

Expected:
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from keras_gemma import startup

startup.leave_out_tensorflow()

import keras
from tiny.standard_library import names_and_summaries

from keras_gemma import GemmaCausalLM
from keras_gemma import training

HELD_OUT = 100


def read_pairs(path):
    pairs = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {field: [pair[field] for pair in pairs] for field in ("prompts", "responses")}


def framed(pairs):
    """Every prompt as a line of its own, and a response after it."""
    return {"prompts": [f"{prompt}\n" for prompt in pairs["prompts"]], "responses": pairs["responses"]}


def part(pairs, first, last=None):
    return {field: values[first:last] for field, values in pairs.items()}


def perplexity_of_responses(model, pairs):
    return model.evaluate(pairs, batch_size=8, pack=True, verbose=0, return_dict=True)["perplexity"]


def show(title, model, pairs):
    print(f"\n--- {title}")
    for prompt in pairs["prompts"][:3]:
        answer = model.generate(prompt, max_new_tokens=24, strip_prompt=True)
        print(f"{prompt.strip()}\n    {' '.join(answer.split())}")


def main(options):
    keras.utils.set_random_seed(options.seed)
    pairs = framed(read_pairs(options.pairs) if options.pairs else names_and_summaries())
    held_out, train = part(pairs, 0, HELD_OUT), part(pairs, HELD_OUT)

    model = GemmaCausalLM.from_preset(options.preset, dtype=options.dtype)
    model.preprocessor.sequence_length = options.sequence_length
    show("before", model, held_out)

    model.backbone.enable_lora(rank=options.rank)
    schedule = training.WarmUp(options.learning_rate, warmup_steps=10, decay="constant")
    model.compile(optimizer=training.AdamW(schedule, weight_decay=0.0))
    before = perplexity_of_responses(model, held_out)
    adapters = sum(weight.value.size for weight in model.trainable_weights)
    print(f"\n--- {len(train['prompts']):,} pairs train {adapters:,} of {model.count_params():,} parameters")
    model.fit(train, batch_size=8, epochs=options.epochs, pack=True, verbose=2, callbacks=[training.TrainingMonitor()])
    after = perplexity_of_responses(model, held_out)
    show("after", model, held_out)
    print(before, after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("finetuned"))
    add("--pairs", type=Path)
    add("--preset", default="gemma_tiny_en")
    add("--rank", type=int, default=8)
    add("--sequence-length", type=int, default=128)
    add("--epochs", type=int, default=2)
    add("--learning-rate", type=float, default=5e-3)
    add("--dtype", default="float32"); add("--seed", type=int, default=0)
    main(parser.parse_args())
