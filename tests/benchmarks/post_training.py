"""Tuning on answers and a REINFORCE step beside TRL's SFTTrainer and RLOOTrainer, with the weights of `gemma_tiny_en`.

TRL is needed for this alone, so no extra brings it: `pip install trl` beside the extra `test` (seen with 1.16.0, torch
2.13.0 and transformers 5.23.0; float32, no recomputation of activations, sampling at full support).

Every measurement is a process of its own on two cores; the libraries take turns, so that a machine that slows down
slows both. Both get the same token ids, batch, length, AdamW with norms clipped at 1, and reward. Both first take one
step with the same examples: losses that differ end the run, as do responses of other lengths.

Not compared: memory, devices other than CPUs, `torch.compile`, vLLM.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRESET = "gemma_tiny_en"
CORES = 2
RATE = 1e-5
# Rows of a step, and their tokens.
ROWS, LENGTH = 8, 256
EXAMPLES = 64
# After one that compiles.
EPOCHS = 4
PROMPTS, GROUP, NEW_TOKENS = 8, 4, 64
RL_LENGTH = 128
KL_COEFFICIENT = 0.05
# After one that compiles.
STEPS = 5
# TRL's ways to a batch of `ROWS`: padded; packed into one row of all; packed rows one at a time. Each of its ways to
# a step of `PROMPTS * GROUP` responses has so many rows in memory at a time; ours has its default.
TUNING = {
    "keras_gemma, packed": {"pack": True},
    "keras_gemma, padded": {"pack": False},
    "trl, packed": {"packing": True, "per_device_train_batch_size": ROWS},
    "trl, packed, row by row": {
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS,
    },
    "trl, padded": {"packing": False, "per_device_train_batch_size": ROWS},
}
REINFORCING = {
    "keras_gemma": {},
    "trl, 32 rows at once": {"per_device_train_batch_size": PROMPTS * GROUP},
    "trl, 8 rows at once": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": PROMPTS * GROUP // 8},
}
TARGET = 2.0
LOSSES_DIFFER = 1e-3
COUNTS_DIFFER = 0.02
PHASES = ("rollout", "score", "update")


def run(repeats):
    """Measures every way `repeats` times.

    Returns:
        A list of dicts with `case`, `way`, `tokens_per_second` and `step_seconds`, medians of the runs; of tuning
        `first_loss`, of REINFORCE `response_tokens` of a step and the `shares` of its phases; `ratio`, how many times
        as fast the fastest of ours is, and `target`.
    """
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        return [
            *_compared("tuning", TUNING, repeats, folder, _refuse_other_losses),
            *_compared("REINFORCE step", REINFORCING, repeats, folder, _refuse_other_lengths),
        ]


def _compared(case, ways, repeats, folder, check):
    runs = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(_measure_in_own_process(case, way, folder))
        check({way: measured[-1] for way, measured in runs.items()})
    results = [{"case": case, "way": way, **_summary(measured)} for way, measured in runs.items()]
    ours = max(r["tokens_per_second"] for r in results if r["way"].startswith("keras_gemma"))
    for result in results:
        if result["way"].startswith("trl"):
            result |= {"ratio": ours / result["tokens_per_second"], "target": TARGET}
    return results


def _summary(measured):
    names = ("tokens_per_second", "step_seconds")
    summary = {**measured[0], **{name: statistics.median(one[name] for one in measured) for name in names}}
    if "shares" in summary:
        summary["shares"] = {p: statistics.median(one["shares"][p] for one in measured) for p in PHASES}
    return summary


def _refuse_other_losses(runs):
    losses = {way: measured["first_loss"] for way, measured in runs.items()}
    if max(losses.values()) - min(losses.values()) > LOSSES_DIFFER:
        raise RuntimeError(f"They do not learn the same: the losses of a first step are {losses}")


def _refuse_other_lengths(runs):
    counts = {way: measured["response_tokens"] for way, measured in runs.items()}
    if min(counts.values()) < (1 - COUNTS_DIFFER) * max(counts.values()):
        raise RuntimeError(f"They do not write as much: tokens of a step are {counts}")


def _measure_in_own_process(case, way, folder):
    command = [sys.executable, __file__, case, way, folder]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{way} failed at {case}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results):
    """Lines of tables in Markdown."""
    yield "| tuning | tokens/s | step, s | ours / theirs | loss of the first step |"
    yield "|---|---|---|---|---|"
    for r in results:
        if r["case"] == "tuning":
            yield f"| {_speed(r)} | {r['first_loss']:.5f} |"
    yield ""
    yield f"| REINFORCE step | tokens/s | step, s | ours / theirs | {' | '.join(PHASES)} | tokens written |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in results:
        if r["case"] != "tuning":
            shares = " | ".join(f"{r['shares'][phase]:.0%}" for phase in PHASES)
            yield f"| {_speed(r)} | {shares} | {r['response_tokens']:.0f} |"


def _speed(r):
    ratio = f"{r['ratio']:.2f} (≥ {r['target']:g})" if "ratio" in r else ""
    return f"{r['way']} | {r['tokens_per_second']:.0f} | {r['step_seconds']:.2f} | {ratio}"


# === What both get ===


def _prepare(folder):
    """Weights and token ids in a form for both, in files."""
    from keras_gemma.checkpoints import convert
    from keras_gemma.models import GemmaCausalLMPreprocessor

    convert(PRESET, folder / "weights", format="hugging_face", dtype="float32", progress=False)
    preprocessor = GemmaCausalLMPreprocessor.from_preset(PRESET, sequence_length=LENGTH)
    pairs = _pairs()
    rows = [_ids_and_labels(row) for row in preprocessor.unpadded(pairs)]
    prompts = _prompts()
    given = {
        "pairs": pairs,
        "rows": rows,
        "prompts": prompts,
        "prompt_tokens": sum(len(preprocessor.prompt_ids(prompt)) for prompt in prompts),
    }
    (folder / "given.json").write_text(json.dumps(given))


def _pairs():
    """Questions and answers in words, about as long as those of public tuning data, and as different in length."""
    import numpy as np

    rng = np.random.default_rng(0)
    questions = np.clip(rng.lognormal(np.log(16), 0.6, EXAMPLES), 3, 50).astype(int)
    answers = np.clip(rng.lognormal(np.log(50), 0.9, EXAMPLES), 2, 160).astype(int)
    return {
        "prompts": [f"{_sentence(rng, n)}?\n" for n in questions],
        "responses": [f"{_sentence(rng, n)}." for n in answers],
    }


def _prompts():
    import numpy as np

    rng = np.random.default_rng(1)
    return [_sentence(rng, n) for n in rng.integers(10, 20, PROMPTS)]


def _sentence(rng, words):
    known = "the sea was calm and she had never seen so many ships of that kind before he came to tell her about it"
    return " ".join(rng.choice(known.split(), words))


def _ids_and_labels(row):
    """As TRL takes them: labels beside their own tokens, -100 where nothing is learned."""
    labels = [int(t) if w else -100 for t, w in zip(row["targets"], row["weights"])]
    return {"input_ids": [int(row["token_ids"][0]), *map(int, row["targets"])], "labels": [-100, *labels]}


def reward(prompts, completions, **kwargs):
    return [text.count("e") / 10 for text in completions]


# === In a process of its own ===


def measure(case, way, folder):
    """Times one way of one library, in this process."""
    # Before anything counts them.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    given = json.loads((Path(folder) / "given.json").read_text())
    ways = {"tuning": TUNING, "REINFORCE step": REINFORCING}[case]
    measures = {
        ("tuning", "keras_gemma"): _tune,
        ("tuning", "trl"): _tune_with_trl,
        ("REINFORCE step", "keras_gemma"): _reinforce,
        ("REINFORCE step", "trl"): _reinforce_with_trl,
    }
    return measures[case, way.split(",")[0]](given, folder, **ways[way])


def _tuning_result(given, first_loss, epoch_ends, steps):
    seconds = (epoch_ends[-1] - epoch_ends[0]) / EPOCHS
    tokens = sum(len(row["input_ids"]) for row in given["rows"])
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / steps,
        "first_loss": first_loss,
    }


def _reinforce_result(given, step_ends, phases, response_tokens):
    """Of the last `STEPS` steps; `phases` are seconds of each."""
    seconds = [after - before for before, after in itertools.pairwise(step_ends)][-STEPS:]
    median = {phase: statistics.median(times[-STEPS:]) for phase, times in phases.items()}
    tokens = statistics.mean(response_tokens[-STEPS:])
    step_seconds = statistics.median(seconds)
    return {
        "tokens_per_second": (GROUP * given["prompt_tokens"] + tokens) / step_seconds,
        "step_seconds": step_seconds,
        "shares": {phase: one / sum(median.values()) for phase, one in median.items()},
        "response_tokens": tokens,
    }


# === Ours ===


def _tune(given, folder, pack):
    import keras

    from keras_gemma import startup

    startup.leave_out_tensorflow()
    from keras_gemma.training import tune

    pairs = given["pairs"]
    first = {name: texts[:ROWS] for name, texts in pairs.items()}
    settings = {"batch_size": ROWS, "learning_rate": RATE, "pack": pack, "verbose": 0}
    first_loss = tune(_model(LENGTH), first, epochs=1, **settings).history["loss"][0]
    ends, steps = [], []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter()),
        on_train_batch_end=lambda batch, logs: steps.append(batch),
    )
    tune(_model(LENGTH), pairs, epochs=1 + EPOCHS, callbacks=[clock], **settings)
    return _tuning_result(given, first_loss, ends, max(steps) + 1)


def _model(length):
    from keras_gemma.models import GemmaCausalLM

    return GemmaCausalLM.from_preset(PRESET, sequence_length=length, dtype="float32")


def _reinforce(given, folder):
    import keras

    from keras_gemma import startup

    startup.leave_out_tensorflow()
    from keras_gemma.rlhf import ReinforceTrainer
    from keras_gemma.training import AdamW

    policy = _model(RL_LENGTH)
    policy.compile(AdamW(RATE, weight_decay=0.0))
    trainer = ReinforceTrainer(
        policy, reward, kl_coefficient=KL_COEFFICIENT, group_size=GROUP, max_new_tokens=NEW_TOKENS
    )
    ends, phases, tokens = [], {phase: [] for phase in PHASES}, []

    def end_step(batch, logs):
        ends.append(time.perf_counter())
        tokens.append(logs["response_length"] * PROMPTS * GROUP)
        for phase in PHASES:
            phases[phase].append(logs[f"{phase}_seconds"])

    clock = keras.callbacks.LambdaCallback(on_train_batch_end=end_step)
    trainer.fit(given["prompts"], batch_size=PROMPTS, steps=1 + STEPS, callbacks=[clock], verbose=0)
    return _reinforce_result(given, ends, phases, tokens)


# === Theirs ===

# What both trainers are told: nothing but the training itself.
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def _tune_with_trl(given, folder, **way):
    from datasets import Dataset
    from trl import SFTConfig
    from trl import SFTTrainer

    model, tokenizer = _peer(folder)
    rows = Dataset.from_list(given["rows"])

    def trainer(rows, epochs, **settings):
        config = SFTConfig("sft", num_train_epochs=epochs, max_length=LENGTH + 1, **PLAIN, **way, **settings)
        return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)

    first = trainer(rows.select(range(ROWS)), 1, logging_steps=1)
    first.train()
    ends, steps = [], trainer(rows, 1 + EPOCHS, logging_strategy="no")
    steps.add_callback(_callback(on_epoch_end=lambda: ends.append(time.perf_counter())))
    steps.train()
    first_loss = next(logs["loss"] for logs in first.state.log_history if "loss" in logs)
    return _tuning_result(given, first_loss, ends, steps.state.global_step // (1 + EPOCHS))


def _reinforce_with_trl(given, folder, **way):
    from datasets import Dataset
    from trl import RLOOConfig
    from trl import RLOOTrainer

    model, tokenizer = _peer(folder)
    config = RLOOConfig(
        "rloo",
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        beta=KL_COEFFICIENT,
        max_steps=1 + STEPS,
        logging_strategy="no",
        **PLAIN,
        **way,
    )
    prompts = Dataset.from_dict({"prompt": given["prompts"]})
    trainer = RLOOTrainer(model, reward, config, train_dataset=prompts, processing_class=tokenizer)
    rollout = _Timed(trainer, "_generate")
    rollout_and_score = _Timed(trainer, "_generate_and_score_completions")
    ends = [time.perf_counter()]
    trainer.add_callback(_callback(on_step_end=lambda: ends.append(time.perf_counter())))
    trainer.train()
    score = [both - one for both, one in zip(rollout_and_score.seconds, rollout.seconds)]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    update = [step - both for step, both in zip(steps, rollout_and_score.seconds)]
    tokens = [int((batch["completion_mask"]).sum()) for batch in rollout_and_score.results]
    return _reinforce_result(given, ends, dict(zip(PHASES, (rollout.seconds, score, update))), tokens)


def _peer(folder):
    import torch
    from transformers import AutoTokenizer
    from transformers import GemmaForCausalLM

    torch.set_num_threads(CORES)
    weights = Path(folder) / "weights"
    return GemmaForCausalLM.from_pretrained(weights, dtype="float32"), AutoTokenizer.from_pretrained(weights)


def _callback(**events):
    from transformers import TrainerCallback

    methods = {name: lambda self, *args, event=event, **kwargs: event() for name, event in events.items()}
    return type("Clock", (TrainerCallback,), methods)()


class _Timed:
    """A method of an object that notes what it takes and gives."""

    def __init__(self, owner, name):
        self.seconds, self.results = [], []
        self._method = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        began = time.perf_counter()
        result = self._method(*args, **kwargs)
        self.seconds.append(time.perf_counter() - began)
        self.results.append(result)
        return result


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
