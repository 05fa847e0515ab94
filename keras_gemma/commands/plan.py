"""`keras-gemma plan`: a step compiled for TPUs that need not be there."""

import os
import sys

from keras_gemma.commands import checks
from keras_gemma.commands.arguments import UsageError
from keras_gemma.commands.arguments import add_command
from keras_gemma.commands.arguments import mesh_name
from keras_gemma.commands.arguments import positive_int
from keras_gemma.commands.arguments import without_backend

# What a search has no use for: it trains, and chooses the rest.
SEARCHED = ("context", "model", "accumulate", "recompute", "phase", "lora_rank")


class DoesNotFitError(Exception):
    """A plan for too little memory."""


def add(commands):
    parser = add_command(
        commands,
        "plan",
        run,
        help="compile training or generation for TPUs that you do not have",
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
        type=mesh_name,
        default="gemma_2b_v5e_16",
        help="name in keras_gemma.distribution; an unknown one lists them (default: %(default)s)",
    )
    parser.add_argument(
        "--sequence-length", type=positive_int, default=8192, metavar="T", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="B",
        help="rows of all devices together (default: one per device that shares the batch)",
    )
    _add_plan_settings(parser)
    parser.add_argument(
        "--search",
        type=positive_int,
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
        type=positive_int,
        metavar="C",
        help="devices among which the tokens of a row are cut, of those that share a batch (default: 1)",
    )
    parser.add_argument(
        "--recompute",
        choices=("none", "dots", "block"),
        help="which activations to recompute (default: block)",
    )
    parser.add_argument(
        "--phase",
        choices=("train", "prefill", "decode"),
        help="a step of training, the prefill of a batch of prompts, or a token more for each row when the cache is "
        "full (default: train; prefill, then decode, for a configuration for serving)",
    )
    parser.add_argument(
        "--model",
        type=positive_int,
        metavar="M",
        help="length of the model axis in place of the configuration's; the data axis has the rest of a pod",
    )
    parser.add_argument(
        "--accumulate",
        type=positive_int,
        metavar="A",
        help="microbatches that a step is cut into, one in memory at a time (default: 1)",
    )
    parser.add_argument(
        "--lora-rank",
        type=positive_int,
        metavar="R",
        help="train adapters of this rank and no other weight (default: 8 for a configuration for adapters, else none)",
    )


def run(args):
    refuse_settings_of_a_search(args)
    checks.check_preset(args.preset)
    # The TPU that a program is compiled for is not the one to run on.
    without_backend()
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
