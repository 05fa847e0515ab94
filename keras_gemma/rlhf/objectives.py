"""What a policy is improved by, as functions of arrays that a test can enumerate.

N responses, T tokens of a response, G responses to one prompt. `mask` `[N, T]` is 1 at every action of a response, the
token that ends it among them, and 0 behind.

    log-probabilities ─→ kl ─┐
    rewards ─────────────────┴→ penalised rewards ─→ baseline ─→ advantages ─→ loss
"""

from keras import ops


def sequence_kl(logps, reference_logps, mask):
    """The estimate `log π - log π_ref` of a response, summed over its tokens; k1 of Schulman (2020).

    Args:
        logps: float tensor `[N, T]`, of the policy that sampled.
        reference_logps: float tensor `[N, T]`.
        mask: tensor `[N, T]`.

    Returns:
        Float32 tensor `[N]`, in nats. Single estimates may be negative.
    """
    return ops.sum(ops.multiply(ops.subtract(logps, reference_logps), ops.cast(mask, "float32")), axis=-1)


def leave_one_out(rewards, group_size, given=None):
    """Rewards minus the mean of the other responses to the same prompt (Kool et al. 2019; Ahmadian et al.,
    arXiv 2402.14740, equation 6).

    Args:
        rewards: float tensor `[N]`, responses to one prompt beside each other.
        group_size: int from 2, `G`.
        given: optional tensor `[N]`, 1 where a response has a reward. Those without have no part in the mean.

    Returns:
        Float32 tensor `[N]`; 0 for responses without a reward, and for the only one of a prompt that has one.

    Raises:
        ValueError: for groups of one, and a number of rewards that they do not divide.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.rlhf import leave_one_out
    >>> np.array(leave_one_out(np.array([1.0, 2.0, 6.0, 0.0, 0.0, 0.0]), group_size=3))
    array([-3. , -1.5,  4.5,  0. ,  0. ,  0. ], dtype=float32)
    """
    rewards = ops.cast(rewards, "float32")
    if group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(
            "Leaving one out takes groups of at least 2 responses, all of one size. "
            f"Received: {rewards.shape[0]} responses in groups of {group_size}"
        )
    if given is not None:
        return _leave_one_out_of_given(rewards, group_size, given)
    groups = ops.reshape(rewards, (-1, group_size))
    others = (ops.sum(groups, axis=1, keepdims=True) - groups) / (group_size - 1)
    return ops.reshape(groups - others, (-1,))


def _leave_one_out_of_given(rewards, group_size, given):
    given = ops.reshape(ops.cast(given, "bool"), (-1, group_size))
    groups = ops.where(given, ops.reshape(rewards, (-1, group_size)), 0.0)
    others = ops.sum(ops.cast(given, "float32"), axis=1, keepdims=True) - 1.0
    means = (ops.sum(groups, axis=1, keepdims=True) - groups) / ops.maximum(others, 1.0)
    compared = ops.logical_and(given, others > 0)
    return ops.reshape(ops.where(compared, groups - means, 0.0), (-1,))


def reinforce_losses(logps, advantages, mask):
    """`-advantage · log π(response)` (Williams 1992).

    The log-probability of a response is the sum over its tokens; neither its length nor the spread of the advantages
    divides it.

    Args:
        logps: float tensor `[N, T]`.
        advantages: float tensor `[N]`.
        mask: tensor `[N, T]`.

    Returns:
        Float32 tensor `[N]`.
    """
    of_responses = ops.sum(ops.multiply(logps, ops.cast(mask, "float32")), axis=-1)
    return ops.multiply(ops.negative(advantages), of_responses)


def clipped_losses(logps, sampled_logps, advantages, mask, clip):
    """Importance ratios of tokens, clipped where they have gone far enough (Schulman et al., arXiv 1707.06347,
    equation 7), summed over the tokens of a response.

    At the policy that sampled, its gradient is that of `reinforce_losses`.

    Args:
        logps: float tensor `[N, T]`, of the policy as it is now.
        sampled_logps: float tensor `[N, T]`, of the policy that sampled.
        advantages: float tensor `[N]`.
        mask: tensor `[N, T]`.
        clip: float, 0.2 as a rule.

    Returns:
        Float32 tensor `[N]`.
    """
    ratios = ops.exp(ops.subtract(logps, sampled_logps))
    advantages = ops.expand_dims(ops.cast(advantages, "float32"), 1)
    objective = ops.minimum(ratios * advantages, ops.clip(ratios, 1.0 - clip, 1.0 + clip) * advantages)
    return -ops.sum(objective * ops.cast(mask, "float32"), axis=-1)


def importance_ratios(logps, sampled_logps, mask, clip):
    """How far a policy has gone from the one that sampled.

    Args:
        logps, sampled_logps, mask, clip: as of `clipped_losses`.

    Returns:
        A dict of float32 tensors `[N]`: `ratio`, the mean over the tokens of a response, and `clipped`, the share of
        them that is `clip` or more from 1.
    """
    mask = ops.cast(mask, "float32")
    lengths = ops.maximum(ops.sum(mask, axis=-1), 1.0)
    ratios = ops.exp(ops.subtract(logps, sampled_logps))
    far = ops.cast(ops.abs(ratios - 1.0) >= clip, "float32")
    return {"ratio": ops.sum(ratios * mask, axis=-1) / lengths, "clipped": ops.sum(far * mask, axis=-1) / lengths}


def dpo_losses(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing=0.0):
    """`-log σ(β (log π/π_ref of the chosen - log π/π_ref of the rejected))` (Rafailov et al., arXiv 2305.18290,
    equation 7).

    With `label_smoothing` ε the loss is `(1 - ε) · loss + ε · loss with the answers exchanged`, for pairs of which a
    share ε is the wrong way round (conservative DPO; Mitchell 2023, "A note on DPO with noisy preferences").

    Args:
        chosen, rejected, reference_chosen, reference_rejected: float tensors `[N]`, log-probabilities of whole
            responses.
        beta: float. The larger, the closer to the reference.
        label_smoothing: float from 0 to below 0.5.

    Returns:
        Float32 tensor `[N]`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.rlhf import dpo_losses
    >>> equal = np.zeros(1, "float32")
    >>> np.round(np.array(dpo_losses(equal, equal, equal, equal, beta=0.1)), 4)
    array([0.6931], dtype=float32)
    """
    gains = ops.multiply(beta, ahead(chosen, rejected, reference_chosen, reference_rejected))
    losses = ops.softplus(-gains)
    if not label_smoothing:
        return losses
    return (1.0 - label_smoothing) * losses + label_smoothing * ops.softplus(gains)


def ipo_losses(chosen, rejected, reference_chosen, reference_rejected, beta):
    """`(log π/π_ref of the chosen - log π/π_ref of the rejected - 1 / (2β))²` (Azar et al., arXiv 2310.12036, equation
    17, whose τ is β here).

    A pair is learned until its chosen answer is `1 / (2β)` nats ahead, and no further. As in the paper,
    log-probabilities are of whole responses.

    Args:
        chosen, rejected, reference_chosen, reference_rejected, beta: as of `dpo_losses`.

    Returns:
        Float32 tensor `[N]`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.rlhf import ipo_losses
    >>> equal = np.zeros(1, "float32")
    >>> np.array(ipo_losses(equal, equal, equal, equal, beta=0.5))
    array([1.], dtype=float32)
    """
    gains = ahead(chosen, rejected, reference_chosen, reference_rejected)
    return ops.square(ops.subtract(gains, 1.0 / (2.0 * beta)))


def ahead(chosen, rejected, reference_chosen, reference_rejected):
    """How much more the chosen answer gained over the reference than the rejected one, float32 `[N]` in nats.

    Args:
        chosen, rejected, reference_chosen, reference_rejected: as of `dpo_losses`.
    """
    return ops.subtract(ops.subtract(chosen, reference_chosen), ops.subtract(rejected, reference_rejected))


class AdaptiveCoefficient:
    """A coefficient of the KL that follows a target (Ziegler et al., arXiv 1909.08593, section 2.2).

    Args:
        value: float, what it begins with.
        target: optional float, nats of a response. `None` keeps the coefficient as it is.
        rate: float below 5, of its adaptation in each update: one changes it by at most 20% of that.

    Raises:
        ValueError: for numbers that are not positive, but for a coefficient of 0 that stays.
    """

    def __init__(self, value, target=None, rate=0.1):
        if value < 0 or (target is not None and (target <= 0 or value == 0)) or not 0 < rate < 5:
            raise ValueError(
                "A coefficient is at least 0; one that follows a target is above 0, as target and rate are, and the "
                "rate is below 5. "
                f"Received: value={value}, target={target}, rate={rate}"
            )
        self.value, self.target, self.rate = float(value), target, rate

    def update(self, kl):
        """Adapts to the mean KL of a batch, in nats of a response."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.value *= 1.0 + self.rate * error
