"""`plan(...)`: the programs that a model would run on a configuration, compiled and read."""

import dataclasses
import json

import keras

from keras_gemma import distribution as distributions
from keras_gemma import startup
from keras_gemma.planning import abstract
from keras_gemma.planning import compiling
from keras_gemma.planning import phases
from keras_gemma.planning import picture
from keras_gemma.planning import report
from keras_gemma.planning import topology

# Of adapters, as in most of what is written about them.
DEFAULT_RANK = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a phase does on a configuration, for each of its chips.

    The phase is a step of training, the prefill of a batch of prompts, or a token more for each row. Sizes are in
    bytes, times in seconds; collectives are keyed by kind.

    Attributes:
        preset, configuration, phase, dtype, recompute: strings.
        accumulate: int, microbatches of a step.
        lora_rank: int, of the adapters that are trained; `None` where all weights are.
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
        unknown_loops: int, loops of which the program does not say how often they turn: they are counted once.
    """

    preset: str
    configuration: str
    phase: str
    dtype: str
    recompute: str
    accumulate: int
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
    lora_rank: int | None = None
    unknown_loops: int = 0

    @property
    def step_seconds(self):
        """The shortest time: all that the chip does at once, at full speed.

        Returns:
            A float, seconds; `None` where the chip is not known or the program does not fit.
        """
        return max(self.seconds.values()) if self.seconds else None

    @property
    def tokens_per_second(self):
        """Of all devices together, in the shortest time."""
        tokens = self.batch_size * (1 if self.phase == phases.DECODE else self.sequence_length)
        return tokens / self.step_seconds if self.seconds else None

    @property
    def utilization(self):
        """How much of the chips' peak goes into what the model needs, in the shortest time.

        Returns:
            A float from 0 to 1; `None` where the chip is not known or the program does not fit. It is the model's
            utilization of Chowdhery et al., arXiv 2204.02311, appendix B, at its best.
        """
        return self.model_flops / self.chip["flops"] / self.step_seconds if self.seconds else None

    @property
    def settings(self):
        """What to type to run it."""
        options = [f"{axis}={self.mesh[axis]}" for axis in ("context", "model") if self.mesh.get(axis, 1) > 1]
        mesh = f"{self.configuration}({', '.join(options)})"
        if self.phase != phases.TRAIN:
            return f"{mesh}, dtype={self.dtype!r}"
        adapters = f", enable_lora({self.lora_rank})" if self.lora_rank else ""
        accumulate = f", gradient_accumulation_steps={self.accumulate}" if self.accumulate > 1 else ""
        return (
            f"{mesh}, dtype={self.dtype!r}, recompute={self.recompute!r}{adapters}{accumulate}, "
            f"{self.batch_size} rows of {self.sequence_length} tokens a step"
        )

    @property
    def outcome(self):
        """Whether it fits and how fast it can be, in a line."""
        gib = f"{self.memory['peak'] / topology.GIB:.2f} GiB a chip"
        if not self.fits:
            return f"does not fit, {gib}"
        speed = f", at best {self.tokens_per_second:,.0f} tokens a second" if self.seconds else ""
        return f"fits, {gib}{speed}"

    def to_json(self):
        """All attributes and estimates.

        Returns:
            A string, a JSON object: the attributes by name, `step_seconds`, `tokens_per_second` and `utilization`.
        """
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
    accumulate=1,
    context=1,
    model=None,
    lora_rank=None,
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
        accumulate: int, as `gradient_accumulation_steps` of `GemmaCausalLM.compile`.
        context: int, as of a configuration when it is called: over how many devices the tokens of a row are cut.
        model: optional int, as of a configuration when it is called: length of the model axis.
        lora_rank: optional int, as `rank` of `GemmaBackbone.enable_lora`: only adapters are trained. 8 by default for
            training on a configuration for adapters.

    Returns:
        A `Plan`. Its `fits` is `False` where the compiler refuses a program for lack of memory.

    Raises:
        ImportError: without libtpu, the TPU's compiler.
        ValueError: for an unknown configuration or phase, a configuration for any devices without `devices`, a batch
            that cannot be cut, and `accumulate` or `lora_rank` below 1 or for another phase than training.
    """
    startup.require_jax("plan")
    configuration = distributions.configuration(config)
    phase = phase or phases_of(config)[-1]
    if phase not in phases.PHASES:
        raise ValueError(f"Phases are {', '.join(phases.PHASES)}. Received: {phase!r}")
    training = phase == phases.TRAIN
    if training and lora_rank is None and configuration.use == distributions.ADAPTERS:
        lora_rank = DEFAULT_RANK
    _refuse_settings(phase, accumulate=accumulate, lora_rank=lora_rank)
    dtype = dtype or ("mixed_bfloat16" if training else "bfloat16")
    if devices is None:
        devices = _tpu_devices(configuration)
    mesh = configuration(devices=devices, context=context, model=model)
    parts = mesh.num_model_replicas
    batch_size = parts * accumulate if batch_size is None else batch_size
    if batch_size < 1 or (training and batch_size % (parts * accumulate)):
        raise ValueError(
            f"{config!r} cuts a batch into {parts} parts, and each into {accumulate} microbatches. "
            f"Received: batch_size={batch_size}"
        )

    with mesh.scope():
        gemma = abstract.model_without_memory(
            preset,
            optimizer if training else None,
            accumulate,
            lora_rank=lora_rank,
            dtype=dtype,
            recompute=recompute,
        )
        phase_of_model = phases.PHASES[phase](gemma, batch_size, sequence_length)
        findings = compiling.findings(phase_of_model, mesh.device_mesh, configuration.topology)
    return Plan(
        preset=str(preset),
        configuration=config,
        phase=phase,
        dtype=str(dtype),
        recompute=str(recompute),
        accumulate=accumulate,
        lora_rank=lora_rank,
        devices=len(devices),
        mesh=dict(zip(mesh.device_mesh.axis_names, mesh.device_mesh.shape)),
        parts=parts,
        batch_size=phase_of_model.rows,
        sequence_length=phase_of_model.columns,
        **findings,
    )


def _refuse_settings(phase, **settings):
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is at least 1. Received: {value!r}")
        if phase != phases.TRAIN and value is not None and (name, value) != ("accumulate", 1):
            raise ValueError(f"`{name}` is of training alone. Received: {name}={value}, and the phase {phase!r}")


def phases_of(config):
    """The phases that a configuration is for.

    Args:
        config: string, its name.

    Returns:
        A tuple: of `"train"`, or of `"prefill"` and `"decode"` for a configuration for serving.

    Raises:
        ValueError: for an unknown name.
    """
    serving = distributions.configuration(config).use == distributions.SERVING
    return (phases.PREFILL, phases.DECODE) if serving else (phases.TRAIN,)


def _tpu_devices(configuration):
    if configuration.topology is None:
        raise ValueError(
            f"A plan is for devices of one kind. Received: {configuration.name!r}, which takes any; give `devices`"
        )
    return topology.tpu_devices(configuration.topology, configuration.replica)
