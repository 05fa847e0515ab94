import re
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import keras_gemma.distribution
from keras_gemma.distribution import CONFIGURATIONS
from keras_gemma.distribution import PodParallel
from keras_gemma.distribution import gemma_2b_v5e_8
from keras_gemma.distribution import gemma_2b_v5e_16
from keras_gemma.distribution import gemma_2b_v5e_512
from keras_gemma.distribution import gemma_7b_v5e_8_serving
from keras_gemma.distribution import gemma_7b_v5e_256
from keras_gemma.distribution import gemma_7b_v5e_4096
from keras_gemma.distribution import gemma_7b_v6e_8_serving
from keras_gemma.distribution import local_data
from keras_gemma.distribution import local_model
from keras_gemma.distribution import meshes
from keras_gemma.models import GemmaBackbone

if keras.backend.backend() != "jax":
    pytest.skip("Distribution runs on JAX.", allow_module_level=True)

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


class Chip(SimpleNamespace):
    """What JAX says of a TPU."""

    def __hash__(self):
        return self.id


def chips(topology="v5e:16x16", pods=1, shuffled=False):
    kind, sizes = topology.split(":")
    sizes = [int(size) for size in sizes.split("x")]
    sizes += [1] * (3 - len(sizes))
    devices = [
        Chip(
            id=pod * int(np.prod(sizes)) + index,
            platform="tpu",
            device_kind=KINDS[kind],
            coords=tuple(int(c) for c in np.unravel_index(index, sizes)),
            core_on_chip=0,
            slice_index=pod,
            process_index=0,
        )
        for pod in range(pods)
        for index in range(int(np.prod(sizes)))
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))] if shuffled else devices


@pytest.mark.parametrize("name", [name for name, one in CONFIGURATIONS.items() if one.topology])
def test_a_configuration_takes_the_pods_it_names(name):
    configuration = CONFIGURATIONS[name]
    distribution = configuration(devices=chips(configuration.topology, configuration.replica))
    shape = (configuration.replica, configuration.data, configuration.model)
    assert tuple(distribution.device_mesh.devices.shape) == shape
    assert distribution.num_model_replicas == shape[0] * shape[1]


@pytest.mark.parametrize(("configuration", "pods"), [(gemma_2b_v5e_512, 2), (gemma_7b_v5e_4096, 16)])
def test_each_pod_is_one_replica_in_whatever_order_devices_come(configuration, pods):
    mesh = configuration(devices=chips(pods=pods, shuffled=True)).device_mesh.devices
    for pod, devices in enumerate(mesh):
        assert {device.slice_index for device in devices.flat} == {pod}
    assert len({device.id for device in mesh.flat}) == mesh.size


def test_the_meshes_of_the_report():
    assert gemma_2b_v5e_512.shape(512) == (2, 256, 1)
    assert gemma_7b_v5e_4096.shape(4096) == (16, 16, 16)


def test_another_number_of_devices_is_refused_with_what_would_fit():
    with pytest.raises(ValueError, match=r"'gemma_2b_v5e_512'.*512 devices.*Received: 8 devices.*gemma_2b_v5e_8,"):
        gemma_2b_v5e_512(devices=chips("v5e:2x4"))


def test_pods_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"from each of 2 pods.*256 in pod 0, 128 in pod 1, 128 in pod 2"):
        devices = chips(pods=3)
        gemma_2b_v5e_512(devices=devices[:256] + devices[256:384] + devices[512:640])


def test_one_pod_may_be_cut_into_several_replicas():
    mesh = gemma_2b_v5e_16(devices=chips("v5e:4x4")).device_mesh
    assert meshes.device_mesh((2, 8, 1), mesh.axis_names, chips("v5e:4x4")).devices.shape == (2, 8, 1)


def test_no_devices_are_refused():
    with pytest.raises(ValueError, match=r"at least one device. Received: devices=\[\]"):
        local_data(devices=[])


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="Received: cpu:99"):
        local_data(devices=["cpu:99"])


def test_every_configuration_stands_in_the_table_of_the_package_as_it_is():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) × (\w+) × (\w+) \| ([\w:]+)", keras_gemma.distribution.__doc__, re.M)
    shown = {name: tuple(sizes) for name, *sizes, _ in rows}
    expected = {
        name: tuple(str(size or "all") for size in (one.replica, one.data, one.model))
        for name, one in CONFIGURATIONS.items()
    }
    assert shown == expected
    topologies = {name: topology for name, *_, topology in rows}
    assert all(one.topology in (None, topologies[name]) for name, one in CONFIGURATIONS.items())


def axes(distribution, path, shape):
    weight = SimpleNamespace(path=path, shape=shape, trainable=True)
    return tuple(distribution.get_variable_layout(weight).axes)


KEY = "decoder_block_0/attention/key/kernel"
QUERY = "decoder_block_0/attention/query/kernel"


def test_heads_are_cut_where_they_divide_and_weights_never_between_pods():
    distribution = gemma_7b_v5e_4096(devices=chips(pods=16))
    assert axes(distribution, KEY, (16, 3072, 256)) == ("model", "data", None)
    assert axes(distribution, KEY, (1, 2048, 256)) == (None, "data", None)
    assert axes(distribution, QUERY, (8, 2048, 256)) == (None, "data", None)
    assert axes(distribution, "gemma_reward_model/reward_head/kernel", (3072, 1)) == ("data", None)
    assert axes(distribution, "reward_head/kernel", (3072, 1)) == ("data", None)
    assert distribution.get_data_layout((4096, 8192)).axes == (("replica", "data"), None)


def test_a_context_takes_its_devices_from_the_data_axis():
    distribution = gemma_7b_v5e_256(devices=chips(), context=4)
    mesh = distribution.device_mesh
    assert dict(zip(mesh.axis_names, mesh.shape)) == {"replica": 1, "data": 4, "context": 4, "model": 16}
    assert distribution.num_model_replicas == 4
    assert axes(distribution, KEY, (16, 3072, 256)) == ("model", ("data", "context"), None)
    assert distribution.get_data_layout((64, 8192)).axes == (("replica", "data"), None)
    assert gemma_7b_v5e_256(devices=chips(), context=1).device_mesh.axis_names == ("replica", "data", "model")
    serving = gemma_7b_v6e_8_serving(devices=chips("v6e:2x4"), context=2)
    assert axes(serving, KEY, (16, 3072, 256)) == ("model", None, None)


@pytest.mark.parametrize("context", [3, 32, 0])
def test_a_context_that_does_not_divide_the_data_axis_is_refused(context):
    with pytest.raises(ValueError, match=rf"'gemma_7b_v5e_256' gives 16 devices. Received: context={context}"):
        gemma_7b_v5e_256(devices=chips(), context=context)


def test_another_model_axis_takes_its_devices_from_the_data_axis():
    mesh = gemma_2b_v5e_8(devices=chips("v5e:2x4"), model=4).device_mesh
    assert dict(zip(mesh.axis_names, mesh.shape)) == {"replica": 1, "data": 2, "model": 4}
    mesh = gemma_7b_v5e_256(devices=chips(), context=8, model=8).device_mesh
    assert dict(zip(mesh.axis_names, mesh.shape)) == {"replica": 1, "data": 4, "context": 8, "model": 8}
    for model in (3, 0, 512):
        with pytest.raises(ValueError, match=rf"'gemma_7b_v5e_256' has 256. Received: model={model}"):
            gemma_7b_v5e_256(devices=chips(), model=model)


def test_no_part_of_an_embedding_is_narrower_than_the_vectors_of_a_chip():
    table, whole = "token_embedding/embeddings", (256000, 2048)
    assert axes(gemma_2b_v5e_16(devices=chips("v5e:4x4")), table, whole) == ("model", "data")
    # 8 columns a chip: 1000 rows instead.
    distribution = gemma_2b_v5e_512(devices=chips(pods=2))
    assert axes(distribution, table, whole) == ("data", None)
    # A vocabulary that 256 chips do not divide.
    assert axes(distribution, table, (256001, 2048)) == ("model", "data")


def test_serving_sends_no_weights():
    distribution = gemma_7b_v5e_8_serving(devices=chips("v5e:2x4"))
    assert axes(distribution, KEY, (16, 3072, 256)) == ("model", None, None)
    assert axes(distribution, "token_embedding/embeddings", (256000, 3072)) == ("model", None)


def test_what_is_not_divided_is_refused_with_path_shape_and_axis():
    distribution = gemma_2b_v5e_8(devices=chips("v5e:2x4"))
    with pytest.raises(
        ValueError, match=r"Axis 1 of 'decoder_block_0.*key/kernel' with the shape \(1, 12, 8\).*'data'"
    ):
        axes(distribution, KEY, (1, 12, 8))


def test_a_weight_without_a_layout_is_refused_until_it_has_one():
    distribution = gemma_2b_v5e_8(devices=chips("v5e:2x4"))
    with pytest.raises(ValueError, match=r"'my_head/kernel' with the shape \(16, 3\)"):
        axes(distribution, "my_head/kernel", (16, 3))
    layout_map = keras_gemma.distribution.layout_map(distribution.device_mesh)
    layout_map["my_head/kernel"] = ("data", None)
    assert axes(PodParallel(distribution.device_mesh, layout_map), "my_head/kernel", (16, 3)) == ("data", None)
    assert axes(distribution, "my_norm/scale", (16,)) == (None,)


def test_a_mesh_with_other_axes_is_refused():
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), devices=["cpu:0"])
    with pytest.raises(ValueError, match="axes of the mesh"):
        PodParallel(mesh)


SHAPE = {
    "vocabulary_size": 64, "num_layers": 1, "num_query_heads": 4, "num_key_value_heads": 1,
    "hidden_dim": 12, "intermediate_dim": 64, "head_dim": 8,
}  # fmt: skip


def test_a_backbone_that_a_plain_mesh_cannot_cut_is_refused_before_it_is_made():
    devices = [f"cpu:{i}" for i in range(8)]
    mesh = keras.distribution.DeviceMesh((8, 1), ("batch", "model"), devices=devices)
    layout_map = GemmaBackbone.get_layout_map(mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
    refused = pytest.raises(ValueError, match=r"Axis 1 of 'token_embedding/embeddings' with the shape \(64, 12\).*: 8")
    with distribution.scope(), refused:
        GemmaBackbone(**SHAPE)


def test_local_configurations_take_what_there_is():
    devices = keras.distribution.list_devices()[:1]
    assert local_data(devices=devices).device_mesh.devices.shape == (1, 1, 1)
    assert local_model.shape(4) == (1, 1, 4) and local_data.shape(4) == (1, 4, 1)
