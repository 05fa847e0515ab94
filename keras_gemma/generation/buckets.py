"""Sizes rounded up, so that few of them are ever compiled."""


def bucket(size, smallest=1):
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … (two an octave) that holds `size` and is no less than `smallest`.

    Example:

    >>> from keras_gemma.generation.buckets import bucket
    >>> [bucket(size, smallest=32) for size in (1, 33, 64, 65, 1000)]
    [32, 48, 64, 96, 1024]
    """
    size = max(size, smallest)
    power = 1 << (size - 1).bit_length()
    between = power * 3 // 4
    return between if size <= between and power >= 4 else power
