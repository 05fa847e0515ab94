"""Several processes that train, evaluate and generate together, and write and read files."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("Several processes are JAX's.", allow_module_level=True)
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

import processes


def test_two_processes_are_like_one(on_processes, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    several.mkdir()
    model, (x, _, _) = processes.build(), processes.examples(11)
    logits = model.predict(x, verbose=0)
    model.backbone.save_to_preset(one / "preset")
    model.save_weights(one / "model.weights.h5")
    np.save(one / "logits.npy", logits)
    begun = processes.begun_and_gone_on(one, 1)
    losses = processes.begun_and_gone_on(tmp_path / "unbroken", 2)
    np.save(one / "losses.npy", losses)

    on_processes(
        2,
        "processes_begin_alike_without_a_seed",
        "every_row_is_read_once",
        "each_process_reads_its_share_of_grain_data_sets",
        "a_share_that_ends_between_its_steps_is_refused",
        "hosts_that_do_not_share_a_folder_are_noticed",
        "what_would_train_other_rows_is_refused",
        "a_mixed_mesh_does_what_one_device_does",
        "files_of_one_process_are_read_and_others_written",
    )

    assert begun == losses[:1]
    np.testing.assert_allclose(processes.begun_and_gone_on(several, 2), losses, rtol=1e-5)
    for loaded in (processes.loaded_from_preset(several), processes.loaded_from_weights(several)):
        np.testing.assert_allclose(loaded.predict(x, verbose=0), logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_every_mesh_trains_and_generates_as_one_device_does(on_processes, count, devices):
    on_processes(count, "every_mesh_trains_and_generates_as_one_device_does", devices=devices)


@pytest.mark.slow
def test_batches_of_any_size_and_own_shares(on_processes):
    on_processes(2, "batches_of_any_size_are_predicted", "own_shares_train_as_all_rows_do")


@pytest.mark.slow
def test_policies_learn_on_two_processes(on_processes):
    on_processes(2, "policies_learn_as_on_one_device", "a_policy_goes_on_where_several_processes_stopped")
