"""`keras-gemma sft`: examples → what is dropped and why → `training.tune` → a preset.

OUTPUT/settings.json       what was asked for, so that other settings are not taken for these
OUTPUT/dropped.json        what was left out of the examples, and why
OUTPUT/checkpoints/        where a killed run goes on
OUTPUT/history.json        loss and metrics by evaluation
OUTPUT/curve.png           the same as a picture, where matplotlib is installed
OUTPUT/adapters.lora.h5    with --lora-rank
OUTPUT/preset/             the tuned model, adapters merged
"""

import glob
import hashlib
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

from keras_gemma.commands import checks
from keras_gemma.commands.arguments import UsageError
from keras_gemma.commands.arguments import add_command
from keras_gemma.commands.arguments import add_model_options
from keras_gemma.commands.arguments import choose_backend
from keras_gemma.commands.arguments import mesh_name
from keras_gemma.commands.arguments import not_negative_int
from keras_gemma.commands.arguments import positive_float
from keras_gemma.commands.arguments import positive_int
from keras_gemma.commands.arguments import share_or_none
from keras_gemma.staging import write_file

LORA_TARGETS = ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear")
# What does not change the result, or is not known before the run.
NOT_SETTINGS = {"run", "parser", "traceback", "output", "overwrite", "backend", "logging_steps"}
WRITTEN = ("settings.json", "dropped.json", "checkpoints", "history.json", "curve.png", "adapters.lora.h5", "preset")
SAMPLES = 3
SAMPLE_TOKENS = 64
VALIDATION_SHARE = 0.05


def add(commands):
    parser = add_command(
        commands,
        "sft",
        run,
        help="fine-tune on prompts and responses, or on dialogues",
        description="Supervised fine-tuning: reads and filters examples, says what it dropped and why, trains all "
        "weights or LoRA adapters, keeps the best evaluation, and writes a preset. If interrupted, run the same "
        "command again to continue from the last checkpoint.",
        epilog="""\
examples:
  keras-gemma sft pairs.jsonl --output tuned
  keras-gemma sft chat.parquet --messages conversation --preset gemma_2b_en --lora-rank 16 --dtype bfloat16 \\
      --output tuned
  keras-gemma sft tfds:gem/common_gen:train --prompts concepts --responses target --filter duplicates --output tuned

Needs the extra `train`, and for --filter `filters`: pip install 'keras_gemma[train,filters]'""",
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help=checks.DATA_HELP)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder for the preset, checkpoints and figures"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where --output holds another run")
    _add_example_options(parser)
    add_model_options(parser)
    _add_training_options(parser.add_argument_group("training"))
    _add_lora_options(parser.add_argument_group("LoRA adapters"))


def _add_example_options(parser):
    group = parser.add_argument_group("examples")
    group.add_argument("--prompts", metavar="FIELD", help="field of the prompts (default: prompts)")
    group.add_argument("--responses", metavar="FIELD", help="field of the responses (default: responses)")
    group.add_argument("--messages", metavar="FIELD", help="field of dialogues, in place of both (default: messages)")
    group.add_argument("--validation", nargs="+", metavar="DATA", help="validation examples, in place of a share")
    group.add_argument(
        "--validation-share",
        type=share_or_none,
        metavar="S",
        help=f"share of the examples held out for validation, 0 for none (default: {VALIDATION_SHARE})",
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        choices=("personal_data", "unsafe", "mistaken_identity", "duplicates"),
        help="drop such examples; may be given several times",
    )


def _add_training_options(group):
    add = group.add_argument
    add("--epochs", type=positive_int, metavar="N", help="passes over the examples (default: 3)")
    add("--steps", type=positive_int, metavar="N", help="optimizer steps, in place of --epochs")
    add("--batch-size", type=positive_int, default=8, metavar="B", help="packed rows per step (default: %(default)s)")
    add(
        "--gradient-accumulation",
        "--accumulate",
        dest="accumulate",
        type=positive_int,
        default=1,
        metavar="A",
        help="microbatches that a step is cut into, one in memory at a time (default: %(default)s)",
    )
    add("--sequence-length", type=positive_int, metavar="T", help="tokens of a row (default: the preset's)")
    add("--learning-rate", type=positive_float, metavar="R", help="peak (default: 2e-5, for adapters 2e-4)")
    add("--warmup-steps", type=not_negative_int, metavar="N", help="steps of warm-up (default: a tenth of all)")
    add(
        "--decay",
        choices=("cosine", "linear", "constant"),
        default="cosine",
        help="learning-rate schedule after the warm-up (default: %(default)s)",
    )
    add("--eval-steps", type=positive_int, metavar="N", help="steps between evaluations (default: once an epoch)")
    add("--logging-steps", type=positive_int, default=10, metavar="N", help="steps per log line (default: %(default)s)")
    add(
        "--early-stopping",
        "--patience",
        dest="patience",
        type=positive_int,
        metavar="N",
        help="stop after N evaluations without a lower validation loss",
    )
    add(
        "--recompute",
        choices=("none", "dots", "block"),
        help="activation recomputation (gradient checkpointing), to save memory (default: none)",
    )
    add("--config", type=mesh_name, metavar="NAME", help="mesh in keras_gemma.distribution (default: one device)")
    add("--seed", type=int, default=0, metavar="S", help="seed of adapters and data order (default: %(default)s)")


def _add_lora_options(group):
    group.add_argument(
        "--lora-rank", "--rank", dest="rank", type=positive_int, metavar="R", help="train adapters of this rank alone"
    )
    group.add_argument("--lora-alpha", type=positive_float, metavar="A", help="scaled by A / R (default: A = R)")
    group.add_argument(
        "--lora-targets",
        nargs="+",
        choices=LORA_TARGETS,
        metavar="LAYER",
        help=f"layers with adapters, of {', '.join(LORA_TARGETS)} (default: query value)",
    )


def run(args):
    """Fine-tunes as the command's arguments say and prints what came of it."""
    _refuse_wrong_combinations(args)
    settings = _settings(args)
    _refuse_another_run(args, settings)
    choose_backend(args)
    import keras

    from keras_gemma import GemmaCausalLM
    from keras_gemma import distribution
    from keras_gemma import training

    keras.utils.set_random_seed(args.seed)
    if args.config:
        keras.distribution.set_distribution(distribution.configuration(args.config)())
    model = GemmaCausalLM.from_preset(args.preset, dtype=args.dtype, sequence_length=args.sequence_length)
    examples, validation = _examples(args, model.preprocessor)
    write_file(args.output / "settings.json", json.dumps(settings, indent=2))
    in_terminal = sys.stdout.isatty()
    history = training.tune(
        model,
        examples,
        validation,
        epochs=args.epochs or 3,
        steps=args.steps,
        batch_size=args.batch_size,
        lora_rank=args.rank,
        lora_alpha=args.lora_alpha,
        lora_targets=args.lora_targets,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        decay=args.decay,
        gradient_accumulation_steps=args.accumulate,
        evaluation_steps=args.eval_steps,
        patience=args.patience,
        recompute=args.recompute,
        checkpoints=args.output / "checkpoints",
        callbacks=[] if in_terminal else [training.ProgressLines(args.logging_steps, args.steps)],
        verbose=1 if in_terminal else 0,
    ).history
    write_file(args.output / "history.json", json.dumps(_finite(history), indent=2))
    _draw(history, args.output / "curve.png")
    if args.rank is not None:
        model.backbone.save_lora_weights(str(args.output / "adapters.lora.h5"))
    model.save_to_preset(args.output / "preset")
    print(_outcome(history))
    _show_samples(model, validation or examples)
    print(f"preset: {args.output / 'preset'}")
    print(f"chat with it: keras-gemma chat --preset {shlex.quote(str(args.output / 'preset'))}")


# === What is refused ===


def _refuse_wrong_combinations(args):
    if args.messages and (args.prompts or args.responses):
        raise UsageError("argument --messages: dialogues have --messages, pairs --prompts and --responses, not both")
    if args.validation and args.validation_share is not None:
        raise UsageError("argument --validation-share: give --validation or --validation-share, not both")
    if args.epochs and args.steps:
        raise UsageError("argument --steps: give --epochs or --steps, not both")
    for name in ("lora_alpha", "lora_targets"):
        if getattr(args, name) is not None and args.rank is None:
            raise UsageError(f"argument --{name.replace('_', '-')}: adapters need --lora-rank")
    nothing_held_out = not args.validation and args.validation_share == 0
    for option, value in {"--early-stopping": args.patience, "--eval-steps": args.eval_steps}.items():
        if value is not None and nothing_held_out:
            raise UsageError(f"argument {option}: needs validation examples, not --validation-share 0")
    checks.check_preset(args.preset)
    for path in [*args.data, *(args.validation or ())]:
        checks.check_examples(path)
    checks.check_writable(args.output)


def _settings(args):
    """What decides the result: the arguments and the contents of the files."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    files = [*args.data, *(args.validation or ())]
    return {**settings, "contents": {path: _digest(path) for path in files if not path.startswith(checks.DATA_SETS)}}


def _digest(path):
    """A number of the contents of a file, or of all files of a folder or pattern."""
    folder = Path(path)
    if folder.is_dir():
        # As `data.from_any` reads them: what else lies there, this run's own output for instance, decides nothing.
        found = [file for file in folder.rglob("*") if _kind(file) in checks.DATA_KINDS]
    else:
        found = [path] if folder.is_file() else glob.glob(path, recursive=True)
    digests = []
    for name in sorted(map(str, found)):
        if Path(name).is_file():
            with open(name, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0][:16] if folder.is_file() else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _kind(file):
    return Path(file.stem).suffix if file.suffix in checks.COMPRESSED else file.suffix


def _refuse_another_run(args, settings):
    """Raises where the output folder holds a run with other settings, unless it shall be overwritten.

    Raises:
        FileExistsError: naming what differs.
    """
    path = args.output / "settings.json"
    if args.overwrite:
        for name in WRITTEN:
            target = args.output / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    elif path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        different = [
            f"{name} was {earlier.get(name)!r}, is now {settings.get(name)!r}"
            for name in dict.fromkeys([*earlier, *settings])
            if earlier.get(name) != settings.get(name)
        ]
        if different:
            raise FileExistsError(
                f"{args.output} holds a run with other settings: {'; '.join(different)}. "
                "Choose another --output, or --overwrite it."
            )
    elif (args.output / "preset").exists() or (args.output / "checkpoints").exists():
        raise FileExistsError(
            f"{args.output} holds another run, with settings unknown. Choose another --output, or --overwrite it."
        )


# === Examples ===


def _examples(args, preprocessor):
    """Examples to train and to validate on; the latter may be `None`."""
    from keras_gemma import data

    filters = [getattr(data, name)() for name in args.filter]
    if args.validation:
        # First, so that duplicates of them are dropped from what is trained on.
        validation, left_out = data.tuning_examples(_source(args.validation, args), preprocessor, filters)
        print(f"{', '.join(args.validation)}: {left_out}")
        dropped = {"validation": left_out.to_json()}
    else:
        validation, dropped = None, {}
    examples, left_out = data.tuning_examples(_source(args.data, args), preprocessor, filters)
    print(f"{', '.join(args.data)}: {left_out}")
    write_file(args.output / "dropped.json", json.dumps({**dropped, "training": left_out.to_json()}, indent=2))
    if validation is None:
        share = VALIDATION_SHARE if args.validation_share is None else args.validation_share
        examples, validation = _split(examples, share)
    return examples, validation


def _split(examples, share):
    """Examples to train on, and a share of them, spread evenly, to validate on; `None` where there is none."""
    if not share or len(examples) < 2:
        return examples, None
    every = max(2, round(1 / share))
    return [example for i, example in enumerate(examples) if i % every], examples[::every]


def _source(paths, args):
    from keras_gemma import data
    from keras_gemma.data.sources import with_origin

    renamed = _fields(args)
    for path in paths:
        for example in data.from_any(path):
            picked = {name: example[field] for name, field in renamed.items() if field in example}
            yield with_origin(picked, example) if renamed else example


def _fields(args):
    """From the names that examples shall have to those in the files."""
    if args.messages:
        return {"messages": args.messages}
    if args.prompts or args.responses:
        return {"prompts": args.prompts or "prompts", "responses": args.responses or "responses"}
    return {}


# === Results ===


def _outcome(history):
    if "val_perplexity" not in history:
        return f"perplexity of responses: {history['perplexity'][-1]:.2f}"
    best = min(range(len(history["val_loss"])), key=history["val_loss"].__getitem__)
    perplexity = history["val_perplexity"][best]
    return (
        f"perplexity of responses held out: {perplexity:.2f}, at evaluation {best + 1} of {len(history['val_loss'])}, "
        "whose weights are kept"
    )


def _show_samples(model, examples):
    """Prints what the tuned model answers to a few prompts, spread over the examples."""
    chosen = examples[:: max(1, len(examples) // SAMPLES)][:SAMPLES]
    prompts = [_prompt_of(example) for example in chosen]
    room = model.preprocessor.sequence_length
    for prompt in prompts:
        new_tokens = min(SAMPLE_TOKENS, room - len(model.preprocessor.prompt_ids(prompt)))
        if new_tokens < 1:
            continue
        answer = model.generate(prompt, max_new_tokens=new_tokens, strip_prompt=True)
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"sample: {_in_one_line(asked)}\n     -> {_in_one_line(answer)}")


def _prompt_of(example):
    """What an example asks: its prompt, or its dialogue up to the model's last turn."""
    if isinstance(example, dict):
        return example["prompts"]
    return example[:-1]


def _in_one_line(text, width=90):
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _finite(history):
    """The history with nothing in place of NaN, which is no JSON."""
    return {
        name: [value if math.isfinite(value) else None for value in map(float, values)]
        for name, values in history.items()
    }


def _draw(history, path):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    evaluations = range(1, len(history["perplexity"]) + 1)
    axes.plot(evaluations, history["perplexity"], marker="o", label="trained on")
    if "val_perplexity" in history:
        axes.plot(evaluations, history["val_perplexity"], marker="o", label="held out")
    axes.set_xlabel("epoch or evaluation")
    axes.set_ylabel("perplexity of responses")
    axes.legend(frameon=False)
    figure.savefig(path)
