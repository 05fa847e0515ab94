"""What several commands take, and how wrong usage is reported: in one line."""

import argparse
import difflib
import math
import os
import re

from keras_gemma import startup
from keras_gemma.commands import checks
from keras_gemma.mesh_table import MESHES

DEFAULT_PRESET = "gemma_tiny_en"
# What each name of `--sampler` stands for, and the options that go with it.
SAMPLERS = {
    "greedy": ({"temperature": 0.0}, ()),
    "random": ({"temperature": 1.0}, ("temperature",)),
    "top_k": ({"top_k": 40}, ("temperature", "top_k")),
    "top_p": ({"top_p": 0.9}, ("temperature", "top_p")),
}
SHAPING = ("temperature", "top_k", "top_p", "min_p")
WRONG_USAGE = 2


class UsageError(Exception):
    """A wrong combination of arguments that argparse cannot see."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the command that helps."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        # A shortened option would change its meaning when a new one is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(WRONG_USAGE, f"{self.prog}: error: {message}{_suggestion(self, message)} (see {self.prog} --help)\n")


def _suggestion(parser, message):
    """The option or choice that was probably meant."""
    unknown = re.search(r"unrecognized arguments: (--[\w-]+)|invalid choice: '([^']+)'", message)
    if unknown is None:
        return ""
    typed = unknown[1] or unknown[2]
    if unknown[1]:
        valid = list(parser._option_string_actions)
    else:
        valid = re.findall(r"[\w.]+", message.partition("choose from")[2])
    closest = difflib.get_close_matches(typed, valid, n=1)
    return f"; did you mean {closest[0]}?" if closest else ""


def add_command(commands, name, run, help, description, epilog=None):
    """Adds the parser of a command."""
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run, parser=parser)
    return parser


# === Types ===


def positive_int(text):
    value = _number(int, text, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, received {text}")
    return value


def not_negative_int(text):
    value = _number(int, text, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, received {text}")
    return value


def positive_float(text):
    value = _number(float, text, "a number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, received {text}")
    return value


def not_negative_float(text):
    value = _number(float, text, "a number")
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, received {text}")
    return value


def share(text):
    value = _number(float, text, "a number")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, received {text}")
    return value


def share_or_none(text):
    value = _number(float, text, "a number")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, received {text}")
    return value


def seed(text):
    value = _number(int, text, "a whole number")
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**32 - 1}, received {text}")
    return value


def stop_text(text):
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def mesh_name(text):
    if text not in MESHES:
        closest = difflib.get_close_matches(text, MESHES, n=1)
        hint = f"did you mean {closest[0]}? " if closest else ""
        raise argparse.ArgumentTypeError(f"no configuration {text!r}; {hint}configurations are {', '.join(MESHES)}")
    return text


def _number(kind, text, wanted):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {wanted}, received {text!r}") from None


# === Model ===


def add_model_options(parser, default=DEFAULT_PRESET):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset",
        default=default,
        help="name (see `keras-gemma presets`), folder, or kaggle:// or hf:// handle (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=checks.DTYPES,
        metavar="DTYPE",
        help=f"dtype of weights and activations: {', '.join(checks.DTYPES)} (default: float32)",
    )
    group.add_argument(
        "--backend",
        choices=("jax", "tensorflow", "torch"),
        help="backend of Keras (default: $KERAS_BACKEND, else jax)",
    )


def load_model(args):
    """The model that the arguments name."""
    choose_backend(args)
    from keras_gemma import GemmaCausalLM

    options = {} if args.dtype is None else {"dtype": args.dtype}
    return GemmaCausalLM.from_preset(args.preset, **options)


def choose_backend(args):
    """Sets the backend before Keras is imported, and leaves out TensorFlow where it is not the backend."""
    if args.backend is not None:
        os.environ["KERAS_BACKEND"] = args.backend
    startup.leave_out_tensorflow()


def without_backend():
    """Takes no accelerator and loads no TensorFlow, for what is done with files."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["KERAS_BACKEND"] = "jax"
    startup.leave_out_tensorflow()


# === Sampling ===


def add_sampling_options(parser):
    group = parser.add_argument_group(
        "sampling",
        "Without options, the sampler that the preset was saved with is used, otherwise the likeliest token, as in "
        "Python.",
    )
    add = group.add_argument
    add(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="limit of new tokens (default: 128)",
    )
    add(
        "--temperature",
        type=not_negative_float,
        metavar="T",
        help="below 1 less varied, above 1 more, 0 greedy",
    )
    add("--top-k", "--k", type=positive_int, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", "--p", type=share, metavar="P", help="sample among the likeliest tokens that sum to P")
    add("--min-p", type=share, metavar="P", help="sample among tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=positive_float, metavar="R", help="above 1 avoids tokens that came before")
    add(
        "--stop",
        action="append",
        type=stop_text,
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    add("--sampler", choices=SAMPLERS, help="shorthand: greedy, random, top_k (K 40) or top_p (P 0.9)")
    add("--seed", type=seed, metavar="S", help="makes the text repeatable (default: a new one each time)")


def sampling_options(args):
    """Keyword arguments of `generate` and `stream`: what the arguments say, and nothing else.

    Raises:
        UsageError: for an option that the sampler does not know.
    """
    given = {name: getattr(args, name) for name in SHAPING if getattr(args, name) is not None}
    if args.sampler is not None:
        defaults, known = SAMPLERS[args.sampler]
        for name in given:
            if name not in known:
                option = name.replace("_", "-")
                raise UsageError(f"argument --{option}: the sampler {args.sampler} does not take it")
        given = {**defaults, **given}
    others = {"repetition_penalty": args.repetition_penalty, "stop": args.stop, "seed": args.seed}
    given |= {name: value for name, value in others.items() if value is not None}
    return {"max_new_tokens": args.max_new_tokens, **given}
