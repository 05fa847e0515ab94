"""The commands of `keras-gemma`, one file each.

A command's file has `add(commands)`, its arguments, and `run(args)`, what it does. Nothing heavy is imported before the
arguments are checked.

arguments   what several commands take
checks      presets and files are there, before Keras is imported
failures    an error of any library as one sentence
"""
