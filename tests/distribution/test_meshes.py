"""Training and generation on meshes of eight devices."""

import pytest


def test_mixed_meshes_train_and_generate_as_one_device_does(on_eight_devices):
    on_eight_devices(
        "mixed_meshes_train_and_generate_as_one_device_does", "what_is_kept_of_blocks_is_cut_along_the_model_axis"
    )


@pytest.mark.slow
def test_data_and_model_meshes_train_and_generate_as_one_device_does(on_eight_devices):
    on_eight_devices("data_and_model_meshes_train_and_generate_as_one_device_does")
