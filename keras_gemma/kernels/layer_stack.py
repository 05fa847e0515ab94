"""Alike layers, one after another: unrolled or as one scanned program, keeping or recomputing what lies within."""

from functools import partial

import keras
from keras import ops

from keras_gemma.kernels.platform import on_jax
from keras_gemma.kernels.platform import on_jax_cpu
from keras_gemma.kernels.sharding import gathered
from keras_gemma.kernels.sharding import stream_apart

# What the backward pass finds: everything; the input of each layer; that and the results of products with weights.
RECOMPUTE_POLICIES = ("none", "block", "dots")


def named(x, name):
    """`x` itself, under a name that a custom recomputation policy can ask to keep (JAX only)."""
    if not on_jax():
        return x
    from jax.ad_checkpoint import checkpoint_name

    return checkpoint_name(x, name)


def with_flags_bound(rematerialized_call):
    """A layer's `rematerialized_call`, behind which `training`, `reverse` and other flags stay Python's.

    `keras.RematScope` hands everything that a layer is called with to the recomputation, and JAX makes tensors of it.
    """

    def bound(layer_call, *args, **kwargs):
        flags = {name: value for name, value in kwargs.items() if value is None or isinstance(value, bool)}
        others = {name: value for name, value in kwargs.items() if name not in flags}
        call = rematerialized_call(partial(layer_call, **flags), *args, **others)
        return lambda *args, **kwargs: call(*args, **{k: v for k, v in kwargs.items() if k not in flags})

    return bound


def run_layers(layers, x, *arguments, recompute="none", scan="auto"):
    """Runs layers in training mode.

    A scan compiles one layer whatever their number; in exchange it copies the weights into one tensor a kind, in the
    dtype of the computation. On a CPU that copy takes memory and saves next to no time, so there `"auto"` scans for the
    sake of recomputation only, which XLA for CPUs undoes in layers that are not in a loop.

    Args:
        layers: list of built Keras layers with the call arguments `(x, *arguments, training)`.
        x: tensor, the input of the first layer and, in shape and dtype, the output of each.
        *arguments: tensors that every layer is given.
        recompute: one of `RECOMPUTE_POLICIES`, or a JAX checkpoint policy (see `jax.checkpoint_policies`). TensorFlow
            and torch cannot choose what to keep: there anything but `"none"` keeps the inputs only.
        scan: bool or `"auto"`. Honoured on JAX, in compiled functions, by layers whose variables are alike; else
            layers run one by one.

    Returns:
        The output of the last layer.
    """
    if not on_jax():
        return _one_by_one(layers, x, arguments, recompute != "none")
    if scan == "auto":
        scan = recompute != "none" or not on_jax_cpu()
    if scan and _is_traced(x) and _are_alike(layers):
        return _scanned(layers, x, arguments, recompute)
    for layer in layers:
        if recompute == "none":
            x = stream_apart(layer(x, *arguments, training=True))
        else:
            x, states = _stateless(layer, recompute)(_values(layer), x, arguments)
            _assign(layer, states)
    return x


def _one_by_one(layers, x, arguments, recompute):
    for layer in layers:
        if recompute and _states_of(layer):
            raise ValueError(
                "Recomputation would draw other random numbers than the forward pass did: on TensorFlow and torch "
                f"it needs layers without dropout. Received: {layer.name} with dropout."
            )
        run = keras.remat(lambda x, *arguments, layer=layer: layer(x, *arguments, training=True)) if recompute else None
        x = run(x, *arguments) if recompute else layer(x, *arguments, training=True)
    return x


# === JAX ===


def _is_traced(x):
    from jax.core import Tracer

    return isinstance(x, Tracer)


def _scanned(layers, x, arguments, recompute):
    from jax import lax

    run = _stateless(layers[0], recompute, in_scan=True)
    stacked = [ops.stack(values) for values in zip(*map(_values, layers))]
    x, states = lax.scan(lambda x, values: run(values, x, arguments), x, stacked)
    for index, layer in enumerate(layers):
        _assign(layer, [state[index] for state in states])
    return x


def _stateless(layer, recompute, in_scan=False):
    """Function `(values of the layer's variables, x, arguments) → x, new values of its states`."""
    import jax

    variables = layer.variables
    states = _states_of(layer)

    def run(values, x, arguments):
        values = [gathered(value, variable) for value, variable in zip(values, variables)]
        with keras.StatelessScope(zip(variables, values)) as scope:
            x = stream_apart(layer(x, *arguments, training=True))
        return x, [scope.get_current_value(state) for state in states]

    if recompute == "none":
        return run
    # Within a scan XLA cannot merge the two computations of a layer, and nothing has to keep it from trying.
    return jax.checkpoint(run, policy=_jax_policy(recompute), prevent_cse=not in_scan)


def _jax_policy(recompute):
    import jax

    if recompute == "block":
        return None
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if recompute == "dots" else recompute


def _values(layer):
    # In the dtype of the computation where the layer would cast them anyway: a scan then copies half as much.
    return [variable.value for variable in layer.variables]


def _states_of(layer):
    """The variables that a training step changes without gradients: the states of random generators."""
    return [variable for variable in layer.non_trainable_variables if "seed_generator" in variable.path]


def _assign(layer, values):
    for state, value in zip(_states_of(layer), values):
        state.assign(value)


def _are_alike(layers):
    kinds = {
        (layer.dtype_policy.name, *((v.name, tuple(v.shape), v.dtype, v.trainable) for v in layer.variables))
        for layer in layers
    }
    return len(kinds) == 1
