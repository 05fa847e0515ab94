"""What a run was like, for people: curves, pictures and samples.

DIRECTORY/events.out…               every quantity of every step, for TensorBoard; with samples as text
DIRECTORY/samples.jsonl             samples of every few steps, a line each
DIRECTORY/reward_against_kl.png     what was gained and how far the policy went for it
"""

import io
import json
from pathlib import Path

import jax
import keras

from keras_gemma.staging import write_file
from keras_gemma.training.event_files import EventFiles

ROWS_OF_A_TABLE = 8


class RunReport(keras.callbacks.Callback):
    """Writes curves for TensorBoard, tables of samples, and reward against KL as a picture.

    Passed behind a `SideBySide`, it shows its win rate too. After a crash it goes on in the same folder: steps that
    were made twice are told twice in TensorBoard's files alone.

    Args:
        trainer: a `ReinforceTrainer`, to whose `fit` this is passed as a callback.
        directory: path of a folder.
        samples_every: int, steps between two tables of samples.

    Raises:
        ImportError: without the packages `tensorboard` and `matplotlib`.
        ValueError: for `samples_every` below 1.
    """

    def __init__(self, trainer, directory, samples_every=10):
        super().__init__()
        if samples_every < 1:
            raise ValueError(f"`samples_every` counts steps and is at least 1. Received: {samples_every}")
        _require_matplotlib()
        self.trainer = trainer
        self.directory = Path(directory)
        self.samples_every = samples_every
        self.steps = []
        self._events = EventFiles(self.directory.parent)

    def on_train_begin(self, logs=None):
        self._events.open(self.directory.name)

    def on_train_batch_end(self, batch, logs=None):
        step = self.trainer.step
        self.steps.append({"step": step, **{name: float(value) for name, value in logs.items()}})
        self._events.write(self.directory.name, step, logs)
        if (step - 1) % self.samples_every == 0:
            self._write_samples(step)

    def on_epoch_end(self, epoch, logs=None):
        if jax.process_index() == 0:
            draw(self.steps, self.directory / "reward_against_kl.png")

    def on_train_end(self, logs=None):
        self._events.close()

    def _write_samples(self, step):
        if jax.process_index() != 0:
            return
        samples = self.trainer.samples[:ROWS_OF_A_TABLE]
        self._events.write_text(self.directory.name, step, "samples", table(samples))
        path = self.directory / "samples.jsonl"
        # Those of steps that a crash undid are left out.
        kept = [line for line in _lines(path) if json.loads(line)["step"] < step]
        added = [json.dumps({"step": step, **sample}, ensure_ascii=False) for sample in samples]
        write_file(path, "".join(f"{line}\n" for line in kept + added).encode())


def table(samples):
    """Samples of a step as a Markdown table.

    Args:
        samples: list of dicts, see `ReinforceTrainer.samples`.
    """
    lines = ["| prompt | response | reward | KL | ended |", "| --- | --- | ---: | ---: | --- |"]
    for one in samples:
        prompt, response = (_in_a_cell(one[name]) for name in ("prompt", "response"))
        ended = "yes" if one["ended"] else "cut off"
        lines.append(f"| {prompt} | {response} | {_reward_in_a_cell(one['reward'])} | {one['kl']:.3f} | {ended} |")
    return "\n".join(lines)


def draw(steps, path):
    """Draws rewards over steps, and rewards against the KL that they cost.

    Args:
        steps: list of dicts with `step`, `reward`, `penalised_reward`, `kl` and perhaps `judge_win_rate`.
        path: path of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over_steps, against_kl = figure.subplots(1, 2)
    numbers = [one["step"] for one in steps]
    over_steps.plot(numbers, [one["reward"] for one in steps], label="reward")
    over_steps.plot(numbers, [one["penalised_reward"] for one in steps], label="reward - β KL")
    over_steps.set_xlabel("step")
    over_steps.set_ylabel("mean reward of a response")
    _draw_win_rates(over_steps, steps)
    over_steps.legend(loc="lower right", frameon=False)
    points = against_kl.scatter([one["kl"] for one in steps], [one["reward"] for one in steps], c=numbers, s=12)
    figure.colorbar(points, ax=against_kl, label="step")
    against_kl.set_xlabel("KL to the reference, nats of a response")
    against_kl.set_ylabel("mean reward of a response")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(Path(path), picture.getvalue())


def _draw_win_rates(axes, steps):
    judged = [one for one in steps if "judge_win_rate" in one]
    if not judged:
        return
    right = axes.twinx()
    right.plot(
        [one["step"] for one in judged], [one["judge_win_rate"] for one in judged], color="tab:green", linestyle=":"
    )
    right.set_ylim(0, 1)
    right.set_ylabel("win rate against the reference (dotted)")


def _reward_in_a_cell(reward):
    return "none" if reward is None else f"{reward:.3f}"


def _in_a_cell(text):
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _lines(path):
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _require_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Pictures need the package matplotlib: pip install matplotlib") from error
