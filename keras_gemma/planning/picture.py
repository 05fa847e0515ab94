"""A plan as a picture."""

import io
from pathlib import Path

from keras_gemma.planning.report import WHAT_IS_DONE
from keras_gemma.planning.topology import GIB
from keras_gemma.staging import write_file


def draw(plan, path):
    """Two rows of bars: what fills the memory of a chip, and what takes how long. See `Plan.plot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    memory, times = figure.subplots(2, 1)
    figure.suptitle(
        f"{plan.preset} on {plan.configuration}, batch {plan.batch_size} × {plan.sequence_length}, {plan.phase}"
    )
    _draw_memory(memory, plan)
    _draw_times(times, plan)
    _write(figure, Path(path))


def _draw_memory(axes, plan):
    parts = {name: size for name, size in plan.memory.items() if name != "peak"} or plan.memory
    start = 0.0
    for name, size in parts.items():
        axes.barh(["a chip"], [size / GIB], left=start, label=f"{name} {size / GIB:.2f}")
        start += size / GIB
    if plan.memory_limit:
        axes.axvline(
            plan.memory_limit / GIB, color="black", linestyle="--", label=f"limit {plan.memory_limit / GIB:.2f}"
        )
    axes.set_xlabel("GiB")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _draw_times(axes, plan):
    if not plan.seconds:
        axes.set_axis_off()
        return
    names = [name.replace("_", " ") for name in plan.seconds]
    bars = axes.barh(names, list(plan.seconds.values()))
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds for {WHAT_IS_DONE[plan.phase]}, each at full speed")


def _write(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lstrip(".") or "png", dpi=120)
    write_file(path, content.getvalue())
