"""`keras-gemma presets`: the presets known by name."""

from keras_gemma.commands.arguments import add_command
from keras_gemma.preset_table import known_presets


def add(commands):
    add_command(
        commands,
        "presets",
        run,
        help="list the presets",
        description="Lists the presets that --preset takes by name, with their size and where their weights are.",
    )


def run(args):
    rows = [("NAME", "PARAMETERS", "WEIGHTS", "DESCRIPTION")]
    rows += [preset_row(name, entry) for name, entry in known_presets().items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def preset_row(name, entry):
    weights = "download" if "kaggle_handle" in entry else "bundled"
    return name, readable_count(entry["metadata"]["params"]), weights, entry["metadata"]["description"]


def readable_count(parameters):
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.1f}M"
