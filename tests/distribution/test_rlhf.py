"""Reward models, REINFORCE and preference tuning on meshes of eight devices."""

import pytest

FILE = "eight_devices_rlhf.py"


def test_reinforce_and_pairs_on_a_mesh(on_eight_devices):
    on_eight_devices("reinforce_learns_as_on_one_device", "pairs_are_learned_as_on_one_device", file=FILE)


@pytest.mark.slow
def test_all_of_it_on_other_meshes(on_eight_devices):
    on_eight_devices("everything_learns_as_on_one_device_on_other_meshes", file=FILE)
