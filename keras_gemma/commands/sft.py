"""`keras-gemma sft`: examples → what is dropped and why → `training.tune` → a preset.

OUTPUT/dropped.json        what was left out of the examples, and why
OUTPUT/checkpoints/        where a killed run goes on
OUTPUT/history.json        loss and metrics by epoch
OUTPUT/curve.png           the same as a picture, where matplotlib is installed
OUTPUT/adapters.lora.h5    with --rank
OUTPUT/preset/             the tuned model, adapters merged
"""

import json
from pathlib import Path

from keras_gemma import startup
from keras_gemma.staging import write_file

TFDS = "tfds:"


def run(args):
    """Tunes as the command's arguments say and prints what came of it."""
    _refuse_wrong_combinations(args)
    startup.leave_out_tensorflow()
    import keras

    from keras_gemma import GemmaCausalLM
    from keras_gemma import distribution
    from keras_gemma import training

    keras.utils.set_random_seed(args.seed)
    if args.config:
        keras.distribution.set_distribution(distribution.configuration(args.config)())
    model = GemmaCausalLM.from_preset(args.preset, dtype=args.dtype, sequence_length=args.sequence_length)
    examples, validation = _examples(args, model.preprocessor)
    args.output.mkdir(parents=True, exist_ok=True)
    history = training.tune(
        model,
        examples,
        validation,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lora_rank=args.rank,
        learning_rate=args.learning_rate,
        gradient_accumulation_steps=args.accumulate,
        patience=args.patience,
        checkpoints=args.output / "checkpoints",
        verbose=2,
    ).history
    write_file(args.output / "history.json", json.dumps(history, indent=2))
    _draw(history, args.output / "curve.png")
    if args.rank is not None:
        model.backbone.save_lora_weights(str(args.output / "adapters.lora.h5"))
    model.save_to_preset(args.output / "preset")
    print(_outcome(history))
    print(f"preset: {args.output / 'preset'}")


def _refuse_wrong_combinations(args):
    if args.messages and (args.prompts or args.responses):
        raise ValueError("Dialogues have --messages, pairs have --prompts and --responses. Received both.")
    if args.validation and args.validation_share is not None:
        raise ValueError("Give --validation or --validation-share. Received both.")
    share = args.validation_share
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"--validation-share is at least 0 and below 1. Received: {share}")


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
        examples, validation = _split(examples, 0.05 if args.validation_share is None else args.validation_share)
    return examples, validation


def _split(examples, share):
    """Examples to train on, and a share of them, spread evenly, to validate on; `None` where there is none."""
    if not share or len(examples) < 2:
        return examples, None
    every = max(2, round(1 / share))
    return [example for i, example in enumerate(examples) if i % every], examples[::every]


def _source(paths, args):
    from keras_gemma import data

    renamed = _fields(args)
    for path in paths:
        if path.startswith(TFDS):
            name, _, split = path.removeprefix(TFDS).partition(":")
            source = data.from_tfds(name, split or "train")
        else:
            source = _reader(path)(path)
        for example in source:
            yield {name: example[field] for name, field in renamed.items() if field in example} if renamed else example


def _fields(args):
    """From the names that examples shall have to those in the files."""
    if args.messages:
        return {"messages": args.messages}
    if args.prompts or args.responses:
        return {"prompts": args.prompts or "prompts", "responses": args.responses or "responses"}
    return {}


def _reader(path):
    from keras_gemma import data

    readers = {".jsonl": data.from_jsonl, ".parquet": data.from_parquet, ".array_record": data.from_array_record}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise ValueError(f"Examples lie in files of {', '.join(readers)}, or in {TFDS}NAME:SPLIT. Received: {path}")
    return readers[suffix]


# === Results ===


def _outcome(history):
    if "val_perplexity" not in history:
        return f"perplexity of responses: {history['perplexity'][-1]:.2f}"
    best = min(range(len(history["val_loss"])), key=history["val_loss"].__getitem__)
    perplexity = history["val_perplexity"][best]
    return f"perplexity of responses held out: {perplexity:.2f}, after epoch {best + 1} of {len(history['val_loss'])}"


def _draw(history, path):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = range(1, len(history["perplexity"]) + 1)
    axes.plot(epochs, history["perplexity"], marker="o", label="trained on")
    if "val_perplexity" in history:
        axes.plot(epochs, history["val_perplexity"], marker="o", label="held out")
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity of responses")
    axes.legend(frameon=False)
    figure.savefig(path)
