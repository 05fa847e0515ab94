"""What the command lines of several examples have in common."""

import argparse
import sys
from pathlib import Path

OF_PRETRAINING = {
    "sequence_length": "tokens of a row",
    "batch_size": "rows of a step, on all hosts together",
    "accumulate": "parts of a step, one of which is in memory at a time",
    "epochs": "stretches that fit reports on",
    "steps_per_epoch": "steps of a stretch",
    "save_every": "steps from one checkpoint to the next",
    "learning_rate": "its peak",
}


class Options(argparse.ArgumentParser):
    """Options whose help gives their defaults.

    Args:
        description: string, shown as it is.
    """

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(self, name, default, help, **kwargs):
        """An option of the type of its default, unless another is given."""
        kwargs.setdefault("type", type(default))
        self.add_argument(name, default=default, help=f"{help} (default: %(default)s)", **kwargs)

    def pairs(self, name, convert, metavar, help):
        """An option that may be given several times, as `NAME=VALUE` with another name each time."""
        self.add_argument(name, action=OncePerName, type=named(convert), default=[], metavar=metavar, help=help)

    def of_pretraining(self, **defaults):
        """What every run of pretraining asks for.

        Args:
            **defaults: of `sequence_length`, `batch_size`, `accumulate`, `epochs`, `steps_per_epoch`, `save_every` and
                `learning_rate`.
        """
        for name, help in OF_PRETRAINING.items():
            self.option(f"--{name.replace('_', '-')}", defaults[name], help)
        self.option("--seed", 0, "of weights and order")
        self.add_argument("--tensorboard", metavar="FOLDER", help="for event files")


class OncePerName(argparse.Action):
    """Collects pairs `NAME=VALUE`, none of whose names comes twice."""

    def __call__(self, parser, namespace, pair, option_string=None):
        pairs = getattr(namespace, self.dest)
        if pair[0] in dict(pairs):
            raise argparse.ArgumentError(self, f"each NAME is given once. Received: {pair[0]!r} twice")
        setattr(namespace, self.dest, [*pairs, pair])


def named(convert):
    """What `argparse` turns `NAME=VALUE` into a pair with, the value converted."""

    def pair(text):
        name, _, value = text.partition("=")
        if not (name and value):
            raise argparse.ArgumentTypeError(f"NAME=VALUE is expected. Received: {text!r}")
        return name, convert(value)

    return pair


def run(main, options, if_stopped="stopped"):
    """`main(options)`; what goes wrong is one line and an exit status.

    Args:
        main: callable of the options.
        options: of `argparse`.
        if_stopped: string, said to who presses Ctrl-C.
    """
    name = Path(sys.argv[0]).name
    try:
        main(options)
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        sys.exit(f"{name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {if_stopped}")
