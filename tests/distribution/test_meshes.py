"""Training and generation on meshes of eight devices."""


def test_every_mesh_trains_and_generates_as_one_device_does(on_eight_devices):
    on_eight_devices("every_mesh_trains_and_generates_as_one_device_does")
