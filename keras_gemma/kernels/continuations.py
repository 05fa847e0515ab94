"""Rows that begin alike: their prompt stands once, with its continuations one after another behind it.

G prompts of P columns, n continuations of R columns each.
"""

import contextlib
import contextvars
from typing import NamedTuple

import keras
from keras import ops

from keras_gemma.kernels.platform import jax_platform
from keras_gemma.kernels.platform import on_jax

_CONTINUED = contextvars.ContextVar("continued", default=None)


class Continued(NamedTuple):
    """How columns `[G, P + n * R]` are read.

    Attributes:
        prompt_columns: int, `P`.
        continuations: int, `n`.
    """

    prompt_columns: int
    continuations: int

    def in_rows(self, x):
        """`[G, P + n * R, …]` → `[G * n, P + R, …]`, a row for each continuation."""
        copies, rest = self.continuations, x.shape[2:]
        prompts = ops.repeat(x[:, : self.prompt_columns], copies, axis=0)
        return ops.concatenate([prompts, ops.reshape(x[:, self.prompt_columns :], (len(prompts), -1, *rest))], axis=1)

    def once(self, rows):
        """`[G * n, P + R, …]` → `[G, P + n * R, …]`: undoes `in_rows`."""
        copies, rest = self.continuations, rows.shape[2:]
        prompts = rows[::copies, : self.prompt_columns]
        behind = ops.reshape(rows[:, self.prompt_columns :], (len(prompts), -1, *rest))
        return ops.concatenate([prompts, behind], axis=1)


@contextlib.contextmanager
def continued_prompts(prompt_columns, continuations):
    """Within, `causal_attention` takes columns as `Continued` reads them: no continuation sees another.

    Everything else in a network is of single tokens, positions given, so that prompts are run once.
    """
    continued = Continued(prompt_columns, continuations)
    before = _CONTINUED.set(continued)
    try:
        yield continued
    finally:
        _CONTINUED.reset(before)


def takes_continuations():
    """Whether `continued_prompts` is worth it: on one CPU or TPU. cuDNN's attention takes no padding in front."""
    return keras.distribution.distribution() is None and not (on_jax() and jax_platform() == "gpu")


def continued():
    """The `Continued` that is in force, or `None`."""
    return _CONTINUED.get()
