"""Pairs of answers and rewards → a policy that answers better.

    pairs ─ GemmaRewardModel.fit ─→ reward ─┐
    prompts ─ rollouts ─→ responses ────────┴→ advantages ─→ policy update
    pairs ─ DPOTrainer.fit ────────────────────────────────→ policy update

`objectives` has the quantities as pure functions; `SideBySide` watches a run, `RunReport` shows it.
"""

from keras_gemma.rlhf.direct_preference import DPOTrainer
from keras_gemma.rlhf.objectives import AdaptiveCoefficient
from keras_gemma.rlhf.objectives import clipped_losses
from keras_gemma.rlhf.objectives import dpo_losses
from keras_gemma.rlhf.objectives import importance_ratios
from keras_gemma.rlhf.objectives import ipo_losses
from keras_gemma.rlhf.objectives import leave_one_out
from keras_gemma.rlhf.objectives import reinforce_losses
from keras_gemma.rlhf.objectives import sequence_kl
from keras_gemma.rlhf.reinforce import ReinforceTrainer
from keras_gemma.rlhf.reinforce import ppo_trainer
from keras_gemma.rlhf.reinforce import rloo_trainer
from keras_gemma.rlhf.run_report import RunReport
from keras_gemma.rlhf.side_by_side import SideBySide
from keras_gemma.rlhf.side_by_side import win_rate_interval

__all__ = [
    "AdaptiveCoefficient",
    "DPOTrainer",
    "ReinforceTrainer",
    "RunReport",
    "SideBySide",
    "clipped_losses",
    "dpo_losses",
    "importance_ratios",
    "ipo_losses",
    "leave_one_out",
    "ppo_trainer",
    "reinforce_losses",
    "rloo_trainer",
    "sequence_kl",
    "win_rate_interval",
]
