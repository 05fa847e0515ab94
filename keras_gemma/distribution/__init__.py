"""Many devices: where weights and batches lie, and the configurations by name.

layouts         a table: which axis of a weight is cut along which axis of the mesh
meshes          which device stands where
pods            a `keras.distribution` of pods: replica × data × model, or replica × data × context × model
configurations  the table below
processes       several hosts: how they meet, which rows are whose
filled_up       batches whose rows a mesh divides
whole           arrays that are spread over hosts, in one piece: to look at, and to be written to files

    import keras
    from keras_gemma.distribution import gemma_2b_v5e_512

    keras.distribution.set_distribution(gemma_2b_v5e_512())   # before the model is made
    model = GemmaCausalLM.from_preset("gemma_2b_en")

On several hosts every process runs the same lines, after `initialize()`, which makes them one job.

Batches are cut along `replica` and `data`, weights and what the optimizer keeps of them along `data` and `model`;
pods hold the same weights and share nothing but the sum of the gradients. A configuration's name has the chips that
Google sells under it; a v5p is counted as two. Mesh: replica × data × model.

| name | mesh | one pod | for |
|---|---|---|---|
| `gemma_2b_v5e_8` | 1 × 8 × 1 | v5e:2x4, one host | 2B, full training |
| `gemma_2b_v5e_16` | 1 × 16 × 1 | v5e:4x4 | 2B, full training |
| `gemma_2b_v5e_256` | 1 × 256 × 1 | v5e:16x16 | 2B, full training |
| `gemma_2b_v5e_512` | 2 × 256 × 1 | v5e:16x16 | 2B as in its report: 2 pods, 256-way data within |
| `gemma_7b_v5e_8` | 1 × 8 × 1 | v5e:2x4, one host | 7B, adapters: Adam's moments of all weights leave no room |
| `gemma_7b_v5e_16` | 1 × 16 × 1 | v5e:4x4 | 7B, full training |
| `gemma_7b_v5e_256` | 1 × 16 × 16 | v5e:16x16 | 7B, full training |
| `gemma_7b_v5e_4096` | 16 × 16 × 16 | v5e:16x16 | 7B as in its report: 16 pods, 16-way data and model within |
| `gemma_2b_v5p_8` | 1 × 4 × 1 | v5p:2x2x1, one host | 2B, full training |
| `gemma_7b_v5p_32` | 1 × 16 × 1 | v5p:2x2x4 | 7B, full training |
| `gemma_7b_v5p_128` | 1 × 16 × 4 | v5p:4x4x4 | 7B, full training |
| `gemma_2b_v6e_8` | 1 × 8 × 1 | v6e:2x4, one host | 2B, full training |
| `gemma_7b_v6e_16` | 1 × 16 × 1 | v6e:4x4 | 7B, full training |
| `gemma_7b_v6e_256` | 1 × 16 × 16 | v6e:16x16 | 7B, full training |
| `gemma_2b_v5e_8_serving` | 1 × 2 × 4 | v5e:2x4, one host | 2B, `generate` |
| `gemma_7b_v5e_4_serving` | 1 × 1 × 4 | v5e:2x2, one host | 7B, `generate` |
| `gemma_7b_v5e_8_serving` | 1 × 1 × 8 | v5e:2x4, one host | 7B, `generate`, long prompts and large batches |
| `gemma_7b_v6e_8_serving` | 1 × 2 × 4 | v6e:2x4, one host | 7B, `generate` |
| `local_data` | 1 × all × 1 | any devices, CPUs and GPUs too | training: rows and weights are cut |
| `local_model` | 1 × 1 × all | any devices, CPUs and GPUs too | `generate`: weights are cut, rows are not |

A serving configuration cuts weights along `model` only, so that no token waits for weights of another device.

`gemma_7b_v5e_256(model=4)` has another model axis, and the data axis the rest of a pod: 1 × 64 × 4.
`keras-gemma plan --search` says which one trains fastest.

For rows too long for one device, `gemma_2b_v5e_16(context=4)` cuts the tokens of a row over four devices of the data
axis: the mesh is replica × data × context × model, 1 × 4 × 4 × 1. A batch may then have a quarter of the rows, weights
are cut as before, and `2 * context` divides the length of the rows. See `PodParallel`.

Example:

>>> import keras
>>> from keras_gemma.distribution import local_data
>>> local_data(devices=keras.distribution.list_devices()[:1]).device_mesh.axis_names
('replica', 'data', 'model')
"""

from keras_gemma.distribution.configurations import CONFIGURATIONS
from keras_gemma.distribution.configurations import Configuration
from keras_gemma.distribution.configurations import configuration
from keras_gemma.distribution.filled_up import filled_up
from keras_gemma.distribution.filled_up import is_own_share
from keras_gemma.distribution.filled_up import own_rows
from keras_gemma.distribution.layouts import check_weights
from keras_gemma.distribution.layouts import layout_map
from keras_gemma.distribution.layouts import shapes_of_weights
from keras_gemma.distribution.pods import PodParallel
from keras_gemma.distribution.processes import initialize
from keras_gemma.distribution.processes import share_of_data
from keras_gemma.distribution.whole import whole
from keras_gemma.distribution.whole import with_whole_outputs
from keras_gemma.distribution.whole import written_once
from keras_gemma.mesh_table import ADAPTERS
from keras_gemma.mesh_table import SERVING

globals().update(CONFIGURATIONS)


def __getattr__(name):
    # `plan` makes models, and models ask this package where their weights lie: so it is imported when it is used.
    if name in ("Plan", "plan"):
        from keras_gemma import planning

        return getattr(planning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ADAPTERS",
    "CONFIGURATIONS",
    "SERVING",
    "Configuration",
    "Plan",
    "PodParallel",
    "check_weights",
    "configuration",
    "filled_up",
    "initialize",
    "is_own_share",
    "layout_map",
    "own_rows",
    "plan",
    "shapes_of_weights",
    "share_of_data",
    "whole",
    "with_whole_outputs",
    "written_once",
    *CONFIGURATIONS,
]
