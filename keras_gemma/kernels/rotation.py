"""Rotary position embedding applied to heads."""

from keras import ops

from keras_gemma.kernels.platform import on_jax_cpu


def rotate(x, sine, cosine):
    """Rotates the two halves of every head by the angle of its position.

    Args:
        x: float tensor `[B, T, heads, H]`.
        sine: float32 tensor `[B, T, H / 2]`.
        cosine: float32 tensor `[B, T, H / 2]`.

    Returns:
        A tensor like `x`; the rotation is computed in float32.
    """
    heads = ops.cast(x, "float32")
    sine, cosine = sine[:, :, None, :], cosine[:, :, None, :]
    return ops.cast((_whole if on_jax_cpu() else _by_halves)(heads, sine, cosine), x.dtype)


def _by_halves(heads, sine, cosine):
    first, second = ops.split(heads, 2, axis=-1)
    return ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _whole(heads, sine, cosine):
    # Halves that are put together at the end are several times slower on a CPU. A TPU would move twice the sines.
    turned = ops.roll(heads, heads.shape[-1] // 2, axis=-1)
    sines, cosines = ops.concatenate([-sine, sine], axis=-1), ops.concatenate([cosine, cosine], axis=-1)
    return heads * cosines + turned * sines
