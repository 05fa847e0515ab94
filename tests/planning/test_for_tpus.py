"""Programs compiled by the TPU's own compiler, most of them of the bundled preset."""

import keras
import pytest

from keras_gemma.planning import plan

if keras.backend.backend() != "jax":
    pytest.skip("Plans are of JAX programs.", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu", reason="pip install libtpu")


def test_training_in_a_pod():
    made = plan("gemma_tiny_en", "gemma_2b_v5e_8", 256)
    assert made.fits and not made.across_pods
    assert any(name.startswith("splash") for name in made.kernels)
    assert 1.0 < made.executed_flops / made.model_flops < 1.4
    assert "of 15.75" in str(made) and made.utilization < 1


def test_nothing_crosses_pods_but_the_sum_of_gradients():
    made = plan("gemma_tiny_en", "gemma_2b_v5e_512", 256)
    assert set(made.across_pods) == {"all-reduce"}
    # Each chip sends its part of the gradients once, and scalars.
    assert made.across_pods["all-reduce"] < 1.1 * made.memory["weights"]


def test_decoding_has_one_cache():
    # The bundled preset's heads are narrower than the chip's vectors, which fills them up for a while.
    made = plan("gemma_2b_en", "gemma_2b_v5e_8_serving", 4096, 64, phase="decode")
    assert made.memory["temporaries"] < made.memory["cache"] / 2


def test_a_prompt_goes_through_splash():
    made = plan("gemma_tiny_en", "gemma_2b_v5e_8_serving", 256, phase="prefill")
    assert any(name.startswith("splash") for name in made.kernels)


def test_what_does_not_fit_says_by_how_much():
    made = plan("gemma_tiny_en", "gemma_2b_v5e_8", 16384, 256, recompute="none")
    assert not made.fits and "GiB more than there are" in str(made)
