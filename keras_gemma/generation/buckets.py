"""Sizes rounded up, so that few of them are ever compiled."""


def bucket(size, smallest=1, parts=2):
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … that holds `size` and is no less than `smallest`.

    Args:
        size: int.
        smallest: int.
        parts: int, sizes of an octave, a power of two. More waste less and are compiled more often.

    Example:

    >>> from keras_gemma.generation.buckets import bucket
    >>> [bucket(size, smallest=32) for size in (1, 33, 64, 65, 1000)]
    [32, 48, 64, 96, 1024]
    >>> [bucket(size, parts=8) for size in (7, 33, 64, 65, 1000)]
    [7, 36, 64, 72, 1024]
    """
    size = max(size, smallest)
    step = max((1 << (size - 1).bit_length()) // (2 * parts), 1)
    return -(-size // step) * step
