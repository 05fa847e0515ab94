"""Rows, adapters, 8-bit weights and files on meshes of eight devices. Apart from training: it runs beside that."""

import pytest


def test_rows_adapters_and_files(on_eight_devices):
    on_eight_devices(
        "batches_of_any_size_are_predicted_and_evaluated",
        "gradients_are_those_of_one_device",
        "adapters_and_8_bit_weights_lie_on_the_mesh",
        "files_of_one_mesh_load_on_others",
    )


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(on_eight_devices):
    on_eight_devices("a_run_goes_on_on_another_mesh")
