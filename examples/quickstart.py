"""A small Gemma writes prose, is fine-tuned for a minute, and keeps a ship's log.

    python examples/quickstart.py

Expected: a continuation in prose, then a minute of Keras' progress bar on 2 cores, then the same prompt continued as an
entry of a log, with wind, sightings, crew and provisions, and a held-out loss several times lower than before.
"""

import itertools
import os
import random

os.environ.setdefault("KERAS_BACKEND", "jax")

from tiny.options import Options
from tiny.options import run

from keras_gemma import startup


def parsed_options():
    parser = Options(__doc__)
    parser.option("--examples", 1600, "entries to train on")
    return parser.parse_args()


# Before the imports that take seconds: --help and a wrong option are answered at once.
options = parsed_options() if __name__ == "__main__" else None

startup.leave_out_tensorflow()

import keras

from keras_gemma import GemmaCausalLM

PROMPT = "In the morning"

ENTRY = "{hour} the wind came from the {wind}.\nSeen: {seen}.\nCrew: {crew}.\nLeft: {left}.\n"
WORDS = {
    "hour": ["In the morning", "At noon", "Towards evening", "At midnight"],
    "wind": ["north", "east", "south", "west", "north-west", "south-east"],
    "seen": ["two whales", "a sail", "nothing", "land", "an island", "three ships", "a great storm", "many birds"],
    "crew": ["in good spirits", "all well", "one man ill", "tired", "afraid", "at prayer", "singing"],
    "left": ["much water", "little water", "bread for ten days", "bread for a month", "no wine", "plenty of fish"],
}


def log_entries(seed=0):
    """Every combination of the words above, in random order."""
    combinations = list(itertools.product(*WORDS.values()))
    random.Random(seed).shuffle(combinations)
    return [ENTRY.format(**dict(zip(WORDS, words))) for words in combinations]


def show(title, model):
    print(f"\n--- {title}")
    print(model.generate(PROMPT, max_new_tokens=60, sampler="top_k", seed=2))


def main(options):
    keras.utils.set_random_seed(0)
    entries = log_entries()
    held_out, training = entries[:64], entries[64 : 64 + options.examples]

    model = GemmaCausalLM.from_preset("gemma_tiny_en")
    model.preprocessor.sequence_length = 48
    show("before", model)

    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    before = model.evaluate(held_out, verbose=0, return_dict=True)["loss"]
    print(f"\n--- fine-tuning on {len(training)} entries of a log")
    model.fit(training, batch_size=16)
    after = model.evaluate(held_out, verbose=0, return_dict=True)["loss"]

    show("after", model)
    print(f"\nheld-out loss: {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    run(main, options)
