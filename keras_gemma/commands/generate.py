"""`keras-gemma generate`: prompts continued."""

import argparse
import sys

from keras_gemma.commands import checks
from keras_gemma.commands.arguments import add_command
from keras_gemma.commands.arguments import add_model_options
from keras_gemma.commands.arguments import add_sampling_options
from keras_gemma.commands.arguments import load_model
from keras_gemma.commands.arguments import sampling_options


def add(commands):
    parser = add_command(
        commands,
        "generate",
        run,
        help="continue prompts",
        description="Continues each prompt and prints it with its continuation.",
        epilog="""\
examples:
  keras-gemma generate "The old man went"
  keras-gemma generate --top-k 20 --temperature 0.7 --seed 1 "The old man went"
  echo "The old man went" | keras-gemma generate -""",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue; - reads it from standard input")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--strip-prompt", action="store_true", help="print the continuation alone")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print text as it comes; --no-stream decodes all prompts as one batch (default: stream)",
    )


def run(args):
    sampling = sampling_options(args)
    checks.check_preset(args.preset)
    prompts = [read_prompt(prompt) for prompt in args.prompts]
    model = load_model(args)
    if args.stream:
        texts = (stream_text(model, prompt, args.strip_prompt, sampling) for prompt in prompts)
    else:
        texts = model.generate(prompts, strip_prompt=args.strip_prompt, **sampling)
    for i, text in enumerate(texts):
        write(("\n" if i else ""), text, "\n")


def stream_text(model, prompt, strip_prompt, sampling):
    """Pieces of a prompt's text as they come."""
    # Checks its arguments at once, before anything is printed.
    pieces = model.stream(prompt, **sampling)
    if not strip_prompt:
        yield prompt
    yield from pieces


def read_prompt(prompt):
    """The prompt itself, or for `-` what stands on standard input, without its last line end."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def write(*texts):
    """Writes strings and streams of strings, each piece at once."""
    for text in texts:
        for piece in [text] if isinstance(text, str) else text:
            sys.stdout.write(piece)
            sys.stdout.flush()
