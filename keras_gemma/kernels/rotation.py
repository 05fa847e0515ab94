"""Rotary position embedding applied to heads."""

from keras import ops


def rotate(x, sine, cosine):
    """Rotates the two halves of every head by the angle of its position.

    Args:
        x: float tensor `[B, T, heads, H]`.
        sine: float32 tensor `[B, T, H / 2]`.
        cosine: float32 tensor `[B, T, H / 2]`.

    Returns:
        A tensor like `x`; the rotation is computed in float32.
    """
    # Whole heads, one of them turned: halves that are put together at the end are several times slower on a CPU.
    half = x.shape[-1] // 2
    sines = ops.concatenate([-sine, sine], axis=-1)[:, :, None, :]
    cosines = ops.concatenate([cosine, cosine], axis=-1)[:, :, None, :]
    heads = ops.cast(x, "float32")
    return ops.cast(heads * cosines + ops.roll(heads, half, axis=-1) * sines, x.dtype)
