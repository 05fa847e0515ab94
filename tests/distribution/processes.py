"""Checks on several processes. `conftest.py` runs `python processes.py PORT COUNT PROCESS FOLDER CHECK...` in each.

Several checks share a run: starting the processes takes longer than most checks. What they compare with is computed
in each process alone, on one device.
"""

import contextlib
import re
import sys
import time
import warnings
from pathlib import Path

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()

import eight_devices_rlhf
import grain
import jax
import keras
import numpy as np
from eight_devices import SHAPES
from eight_devices import build
from eight_devices import examples
from eight_devices import generated
from eight_devices import pods
from eight_devices import trained

from keras_gemma import data
from keras_gemma import distribution
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.rlhf import ReinforceTrainer
from keras_gemma.training import AdamW
from keras_gemma.training import ExactResume
from keras_gemma.training.checkpoint_folder import CheckpointFolder


def run(shape, **kwargs):
    model = build(shape, **kwargs)
    history = trained(model)
    return history, [distribution.whole(weight) for weight in model.weights], generated(model)


def assert_equal_to_one_device(shape, distributions, **kwargs):
    history, weights, tokens = run(shape, **kwargs)
    for mesh, chosen in distributions.items():
        with chosen.scope():
            received, weights_received, tokens_received = run(shape, **kwargs)
        for name in history:
            np.testing.assert_allclose(received[name], history[name], rtol=1e-5, err_msg=f"{name} on {mesh}")
        for weight, expected in zip(weights_received, weights):
            np.testing.assert_allclose(weight, expected, atol=1e-5, err_msg=str(mesh))
        np.testing.assert_array_equal(tokens_received, tokens, err_msg=str(mesh))


def every_mesh_trains_and_generates_as_one_device_does(folder):
    meshes = {mesh: pods(*mesh) for mesh in ((2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4))}
    meshes["crossed"] = crossed()
    assert_equal_to_one_device("2b", meshes, num_layers=2, scan_layers=True)


def a_mixed_mesh_does_what_one_device_does(folder):
    """Trains, predicts, evaluates and generates."""

    def outcome():
        model = build("7b")
        history = trained(model)
        x, y, weights = examples(11)
        logits = model.predict(x, batch_size=11, verbose=0)
        results = model.evaluate(x, y, 11, weights, verbose=0)
        return history, [distribution.whole(weight) for weight in model.weights], logits, results, generated(model)

    expected = outcome()
    with crossed().scope():
        received = outcome()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), received, expected)


def crossed():
    """Four devices of which every process has some of each half of the rows."""
    mesh = keras.distribution.DeviceMesh((1, 2, 2), ("replica", "data", "model"))
    devices = mesh.devices.reshape(2, 2).T.reshape(1, 2, 2)
    return distribution.PodParallel(keras.distribution.DeviceMesh(devices.shape, mesh.axis_names, devices.flatten()))


def policies_learn_as_on_one_device(folder):
    for run_of in (eight_devices_rlhf.reinforced, eight_devices_rlhf.preferred):
        eight_devices_rlhf.assert_equal_to_one_device(run_of, "2b", (2, 2, 1), (1, 2, 2))


def a_policy_goes_on_where_several_processes_stopped(folder):
    """And all learn from the rewards of the first, whatever their own are."""
    asked = []

    def letters(prompts, texts):
        asked.append(texts)
        return [text.count("e") + jax.process_index() for text in texts]

    def reinforced(epochs, checkpoints):
        trainer = ReinforceTrainer(
            eight_devices_rlhf.policy("2b"),
            letters,
            max_new_tokens=6,
            group_size=2,
            baseline="moving_average",
        )
        settings = {"batch_size": 3, "verbose": 0, "save_every_steps": 1}
        history = trainer.fit(eight_devices_rlhf.PROMPTS, epochs=epochs, checkpoints=checkpoints, **settings).history
        weights = [distribution.whole(weight) for weight in trainer.policy.weights]
        return weights, [history[name] for name in ("reward", "kl", "loss")], trainer.samples

    with pods(1, 2, 2).scope():
        expected = reinforced(3, folder / "unbroken")
        reinforced(1, folder / "broken")
        received = reinforced(3, folder / "broken")
    assert len(asked) == 3 + 1 + 2 and received[1][1][2] != 0
    jax.tree.map(np.testing.assert_array_equal, received, expected)


def batches_of_any_size_are_predicted(folder):
    x, y, _ = examples(11)
    alone = build()
    logits = alone.predict(x, batch_size=3, verbose=0)
    cut = [slice(start, start + 5) for start in range(0, 11, 5)]
    for mesh in (pods(2, 1, 2), pods(1, 1, 4), pods(1, 4, 1)):
        with mesh.scope():
            model = build()
            np.testing.assert_allclose(model.predict(x, batch_size=3, verbose=0), logits, atol=1e-5)
            batches = (({name: values[rows] for name, values in x.items()}, y[rows]) for rows in cut)
            np.testing.assert_allclose(model.predict(batches, verbose=0, steps=3), logits, atol=1e-5)


def every_row_is_read_once(folder):
    """What `fit` draws, without a model: all processes together have the rows of each batch, in their order."""
    rows = np.arange(1, 12)
    for mesh in (pods(1, 4, 1), pods(2, 1, 2), pods(1, 1, 4), crossed()):
        with mesh.scope():
            assert drawn(arrays_of(rows, 6)) == [[*range(1, 7)], [*range(7, 12)]], mesh
            assert drawn(({"token_ids": rows[:n]}, rows[:n]) for n in (5,)) == [[1, 2, 3, 4, 5]], mesh
    with pods(1, 4, 1, auto_shard_dataset=False).scope():
        index, count = distribution.share_of_data()
        assert (index, count) == (jax.process_index(), 2)
        # The last batches of two rows and of one are filled up alike.
        assert drawn(arrays_of(rows[index::count], 4)) == [[1, 3, 5, 7, 2, 4, 6, 8], [9, 11, 10]]
    with pods(1, 1, 4, auto_shard_dataset=False).scope():
        assert distribution.share_of_data() == (0, 1)
        assert drawn(arrays_of(rows, 8)) == [[*range(1, 9)], [9, 10, 11]]


def arrays_of(rows, batch_size):
    return data.preprocessed({"token_ids": rows}, rows, None, batch_size, lambda *batch: batch)


def drawn(batches, **kwargs):
    """The rows of all devices of each batch, without those that fill it up."""
    batches = distribution.filled_up(batches, **kwargs)
    layout = keras.distribution.distribution().get_data_layout((8,)).backend_layout
    found = []
    for x, y, *_ in batches.get_jax_iterator():
        whole = distribution.whole(jax.make_array_from_process_local_data(layout, np.asarray(y)))
        np.testing.assert_array_equal(
            distribution.whole(jax.make_array_from_process_local_data(layout, np.asarray(x["token_ids"]))), whole
        )
        found.append(whole[whole > 0].tolist())
    return found


def each_process_reads_its_share_of_grain_data_sets(folder):
    with pods(1, 4, 1).scope():
        index, _ = distribution.share_of_data()
        # Three batches here and one there, as packing may make them.
        own = list(range(1, 11)) if index == 0 else [11, 12]
        assert drawn(grain_batches(own)) == [[1, 2, 3, 4, 11, 12], [5, 6, 7, 8], [9, 10]]
        sources = {"numbers": grain.MapDataset.range(1, 12)}
        share = data.mixture(sources, {"numbers": 1}, shuffle=False)
        assert drawn(grain_batches(list(share[:4]))) == [[1, 3, 5, 7, 2, 4, 6, 8]]
        assert drawn(grain_batches(list(share[4 : 6 - index]))) == [[9, 11, 10]]
    with pods(1, 1, 4).scope():
        share = data.mixture(sources, {"numbers": 1}, shuffle=False)
        assert drawn(grain_batches(list(share[:11]))) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]


def a_share_that_ends_between_its_steps_is_refused(folder):
    process = jax.process_index()
    with pods(1, 4, 1).scope():
        short = distribution.filled_up(grain_batches(range(8 - 4 * process)), steps=2).get_jax_iterator()
        if process == 0:
            assert len(list(short)) == 2
        else:
            with raised("A share lasts as long as its steps. Received: 1 batches for every 2 steps"):
                list(short)


def hosts_that_do_not_share_a_folder_are_noticed(folder):
    shared = CheckpointFolder(folder / "shared", keep=1)
    assert shared.verify_latest() is None
    # The first process clears up, and the others may be faster.
    assert jax.process_index() or not list(shared.path.iterdir())
    own = CheckpointFolder(folder / f"own_{jax.process_index()}", keep=1)
    with raised("All processes see one folder. Received: .*own_., which process 1 does not share with process 0"):
        own.verify_latest()


def grain_batches(rows):
    rows = np.array(rows, int)
    source = grain.MapDataset.source(range(len(rows))).to_iter_dataset()
    return source.batch(4).map(lambda numbers: ({"token_ids": rows[numbers]}, rows[numbers]))


def what_would_train_other_rows_is_refused(folder):
    process = jax.process_index()
    rows = np.arange(1, 9)
    other = rows + process
    with pods(1, 4, 1).scope(), raised("every process hands over the same batches.*auto_shard_dataset=False"):
        drawn(arrays_of(other, 8))
    with pods(1, 1, 4, auto_shard_dataset=False).scope(), raised("hold the same rows read the same share"):
        drawn(arrays_of(other, 8))
    with pods(1, 4, 1, auto_shard_dataset=False).scope():
        with raised(r"as many rows as the others. Received.*\(4, 2\), \(8, 1\)"):
            drawn(arrays_of(other, 4 + 4 * process))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            drawn(arrays_of(rows, 8))
        assert any("Every process reads the same batch" in str(one.message) for one in caught), caught
    mesh = keras.distribution.DeviceMesh((1, 2, 1), ("replica", "data", "model"), jax.devices()[:2])
    with distribution.PodParallel(mesh).scope(), raised("mesh without any of process 1"):
        distribution.share_of_data()


def own_shares_train_as_all_rows_do(folder):
    x, y, weights = examples(11)
    alone = build()
    alone.compile("sgd")
    settings = {"batch_size": 8, "shuffle": False, "epochs": 2, "verbose": 0}
    expected = alone.fit(x, y, sample_weight=weights, **settings).history["loss"]
    logits = alone.predict(x, verbose=0)
    for mesh in (pods(1, 4, 1, auto_shard_dataset=False), pods(1, 1, 4, auto_shard_dataset=False)):
        with mesh.scope():
            index, count = distribution.share_of_data()
            own = np.arange(11)[index::count]
            mine = {name: values[own] for name, values in x.items()}
            model = build()
            model.compile("sgd")
            settings["batch_size"] = 8 // count
            received = model.fit(mine, y[own], sample_weight=weights[own], **settings).history["loss"]
            np.testing.assert_allclose(received, expected, rtol=1e-5)
            np.testing.assert_allclose(model.predict(mine, batch_size=3, verbose=0), logits[own], atol=1e-5)


@contextlib.contextmanager
def raised(message, kind=ValueError):
    try:
        yield
    except kind as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"nothing raised: {message}")


def processes_begin_alike_without_a_seed(folder):
    from jax.experimental import multihost_utils

    multihost_utils.assert_equal(np.random.get_state()[1])
    with pods(1, 4, 1).scope():
        shuffled = data.preprocessed(np.arange(1, 9), None, None, 8, lambda *batch: batch, shuffle=True)
        next(iter(distribution.filled_up(shuffled).get_jax_iterator()))


def files_of_one_process_are_read_and_others_written(folder):
    x, _, _ = examples(11)
    one, several = folder / "one", folder / "several"
    logits = np.load(one / "logits.npy")
    with pods(1, 2, 2).scope():
        loaded = loaded_from_weights(one)
        np.testing.assert_allclose(loaded.predict(x, verbose=0), logits, atol=1e-5)
        loaded.save_weights(several / "model.weights.h5")
        with raised("could not be written|could not write", OSError):
            loaded.save_weights(one / "losses.npy" / "model.weights.h5")
        loaded = loaded_from_preset(one)
        np.testing.assert_allclose(loaded.predict(x, verbose=0), logits, atol=1e-5)
        loaded.backbone.save_to_preset(several / "preset")
        np.testing.assert_allclose(begun_and_gone_on(one, 2), np.load(one / "losses.npy"), rtol=1e-5)
        begun_and_gone_on(several, 1)


def loaded_from_preset(folder):
    return GemmaCausalLM(GemmaBackbone.from_preset(str(folder / "preset")))


def loaded_from_weights(folder):
    model = GemmaCausalLM(GemmaBackbone(**SHAPES["2b"]))
    model.load_weights(folder / "model.weights.h5")
    return model


def begun_and_gone_on(folder, epochs):
    """Losses of `epochs` epochs, of which those are not trained again that a checkpoint in the folder has."""
    model = build()
    model.compile(AdamW(1e-2))
    x, y, weights = examples(11)
    resume = ExactResume(folder / "checkpoints", save_every_steps=1)
    settings = {"sample_weight": weights, "batch_size": 6, "epochs": epochs, "verbose": 0}
    return model.fit(x, y, callbacks=[resume], **settings).history["loss"]


if __name__ == "__main__":
    port, count, process, folder = *map(int, sys.argv[1:4]), Path(sys.argv[4])
    # Nobody dies here, and a busy machine may stand still for a while.
    patient = {"heartbeat_timeout_seconds": 900, "shutdown_timeout_seconds": 300}
    assert distribution.initialize(f"127.0.0.1:{port}", count, process, **patient) == (process, count)
    for name in sys.argv[5:]:
        began = time.monotonic()
        globals()[name](folder)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
