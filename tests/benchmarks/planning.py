"""Training steps compiled by the TPU's own compiler, here and in keras-hub: memory of a chip, time, operations.

Needs libtpu and no TPU: `pip install -e ".[plan]"`. Each program is compiled in a process of its own, one after the
other, which takes two to eight minutes each.
"""

import json
import os
import subprocess
import sys

# Tokens of a row, and rows where there is more than one for each part of the batch.
CASES = {
    "2B on v5e:4x4, 512 tokens": ("gemma_2b_en", "gemma_2b_v5e_16", 512),
    "2B on v5e:4x4, 2048 tokens": ("gemma_2b_en", "gemma_2b_v5e_16", 2048),
    "2B on v5e:4x4, 8192 tokens": ("gemma_2b_en", "gemma_2b_v5e_16", 8192),
    "2B on 2 x v5e:16x16, 8192 tokens": ("gemma_2b_en", "gemma_2b_v5e_512", 8192),
    "7B on v5e:16x16, 8192 tokens": ("gemma_7b_en", "gemma_7b_v5e_256", 8192),
    "7B on v5e:16x16, 256 rows of 8192 tokens": ("gemma_7b_en", "gemma_7b_v5e_256", 8192, 256),
    "7B on 16 x v5e:16x16, 8192 tokens": ("gemma_7b_en", "gemma_7b_v5e_4096", 8192),
    "7B on 16 x v5e:16x16, 4096 rows of 8192 tokens": ("gemma_7b_en", "gemma_7b_v5e_4096", 8192, 4096),
}
# keras-hub compiles for up to ten minutes, and no distribution of it knows pods.
OF_KERAS_HUB = ("2B on v5e:4x4, 512 tokens", "2B on v5e:4x4, 2048 tokens", "7B on v5e:16x16, 2048 tokens")
CASES_OF_KERAS_HUB = {"7B on v5e:16x16, 2048 tokens": ("gemma_7b_en", "gemma_7b_v5e_256", 2048), **CASES}
FIELDS = ("fits", "memory", "compile_seconds", "executed_flops", "model_flops", "kernels", "across_pods")


def run(repeats):
    """Compiles every case once: the compiler gives the same program each time.

    Returns:
        A list of dicts with `case`, `library` and what the compiler says.
    """
    jobs = [(library, case) for case in CASES_OF_KERAS_HUB for library in _libraries(case)]
    return [{"case": case, "library": library, **_in_own_process(library, case)} for library, case in jobs]


def _libraries(case):
    return ("keras_gemma", "keras_hub") if case in OF_KERAS_HUB else ("keras_gemma",)


def _in_own_process(library, case):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, library, case]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results):
    """Lines of a table in Markdown."""
    yield "| | | fits | GiB a chip | compiled in s | operations / model's | Splash kernels | GiB across pods |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in results:
        ratio = f"{one['executed_flops'] / one['model_flops']:.2f}" if one["fits"] else ""
        yield (
            f"| {one['case']} | {one['library']} | {'yes' if one['fits'] else 'no'} "
            f"| {one['memory']['peak'] / 2**30:.2f} | {one['compile_seconds']:.0f} | {ratio} "
            f"| {_splash(one['kernels'] or {})} | {_across_pods(one['across_pods'] or {})} |"
        )


def _splash(kernels):
    return sum(count for name, count in kernels.items() if name.startswith("splash"))


def _across_pods(sent):
    return ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in sorted(sent.items())) or "none"


def of_keras_gemma(preset, config, length, rows=None):
    import dataclasses

    from keras_gemma.planning import plan

    return dataclasses.asdict(plan(preset, config, length, rows))


def of_keras_hub(preset, config, length):
    """The same step of the same model on the same mesh, as keras-hub's documentation distributes it."""
    import keras
    import keras_hub

    from keras_gemma import distribution
    from keras_gemma.planning import abstract
    from keras_gemma.planning import compiling
    from keras_gemma.planning import phases
    from keras_gemma.planning import topology

    configuration = distribution.CONFIGURATIONS[config]
    ours = configuration(devices=topology.tpu_devices(configuration.topology))
    shape = 1, configuration.data, configuration.model
    devices = ours.device_mesh.backend_mesh.devices.reshape(shape)
    mesh = keras.distribution.DeviceMesh(shape, ("replica", "batch", "model"), devices)
    layouts = keras_hub.models.GemmaBackbone.get_layout_map(mesh)
    sizes = abstract.model_without_memory(preset).backbone.get_config()
    names = ("vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads", "hidden_dim", "head_dim")
    arguments = {name: sizes[name] for name in (*names, "intermediate_dim")}

    def build():
        backbone = keras_hub.models.GemmaBackbone(**arguments, dtype="mixed_bfloat16")
        model = keras_hub.models.GemmaCausalLM(preprocessor=None, backbone=backbone)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # Its metrics are made by the first batch only; without them it does less.
        model.compile(optimizer=keras.optimizers.Adam(), loss=loss, weighted_metrics=[])
        model.optimizer.build(model.trainable_variables)
        return model

    with keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope():
        model = abstract.without_memory(build)
        phase = phases.of_training(model, configuration.data, length)
        return compiling.findings(phase, mesh, configuration.topology)


def main(library, case):
    from keras_gemma import startup

    startup.leave_out_tensorflow()
    made = globals()[f"of_{library}"](*CASES_OF_KERAS_HUB[case])
    print(json.dumps({name: made.get(name) for name in FIELDS}))


if __name__ == "__main__":
    main(*sys.argv[1:])
