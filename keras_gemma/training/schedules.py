"""Learning rates by step."""

import math

import keras
from keras import ops

DECAYS = ("cosine", "linear", "constant")


@keras.saving.register_keras_serializable(package="keras_gemma")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in a line from 0 to `peak`, then falls to `final`, or stays.

    The rate is 0 at step 0, `peak` at `warmup_steps`, and `final` from `total_steps` on; in between it follows
    half a cosine (Loshchilov and Hutter, arXiv 1608.03983, without restarts) or a line. A step is one update of the
    weights.

    Args:
        peak: float. The largest rate.
        warmup_steps: int. 0 starts at the peak.
        total_steps: int, warm-up included. Needed by every decay but `"constant"`.
        decay: `"cosine"`, `"linear"` (to zero, unless `final` says otherwise) or `"constant"`.
        final: float. Where the decay ends.

    Raises:
        ValueError: for a decay of another name, and for numbers that leave it no steps or nowhere to go.

    Example:

    >>> from keras_gemma.training import WarmUp
    >>> rate = WarmUp(peak=3e-4, warmup_steps=100, total_steps=1000, decay="linear")
    >>> [f"{float(rate(step)):.1e}" for step in (0, 50, 100, 550, 1000)]
    ['0.0e+00', '1.5e-04', '3.0e-04', '1.5e-04', '0.0e+00']
    """

    def __init__(self, peak, warmup_steps=0, total_steps=None, decay="cosine", final=0.0):
        super().__init__()
        if decay not in DECAYS:
            raise ValueError(f"`decay` is one of {', '.join(map(repr, DECAYS))}. Received: {decay!r}")
        if peak < 0 or final < 0 or warmup_steps < 0:
            raise ValueError(
                f"Rates and steps are not negative. Received: peak={peak}, final={final}, warmup_steps={warmup_steps}"
            )
        if decay == "constant" and final:
            raise ValueError(f"`decay='constant'` stays at the peak and has no `final` rate. Received: final={final}")
        if decay != "constant" and (total_steps is None or total_steps <= warmup_steps):
            raise ValueError(
                f"`decay={decay!r}` lasts from `warmup_steps` to `total_steps`, which must be larger. "
                f"Received: warmup_steps={warmup_steps}, total_steps={total_steps}"
            )
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay = decay
        self.final = final

    def __call__(self, step):
        step = ops.cast(step, "float32")
        if not self.warmup_steps:
            return self._after_warmup(step)
        return ops.where(step < self.warmup_steps, self.peak * (step / self.warmup_steps), self._after_warmup(step))

    def _after_warmup(self, step):
        if self.decay == "constant":
            return self.peak * ops.ones_like(step)
        progress = ops.clip((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0.0, 1.0)
        remaining = 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + ops.cos(math.pi * progress))
        return self.peak * remaining + self.final * (1.0 - remaining)

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "decay": self.decay,
            "final": self.final,
        }
