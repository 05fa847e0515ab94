"""`plan(...)`: the program that `fit` would run on a configuration, compiled and read."""

import dataclasses
import json
import re
import time

import keras
import numpy as np

from keras_gemma import distribution as distributions
from keras_gemma.planning import abstract
from keras_gemma.planning import picture
from keras_gemma.planning import topology
from keras_gemma.planning.program import Program
from keras_gemma.training.flops import training_flops_per_token

# Products of two matrices in each pass of JAX's Splash kernels, forward and backward.
PRODUCTS_OF_KERNELS = {"splash_mqa_fwd": 2, "splash_mqa_dkv": 4, "splash_mqa_dq": 3}
PROJECTIONS = ("ffw_", "query", "key", "value", "attention_output")
GIB = topology.GIB


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step of training does on a configuration, for each of its chips.

    Sizes are in bytes, times in seconds; collectives are keyed by kind.

    Attributes:
        preset, configuration: strings.
        devices: int.
        mesh: dict, devices along each axis.
        batch_size, sequence_length: ints, of all devices together.
        recompute: string.
        fits: bool.
        memory_limit: float, what the compiler gives to a program; `None` where it is not known.
        memory: dict of `weights`, `optimizer`, `batch`, `temporaries`, and their sum `peak`; where the program does not
            fit, of `peak` alone.
        compile_seconds: float.
        model_flops: float, what the model needs a step: products and the attention that is not masked, once each.
        executed_flops: float, with what is computed again and what chips do alike.
        kernels: dict, how often each kernel that is no product of XLA's runs.
        within_pods, across_pods: dicts of bytes that a chip sends in a step.
        seconds: dict, the time that `compute`, `memory`, `within_pods` and `across_pods` take at full speed; empty if
            the chip is not known.
        largest: list of pairs, a part of the model and its share of the executed operations.
    """

    preset: str
    configuration: str
    devices: int
    mesh: dict
    batch_size: int
    sequence_length: int
    recompute: str
    fits: bool
    memory_limit: float | None
    memory: dict
    compile_seconds: float
    model_flops: float = 0.0
    executed_flops: float = 0.0
    kernels: dict = dataclasses.field(default_factory=dict)
    within_pods: dict = dataclasses.field(default_factory=dict)
    across_pods: dict = dataclasses.field(default_factory=dict)
    seconds: dict = dataclasses.field(default_factory=dict)
    largest: list = dataclasses.field(default_factory=list)

    @property
    def step_seconds(self):
        """The shortest step: all that the chip does at once, at full speed. `None` where the chip is not known."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def tokens_per_second(self):
        """Of all devices together, with the shortest step."""
        return self.batch_size * self.sequence_length / self.step_seconds if self.seconds else None

    @property
    def utilization(self):
        """Of the chips' peak by what the model needs, with the shortest step."""
        return (
            self.seconds["compute"] / self.step_seconds * self.model_flops / self.executed_flops
            if self.seconds
            else None
        )

    def to_json(self):
        estimates = {name: getattr(self, name) for name in ("step_seconds", "tokens_per_second", "utilization")}
        return json.dumps({**dataclasses.asdict(self), **estimates}, indent=2)

    def __str__(self):
        return "\n".join(_lines(self))

    def plot(self, path):
        """Draws memory and times.

        Args:
            path: where the picture goes, as `plan.png`; what stands behind the dot is its format.
        """
        picture.draw(self, path)


def plan(
    preset="gemma_2b_en",
    config="gemma_2b_v5e_16",
    sequence_length=8192,
    batch_size=None,
    recompute="block",
    dtype="mixed_bfloat16",
    optimizer=keras.optimizers.Adam,
    devices=None,
):
    """Compiles the step that `GemmaCausalLM.fit` runs, for devices that need not exist, and says what it does.

    Args:
        preset: string, as of `from_preset`. Its weights are not read.
        config: name of a configuration of `keras_gemma.distribution`.
        sequence_length: int, tokens of a row.
        batch_size: int, rows of all devices together; as many as the batch is cut into parts by default.
        recompute: string, as of `GemmaBackbone`.
        dtype: dtype policy.
        optimizer: callable without arguments to a Keras optimizer.
        devices: optional list of `jax.Device`s in place of those of the configuration's topology.

    Returns:
        A `Plan`. Its `fits` is `False` where the compiler refuses the program for lack of memory.

    Raises:
        ImportError: without libtpu, the TPU's compiler.
        ValueError: for an unknown configuration, one for any devices without `devices`, or a batch that cannot be
            cut.
    """
    configuration = _configuration(config)
    if devices is None:
        if configuration.topology is None:
            raise ValueError(
                f"A plan is for devices of one kind. Received: {config!r}, which takes any; give `devices`"
            )
        devices = topology.tpu_devices(configuration.topology, configuration.replica)
    mesh = configuration(devices=devices)
    parts = mesh.num_model_replicas
    batch_size = parts if batch_size is None else batch_size
    if batch_size < 1 or batch_size % parts:
        raise ValueError(f"{config!r} cuts a batch into {parts} parts. Received: batch_size={batch_size}")

    with mesh.scope():
        model = abstract.model_without_memory(preset, optimizer, dtype=dtype, recompute=recompute)
        state, batch = abstract.state_of(model), abstract.batch_of(batch_size, sequence_length)
        start = time.perf_counter()
        compiled, required = _compiled(model.train_step, state, batch, devices[0].platform)
        seconds = time.perf_counter() - start
    chip = topology.chip_of(configuration.topology)
    common = dict(
        preset=str(preset),
        configuration=config,
        devices=len(devices),
        mesh=dict(zip(mesh.device_mesh.axis_names, mesh.device_mesh.shape)),
        batch_size=batch_size,
        sequence_length=sequence_length,
        recompute=str(recompute),
        memory_limit=chip and chip.memory * GIB,
        compile_seconds=seconds,
    )
    if compiled is None:
        return Plan(**common, fits=False, memory={"peak": required})
    memory = _memory(compiled, state, batch)
    fits = chip is None or memory["peak"] <= chip.memory * GIB
    config = model.backbone.get_config()
    per_token = training_flops_per_token(config, sequence_length, causal=True)
    read = _read(compiled, mesh.device_mesh.shape, chip)
    model_flops = per_token * batch_size * sequence_length / len(devices)
    return Plan(**common, **read, fits=fits, memory=memory, model_flops=model_flops)


def _configuration(name):
    if name not in distributions.CONFIGURATIONS:
        known = ", ".join(distributions.CONFIGURATIONS)
        raise ValueError(f"Configurations are {known}. Received: {name!r}")
    return distributions.CONFIGURATIONS[name]


def _compiled(step, state, batch, platform):
    """The program, or `None` and the bytes that it would take where there are fewer."""
    import jax

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(None, abstract.shardings_of(state)))
    lowered = jitted.trace(state, batch).lower(lowering_platforms=(platform,))
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        required = _required_memory(str(error))
        if required is None:
            raise
        return None, required


def _required_memory(message):
    """Bytes out of what the TPU's compiler says of a program that is too large; `None` for other errors."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return float(found.group(1)) * 1024 ** " KMGT".index(found.group(2) or " ") if found else None


def _memory(compiled, state, batch):
    trainable, others, optimizer, metrics = state
    analysis = compiled.memory_analysis()
    arguments = {
        "weights": abstract.bytes_on_a_device([trainable, others, metrics]),
        "optimizer": abstract.bytes_on_a_device(optimizer),
        "batch": abstract.bytes_on_a_device(batch),
    }
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporaries = analysis.temp_size_in_bytes + new
    return {**arguments, "temporaries": temporaries, "peak": analysis.argument_size_in_bytes + temporaries}


def _read(compiled, mesh_shape, chip):
    program = Program(compiled.as_text(), _flops_of_kernel)
    pods = np.repeat(np.arange(mesh_shape[0]), np.prod(mesh_shape[1:]))
    within, across = {}, {}
    for one in program.collectives:
        sent = across if one.crosses(pods) else within
        # Of a sum over pods each sends, and passes on, all parts but its own.
        rounds = 2 * (1 - 1 / mesh_shape[0]) if one.groups is None and one.kind == "all-reduce" else 1
        sent[one.kind] = sent.get(one.kind, 0.0) + one.sent * one.turns * rounds
    flops = sum(program.flops.values())
    return {
        "executed_flops": flops,
        "kernels": dict(program.kernels),
        "within_pods": within,
        "across_pods": across,
        "seconds": _seconds(compiled.memory_analysis(), flops, within, across, chip) if chip else {},
        "largest": _largest(program.flops, flops),
    }


def _flops_of_kernel(instruction, operands):
    """Of Splash: its blocks below the diagonal and on it, of the causal mask."""
    products = [count for name, count in PRODUCTS_OF_KERNELS.items() if instruction.name.startswith(name)]
    if not products:
        return 0.0
    sizes = [sizes for _, sizes in operands]
    blocks = next(shape[-1] for shape in sizes if len(shape) == 3 and shape[-1] == shape[-2])
    heads, length, head_dim = next(shape for shape in sizes if len(shape) == 3 and shape[-1] != shape[-2])
    return products[0] * 2.0 * heads * length * length * head_dim * (blocks + 1) / (2 * blocks)


def _seconds(memory, flops, within, across, chip):
    # At least once each byte of what goes in and comes out, and of temporaries written and read.
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    return {
        "compute": flops / chip.flops,
        "memory": moved / chip.memory_bandwidth,
        "within_pods": sum(within.values()) / chip.link_bandwidth,
        "across_pods": sum(across.values()) / chip.pod_bandwidth,
    }


def _largest(flops, total, count=6):
    parts = {}
    for op_name, operations in flops.items():
        part = _part_of_model(op_name)
        parts[part] = parts.get(part, 0.0) + operations / total
    return sorted(parts.items(), key=lambda item: -item[1])[:count]


def _part_of_model(op_name):
    if "decoder_block" not in op_name:
        return "vocabulary" if "dot_general" in op_name else "other"
    inside = op_name.split("decoder_block")[1].split("/")
    if "dot_general" not in op_name:
        return "attention"
    return next((part for part in inside if part.startswith(PROJECTIONS)), "attention")


# === For people ===


def _lines(plan):
    mesh = " × ".join(f"{size} {axis}" for axis, size in plan.mesh.items())
    yield f"{plan.preset} on {plan.configuration}: {plan.devices} devices, {mesh}"
    yield f"batch {plan.batch_size} × {plan.sequence_length} tokens, recompute {plan.recompute}"
    yield ""
    peak, limit = plan.memory["peak"], plan.memory_limit
    if not plan.fits:
        yield f"does not fit: {peak / GIB:.1f} GiB a chip, {(peak - limit) / GIB:.1f} GiB more than there are"
        yield "  to try: " + _advice(plan)
        return
    room = f" of {limit / GIB:.2f} ({1 - peak / limit:.0%} to spare)" if limit else ""
    yield f"fits: {peak / GIB:.2f} GiB a chip{room}, compiled in {plan.compile_seconds:.0f} s"
    for part, size in plan.memory.items():
        if part != "peak":
            yield f"  {part:12} {size / GIB:8.2f} GiB"
    ratio = plan.executed_flops / plan.model_flops
    yield f"operations a chip: {plan.executed_flops / 1e12:.1f} TFLOP, {ratio:.2f} times the model's"
    for part, share in plan.largest:
        yield f"  {part:18} {share:6.1%}"
    for name, count in plan.kernels.items():
        yield f"  kernel {name}, {count} times"
    for where, sent in (("within pods", plan.within_pods), ("across pods", plan.across_pods)):
        if sent:
            kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in sorted(sent.items()))
            yield f"sent {where}, GiB a chip: {kinds}"
    if plan.seconds:
        times = ", ".join(
            f"{what.replace('_', ' ')} {seconds:.3f}" for what, seconds in plan.seconds.items() if seconds
        )
        yield f"seconds at full speed: {times}"
        yield (
            f"at best, all at once: {plan.step_seconds:.2f} s a step, {plan.tokens_per_second:,.0f} tokens a second, "
            f"{plan.utilization:.0%} of the chips' peak"
        )


def _advice(plan):
    rows = int(plan.batch_size / np.prod([plan.mesh["replica"], plan.mesh["data"]]))
    tries = [f"a batch of {plan.batch_size // rows} rows"] if rows > 1 else []
    tries += ["recompute='block'"] if plan.recompute != "block" else []
    return ", ".join([*tries, f"rows shorter than {plan.sequence_length} tokens", "a configuration with more chips"])
