"""The programs of a phase: what is compiled, from which shapes, and how often it runs.

train     one step of `fit`
prefill   prompts → a cache, block by block as `generate` does it
decode    one more token for each row, with the cache full
"""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras_gemma import generation
from keras_gemma.planning import abstract
from keras_gemma.training.flops import forward_flops_per_token
from keras_gemma.training.flops import training_flops_per_token

TRAIN, PREFILL, DECODE = "train", "prefill", "decode"


class Work(NamedTuple):
    """A program of a phase.

    Attributes:
        function: callable of `arguments`.
        arguments: tuple of trees of `jax.ShapeDtypeStruct`.
        donated: tuple of positions in `arguments`.
        out_shardings: tree of shardings, or `None` for those that the compiler chooses.
        runs: int. How often the phase runs it.
        beside: int. Bytes that a device holds meanwhile, besides the arguments.
        turn_of_loop: bool. Whether the phase is one turn of the program's loop.
    """

    function: Callable
    arguments: tuple
    donated: tuple = ()
    out_shardings: Any = None
    runs: int = 1
    beside: int = 0
    turn_of_loop: bool = False


class Phase(NamedTuple):
    """What a phase runs and keeps.

    Attributes:
        works: list of `Work`.
        kept: dict of bytes that a device holds throughout, by what they are.
        rows, columns: ints. The sizes that are compiled for.
        model_flops: float. Operations of the model, of all devices together.
    """

    works: list
    kept: dict
    rows: int
    columns: int
    model_flops: float


def of_training(model, rows, columns):
    """The step that `fit` runs. See `Phase`."""
    state, batch = abstract.state_of(model), abstract.batch_of(rows, columns)
    trainable, others, optimizer, metrics = state
    step = Work(model.train_step, (state, batch), (0,), (None, abstract.shardings_of(state)))
    kept = {
        "weights": abstract.bytes_on_a_device([trainable, others, metrics]),
        "optimizer": abstract.bytes_on_a_device(optimizer),
        "batch": abstract.bytes_on_a_device(batch),
    }
    share = _size(model.backbone.trainable_weights) / _size(model.backbone.weights)
    per_token = training_flops_per_token(model.backbone.get_config(), columns, causal=True, trainable_share=share)
    return Phase([step], kept, rows, columns, per_token * rows * columns)


def _size(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def of_prefill(model, rows, columns):
    """Filling the cache from prompts. See `Phase`."""
    rows, columns = generation.batch_bucket(rows), generation.prompt_bucket(columns)
    network = generation.LayerNetwork(model.backbone)
    weights, cache = abstract.weights_of(network), abstract.cache_of(model.backbone, rows, columns)
    token_ids, first_column = abstract.of_batch((rows, columns)), cache["first_column"]
    x = abstract.of_batch((rows, columns, model.backbone.hidden_dim), model.backbone.compute_dtype)
    kept = {"weights": abstract.bytes_on_a_device(weights), "cache": abstract.bytes_on_a_device(cache)}
    block, ends = weights["blocks"][-1], weights["ends"]
    of_block, of_ends = abstract.bytes_on_a_device(block), abstract.bytes_on_a_device(ends)
    # The cache grows by what a block returns.
    others = kept["weights"] + kept["cache"] - abstract.bytes_on_a_device(cache["layers"][-1])
    layers = len(weights["blocks"])
    works = [
        Work(generation.make_embed(network), (ends, token_ids), beside=kept["weights"] - of_ends),
        Work(
            generation.make_block(network, 0, columns),
            (block, x, first_column),
            runs=layers - 1,
            beside=others - of_block,
        ),
        Work(
            generation.make_last_block(network, layers - 1, columns), (block, x, first_column), beside=others - of_block
        ),
    ]
    # The last block is run for its keys and values only.
    config = {**model.backbone.get_config(), "num_layers": layers - 1}
    flops = forward_flops_per_token(config, (columns + 1) / 2, logits=False) * rows * columns
    return Phase([work for work in works if work.runs], kept, rows, columns, flops)


def of_decoding(model, rows, columns):
    """One token more for each row, chosen greedily, when all columns are filled. See `Phase`."""
    rows, columns = generation.batch_bucket(rows), generation.capacity_bucket(columns)
    network = generation.LayerNetwork(model.backbone)
    weights, cache = abstract.weights_of(network), abstract.cache_of(model.backbone, rows, columns)
    sampler = generation.resolve_sampler("greedy")
    tokens, end_column = abstract.of_batch((rows, columns)), abstract.of_batch((rows,))
    scalar, stop_token_ids = abstract.everywhere(()), abstract.everywhere((generation.SMALLEST_STOP_LIST,))
    arguments = (weights, cache, tokens, scalar, end_column, stop_token_ids, scalar, (), {}, ())
    step = Work(generation.make_decode(network, sampler), arguments, donated=(1,), turn_of_loop=True)
    kept = {"weights": abstract.bytes_on_a_device(weights), "cache": abstract.bytes_on_a_device(cache)}
    flops = forward_flops_per_token(model.backbone.get_config(), columns) * rows
    return Phase([step], kept, rows, columns, flops)


PHASES = {TRAIN: of_training, PREFILL: of_prefill, DECODE: of_decoding}
