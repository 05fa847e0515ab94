"""The meshes known by name, as plain numbers.

Imports nothing, so that the command line checks names at once. `keras_gemma.distribution` makes devices of them.
"""

ALL = None
TRAINING, ADAPTERS, SERVING = "training", "adapters", "serving"

# In the order of the table in the docstring of `keras_gemma.distribution`.
MESHES = {
    # name                   use       topology     replica data model
    "gemma_2b_v5e_8":        (TRAINING, "v5e:2x4",    1,    8,   1),
    "gemma_2b_v5e_16":       (TRAINING, "v5e:4x4",    1,   16,   1),
    "gemma_2b_v5e_256":      (TRAINING, "v5e:16x16",  1,  256,   1),
    "gemma_2b_v5e_512":      (TRAINING, "v5e:16x16",  2,  256,   1),
    "gemma_7b_v5e_8":        (ADAPTERS, "v5e:2x4",    1,    8,   1),
    "gemma_7b_v5e_16":       (TRAINING, "v5e:4x4",    1,   16,   1),
    "gemma_7b_v5e_256":      (TRAINING, "v5e:16x16",  1,   16,  16),
    "gemma_7b_v5e_4096":     (TRAINING, "v5e:16x16", 16,   16,  16),
    "gemma_2b_v5p_8":        (TRAINING, "v5p:2x2x1",  1,    4,   1),
    "gemma_7b_v5p_32":       (TRAINING, "v5p:2x2x4",  1,   16,   1),
    "gemma_7b_v5p_128":      (TRAINING, "v5p:4x4x4",  1,   16,   4),
    "gemma_2b_v6e_8":        (TRAINING, "v6e:2x4",    1,    8,   1),
    "gemma_7b_v6e_16":       (TRAINING, "v6e:4x4",    1,   16,   1),
    "gemma_7b_v6e_256":      (TRAINING, "v6e:16x16",  1,   16,  16),
    "gemma_2b_v5e_8_serving": (SERVING, "v5e:2x4",    1,    2,   4),
    "gemma_7b_v5e_4_serving": (SERVING, "v5e:2x2",    1,    1,   4),
    "gemma_7b_v5e_8_serving": (SERVING, "v5e:2x4",    1,    1,   8),
    "gemma_7b_v6e_8_serving": (SERVING, "v6e:2x4",    1,    2,   4),
    "local_data":            (TRAINING, None,         1,  ALL,   1),
    "local_model":           (SERVING,  None,         1,    1, ALL),
}  # fmt: skip
