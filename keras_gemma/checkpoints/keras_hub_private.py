"""Everything of keras-hub that is not its public interface, in this one file.

`get_file` finds a file of a preset in a local folder, on Kaggle, on Hugging Face, on ModelScope or in a bucket, through
the hub's own library; it raises `FileNotFoundError` for a file that the preset does not have.
"""

import keras_hub
from keras_hub.src.utils.preset_utils import CONFIG_FILE
from keras_hub.src.utils.preset_utils import METADATA_FILE
from keras_hub.src.utils.preset_utils import MODEL_WEIGHTS_FILE
from keras_hub.src.utils.preset_utils import PREPROCESSOR_CONFIG_FILE
from keras_hub.src.utils.preset_utils import SHARDED_MODEL_WEIGHTS_CONFIG_FILE
from keras_hub.src.utils.preset_utils import TASK_CONFIG_FILE
from keras_hub.src.utils.preset_utils import TASK_WEIGHTS_FILE
from keras_hub.src.utils.preset_utils import TOKENIZER_CONFIG_FILE
from keras_hub.src.utils.preset_utils import get_file

__all__ = [
    "CONFIG_FILE",
    "METADATA_FILE",
    "MODEL_WEIGHTS_FILE",
    "PREPROCESSOR_CONFIG_FILE",
    "SHARDED_MODEL_WEIGHTS_CONFIG_FILE",
    "TASK_CONFIG_FILE",
    "TASK_WEIGHTS_FILE",
    "TOKENIZER_CONFIG_FILE",
    "get_file",
    "module_of",
]


def module_of(class_name):
    """The private module that keras-hub writes into presets for one of its public model classes, or `None`."""
    cls = getattr(keras_hub.models, class_name, None)
    return cls.__module__ if cls else None
