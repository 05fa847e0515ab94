"""The `keras-gemma` command. Keras is imported when a command has checked its arguments, not before."""

import os
import sys

from keras_gemma import __version__
from keras_gemma import startup
from keras_gemma.commands import chat
from keras_gemma.commands import convert
from keras_gemma.commands import generate
from keras_gemma.commands import inspect
from keras_gemma.commands import plan
from keras_gemma.commands import presets
from keras_gemma.commands import sft
from keras_gemma.commands import vocabulary
from keras_gemma.commands.arguments import DEFAULT_PRESET
from keras_gemma.commands.arguments import Parser
from keras_gemma.commands.arguments import UsageError
from keras_gemma.commands.failures import sentence_of

COMMANDS = (generate, chat, presets, inspect, convert, sft, vocabulary, plan)
FAILURE = 1
INTERRUPTED = 130


def main(argv=None):
    """Runs one command and returns the exit status: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        # Here, because argparse would report them without the command that they were meant for.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
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
        print(f"keras-gemma: error: {sentence_of(error)}", file=sys.stderr)
        return FAILURE


def build_parser():
    parser = Parser(
        prog="keras-gemma",
        description="Gemma language models in Keras: generate text, chat, fine-tune, convert and inspect checkpoints, "
        "train vocabularies, and plan training on TPUs.",
        epilog=f"""\
examples:
  keras-gemma generate "The old man went"
  keras-gemma generate --sampler greedy --max-new-tokens 40 "Once upon" "It is"
  cat letter.txt | keras-gemma generate --strip-prompt -
  keras-gemma chat --preset gemma_1.1_instruct_2b_en
  keras-gemma presets
  keras-gemma convert gemma_tiny_en tiny.gguf
  keras-gemma inspect tiny.gguf
  keras-gemma sft pairs.jsonl --output tuned
  keras-gemma vocabulary books/ --output vocabulary.spm
  keras-gemma plan --preset gemma_7b_en --config gemma_7b_v5e_4096

Without --preset, commands use {DEFAULT_PRESET}, a small model that comes with the package and needs no download.
`keras-gemma COMMAND --help` describes the options of a command.""",
    )
    parser.add_argument("--version", action="version", version=f"keras-gemma {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
