"""Pairs of answers and rewards → a policy that answers better.

    pairs ─ GemmaRewardModel.fit ─→ reward ─┐
    prompts ─ rollouts ─→ responses ────────┴→ advantages ─→ policy update (reinforce)

`objectives` has the quantities as pure functions.
"""

from keras_gemma.rlhf.objectives import AdaptiveCoefficient
from keras_gemma.rlhf.objectives import clipped_losses
from keras_gemma.rlhf.objectives import dpo_losses
from keras_gemma.rlhf.objectives import leave_one_out
from keras_gemma.rlhf.objectives import reinforce_losses
from keras_gemma.rlhf.objectives import sequence_kl
from keras_gemma.rlhf.reinforce import ReinforceTrainer

__all__ = [
    "AdaptiveCoefficient",
    "ReinforceTrainer",
    "clipped_losses",
    "dpo_losses",
    "leave_one_out",
    "reinforce_losses",
    "sequence_kl",
]
