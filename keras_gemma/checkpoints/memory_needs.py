"""How much memory a model takes to load, to generate and to train: what must be there, before a compiler's own."""

CONTEXT = 8192
BYTES = {"float32": 4, "bfloat16": 2}
LORA_RANK = 8
# A gradient and the two moments of Adam, in float32, beside each trained weight.
TRAINING_STATE = 3 * 4
GIB = 2**30


def memory_needs(sizes, parameters):
    """Bytes by job and dtype of the weights.

    Args:
        sizes: `canonical.Sizes`.
        parameters: int, all of the model.

    Returns:
        A dict from `"load"`, `"generate"` (the weights and a cache of 8192 tokens), `"train_adapters"` (LoRA of rank 8
        on queries and values, with Adam) and `"train"` (Adam in float32) to dicts of ints by dtype. Activations come
        on top, and on a CPU a compiler's copies.

    Example:

    >>> from keras_gemma.checkpoints.canonical import Sizes
    >>> from keras_gemma.checkpoints.memory_needs import memory_needs
    >>> gemma_2b = Sizes(256000, 18, 8, 1, 2048, 32768, 256)
    >>> needs = memory_needs(gemma_2b, parameters=2_506_172_416)
    >>> {job: round(needs[job]["bfloat16"] / 2**30, 2) for job in needs}
    {'load': 4.67, 'generate': 4.81, 'train_adapters': 4.68, 'train': 37.34}
    """
    cached = 2 * sizes.num_layers * sizes.num_key_value_heads * sizes.head_dim * CONTEXT
    heads = (sizes.num_query_heads + sizes.num_key_value_heads) * sizes.head_dim
    adapters = sizes.num_layers * LORA_RANK * (2 * sizes.hidden_dim + heads)
    return {
        "load": {dtype: size * parameters for dtype, size in BYTES.items()},
        "generate": {dtype: size * (parameters + cached) for dtype, size in BYTES.items()},
        "train_adapters": {
            dtype: size * (parameters + adapters) + TRAINING_STATE * adapters for dtype, size in BYTES.items()
        },
        # Mixed precision keeps the weights themselves in float32.
        "train": {dtype: (BYTES["float32"] + TRAINING_STATE) * parameters for dtype in BYTES},
    }


def readable_bytes(count):
    """Bytes as people say them.

    Example:

    >>> from keras_gemma.checkpoints.memory_needs import readable_bytes
    >>> [readable_bytes(count) for count in (900, 14_680_064, 5_012_344_832)]
    ['900 bytes', '14.0 MiB', '4.67 GiB']
    """
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.1f} MiB"
    return f"{count:,} bytes"


def bytes_on_disk(files):
    """Bytes of files, and of all that is in folders."""
    inside = [path for file in files for path in ([file] if file.is_file() else file.rglob("*"))]
    return sum(path.stat().st_size for path in inside if path.is_file())
