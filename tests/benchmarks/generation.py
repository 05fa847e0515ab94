"""Generation beside keras-hub: the same weights in one process, the two taking turns.

    python tests/benchmarks/generation.py --repeats 5 --json generation.json

Greedy decoding on JAX with the model of the issue: 8 layers, width 512, 8 heads of 64, one key-value head, vocabulary
32000, float32. Three cases measure tokens a second after compilation, the fourth wall time with compilation.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import keras_hub
import numpy as np

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

MODEL = {
    "vocabulary_size": 32_000,
    "num_layers": 8,
    "num_query_heads": 8,
    "num_key_value_heads": 1,
    "hidden_dim": 512,
    "intermediate_dim": 4096,
    "head_dim": 64,
}
# name: (batch, prompt, new tokens)
CASES = {
    "batch 1, 32 + 128": (1, 32, 128),
    "batch 8, 32 + 128": (8, 32, 128),
    "batch 4, 1000 + 24": (4, 1000, 24),
}
TWELVE_LENGTHS = "twelve total lengths"
TOTAL_LENGTHS = (40, 55, 69, 84, 98, 113, 127, 142, 156, 171, 185, 200)
# What the issue asks for.
TARGETS = dict(zip((*CASES, TWELVE_LENGTHS), (1.2, 1.4, 1.7, 3.0)))


def run(repeats=5):
    """Measures all cases.

    Args:
        repeats: int. Timed calls of each model in each of the first three cases; medians are compared.

    Returns:
        A list of dicts: `case`; `ours` and `keras_hub` in `unit`; `ratio`, above 1 where this package is faster; its
        `target`; `same_tokens`, the share of equal token ids.
    """
    ours, keras_hubs = build_models()
    results = [{**compare_speed(ours, keras_hubs, *sizes, repeats), "case": case} for case, sizes in CASES.items()]
    # Models that have compiled nothing yet.
    results.append({**compare_wall_time(*build_models()), "case": TWELVE_LENGTHS})
    return [{**result, "target": TARGETS[result["case"]]} for result in results]


def build_models():
    """This package's model and keras-hub's with the same random weights."""
    keras.utils.set_random_seed(0)
    ours = GemmaCausalLM(GemmaBackbone(**MODEL), preprocessor=None)
    theirs = keras_hub.models.GemmaCausalLM(keras_hub.models.GemmaBackbone(**MODEL), preprocessor=None)
    theirs.backbone.set_weights(ours.backbone.get_weights())
    for model in (ours, theirs):
        model.compile(sampler="greedy")
    return ours, theirs


def compare_speed(ours, keras_hubs, batch, prompt, new_tokens, repeats):
    inputs = prompts(batch, prompt, prompt + new_tokens)
    tokens = [generate(model, inputs) for model in (ours, keras_hubs)]
    seconds = {"ours": [], "keras_hub": []}
    for _ in range(repeats):
        for name, model in (("ours", ours), ("keras_hub", keras_hubs)):
            seconds[name].append(timed(lambda model=model: generate(model, inputs)))
    speeds = {name: batch * new_tokens / statistics.median(times) for name, times in seconds.items()}
    return {
        **speeds,
        "unit": "tokens/s",
        "ratio": speeds["ours"] / speeds["keras_hub"],
        "same_tokens": float(np.mean(tokens[0] == tokens[1])),
    }


def compare_wall_time(ours, keras_hubs):
    batches = [prompts(1, 32, total) for total in TOTAL_LENGTHS]
    seconds = {"ours": 0.0, "keras_hub": 0.0}
    same = []
    for inputs in batches:
        tokens = {}
        for name, model in (("ours", ours), ("keras_hub", keras_hubs)):
            began = time.perf_counter()
            tokens[name] = generate(model, inputs)
            seconds[name] += time.perf_counter() - began
        same.append(np.mean(tokens["ours"] == tokens["keras_hub"]))
    return {
        **seconds,
        "unit": "s",
        "ratio": seconds["keras_hub"] / seconds["ours"],
        "same_tokens": float(np.mean(same)),
    }


def prompts(batch, length, total):
    """Random prompts, all of one length, with room up to `total`."""
    token_ids = np.zeros((batch, total), "int32")
    token_ids[:, :length] = np.random.default_rng(0).integers(4, MODEL["vocabulary_size"], (batch, length))
    mask = np.broadcast_to(np.arange(total) < length, token_ids.shape)
    return {"token_ids": token_ids, "padding_mask": mask.copy()}


def generate(model, inputs):
    return np.asarray(model.generate(inputs, stop_token_ids=None)["token_ids"])


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def table(results):
    rows = [("case", "ours", "keras-hub", "unit", "ratio", "target", "same tokens")]
    for r in results:
        numbers = (f"{r[key]:.2f}" for key in ("ratio", "target", "same_tokens"))
        rows.append((r["case"], f"{r['ours']:.1f}", f"{r['keras_hub']:.1f}", r["unit"], *numbers))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write the results to")
    args = parser.parse_args()
    results = run(args.repeats)
    print(table(results))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
