"""`keras-gemma inspect`: what a checkpoint holds, and whether its numbers look sane."""

from keras_gemma.commands import checks
from keras_gemma.commands.arguments import add_command
from keras_gemma.commands.arguments import without_backend


class DoubtfulError(Exception):
    """A checkpoint whose numbers cannot be right."""


def add(commands):
    parser = add_command(
        commands,
        "inspect",
        run,
        help="say what a checkpoint holds",
        description="Says format, size, shapes, dtypes, parameters and tokenizer of a checkpoint, how much memory it "
        "takes to load, generate and train, and whether its numbers look sane. The exit status is 1 where they do not.",
        epilog="""\
Activations come on top of the memory that is said, and on a CPU copies that its compiler makes: of bfloat16 weights
up to three more.""",
    )
    parser.add_argument("path", help="file, folder, kaggle:// or hf:// handle, or name of a preset")
    parser.add_argument("--no-numbers", dest="numbers", action="store_false", help="do not read the tensors")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(args):
    checks.check_checkpoint(args.path)
    without_backend()
    from keras_gemma.checkpoints import inspect

    found = inspect(args.path, args.numbers)
    print(found.to_json() if args.json else found)
    if found.doubts:
        raise DoubtfulError(f"{args.path} does not look sane: {'; '.join(found.doubts)}")
