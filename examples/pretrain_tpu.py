"""Gemma is trained on all hosts of a TPU pod, or of several pods: every host runs this file.

On Cloud TPU, where `gcloud compute tpus queued-resources create` has made `gemma` and each host has the files:

    gcloud compute tpus tpu-vm ssh gemma --worker=all --command='cd keras_gemma && pip install -e ".[train]" "jax[tpu]"
        && python examples/pretrain_tpu.py --config gemma_2b_v5e_16 --preset gemma_2b_en --sequence-length 8192
        --batch-size 64 --text web=/data/web.array_record --checkpoints gs://BUCKET/gemma'

On GKE, a JobSet that begins again, from the last checkpoint, whenever a host is lost:

    apiVersion: jobset.x-k8s.io/v1alpha2
    kind: JobSet
    metadata:
      name: gemma
      annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}
    spec:
      failurePolicy: {maxRestarts: 100}
      replicatedJobs:
      - name: pod
        replicas: 2                                    # of the mesh's replica axis, for gemma_2b_v5e_512
        template:
          spec:
            parallelism: 64                            # hosts of a pod, with 4 chips each
            completions: 64
            backoffLimit: 0
            template:
              spec:
                restartPolicy: Never
                nodeSelector:
                  cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
                  cloud.google.com/gke-tpu-topology: 16x16
                containers:
                - name: train
                  image: IMAGE                         # this repository, keras_gemma[train] and jax[tpu]
                  command: [python, examples/pretrain_tpu.py, --config, gemma_2b_v5e_512, --preset, gemma_2b_en,
                    --sequence-length, "8192", --batch-size, "512", --text, web=/data/web.array_record,
                    --checkpoints, gs://BUCKET/gemma]
                  resources: {limits: {google.com/tpu: 4}}

On a CPU, to try it, as one process with eight devices, and as two with four each:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/pretrain_tpu.py
    export XLA_FLAGS=--xla_force_host_platform_device_count=4
    for i in 0 1; do
        python examples/pretrain_tpu.py --coordinator 127.0.0.1:4321 --processes 2 --process $i &
    done; wait

Expected there: the small bundled model goes on with what Python's standard library says and does, a line of progress
every 10 steps, for a minute or two. `keras-gemma plan` says before a pod is rented whether it will hold the training.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

from tiny.options import Options
from tiny.options import run

from keras_gemma import startup
from keras_gemma.mesh_table import MESHES


def parsed_options(arguments=None):
    parser = Options(__doc__)

    parser.option("--config", "local_data", "the mesh by name", choices=MESHES, metavar="NAME")
    parser.option("--context", 1, "devices of the data axis over which the tokens of a row are cut")
    parser.add_argument("--model", type=int, help="length of the model axis (default: the configuration's)")
    parser.option("--preset", "gemma_tiny_en", "the model, by name or folder")
    parser.add_argument("--from-scratch", action="store_true", help="begin with random weights")
    parser.pairs("--text", str, "NAME=FILE", "a source: .jsonl or ArrayRecord, a 'text' each")
    parser.pairs("--weight", float, "NAME=SHARE", "its share of the examples")
    parser.of_pretraining(
        sequence_length=128,
        batch_size=16,
        accumulate=1,
        epochs=3,
        steps_per_epoch=10,
        save_every=10,
        learning_rate=1e-4,
    )
    parser.option(
        "--checkpoints", "pretrained_tpu/checkpoints", "a folder that all hosts share, gs:// too; a run goes on there"
    )
    parser.add_argument("--save-preset", metavar="FOLDER", help="for the trained model, on the first host")
    parser.add_argument("--dtype", help="of the model (default: mixed_bfloat16 on TPUs, else float32)")
    parser.add_argument(
        "--recompute", choices=["none", "dots", "block"], help="to save memory (default: block on TPUs)"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="process 0, where JAX cannot find it by itself")
    parser.add_argument("--processes", type=int, help="how many, with --coordinator")
    parser.add_argument("--process", type=int, help="which one this is, with --coordinator")
    return parser.parse_args(arguments)


# Before the imports that take seconds: --help and a wrong option are answered at once.
options = parsed_options() if __name__ == "__main__" else None

startup.leave_out_tensorflow()

import grain
import jax
import keras
from tiny.standard_library import prose_and_code

from keras_gemma import GemmaCausalLM
from keras_gemma import data
from keras_gemma import distribution
from keras_gemma import training


def main(options):
    process, _ = distribution.initialize(options.coordinator, options.processes, options.process)
    configuration = distribution.CONFIGURATIONS[options.config]
    keras.distribution.set_distribution(configuration(context=options.context, model=options.model))
    on_tpu = jax.default_backend() == "tpu"
    keras.utils.set_random_seed(options.seed)
    model = GemmaCausalLM.from_preset(
        options.preset,
        load_weights=not options.from_scratch,
        sequence_length=options.sequence_length,
        dtype=options.dtype or ("mixed_bfloat16" if on_tpu else "float32"),
    )
    model.backbone.recompute = options.recompute or ("block" if on_tpu else "none")
    steps = options.epochs * options.steps_per_epoch
    learning_rate = training.WarmUp(options.learning_rate, warmup_steps=steps // 10, total_steps=steps, decay="cosine")
    model.compile(training.AdamW(learning_rate, weight_decay=0.1), gradient_accumulation_steps=options.accumulate)
    model.fit(
        batches_of_this_host(options, model.preprocessor),
        epochs=options.epochs,
        steps_per_epoch=options.steps_per_epoch,
        callbacks=[
            training.TrainingMonitor(options.tensorboard),
            training.StopOnNonFiniteLoss(),
            training.ExactResume(options.checkpoints, save_every_steps=options.save_every),
        ],
        verbose=2 if process == 0 else 0,
    )
    if options.save_preset:
        model.save_to_preset(options.save_preset)


def batches_of_this_host(options, preprocessor):
    _, shares = distribution.share_of_data()
    if options.batch_size % shares:
        raise ValueError(f"--batch-size is shared among {shares} hosts. Received: {options.batch_size}")
    sources = {name: source_of(file) for name, file in options.text} or {
        name: grain.MapDataset.source(texts) for name, texts in prose_and_code().items()
    }
    weights = dict(options.weight) or dict.fromkeys(sources, 1)
    examples = data.mixture(sources, weights, options.seed)
    return data.training_batches(examples, preprocessor, options.batch_size // shares)


def source_of(file):
    read = data.from_jsonl if file.endswith(".jsonl") else data.from_array_record
    return read(file, fields=["text"])


if __name__ == "__main__":
    run(main, options, if_stopped="stopped. The same command goes on from the last checkpoint.")
