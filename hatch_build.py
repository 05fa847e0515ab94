"""Puts `presets/` into the wheel as `keras_gemma/presets`. An editable installation reads it from the checkout."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundledPresets(BuildHookInterface):
    def initialize(self, version, build_data):
        if version != "editable":
            build_data["force_include"]["presets"] = "keras_gemma/presets"
