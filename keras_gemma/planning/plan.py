"""`plan(...)`: the programs that a model would run on a configuration, compiled and read."""

import dataclasses
import json
import re
import time

import keras

from keras_gemma import distribution as distributions
from keras_gemma.planning import abstract
from keras_gemma.planning import phases
from keras_gemma.planning import picture
from keras_gemma.planning import report
from keras_gemma.planning import topology
from keras_gemma.planning.measures import Measures

GIB = topology.GIB


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a phase does on a configuration, for each of its chips.

    The phase is a step of training, the prefill of a batch of prompts, or a token more for each row. Sizes are in
    bytes, times in seconds; collectives are keyed by kind.

    Attributes:
        preset, configuration, phase, dtype, recompute: strings.
        devices: int.
        mesh: dict, devices along each axis.
        parts: int. Into how many parts a batch is cut.
        batch_size, sequence_length: ints, of all devices together; when decoding, the columns of a full cache.
        fits: bool.
        memory_limit: float, what the compiler gives to a program; `None` where it is not known.
        memory: dict of what is kept (`weights`, `optimizer`, `batch`, `cache`), `temporaries`, and their sum `peak`;
            where a program does not fit, of `peak` alone.
        compile_seconds: float.
        model_flops: float, what the model needs: products and the attention that is not masked, once each.
        executed_flops: float, with what is computed again and what chips do alike.
        kernels: dict, how often each kernel that is no product of XLA's runs.
        within_pods, across_pods: dicts of bytes that a chip sends.
        seconds: dict, the time that `compute`, `memory`, `within_pods` and `across_pods` take at full speed; empty if
            the chip is not known.
        chip: dict, the speeds that `seconds` assumes.
        largest: list of dicts: a `part` of the model, its share of the executed `operations`, and bytes `sent` for it.
    """

    preset: str
    configuration: str
    phase: str
    dtype: str
    recompute: str
    devices: int
    mesh: dict
    parts: int
    batch_size: int
    sequence_length: int
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
    chip: dict = dataclasses.field(default_factory=dict)
    largest: list = dataclasses.field(default_factory=list)

    @property
    def step_seconds(self):
        """The shortest time: all that the chip does at once, at full speed. `None` where the chip is not known."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def tokens_per_second(self):
        """Of all devices together, in the shortest time."""
        tokens = self.batch_size * (1 if self.phase == phases.DECODE else self.sequence_length)
        return tokens / self.step_seconds if self.seconds else None

    @property
    def utilization(self):
        """Of the chips' peak by what the model needs, in the shortest time."""
        return self.model_flops / self.chip["flops"] / self.step_seconds if self.seconds else None

    def to_json(self):
        estimates = {name: getattr(self, name) for name in ("step_seconds", "tokens_per_second", "utilization")}
        return json.dumps({**dataclasses.asdict(self), **estimates}, indent=2)

    def __str__(self):
        return "\n".join(report.lines_of(self))

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
    phase=None,
    dtype=None,
    optimizer=keras.optimizers.Adam,
    devices=None,
):
    """Compiles what `GemmaCausalLM` runs, for devices that need not exist, and says what it does.

    Args:
        preset: string, as of `from_preset`. Its weights are not read.
        config: name of a configuration of `keras_gemma.distribution`.
        sequence_length: int, tokens of a row; when decoding, the columns of its cache. When serving it is rounded up
            as `generate` does.
        batch_size: int, rows of all devices together; as many as the batch is cut into parts by default. When serving
            it is rounded up as `generate` does.
        recompute: string, as of `GemmaBackbone`.
        phase: `"train"`, a step of `fit`; `"prefill"` or `"decode"`, of `generate` with greedy choice. By default
            `"decode"` for a configuration for serving, otherwise `"train"`.
        dtype: dtype policy. `"mixed_bfloat16"` for training and `"bfloat16"` for serving by default.
        optimizer: callable without arguments to a Keras optimizer.
        devices: optional list of `jax.Device`s in place of those of the configuration's topology.

    Returns:
        A `Plan`. Its `fits` is `False` where the compiler refuses a program for lack of memory.

    Raises:
        ImportError: without libtpu, the TPU's compiler.
        ValueError: for an unknown configuration or phase, a configuration for any devices without `devices`, or a
            batch that cannot be cut.
    """
    configuration = _configuration(config)
    phase = phase or phases_of(config)[-1]
    if phase not in phases.PHASES:
        raise ValueError(f"Phases are {', '.join(phases.PHASES)}. Received: {phase!r}")
    training = phase == phases.TRAIN
    dtype = dtype or ("mixed_bfloat16" if training else "bfloat16")
    if devices is None:
        devices = _tpu_devices(configuration)
    mesh = configuration(devices=devices)
    parts = mesh.num_model_replicas
    batch_size = parts if batch_size is None else batch_size
    if batch_size < 1 or (training and batch_size % parts):
        raise ValueError(f"{config!r} cuts a batch into {parts} parts. Received: batch_size={batch_size}")

    with mesh.scope():
        model = abstract.model_without_memory(preset, optimizer if training else None, dtype=dtype, recompute=recompute)
        work = phases.PHASES[phase](model, batch_size, sequence_length)
        start = time.perf_counter()
        compiled, required = _compiled(work.works, devices[0].platform)
        seconds = time.perf_counter() - start
    chip = topology.chip_of(configuration.topology)
    common = dict(
        preset=str(preset),
        configuration=config,
        phase=phase,
        dtype=str(dtype),
        recompute=str(recompute),
        devices=len(devices),
        mesh=dict(zip(mesh.device_mesh.axis_names, mesh.device_mesh.shape)),
        parts=parts,
        batch_size=work.rows,
        sequence_length=work.columns,
        memory_limit=chip and chip.memory * GIB,
        compile_seconds=seconds,
        model_flops=work.model_flops / len(devices),
    )
    if required is not None:
        return Plan(**common, fits=False, memory={"peak": required})
    memory = _memory(work, compiled)
    fits = chip is None or memory["peak"] <= chip.memory * GIB
    return Plan(**common, **_measured(work.works, compiled, mesh.device_mesh.shape, chip), fits=fits, memory=memory)


def phases_of(config):
    """The phases that a configuration, by name, is for."""
    serving = _configuration(config).use == distributions.SERVING
    return (phases.PREFILL, phases.DECODE) if serving else (phases.TRAIN,)


def _configuration(name):
    if name not in distributions.CONFIGURATIONS:
        known = ", ".join(distributions.CONFIGURATIONS)
        raise ValueError(f"Configurations are {known}. Received: {name!r}")
    return distributions.CONFIGURATIONS[name]


def _tpu_devices(configuration):
    if configuration.topology is None:
        raise ValueError(
            f"A plan is for devices of one kind. Received: {configuration.name!r}, which takes any; give `devices`"
        )
    return topology.tpu_devices(configuration.topology, configuration.replica)


def _compiled(works, platform):
    """The programs, and `None`; or those before one that is too large, and the bytes that it would take."""
    import jax

    programs = []
    for work in works:
        settings = {} if work.out_shardings is None else {"out_shardings": work.out_shardings}
        jitted = jax.jit(work.function, donate_argnums=work.donated, **settings)
        lowered = jitted.trace(*work.arguments).lower(lowering_platforms=(platform,))
        try:
            programs.append(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            required = _required_memory(str(error))
            if required is None:
                raise
            return programs, required + work.beside
    return programs, None


def _required_memory(message):
    """Bytes out of what the TPU's compiler says of a program that is too large; `None` for other errors."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return float(found.group(1)) * 1024 ** " KMGT".index(found.group(2) or " ") if found else None


def _memory(phase, compiled):
    """What is kept, and as temporaries all that the largest program holds besides."""
    peak = max(_bytes_held(program) + work.beside for work, program in zip(phase.works, compiled))
    return {**phase.kept, "temporaries": peak - sum(phase.kept.values()), "peak": peak}


def _bytes_held(program):
    analysis = program.memory_analysis()
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new


def _measured(works, compiled, mesh_shape, chip):
    measures = Measures(mesh_shape)
    for work, program in zip(works, compiled):
        measures.add(program, work.runs, work.turn_of_loop)
    return {
        "executed_flops": measures.flops,
        "kernels": dict(measures.kernels),
        "within_pods": dict(measures.within_pods),
        "across_pods": dict(measures.across_pods),
        "seconds": measures.seconds(chip) if chip else {},
        "chip": chip._asdict() if chip else {},
        "largest": measures.largest(),
    }
