"""The known presets as keras-hub's classes list them."""

from keras_gemma.preset_table import known_presets


class Presets:
    """Class attribute that lists the known presets, in the form in which keras-hub's `presets` does.

    It is read from the class, as `GemmaCausalLM.presets`, and leaves keras-hub's own lists untouched.
    """

    def __get__(self, instance, owner=None):
        return {name: dict(entry) for name, entry in known_presets().items()}
