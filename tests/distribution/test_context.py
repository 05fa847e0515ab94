"""Rows whose columns are cut, on meshes of eight devices."""

import pytest

FILE = "eight_devices_context.py"


def test_long_rows_on_a_mesh_with_context(on_eight_devices):
    on_eight_devices(
        "long_rows_train_and_generate_as_on_one_device",
        "kernels_attend_as_without_a_mesh",
        "rows_that_a_context_does_not_divide",
        file=FILE,
    )


@pytest.mark.slow
def test_long_rows_on_other_meshes_with_context(on_eight_devices):
    on_eight_devices(
        "long_rows_of_both_shapes_train_and_generate_as_on_one_device",
        "long_rows_are_predicted_and_evaluated_as_on_one_device",
        "kernels_attend_to_long_rows_as_without_a_mesh",
        "a_plan_cuts_the_tokens_of_a_row",
        file=FILE,
    )
