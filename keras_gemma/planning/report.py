"""A plan in words."""

from keras_gemma.planning.topology import GIB

WHAT_IS_DONE = {"train": "a step", "prefill": "all prompts", "decode": "a token for each row"}


def lines_of(plan):
    """What a `Plan` prints, line by line."""
    mesh = " × ".join(f"{size} {axis}" for axis, size in plan.mesh.items())
    yield f"{plan.preset} on {plan.configuration}, {plan.phase}: {plan.devices} devices, {mesh}"
    recompute = f", recompute {plan.recompute}" if plan.phase == "train" else ""
    recompute += f", {plan.accumulate} microbatches" if plan.accumulate > 1 else ""
    recompute += f", adapters of rank {plan.lora_rank}" if plan.lora_rank else ""
    yield f"batch {plan.batch_size} × {plan.sequence_length} tokens, {plan.dtype}{recompute}"
    yield ""
    yield from _memory(plan)
    if plan.fits:
        yield from _work(plan)
        yield from _sent(plan)
        yield from _times(plan)


def _memory(plan):
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


def _advice(plan):
    rows = plan.batch_size // (plan.parts * plan.accumulate)
    of_rows = f"{rows * plan.accumulate} microbatches" if plan.phase == "train" else f"a batch of {plan.parts} rows"
    tries = [of_rows] if rows > 1 else []
    tries += ["recompute='block'"] if plan.phase == "train" and plan.recompute != "block" else []
    return ", ".join([*tries, f"rows shorter than {plan.sequence_length} tokens", "a configuration with more chips"])


def _work(plan):
    ratio = plan.executed_flops / plan.model_flops
    yield f"operations a chip: {plan.executed_flops / 1e12:.2f} TFLOP, {ratio:.2f} times the model's"
    for part in plan.largest:
        yield f"  {part['part']:34} {part['operations']:6.1%}  {part['sent'] / GIB:8.2f} GiB sent"
    if plan.unknown_loops and plan.phase == "train":
        yield f"  at least: {plan.unknown_loops} loops that turn nobody knows how often are counted once"
    for name, count in plan.kernels.items():
        yield f"  kernel {name}, {count} times"


def _sent(plan):
    for where, sent in (("within pods", plan.within_pods), ("across pods", plan.across_pods)):
        if sent:
            kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in sorted(sent.items()))
            yield f"sent {where}, GiB a chip: {kinds}"


def _times(plan):
    if not plan.seconds:
        return
    times = ", ".join(f"{what.replace('_', ' ')} {seconds:.4f}" for what, seconds in plan.seconds.items() if seconds)
    yield f"seconds at full speed: {times}"
    yield (
        f"at best, all at once: {plan.step_seconds:.4f} s for {WHAT_IS_DONE[plan.phase]}, "
        f"{plan.tokens_per_second:,.0f} tokens a second, {plan.utilization:.0%} of the chips' peak"
    )
    memory, within, across = (plan.chip[name] / 1e9 for name in ("memory_bandwidth", "link_bandwidth", "pod_bandwidth"))
    yield (
        f"  assumed of each chip: {plan.chip['flops'] / 1e12:.0f} TFLOP/s, {memory:,.0f} GB/s of memory, "
        f"{within:.0f} GB/s to its pod, {across:.1f} GB/s to other pods; nothing waits"
    )
