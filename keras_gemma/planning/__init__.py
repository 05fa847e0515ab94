"""Compiling ahead for chips that are not there: does a configuration fit, and what will it do?

preset + configuration + batch → model without memory → programs of a phase → compiled → measures → plan

topology   devices of a TPU that nobody rents yet, and what its chips can do
abstract   a model, its optimizer, a batch and a cache as shapes with layouts
phases     the programs that training, prefill and decoding run
compiling  the compiler asked: does it fit, and what does it do
program    what a compiled program does, counted in its text
measures   the same for all programs of a phase
report     a plan in words
picture    memory and times as bars
plan       all of them put together; `plan(...)` is the one that people call
estimates  memory and time of training, roughly and at once
search     plans of the settings that train fastest, out of many

`keras-gemma plan` prints it. TPU programs are compiled by the TPU's own compiler, in the package libtpu:
`pip install 'keras_gemma[plan]'`.
"""

from keras_gemma.planning.plan import Plan
from keras_gemma.planning.plan import phases_of
from keras_gemma.planning.plan import plan
from keras_gemma.planning.search import search

__all__ = ["Plan", "phases_of", "plan", "search"]
