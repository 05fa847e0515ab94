"""Compiling the programs of a phase, and what the compiler says of them."""

import re
import time

from keras_gemma import kernels
from keras_gemma.planning import topology
from keras_gemma.planning.measures import Measures


def findings(phase, device_mesh, kind):
    """Compiles a phase and reads what came of it.

    Args:
        phase: a `phases.Phase`, of a model that was made under the current `keras.distribution`.
        device_mesh: the `keras.distribution.DeviceMesh` of that, pods first.
        kind: topology of a pod, or `None`.

    Returns:
        A dict of the attributes of a `Plan` from `fits` on.
    """
    chip = topology.chip_of(kind)
    start = time.perf_counter()
    programs, required, limit = _compiled(phase.works, device_mesh.backend_mesh.devices.flat[0].platform)
    found = {
        "compile_seconds": time.perf_counter() - start,
        "model_flops": phase.model_flops / device_mesh.devices.size,
        "memory_limit": chip.memory * topology.GIB if chip else limit,
    }
    if required is not None:
        return {**found, "fits": False, "memory": {"peak": required}}
    memory = _memory(phase, programs)
    fits = chip is None or memory["peak"] <= chip.memory * topology.GIB
    return {**found, "fits": fits, "memory": memory, **_measured(phase, programs, device_mesh.shape, chip)}


def _compiled(works, platform):
    """The programs; of one that is too large, after those before it, the bytes that it would take and may take."""
    import jax

    programs = []
    for work in works:
        settings = {} if work.out_shardings is None else {"out_shardings": work.out_shardings}
        jitted = jax.jit(work.function, donate_argnums=work.donated, **settings)
        with kernels.for_any_batch():
            lowered = jitted.trace(*work.arguments).lower(lowering_platforms=(platform,))
        try:
            programs.append(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            required = _required_memory(str(error))
            if required is None:
                raise
            needed, limit = required
            return programs, needed + work.beside, limit
    return programs, None, None


def _required_memory(message):
    """Bytes that a program takes and bytes that it may take, out of what the TPU's compiler says of one that is too
    large; `None` for other errors."""
    size = r"\(([\d.]+)([KMGT]?)\)"
    found = re.search(rf"{size} exceeds available HBM {size}", message)
    if not found:
        return None
    needed, unit, limit, unit_of_limit = found.groups()
    return _bytes_of(needed, unit), _bytes_of(limit, unit_of_limit)


def _bytes_of(number, unit):
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def _memory(phase, compiled):
    """What is kept, and as temporaries all that the largest program holds besides."""
    peak = max(_bytes_held(program) + work.beside for work, program in zip(phase.works, compiled))
    return {**phase.kept, "temporaries": peak - sum(phase.kept.values()), "peak": peak}


def _bytes_held(program):
    analysis = program.memory_analysis()
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new


def _measured(phase, programs, mesh_shape, chip):
    measures = Measures(mesh_shape)
    for work, program in zip(phase.works, programs):
        measures.add(program, work.runs, work.turn_of_loop)
    return {
        "executed_flops": measures.flops,
        "kernels": dict(measures.kernels),
        "within_pods": dict(measures.within_pods),
        "across_pods": dict(measures.across_pods),
        "seconds": measures.seconds(chip) if chip else {},
        "chip": chip._asdict() if chip else {},
        "largest": measures.largest(),
        "unknown_loops": measures.unknown_loops,
    }
