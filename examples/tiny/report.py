"""What a training run leaves behind: the preset, its curve and its README."""

import csv
from collections import Counter
from pathlib import Path

import keras
import keras_hub
import numpy as np

from keras_gemma import GemmaBackbone
from keras_gemma import GemmaCausalLM

PROMPTS = (
    "It was a dark evening when",
    "And the LORD said unto Moses,",
    '"My dear Watson," said Holmes,',
    "She had always been told that",
)


def write_preset(model, preprocessor, preset_dir: Path) -> None:
    """Saves the model with its vocabulary, the weights rounded to bfloat16."""
    config = model.backbone.get_config()
    config.update(dtype="bfloat16", name="gemma_backbone")
    rounded = GemmaBackbone.from_config(config)
    for target, trained in zip(rounded.weights, model.backbone.weights):
        target.assign(keras.ops.cast(trained, "bfloat16"))
    GemmaCausalLM(rounded, preprocessor, name="gemma_causal_lm").save_to_preset(preset_dir)


def write_curve(log: Path, steps_per_report: int, tokens_per_step: int, path: Path) -> None:
    """Draws loss in nats per token over the tokens seen, for training and held-out text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = np.arange(1, len(rows) + 1) * steps_per_report * tokens_per_step / 1e6
    measured = [i for i, row in enumerate(rows) if row["val_perplexity"] not in ("", "NA")]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(tokens, [np.log(float(row["perplexity"])) for row in rows], label="training text, mean of 50 steps")
    held_out = [np.log(float(rows[i]["val_perplexity"])) for i in measured]
    axes.plot(tokens[measured], held_out, "o-", label="held-out text, an eighth of it")
    axes.set(xlabel="tokens seen (million)", ylabel="cross-entropy (nats per token)", title="gemma_tiny_en")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def samples(preset_dir: Path) -> str:
    """Text that the saved preset writes, with a fixed seed, as Markdown."""
    model = GemmaCausalLM.from_preset(str(preset_dir))
    model.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8))
    texts = [model.generate(prompt, max_new_tokens=90, seed=1) for prompt in PROMPTS]
    return "\n\n".join("> " + text.strip().replace("\n", "\n> ") for text in texts)


def write_readme(preset_dir: Path, corpus, run: dict, result: dict) -> None:
    """Writes the card: corpus, licences, recipe, result beside its baselines, samples."""
    size, licences = Counter(), {}
    for document in corpus.train:
        size[document.source] += len(document.text.encode())
        licences[document.source] = document.licence
    sources = "\n".join(f"| {name} | {size[name] / 1e6:.2f} MB | {licences[name]} |" for name in size)
    figures = "\n".join(f"| {name} | {value} |" for name, value in run.items())
    (preset_dir / "README.md").write_text(
        README.format(
            sources=sources,
            megabytes=sum(size.values()) / 1e6,
            held_out_kilobytes=sum(len(d.text.encode()) for d in corpus.held_out) / 1e3,
            figures=figures,
            samples=samples(preset_dir),
            **result,
        )
    )


README = """\
# gemma_tiny_en

A small Gemma-architecture model of English prose, trained from nothing by `examples/pretrain_tiny.py` on two CPU
cores. It shows every part of the package at work; it knows nothing, and its style is that of its books.

```python
from keras_gemma import GemmaCausalLM

model = GemmaCausalLM.from_preset("gemma_tiny_en")
print(model.generate("It was a dark evening when", max_new_tokens=60))
```

## Corpus

{megabytes:.1f} MB of text from Debian packages; about 3% more, whole chapters chosen by the hash of their name, are
held out ({held_out_kilobytes:.0f} kB).

| source | training text | licence as stated |
| --- | --- | --- |
{sources}

## Recipe

SentencePiece byte-pair vocabulary of 4096 pieces trained on the training text alone: digits split, white space kept,
bytes for unknown characters, no normalisation. Muon for the feed-forward matrices and Adam for the rest, cosine
decay to zero after a warm-up, float32; the weights are saved in bfloat16.

| | |
| --- | --- |
{figures}

![training curve](training_curve.png)

## Held-out bits per byte

All on the same held-out text; lower is better. The model predicts every token from at least 192 tokens before it
where the chapter has them; `<eos>` of every chapter counts, for the Kneser-Ney model too.

| | bits per byte |
| --- | --- |
| **gemma_tiny_en**, as saved (bfloat16 weights) | **{model:.3f}** |
| Kneser-Ney 5-gram over the same tokens and training text | {kneser_ney_5:.3f} |
| `xz -9e`, given the training text first | {xz_conditional:.3f} |
| `xz -9e`, the held-out text alone | {xz_alone:.3f} |

## Samples

Top-p 0.9, temperature 0.8, seed 1, first try:

{samples}

## Licence

The weights are Apache-2.0 like the package. The books are in the public domain as the table states; none of their
text is in this folder.
"""
