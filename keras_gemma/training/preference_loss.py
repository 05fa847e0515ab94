"""Losses of pairs of answers, as functions of arrays.

B pairs.
"""

from keras import ops


def bradley_terry_losses(chosen, rejected, margins=0.0, centring=0.0):
    """Negative log-probability that the chosen answer is the better one: `-log σ(chosen - rejected - margin)`.

    Bradley and Terry (1952), as for Llama 2 with a margin (arXiv 2307.09288, equation 2); `centring · (chosen +
    rejected)²` is added, which draws the free constant of the rewards to zero (Eisenstein et al., arXiv 2312.09244,
    section 2).

    Args:
        chosen: float tensor `[B]`, rewards of the better answers.
        rejected: float tensor `[B]`, rewards of the others.
        margins: float tensor `[B]` or float, by how much the better one should at least be ahead.
        centring: float, 0.01 where it is used.

    Returns:
        Float32 tensor `[B]`, in nats.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.training import bradley_terry_losses
    >>> np.round(np.array(bradley_terry_losses(np.array([1.0, 3.0]), np.array([1.0, 0.0]))), 3)
    array([0.693, 0.049], dtype=float32)
    """
    chosen, rejected, margins = (ops.cast(x, "float32") for x in (chosen, rejected, margins))
    losses = ops.softplus(rejected + margins - chosen)
    return losses + centring * ops.square(chosen + rejected) if centring else losses
