"""What the command lines of several examples have in common."""

import argparse
import sys
from pathlib import Path


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
