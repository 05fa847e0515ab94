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
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    sine, cosine = sine[:, :, None, :], cosine[:, :, None, :]
    rotated = ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return ops.cast(rotated, x.dtype)
