"""Which columns each device computes where the columns of rows are cut."""

import keras
import pytest

from keras_gemma import kernels
from keras_gemma.distribution import PodParallel

if keras.backend.backend() != "jax":
    pytest.skip("Only JAX distributes.", allow_module_level=True)


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_all_devices_have_as_much_to_see(devices):
    from keras_gemma.kernels.shares import _routes
    from keras_gemma.kernels.shares import _starts

    starts = _starts(_routes(devices), width=5)
    assert sorted(start for parts in starts for start in parts) == list(range(0, 10 * devices, 5))
    assert {sum(parts) for parts in starts} == {5 * (2 * devices - 1)}


def test_splash_computes_as_many_blocks_on_every_device():
    from keras_gemma.kernels.shares import _routes
    from keras_gemma.kernels.shares import _starts
    from keras_gemma.kernels.splash_attention import _kernel

    kernel = _kernel(8, _starts(_routes(4), 256), 256, 2048, 128, interpret=True)
    for table in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        # 16 blocks of queries, each of which sees its own and those before it.
        counts = (table.block_mask.reshape(4, -1) > 0).sum(axis=1)
        assert counts.tolist() == [16 * 17 // 2 // 4] * 4


def test_a_context_of_one_device_cuts_nothing():
    axes = ("replica", "data", "context", "model")
    mesh = keras.distribution.DeviceMesh((1, 1, 1, 1), axes, devices=keras.distribution.list_devices()[:1])
    with PodParallel(mesh).scope():
        kernels.refuse_uneven_columns(7)
        x = keras.ops.ones((2, 7, 3))
        assert kernels.tokens_apart(x).shape == (2, 7, 3)
