"""One optimizer step of the same model here, in keras-hub and in transformers: tokens a second and peak memory.

Every measurement is a process of its own, so that peak memory is that of the library alone; the libraries take
turns, so that a machine that slows down slows all of them.
"""

import json
import os
import resource
import subprocess
import sys
import time

LIBRARIES = ("keras_gemma", "keras_hub", "transformers")
CASES = {
    "V 32000, 8 layers, D 512, batch 8 x 256": dict(
        vocabulary_size=32000,
        num_layers=8,
        num_query_heads=8,
        num_key_value_heads=1,
        hidden_dim=512,
        intermediate_dim=4096,
        head_dim=64,
        batch=(8, 256),
    ),
    "V 256000, 4 layers, D 256, batch 4 x 256": dict(
        vocabulary_size=256000,
        num_layers=4,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=256,
        intermediate_dim=2048,
        head_dim=64,
        batch=(4, 256),
    ),
}
# How many times the peer's ours should be: speed at least, memory at most.
TARGETS = {
    "V 32000, 8 layers, D 512, batch 8 x 256": {"keras_hub": {"speed": 1.4, "memory": 0.6}},
    "V 256000, 4 layers, D 256, batch 4 x 256": {
        "keras_hub": {"speed": 1.5, "memory": 0.5},
        "transformers": {"speed": 1.0},
    },
}
STEPS = 3


def run(repeats):
    """Measures every case `repeats` times.

    Returns:
        A list of dicts with `case`, `targets`, and for every library `tokens_per_second` and `peak_gib`: the median
        and the largest of its runs.
    """
    results = []
    for case in CASES:
        runs = {library: [] for library in LIBRARIES}
        for _ in range(repeats):
            for library in LIBRARIES:
                runs[library].append(_measure_in_own_process(library, case))
        summaries = {library: _summary(measured) for library, measured in runs.items()}
        results.append({"case": case, "targets": TARGETS[case], **summaries})
    return results


def _summary(measured):
    speeds = sorted(one["tokens_per_second"] for one in measured)
    return {
        "tokens_per_second": speeds[len(speeds) // 2],
        "peak_gib": max(one["peak_gib"] for one in measured),
    }


def _measure_in_own_process(library, case):
    command = [sys.executable, __file__, library, case]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{library} failed on {case!r}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(library, case):
    """Runs one warm-up step and `STEPS` timed ones, in this process."""
    import numpy as np

    shape = dict(CASES[case])
    batch = shape.pop("batch")
    ids = np.random.default_rng(0).integers(5, shape["vocabulary_size"], (batch[0], batch[1] + 1)).astype("int32")
    step = _transformers_step(shape, ids) if library == "transformers" else _keras_step(library, shape, ids)
    step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = time.perf_counter() - start
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"tokens_per_second": batch[0] * batch[1] * STEPS / seconds, "peak_gib": peak_kib / 2**20}


def _keras_step(library, shape, ids):
    import keras

    if library == "keras_gemma":
        from keras_gemma.models import GemmaBackbone
        from keras_gemma.models import GemmaCausalLM
    else:
        from keras_hub.models import GemmaBackbone
        from keras_hub.models import GemmaCausalLM

    model = GemmaCausalLM(GemmaBackbone(**shape))
    model.compile(optimizer=keras.optimizers.AdamW(1e-4))
    mask = (ids[:, :-1] > 0).astype("int32")
    features = {"token_ids": ids[:, :-1], "padding_mask": mask}
    return lambda: model.train_on_batch(features, ids[:, 1:], mask)


def _transformers_step(shape, ids):
    import torch
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=shape["vocabulary_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_query_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        hidden_size=shape["hidden_dim"],
        intermediate_size=shape["intermediate_dim"] // 2,
        head_dim=shape["head_dim"],
        use_cache=False,
    )
    model = transformers.GemmaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.from_numpy(ids[:, :-1].astype("int64"))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
