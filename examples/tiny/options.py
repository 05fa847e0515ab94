"""What the command lines of several examples have in common."""

import argparse


def named(convert):
    """What `argparse` turns `NAME=VALUE` into a pair with, the value converted."""

    def pair(text):
        name, _, value = text.partition("=")
        if not (name and value):
            raise argparse.ArgumentTypeError(f"NAME=VALUE is expected. Received: {text!r}")
        return name, convert(value)

    return pair
