"""The `keras-gemma` command. Keras is imported when a command runs, not to print help."""

import argparse
import os
import sys
from pathlib import Path

from keras_gemma import __version__
from keras_gemma import startup

DEFAULT_PRESET = "gemma_tiny_en"
# The options that each sampler knows, and its class in keras_hub.samplers.
SAMPLERS = {
    "greedy": ("GreedySampler", ()),
    "random": ("RandomSampler", ("temperature",)),
    "top_k": ("TopKSampler", ("temperature", "k")),
    "top_p": ("TopPSampler", ("temperature", "p")),
}
CHAT_COMMANDS = """\
  /reset  forgets the dialogue
  /quit   ends (so do Ctrl-D and Ctrl-C)"""

# What `plan` takes and a search has no use for: it trains, and chooses the rest.
SEARCHED = ("context", "model", "accumulate", "recompute", "phase", "lora_rank")

FAILURE = 1
INTERRUPTED = 130


def main(argv=None):
    """Runs one command and returns the exit status: 0, 1 for a failure, 2 for wrong usage."""
    args = build_parser().parse_args(argv)
    startup.silence_libraries()
    try:
        args.run(args)
        return 0
    except UsageError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if args.traceback:
            raise
        print(f"keras-gemma: error: {_one_line(error)}", file=sys.stderr)
        return FAILURE


class UsageError(Exception):
    """A wrong combination of arguments that argparse cannot see."""


class DoubtfulError(Exception):
    """A checkpoint whose numbers cannot be right."""


class DoesNotFitError(Exception):
    """A plan for too little memory."""


def _one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


# === Arguments ===


def build_parser():
    parser = argparse.ArgumentParser(
        prog="keras-gemma",
        description="Gemma language models in Keras: generate text, chat, list presets, plan training on TPUs, convert "
        "and inspect checkpoints, tune on prompts and responses.",
        epilog=f"""\
examples:
  keras-gemma generate "The old man went"
  keras-gemma generate --sampler greedy --max-new-tokens 40 "Once upon" "It is"
  cat letter.txt | keras-gemma generate --strip-prompt -
  keras-gemma chat --preset gemma_1.1_instruct_2b_en
  keras-gemma presets
  keras-gemma plan --preset gemma_7b_en --config gemma_7b_v5e_4096
  keras-gemma convert gemma_tiny_en tiny.gguf
  keras-gemma inspect tiny.gguf
  keras-gemma sft pairs.jsonl --output tuned

Without --preset, commands use {DEFAULT_PRESET}, a small model that comes with the package and needs no download.
`keras-gemma COMMAND --help` describes the options of a command.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-gemma {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_presets(commands)
    _add_plan(commands)
    _add_convert(commands)
    _add_inspect(commands)
    _add_sft(commands)
    return parser


def _add_generate(commands):
    parser = _add_command(
        commands,
        generate,
        help="continue prompts",
        description="Continues each prompt and prints it with its continuation.",
        epilog="""\
examples:
  keras-gemma generate "The old man went"
  keras-gemma generate --sampler top_k --k 20 --temperature 0.7 --seed 1 "The old man went"
  echo "The old man went" | keras-gemma generate -""",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue; - reads it from standard input")
    _add_model_options(parser)
    _add_sampling_options(parser)
    parser.add_argument("--strip-prompt", action="store_true", help="print the continuation alone")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print text as it comes; --no-stream decodes all prompts as one batch (default: stream)",
    )


def _add_chat(commands):
    parser = _add_command(
        commands,
        chat,
        help="hold a dialogue",
        description="Holds a dialogue: one message a line on standard input, the reply as it comes.",
        epilog=f"commands inside the dialogue:\n{CHAT_COMMANDS}\n\n"
        "Instruction-tuned presets answer; any other preset goes on with the text in its own way.",
    )
    _add_model_options(parser)
    _add_sampling_options(parser)


def _add_presets(commands):
    _add_command(
        commands,
        presets,
        help="list the presets",
        description="Lists the presets that --preset takes by name, with their size and where their weights are.",
    )


def _add_plan(commands):
    parser = _add_command(
        commands,
        plan,
        help="compile training or generation for TPUs that need not be there",
        description="Compiles the step that `fit` runs on a configuration, or prefill and decoding of `generate`, with "
        "the TPU's own compiler and no TPU, and says whether it fits, what it computes and sends, and how fast it can "
        "be at best. Takes minutes.",
        epilog="""\
examples:
  keras-gemma plan --preset gemma_2b_en --config gemma_2b_v5e_16
  keras-gemma plan --preset gemma_7b_en --config gemma_7b_v5e_4096 --sequence-length 8192 --batch-size 4096 --json
  keras-gemma plan --preset gemma_7b_en --config gemma_7b_v5e_8_serving --batch-size 16
  keras-gemma plan --preset gemma_2b_en --config gemma_2b_v5e_16 --search

The exit status is 1 where it does not fit. Needs libtpu: pip install 'keras_gemma[plan]'""",
    )
    parser.add_argument("--preset", default="gemma_2b_en", help="name or folder (default: %(default)s)")
    parser.add_argument(
        "--config",
        default="gemma_2b_v5e_16",
        help="name in keras_gemma.distribution; an unknown one lists them (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence-length", type=_positive_int, default=8192, metavar="T", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=_positive_int,
        metavar="B",
        help="rows of all devices together (default: one a part)",
    )
    _add_plan_settings(parser)
    parser.add_argument(
        "--search",
        type=_positive_int,
        nargs="?",
        const=4,
        metavar="N",
        help="look for the model axis, recomputation, and batch or microbatches that train fastest on the chips of "
        "--config, compiling at most N programs (4 unless said otherwise)",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, an object for each program")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw memory and times, as plan.png (of several phases plan.prefill.png …)",
    )


def _add_plan_settings(parser):
    parser.add_argument(
        "--context",
        type=_positive_int,
        metavar="C",
        help="devices among which the tokens of a row are cut, of those that share a batch (default: 1)",
    )
    parser.add_argument(
        "--recompute",
        choices=("none", "dots", "block"),
        help="what is not kept (default: block)",
    )
    parser.add_argument(
        "--phase",
        choices=("train", "prefill", "decode"),
        help="a step of training, the prefill of a batch of prompts, or a token more for each row when the cache is "
        "full (default: train; prefill, then decode, for a configuration for serving)",
    )
    parser.add_argument(
        "--model",
        type=_positive_int,
        metavar="M",
        help="length of the model axis in place of the configuration's; the data axis has the rest of a pod",
    )
    parser.add_argument(
        "--accumulate",
        type=_positive_int,
        metavar="A",
        help="microbatches that a step is cut into, one in memory at a time (default: 1)",
    )
    parser.add_argument(
        "--lora-rank",
        type=_positive_int,
        metavar="R",
        help="train adapters of this rank and no other weight (default: 8 for a configuration for adapters, else none)",
    )


def _add_convert(commands):
    parser = _add_command(
        commands,
        convert,
        help="write a model in another format",
        description="Writes a model in another format, a tensor at a time. Numbers keep their dtype unless --dtype "
        "asks for another. Nothing takes the target's name before all of it is written.",
        epilog="""\
formats:
  keras          folders of presets           flax       folders of google-deepmind/gemma, Orbax
  keras_weights  a single .weights.h5 file    pytorch    .bin of Hugging Face, .ckpt of gemma_pytorch; read only
  hugging_face   folders with safetensors     gguf       files of llama.cpp

examples:
  keras-gemma convert gemma_tiny_en tiny.gguf
  keras-gemma convert hf://google/gemma-2b gemma_2b --to keras --dtype bfloat16
  keras-gemma convert gemma-7b.gguf gemma-7b --to hugging_face --max-shard-size 5""",
    )
    parser.add_argument("source", help="file, folder, kaggle:// or hf:// handle, or name of a preset")
    parser.add_argument("target", help="path that does not exist yet")
    parser.add_argument("--to", metavar="FORMAT", help="of the target, where .gguf or .weights.h5 do not say it")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; for GGUF q8_0 too (default: as it is)")
    parser.add_argument(
        "--max-shard-size",
        type=_positive_float,
        metavar="GB",
        help="of a file of keras and hugging_face (default: 10)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece model, where the source has none")


def _add_inspect(commands):
    parser = _add_command(
        commands,
        inspect,
        help="say what a checkpoint holds",
        description="Says format, shapes, dtypes, parameters and tokenizer of a checkpoint, and whether its numbers "
        "look sane. The exit status is 1 where they do not.",
    )
    parser.add_argument("path", help="file, folder, kaggle:// or hf:// handle, or name of a preset")
    parser.add_argument("--no-numbers", dest="numbers", action="store_false", help="do not read the tensors")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def _add_sft(commands):
    parser = _add_command(
        commands,
        sft,
        help="tune a model on prompts and responses, or on dialogues",
        description="Tunes a model on what it should answer: reads and filters examples, says what it dropped and why, "
        "trains all weights or adapters, keeps the best epoch, and writes a preset. Killed, the same command goes on.",
        epilog="""\
examples:
  keras-gemma sft pairs.jsonl --output tuned
  keras-gemma sft chat.parquet --messages conversation --preset gemma_2b_en --rank 16 --dtype bfloat16 --output tuned
  keras-gemma sft tfds:gem/common_gen:train --prompts concepts --responses target --filter duplicates --output tuned

Needs the extra `train`, and for --filter `filters`: pip install 'keras_gemma[train,filters]'""",
    )
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help=".jsonl, .parquet or .array_record file, or tfds:NAME:SPLIT"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the preset and all else")
    parser.add_argument("--validation", nargs="+", metavar="DATA", help="examples held out, in place of a share")
    parser.add_argument(
        "--validation-share", type=float, metavar="S", help="share of the examples held out, 0 for none (default: 0.05)"
    )
    fields = parser.add_argument_group("fields, where they have other names")
    fields.add_argument("--prompts", metavar="FIELD", help="what is asked (default: prompts)")
    fields.add_argument("--responses", metavar="FIELD", help="what is to be answered (default: responses)")
    fields.add_argument("--messages", metavar="FIELD", help="dialogues in place of both (default: messages)")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        choices=("personal_data", "unsafe", "mistaken_identity", "duplicates"),
        help="drop such examples; may be given several times",
    )
    _add_model_options(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--rank", type=_positive_int, metavar="R", help="train adapters of this rank alone")
    training.add_argument("--epochs", type=_positive_int, default=3, metavar="N", help="(default: %(default)s)")
    training.add_argument(
        "--patience", type=_positive_int, metavar="N", help="end after so many epochs without a better one"
    )
    training.add_argument(
        "--batch-size", type=_positive_int, default=8, metavar="B", help="packed rows of a step (default: %(default)s)"
    )
    training.add_argument(
        "--accumulate", type=_positive_int, default=1, metavar="A", help="parts of a step (default: %(default)s)"
    )
    training.add_argument(
        "--sequence-length", type=_positive_int, metavar="T", help="of a row (default: that of the preset)"
    )
    training.add_argument(
        "--learning-rate", type=_positive_float, metavar="R", help="its peak (default: 2e-5, for adapters 2e-4)"
    )
    training.add_argument("--config", help="name in keras_gemma.distribution (default: one device)")
    training.add_argument("--seed", type=int, default=0, metavar="S", help="of adapters and order (default: 0)")


def _add_command(commands, run, help, description, epilog=None):
    parser = commands.add_parser(
        run.__name__,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_model_options(parser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset",
        default=DEFAULT_PRESET,
        help="name (see `keras-gemma presets`), folder, or kaggle:// or hf:// handle (default: %(default)s)",
    )
    group.add_argument("--dtype", help="dtype of the weights and activations, such as bfloat16 (default: the preset's)")
    group.add_argument(
        "--backend",
        choices=("jax", "tensorflow", "torch"),
        help="backend of Keras (default: $KERAS_BACKEND, else jax)",
    )


def _add_sampling_options(parser):
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=_positive_int, default=128, metavar="N", help="most tokens to write (default: 128)"
    )
    group.add_argument("--sampler", choices=SAMPLERS, default="top_p", help="how to choose (default: %(default)s)")
    group.add_argument(
        "--temperature", type=_temperature, metavar="T", help="above 1 is wilder, 0 is greedy (default: 1.0)"
    )
    group.add_argument("--k", type=_positive_int, metavar="K", help="top_k: among the K likeliest (default: 40)")
    group.add_argument("--p", type=_share, metavar="P", help="top_p: among the likeliest that sum to P (default: 0.9)")
    group.add_argument("--seed", type=int, metavar="S", help="makes the text repeatable (default: a new one each time)")


def _positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, received {text}")
    return value


def _positive_float(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, received {text}")
    return value


def _temperature(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, received {text}")
    return value


def _share(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, received {text}")
    return value


def sampler_arguments(args):
    """The name of the keras-hub sampler class and its arguments.

    Raises:
        UsageError: for an option that the sampler does not know.
    """
    class_name, known = SAMPLERS[args.sampler]
    given = {name: getattr(args, name) for name in ("temperature", "k", "p") if getattr(args, name) is not None}
    for name in given:
        if name not in known:
            raise UsageError(f"argument --{name}: the sampler {args.sampler} does not take it")
    defaults = {"temperature": 1.0, "k": 40, "p": 0.9}
    return class_name, {name: given.get(name, defaults[name]) for name in known}


# === Commands ===


def generate(args):
    sampling = sampling_options(args)
    prompts = [read_prompt(prompt) for prompt in args.prompts]
    model = load_model(args)
    sampling["sampler"] = build_sampler(args)
    if args.stream:
        texts = (stream_text(model, prompt, args.strip_prompt, sampling) for prompt in prompts)
    else:
        texts = model.generate(prompts, strip_prompt=args.strip_prompt, **sampling)
    for i, text in enumerate(texts):
        write(("\n" if i else ""), text, "\n")


def stream_text(model, prompt, strip_prompt, sampling):
    """Pieces of a prompt's text as they come."""
    if not strip_prompt:
        yield prompt
    yield from model.stream(prompt, **sampling)


def read_prompt(prompt):
    """The prompt itself, or for `-` what stands on standard input, without its last line end."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def write(*texts):
    """Writes strings and streams of strings, each piece at once."""
    for text in texts:
        for piece in [text] if isinstance(text, str) else text:
            sys.stdout.write(piece)
            sys.stdout.flush()


def chat(args):
    sampling = sampling_options(args)
    model = load_model(args)
    sampling["sampler"] = build_sampler(args)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{args.preset} listens.\n{CHAT_COMMANDS}", file=sys.stderr)
    try:
        hold_dialogue(model, "you> " if interactive else "", sampling)
    except (EOFError, KeyboardInterrupt):
        if interactive:
            print()


def hold_dialogue(model, prompt, sampling):
    """Answers line after line, until `/quit`."""
    messages = []
    while (line := input(prompt).strip()) != "/quit":
        if line == "/reset":
            messages = []
        elif line:
            messages = take_turn(model, messages, line, sampling)


def take_turn(model, messages, line, sampling):
    """Streams the reply to a line and returns the dialogue with both. A refused line leaves the dialogue as it was."""
    asked = drop_oldest(model, [*messages, {"role": "user", "content": line}], sampling["max_new_tokens"])
    reply = []
    try:
        for piece in model.stream(asked, **sampling):
            write(piece)
            reply.append(piece)
    except ValueError as error:
        print(f"keras-gemma: {_one_line(error)}", file=sys.stderr)
        return messages
    write("\n")
    return [*asked, {"role": "model", "content": without_markers("".join(reply))}]


def without_markers(reply):
    """A reply that can stand in a dialogue: a model that was not trained on turns may write their markers."""
    from keras_gemma.models.chat_format import END_OF_TURN
    from keras_gemma.models.chat_format import START_OF_TURN

    return reply.replace(START_OF_TURN, "").replace(END_OF_TURN, "")


def drop_oldest(model, messages, new_tokens):
    """The dialogue without its oldest exchanges, so that the model's sequence length leaves room for a reply."""
    room = model.preprocessor.sequence_length - new_tokens
    while len(messages) > 2 and len(model.preprocessor.prompt_ids(messages)) > room:
        messages = messages[2:]
    return messages


def presets(args):
    startup.leave_out_tensorflow()
    from keras_gemma.models.presets import known_presets

    rows = [("NAME", "PARAMETERS", "WEIGHTS", "DESCRIPTION")]
    rows += [preset_row(name, entry) for name, entry in known_presets().items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def preset_row(name, entry):
    weights = "download" if "kaggle_handle" in entry else "bundled"
    return name, readable_count(entry["metadata"]["params"]), weights, entry["metadata"]["description"]


def readable_count(parameters):
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.1f}M"


def plan(args):
    refuse_settings_of_a_search(args)
    # The TPU that a program is compiled for is not the one to run on.
    _without_backend()
    plans = searched_plans(args) if args.search else plans_of_phases(args)
    chosen = plans[:1] if args.search else plans
    if args.plot:
        plot(chosen, args.plot)
    for made in chosen:
        if not made.fits:
            raise DoesNotFitError(f"{made.preset} does not fit on {made.configuration}, {made.phase}")


def refuse_settings_of_a_search(args):
    given = [name.replace("_", "-") for name in SEARCHED if args.search and getattr(args, name) is not None]
    if given:
        raise UsageError(f"argument --{given[0]}: --search looks for settings of its own, without this one")


def plot(plans, path):
    """Draws one plan to `path`, and several to files that are called after their phases."""
    root, kind = os.path.splitext(path)
    for made in plans:
        made.plot(path if len(plans) == 1 else f"{root}.{made.phase}{kind}")


def plans_of_phases(args):
    from keras_gemma.planning import phases_of
    from keras_gemma.planning import plan

    plans = []
    given = {name: getattr(args, name) for name in SEARCHED if getattr(args, name) is not None}
    for phase in [args.phase] if args.phase else phases_of(args.config):
        arguments = (args.preset, args.config, args.sequence_length, args.batch_size)
        plans.append(plan(*arguments, **{**given, "phase": phase}))
        print(plans[-1].to_json() if args.json else plans[-1], flush=True)
    return plans


def searched_plans(args):
    from keras_gemma.planning import search

    def tell(made):
        print(f"compiled {made.settings}: {made.outcome}", file=sys.stderr, flush=True)

    plans = search(args.preset, args.config, args.sequence_length, args.batch_size, args.search, tell)
    if args.json:
        print("\n".join(made.to_json() for made in plans))
    else:
        print(plans[0])
        print(f"to run it: {plans[0].settings}")
    return plans


def convert(args):
    _without_backend()
    from keras_gemma.checkpoints import convert

    options = {"format": args.to, "dtype": args.dtype, "tokenizer": args.tokenizer}
    found = convert(args.source, args.target, max_shard_size=args.max_shard_size, **options)
    print(f"{args.target}: from {found.format}, {len(found.tensors)} tensors{_said_of_tokenizer(args, found)}")


def _said_of_tokenizer(args, found):
    from keras_gemma.checkpoints import gguf_file
    from keras_gemma.checkpoints import keras_weights

    if args.tokenizer or keras_weights.is_here(args.target) or found.proto() is not None:
        return ""
    is_gguf = gguf_file.is_here(args.target)
    return ", no tokenizer" + (": llama.cpp does not load it" if is_gguf else "")


def inspect(args):
    _without_backend()
    from keras_gemma.checkpoints import inspect

    found = inspect(args.path, args.numbers)
    print(found.to_json() if args.json else found)
    if found.doubts:
        raise DoubtfulError(f"{args.path} does not look sane: {'; '.join(found.doubts)}")


def sft(args):
    if args.backend is not None:
        os.environ["KERAS_BACKEND"] = args.backend
    from keras_gemma.commands import sft

    sft.run(args)


def _without_backend():
    """No accelerator is taken, and no TensorFlow loaded, for what is done with files."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["KERAS_BACKEND"] = "jax"
    startup.leave_out_tensorflow()


# === Loading ===


def sampling_options(args):
    sampler_arguments(args)
    return {"max_new_tokens": args.max_new_tokens, "seed": args.seed}


def load_model(args):
    if args.backend is not None:
        os.environ["KERAS_BACKEND"] = args.backend
    startup.leave_out_tensorflow()
    from keras_gemma import GemmaCausalLM

    options = {} if args.dtype is None else {"dtype": args.dtype}
    return GemmaCausalLM.from_preset(args.preset, **options)


def build_sampler(args):
    import keras_hub

    class_name, options = sampler_arguments(args)
    return getattr(keras_hub.samplers, class_name)(**options)


if __name__ == "__main__":
    sys.exit(main())
