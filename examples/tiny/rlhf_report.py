"""What the run of `examples/rlhf.py` leaves behind: preset, curves, figures and README."""

import json
import shutil
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tiny.definitions import TEMPERATURE_OF_REJECTED

NAME = "gemma_tiny_instruct_en"
STEPS_OF_A_POINT = 20
STAGES = {
    "tuned": "supervised tuning, perplexity before and after",
    "pairs": "pairs, most of which the tuned model writes",
    "reward": "reward model",
    "rater": "rater",
    "policy": "REINFORCE",
    "judged": "judgement on held-out words",
}
MODELS = {"base": "gemma_tiny_en", "tuned": "after supervised tuning", "policy": "after REINFORCE: this preset"}


def publish(preset_dir: Path, preset: Path, tuned: Path, policy: Path, result: dict, licence: str) -> None:
    """Puts everything into a folder beside the preset's and exchanges the two."""
    preset_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = preset_dir.with_name(f".{preset_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(preset, partial)
    draw_tuning(json.loads((tuned / "loss.json").read_text()), result, partial / "tuning_curve.png")
    shutil.copy(policy / "report" / "reward_against_kl.png", partial / "reinforce_curve.png")
    (partial / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (partial / "README.md").write_text(readme(result, licence))
    shutil.rmtree(preset_dir, ignore_errors=True)
    partial.rename(preset_dir)


# === Curves ===


def draw_tuning(losses, result, path):
    """The loss of tuning, and where held-out definitions began and ended."""
    points = [np.mean(losses[i : i + STEPS_OF_A_POINT]) for i in range(0, len(losses), STEPS_OF_A_POINT)]
    steps = np.minimum(np.arange(1, len(points) + 1) * STEPS_OF_A_POINT, len(losses))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, points, label=f"definitions tuned on, mean of {STEPS_OF_A_POINT} steps")
    held_out = np.log([result["perplexity"][name] for name in ("base", "tuned")])
    axes.plot([0, len(losses)], held_out, "o", label="held-out definitions, before and after")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token of the response)", title=f"{NAME}: tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


# === Tables ===


def estimate(values, digits=3):
    """`[value, low, high]` as text."""
    value, low, high = (f"{number:.{digits}f}" for number in values)
    return f"{value} ({low} to {high})"


def table(result):
    """The result in rows of Markdown."""
    rows = [
        f"| perplexity of held-out definitions, {MODELS[name]} | {result['perplexity'][name]:.1f} |" for name in MODELS
    ]
    for judge, name in (("reward", "reward model"), ("rater", "rater")):
        for kind, share in result["accuracy"][judge].items():
            kind = "all pairs" if kind == "all" else f"rejected is {kind}"
            rows.append(f"| pair accuracy of the {name}, {kind} | {estimate(share)} |")
    for way, title in (("drawn", "drawn at temperature 1"), ("greedy", "greedy")):
        of = result[way]
        for name in ("tuned", "policy"):
            rows.append(f"| {title}: reward by the rater, {MODELS[name]} | {estimate(of['reward']['rater'][name])} |")
        rows.append(f"| {title}: gain by the rater, policy less tuned | {estimate(of['gain']['rater'])} |")
        rows.append(f"| {title}: **win rate against tuned by the rater** | **{estimate(of['win_rate']['rater'])}** |")
        rows.append(f"| {title}: win rate against tuned by the reward model | {estimate(of['win_rate']['reward'])} |")
        for name in ("tuned", "policy"):
            writing = of["writing"][name]
            rows.append(
                f"| {title}: words of an answer, different answers, answers that repeat themselves; {MODELS[name]} | "
                f"{writing['words']:.1f}, {writing['different']:.1%}, {writing['repeating']:.1%} |"
            )
    return "\n".join(["| held out | 95% interval in brackets |", "| --- | --- |", *rows])


def samples(result, way):
    rows = ["| word | after supervised tuning | after REINFORCE |", "| --- | --- | --- |"]
    for word, tuned, policy in result[way]["samples"]:
        rows.append(f"| {word} | {_cell(tuned)} | {_cell(policy)} |")
    return "\n".join(rows)


def _cell(text):
    return " ".join(text.split()).replace("|", "\\|")


def readme(result, licence):
    words, pairs, seconds = result["words"], result["pairs"], result["seconds"]
    return README.format(
        name=NAME,
        words=words,
        pairs=pairs,
        table=table(result),
        drawn=samples(result, "drawn"),
        greedy=samples(result, "greedy"),
        longer="; ".join(f"{share:.1%} where the rejected one is {kind}" for kind, share in result["longer"].items()),
        seconds="\n".join(f"| {STAGES[name]} | {value:.0f} s |" for name, value in seconds.items()),
        minutes=sum(seconds.values()) / 60,
        licence="\n".join(f"> {line}".rstrip() for line in licence.split("\n")),
        temperature=TEMPERATURE_OF_REJECTED,
        judgements=", ".join(f"{one['win_rate']:.1%} after step {one['step']}" for one in result["judgements"]),
        kl=result["kl"],
        prompts=result["prompts"],
        **result["run"],
    )


README = """\
# {name}

`gemma_tiny_en` after supervised tuning on the definitions of a dictionary and REINFORCE against a reward model, all of
it by `examples/rlhf.py` on two CPU cores. These are the weights of the REINFORCE policy. It shows the three stages at
work on a model of 3.7 million parameters; it writes in the style of a dictionary and knows few words: do not look
anything up in it.

```python
from keras_gemma import GemmaCausalLM

model = GemmaCausalLM.from_preset("{name}")
print(model.generate("piety\\n", max_new_tokens=24, sampler="top_k", seed=1, strip_prompt=True))
```

A prompt is one word in lower-case letters and a line break; the answer ends by itself.

## Data

WordNet 3.0, Debian's package `wordnet-base`: words of 3 to 12 lower-case letters, one definition each, the first one of
the word's most frequent sense, of 8 to 80 characters, without examples of use. Definitions are dealt out by their
hash, a word goes where its definition goes, and so no word, and no definition word for word, is in two parts. (Related
words, such as a noun and its adjective, may be.)

| part | words |
| --- | --- |
| supervised tuning | {words[tuning]:,} |
| pairs of the reward model | {words[reward]:,} |
| pairs of the rater | {words[rater]:,} |
| prompts of REINFORCE | {words[policy]:,} |
| held out, one word a definition | {words[held_out]:,} |

A pair is a word, its definition, and

- for three words of four what the tuned model wrote for the word at temperature {temperature}: of two answers that
  came to an end, the one whose length is nearer to the definition's, without as many of the longest ones as it takes
  for the better answer to be the longer one as often as the shorter one;
- for the fourth the definition of another word of the same part of speech and about the same length: words exchange
  their definitions two by two, so that every one of these is rejected exactly as often as it is chosen.

The reward model has {pairs[reward]:,} pairs, the rater {pairs[rater]:,} of other words, {pairs[held_out]:,} are held
out. On these, who only called the longer answer the better would be right in
{longer}.

## Recipe

Float32, all weights, {minutes:.0f} minutes in all on two cores, the sum of the stages below.

- Supervised tuning: {tuning}.
- Reward model and rater, each from the tuned weights with a seed of its own: {reward_models}.
- REINFORCE with the KL to the tuned model in the reward: {reinforce}. The rater looked on, at words that the policy
  did not learn from; its win rate against the tuned model was {judgements}.

| stage | time |
| --- | --- |
{seconds}

![tuning curve](tuning_curve.png)

![REINFORCE curve](reinforce_curve.png)

## Result

On held-out words, with the weights as saved (bfloat16). The rater learned from other pairs than the reward model, and
nothing ever learned from it. Both models answer the same {prompts:,} prompts with the same seed; intervals are
Wilson's for accuracies and by bootstrap over prompts (BCa) for the rest.

{table}

Read this with care. Where a judge is right about another word's definition half of the time, it rewards how a
definition reads and not whether it is the word's, and so does the policy that follows it: what is gained is form, and
the perplexity of true definitions is the price. The judges share their blind spots, for both learned from one kind of
pairs, none of which repeats itself; so greedy answers are rewarded as well, though many words get one and the same and
some repeat themselves. Draw, as above, and look at the samples.

KL to the tuned model over the last five steps: {kl:.2f} nats of a response. The same figures are in `result.json`.

## Samples

The first of the held-out words in the order of their hashes, drawn at temperature 1, first try:

{drawn}

The same words, greedy:

{greedy}

## Licence

The weights are Apache-2.0 like the package. No text of the dictionary is in this folder. WordNet may be used, copied,
modified and distributed for any purpose without fee, with this notice:

{licence}
"""
