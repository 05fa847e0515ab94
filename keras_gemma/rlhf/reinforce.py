"""REINFORCE with a penalty for leaving the model that it began as.

prompts ─→ rollouts ─→ rewards ─→ minus β · KL ─→ advantages ─→ gradients ─→ policy
"""

import contextlib
import math
import time
import warnings

import jax
import numpy as np

from keras_gemma import generation
from keras_gemma import startup
from keras_gemma.data import record_formats
from keras_gemma.data import refuse_rows_outside
from keras_gemma.data import text_checks
from keras_gemma.rlhf import objectives
from keras_gemma.rlhf import rewards as rewarding
from keras_gemma.rlhf import rollouts as rolling
from keras_gemma.rlhf import rows
from keras_gemma.rlhf.loop import Loop
from keras_gemma.rlhf.policy_update import PolicyUpdate
from keras_gemma.rlhf.policy_update import on_host
from keras_gemma.rlhf.policy_update import placed

BASELINES = ("leave_one_out", "moving_average")
MOMENTUM = 0.9
SETTINGS = (
    "group_size", "baseline", "max_new_tokens", "temperature", "penalty_without_end", "microbatch_size", "updates",
    "clip", "seed",
)  # fmt: skip


class ReinforceTrainer:
    """Improves a policy by rewards for what it writes (REINFORCE; Williams 1992), held close to what it was.

    Each step samples responses at full support, scores them, subtracts `kl_coefficient` times the KL estimate of the
    whole response, subtracts a baseline, and makes one step of the policy's optimizer, or several with clipped
    importance ratios. The reference of the KL is the policy as it is when the trainer is made: only weights that train
    are copied, so that adapters cost next to nothing. Runs under `keras.distribution`, if one is set before the policy
    is made. JAX only.

    Args:
        policy: a compiled `GemmaCausalLM` with a preprocessor, and without dropout.
        reward: a `GemmaRewardModel` of the same vocabulary, or a callable from a list of prompts and one of responses
            (strings) to rewards `[N]`: a list, or an array or tensor of any library. `None` in a list is no reward: the
            response has no part in the baseline and in the update. Columns of the data reach parameters of their names.
            The callable may be asynchronous, or return a list of awaitables. One of TRL's, with `completions` and
            `**kwargs`, is called as TRL does.
        kl_coefficient: float, or an `AdaptiveCoefficient`.
        group_size: int, responses sampled for each prompt.
        baseline: `"leave_one_out"`, the mean of the other responses to the prompt, or `"moving_average"`, of earlier
            steps.
        max_new_tokens: int, most tokens of a response.
        temperature: float, of sampling and of all probabilities.
        penalty_without_end: float, subtracted from the reward of a response that is cut off at `max_new_tokens`.
        microbatch_size: int, rows whose activations are in memory at a time. Where groups fit into it whole, their
            advantages are known within it, and each response is read once by the policy and once by the reference;
            otherwise, and with `clip`, the policy reads them once more, beforehand. On one CPU or TPU,
            the responses to a prompt that are in one microbatch share it.
        updates: int, steps of the optimizer for each batch of rollouts; above 1 with `clip`.
        clip: optional float, how far importance ratios of tokens count (PPO's clipping).
        seed: int. Prompts' order and samples follow from it.

    Attributes:
        samples: list of dicts of the last step, `prompt`, `response`, `reward` (`None` where there is none), `kl` and
            `ended`.
        step: int, steps made.

    Raises:
        ValueError: for settings out of range, a policy with dropout, quantised or without preprocessor or optimizer,
            another backend than JAX, and a reward model of another vocabulary.

    Example:

    >>> import keras
    >>> from keras_gemma import GemmaCausalLM
    >>> from keras_gemma.rlhf import ReinforceTrainer
    >>> policy = GemmaCausalLM.from_preset("gemma_tiny_en", sequence_length=32)
    >>> policy.compile(keras.optimizers.Adam(1e-4))
    >>> trainer = ReinforceTrainer(policy, lambda prompts, texts: [-len(text) for text in texts], max_new_tokens=4)
    >>> history = trainer.fit(["The sea", "At noon"], batch_size=2, steps=1, verbose=0)
    >>> abs(history.history["kl"][0]) < 1e-4
    True
    """

    def __init__(
        self,
        policy,
        reward,
        *,
        kl_coefficient=0.05,
        group_size=4,
        baseline="leave_one_out",
        max_new_tokens=64,
        temperature=1.0,
        penalty_without_end=0.0,
        microbatch_size=8,
        updates=1,
        clip=None,
        seed=0,
    ):
        startup.require_jax("ReinforceTrainer")
        _refuse_settings(group_size, baseline, max_new_tokens, temperature, microbatch_size, updates, clip)
        if not (hasattr(reward, "score_tokens") or callable(reward)):
            raise ValueError(f"A reward is a `GemmaRewardModel` or a callable. Received: {reward!r}")
        adaptive = isinstance(kl_coefficient, objectives.AdaptiveCoefficient)
        self.policy = policy
        self.reward = reward
        self.kl_coefficient = kl_coefficient if adaptive else objectives.AdaptiveCoefficient(kl_coefficient)
        self.group_size = group_size
        self.baseline = baseline
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.penalty_without_end = penalty_without_end
        self.microbatch_size = microbatch_size
        self.updates = updates
        self.clip = clip
        self.seed = seed
        self.step = 0
        self.samples = []
        self.update = PolicyUpdate(policy, self._loss, temperature)
        if self._has_reward_model:
            rewarding.refuse_other_vocabulary(policy, reward)
        self._settings = {
            **{name: getattr(self, name) for name in SETTINGS},
            "kl_coefficient": vars(self.kl_coefficient).copy(),
        }
        self._average = None
        self._rows, self._columns = [], {}
        self._stop_token_ids = list(policy.preprocessor.tokenizer.stop_token_ids)

    # === The loop ===

    def fit(
        self,
        prompts,
        batch_size=8,
        steps=None,
        epochs=1,
        callbacks=(),
        verbose="auto",
        checkpoints=None,
        save_every_steps=10,
    ):
        """Makes steps of `batch_size` prompts each.

        With `checkpoints`, the same call in a new process goes on after a crash where the newest checkpoint was
        written, and ends like a run that never crashed, to the bit: weights, optimizer, reference, samples, order of
        the prompts, baseline, coefficient, history and what callbacks know are kept. What a reward callable knows is
        not, but for Python's, NumPy's and Keras' global random numbers.

        Args:
            prompts: list of strings, or of dialogues that end with the user; or a list of records with `prompt` and
                further fields, or a dict of such columns: a reward callable is handed those it has parameters for.
            batch_size: int, prompts of a step; each has `group_size` responses.
            steps: optional int, steps of an epoch. By default one pass over the prompts, without a last, smaller batch.
            epochs: int.
            callbacks: Keras callbacks. A step is a batch to them.
            verbose: as of `keras.Model.fit`.
            checkpoints: optional path of a folder for the checkpoints of this run alone.
            save_every_steps: int, steps between two of them.

        Returns:
            A `keras.callbacks.History` with the mean over each epoch of `reward`, `reward_std`, `penalised_reward`,
            `rewarded` (the share of responses that have a reward), `kl` (nats of a response), `kl_per_token`,
            `kl_coefficient`, `entropy` (nats of a token), `response_length`, `ended` and `cut_off` (shares),
            `equal_groups` (the share of prompts whose responses are all rewarded alike, which teach nothing but the
            KL), `gradient_norm`, `loss`, `rollout_seconds`, `score_seconds` and `update_seconds`;
            with `clip`, of the last update, `ratio` (mean importance ratio of a token) and `clipped`
            (share of tokens).

        Raises:
            ValueError: for no prompts, empty ones, those that leave no room, columns that the reward needs and the data
                lack, and rewards that are neither one finite number nor `None` for each response.
            DamagedCheckpointError, ForeignCheckpointError, CheckpointNotSavedError: about checkpoints.
            NonFiniteLossError: at a loss or a weight that is NaN or infinite.
        """
        prompts, self._columns = record_formats.prompts_and_columns(text_checks.plain(prompts))
        self._rows, self._batch_size = self._checked(prompts, batch_size), batch_size
        self._prompts = prompts = _plain_prompts(prompts)
        if not self._has_reward_model:
            rewarding.refuse_missing_columns(self.reward, self._columns)
        steps = steps or len(prompts) // batch_size
        data = {"prompts": self._rows, "batch_size": batch_size}
        if self._columns:
            data["columns"] = repr(self._columns)
        return Loop(self, data, steps, epochs, callbacks, verbose, checkpoints, save_every_steps).run()

    def _checked(self, prompts, batch_size):
        """Token ids of all prompts, before anything is trained."""
        rows = self.prompt_rows(prompts)
        if not 1 <= batch_size <= len(rows):
            raise ValueError(f"A batch has 1 to all prompts. Received: batch_size={batch_size}, {len(prompts)} prompts")
        return rows

    def prompt_rows(self, prompts, raters=()):
        """Token ids of prompts that leave room for responses.

        Args:
            prompts: list of strings or dialogues.
            raters: further models that read the responses.

        Returns:
            A list of lists of ints.

        Raises:
            ValueError: for what is no list, no prompts, empty ones, and those that leave no room.
        """
        if not text_checks.is_list(prompts) or not len(prompts):
            received = "none" if text_checks.is_list(prompts) else type(prompts).__name__
            raise ValueError(f"Prompts are a list of strings or dialogues, one at least. Received: {received}")
        readers = [self.reward, *raters] if self._has_reward_model else raters
        rows = [self.policy.preprocessor.sequence_length, *map(rewarding.longest_row, readers)]
        longest = min(rows) - self.max_new_tokens
        rows = [self._row(number, prompt, longest) for number, prompt in enumerate(text_checks.plain(prompts))]
        return refuse_rows_outside(rows, self.policy.backbone.vocabulary_size, "Tokens of prompts")

    def _row(self, number, prompt, longest):
        try:
            prompt = prompt if isinstance(prompt, list) else text_checks.text(prompt, "A prompt")
            if isinstance(prompt, str) and not prompt.strip():
                raise ValueError(f"A prompt says something. Received: {text_checks.shown(prompt)}")
            row = self.policy.preprocessor.prompt_ids(prompt)
        except ValueError as error:
            raise ValueError(f"{error} (number {number})") from error
        if len(row) > longest:
            raise ValueError(
                f"A prompt leaves room for `max_new_tokens={self.max_new_tokens}` in the `sequence_length` of policy, "
                f"reward model and rater: it has at most {longest} tokens. Received one of {len(row)}, number {number}"
            )
        return row

    @property
    def _has_reward_model(self):
        return hasattr(self.reward, "score_tokens")

    def make_step(self):
        """Makes the next step of `fit`: each pass over all prompts has an order of its own."""
        steps_of_pass = len(self._prompts) // self._batch_size
        number, place = divmod(self.step, steps_of_pass)
        order = np.random.default_rng((self.seed, number)).permutation(len(self._prompts))
        chosen = order[place * self._batch_size : (place + 1) * self._batch_size]
        columns = {name: [values[i] for i in chosen] for name, values in self._columns.items()}
        return self.train_on([self._prompts[i] for i in chosen], [self._rows[i] for i in chosen], columns)

    def validate(self):
        """Nothing: rewards are seen at every step."""
        return {}

    # === What a checkpoint has ===

    @property
    def reference(self):
        return self.update.reference

    def settings(self):
        """What has to be equal for a run to go on exactly, for json."""
        return self._settings

    def state(self):
        """What it knows besides weights and steps, for json."""
        return {"average": self._average, "kl_coefficient": self.kl_coefficient.value}

    def restore(self, state, reference):
        """Takes `state` and `reference` back."""
        self._average = state["average"]
        self.kl_coefficient.value = state["kl_coefficient"]
        self.update.reference = reference

    # === One step ===

    def sample(self, prompts, seed, of_reference=False):
        """Texts that the policy, or its reference, writes: one for each prompt, a list of strings.

        Args:
            prompts: list of strings or dialogues.
            seed: int. Equal seeds give equal texts.
            of_reference: bool.
        """
        return self.policy.preprocessor.decode_rows(self.rollouts(prompts, seed, of_reference).responses)

    def rollouts(self, prompts, seed, of_reference=False):
        """As `sample`, as token ids: `Rollouts`."""
        token_ids = self.prompt_rows(record_formats.prompts_and_columns(prompts)[0])
        with self.update.as_reference() if of_reference else contextlib.nullcontext():
            return self._rollouts(token_ids, 1, seed)

    def train_on(self, prompts, token_ids, columns=None):
        """Makes one step.

        Args:
            prompts: list of strings or dialogues.
            token_ids: list of lists of ints, of the same prompts.
            columns: optional dict of lists, what else is known of each prompt.

        Returns:
            A dict of floats, as of `fit`.
        """
        refuse_rows_outside(token_ids, self.policy.backbone.vocabulary_size, "Tokens of prompts")
        began = time.monotonic()
        seed = int(np.random.SeedSequence((self.seed, self.step)).generate_state(1)[0] >> 1)
        rollouts = self._rollouts(token_ids, self.group_size, seed)
        prompts = self._for_each_response(prompts)
        columns = {name: self._for_each_response(values) for name, values in (columns or {}).items()}
        texts = self.policy.preprocessor.decode_rows(rollouts.responses)
        sampled = time.monotonic()
        rewards = rewarding.of_rollouts(
            self.reward, self.policy, prompts, texts, rollouts, self.microbatch_size, columns
        )
        given = ~np.isnan(rewards)
        learned = self._learned(given)
        batch = placed(rollouts.microbatches(self.microbatch_size))
        batch["reference_logps"] = self.update.reference_log_probabilities(batch)
        coefficient, penalties = self.kl_coefficient.value, self.penalty_without_end * ~rollouts.ended
        batch["rewards"] = rows.in_rows(np.where(given, rewards - penalties - self._expected(), 0.0), batch)
        if not learned.all():
            batch["given"] = rows.in_rows(given, batch)
            batch["row_weights"] = rows.in_rows(learned / max(learned.sum(), 1), batch)
        batch["kl_coefficients"] = rows.in_rows(np.full(len(rollouts), coefficient), batch)
        if not self._learns_in_one_pass(batch) and learned.any():
            self._score_first(batch, len(rollouts))
        jax.block_until_ready(batch)
        scored = time.monotonic()
        of_update, of_rows = self._updated(batch) if learned.any() else self._without_update(batch)
        of_rows = on_host(of_rows)
        kl, entropies = (rows.of_responses(of_rows[name], len(rollouts)) for name in ("kl", "entropies"))
        penalised = rewards - coefficient * kl - penalties
        if given.any():
            self._expect(_mean(penalised))
        self.kl_coefficient.update(float(kl.mean()))
        self.step += 1
        self._remember(prompts, texts, rollouts, rewards, kl)
        actions = rollouts.lengths.sum()
        return {
            "reward": _mean(rewards),
            "reward_std": float(rewards[given].std()) if given.any() else math.nan,
            "rewarded": float(given.mean()),
            "penalised_reward": _mean(penalised),
            "kl": float(kl.mean()),
            "kl_per_token": float(kl.sum() / actions),
            "kl_coefficient": coefficient,
            "entropy": float(entropies.sum() / actions),
            "response_length": float(rollouts.lengths.mean()),
            "ended": float(rollouts.ended.mean()),
            "cut_off": float(1 - rollouts.ended.mean()),
            "equal_groups": _equal_groups(rewards.reshape(-1, self.group_size)),
            **of_update,
            "rollout_seconds": sampled - began,
            "score_seconds": scored - sampled,
            "update_seconds": time.monotonic() - scored,
        }

    def _for_each_response(self, values):
        return [value for value in values for _ in range(self.group_size)]

    def _learned(self, given):
        """Which responses are learned from: those with a reward that has something to be compared with."""
        if self.baseline != "leave_one_out":
            return given
        groups = given.reshape(-1, self.group_size)
        return (groups & (groups.sum(axis=1, keepdims=True) > 1)).reshape(-1)

    def _updated(self, batch):
        """Makes the updates of a step. Returns what the last one logs, and what the first says of rows."""
        of_update, of_rows = self.update.step(batch)
        for _ in range(self.updates - 1):
            of_update, _ = self.update.step(batch)
        return of_update, of_rows

    def _without_update(self, batch):
        """As `_updated`, where no response has a reward that says anything."""
        warnings.warn(
            f"Nothing is learned from step {self.step}: the reward is None for all of its responses, or for all but "
            "one of each prompt.",
            stacklevel=2,
        )
        logps, entropies = self.update.log_probabilities(batch)
        kl = objectives.sequence_kl(logps, batch["reference_logps"], batch["mask"])
        as_it_was = {"loss": 0.0, "gradient_norm": 0.0}
        if self.clip is not None:
            as_it_was |= {"ratio": 1.0, "clipped": 0.0}
        return as_it_was, {"kl": kl, "entropies": (entropies * batch["mask"]).sum(axis=-1)}

    def _rollouts(self, token_ids, group_size, seed):
        return rolling.sample(
            self.policy,
            token_ids,
            group_size,
            self.max_new_tokens,
            self.temperature,
            self._stop_token_ids,
            seed,
            longest_prompt=max(map(len, self._rows), default=0),
        )

    def _learns_in_one_pass(self, batch):
        """Whether a microbatch alone knows the advantages of its rows, and is learned from once."""
        whole_groups = self.baseline != "leave_one_out" or batch["rewards"].shape[1] % self.group_size == 0
        return whole_groups and self.clip is None

    def _score_first(self, batch, count):
        """Adds log-probabilities of the policy that sampled, and advantages, to a batch."""
        logps, batch["entropies"] = self.update.log_probabilities(batch)
        kl = objectives.sequence_kl(logps, batch["reference_logps"], batch["mask"])
        penalised = batch["rewards"] - batch["kl_coefficients"] * on_host(kl)
        given = rows.of_responses(on_host(batch["given"]), count) if "given" in batch else None
        advantages = self._advantages(rows.of_responses(penalised, count), given)
        batch["advantages"] = rows.in_rows(np.asarray(advantages), batch)
        # The only update begins with the weights that sampled; of several, each has its own.
        batch["logps" if self.clip is None else "sampled_logps"] = logps

    def _advantages(self, penalised, given=None):
        if self.baseline == "leave_one_out":
            return objectives.leave_one_out(penalised, self.group_size, given)
        # What was expected is subtracted from the rewards already.
        return penalised

    def _expected(self):
        """The baseline that is known before a step."""
        # Before there are earlier steps, nothing is known of how good a response usually is.
        return 0.0 if self.baseline == "leave_one_out" or self._average is None else self._average

    def _expect(self, mean):
        if self.baseline == "moving_average":
            self._average = mean if self._average is None else MOMENTUM * self._average + (1 - MOMENTUM) * mean

    def _remember(self, prompts, texts, rollouts, rewards, kl):
        self.samples = [
            {
                "prompt": prompt,
                "response": text,
                "reward": None if math.isnan(reward) else float(reward),
                "kl": float(one_kl),
                "ended": bool(ended),
            }
            for prompt, text, reward, one_kl, ended in zip(prompts, texts, rewards, kl, rollouts.ended)
        ]

    def _loss(self, logps, entropies, microbatch):
        """A microbatch's part of the loss and of metrics, and its rows' KL and entropies, in nats of a response."""
        mask, weights = microbatch["mask"], microbatch["row_weights"]
        now = jax.lax.stop_gradient(logps)
        sampled = microbatch.get("sampled_logps", now)
        kl = objectives.sequence_kl(sampled, microbatch["reference_logps"], mask)
        of_rows = {"kl": kl, "entropies": (microbatch.get("entropies", entropies) * mask).sum(axis=-1)}
        if "advantages" in microbatch:
            advantages = microbatch["advantages"]
        else:
            penalised = microbatch["rewards"] - microbatch["kl_coefficients"] * kl
            advantages = self._advantages(penalised, microbatch.get("given"))
        if self.clip is None:
            return (weights * objectives.reinforce_losses(logps, advantages, mask)).sum(), {}, of_rows
        losses = objectives.clipped_losses(logps, sampled, advantages, mask, self.clip)
        metrics = objectives.importance_ratios(logps, sampled, mask, self.clip)
        return (weights * losses).sum(), {name: (weights * values).sum() for name, values in metrics.items()}, of_rows


def _plain_prompts(prompts):
    return [prompt.decode() if isinstance(prompt, bytes) else prompt for prompt in text_checks.plain(prompts)]


def _mean(values):
    """The mean of those that are known, NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _equal_groups(groups):
    """The share of groups whose known rewards are all alike, of those that have any."""
    known = [group[~np.isnan(group)] for group in groups]
    return _mean(np.array([np.ptp(group) == 0 if len(group) else math.nan for group in known], "float64"))


def rloo_trainer(policy, reward, group_size=4, **kwargs):
    """REINFORCE with leave-one-out baselines and nothing else (Ahmadian et al., arXiv 2402.14740).

    Args:
        policy, reward, group_size, **kwargs: as of `ReinforceTrainer`, but for `baseline`.

    Returns:
        A `ReinforceTrainer`.
    """
    return ReinforceTrainer(policy, reward, group_size=group_size, baseline="leave_one_out", **kwargs)


def ppo_trainer(policy, reward, updates=4, clip=0.2, **kwargs):
    """Several updates for each batch of rollouts, with the clipped ratios of PPO (Schulman et al., arXiv 1707.06347).

    There is no critic: the baseline is that of `ReinforceTrainer`, and the advantage one for all tokens of a response.

    Args:
        policy, reward, updates, clip, **kwargs: as of `ReinforceTrainer`.

    Returns:
        A `ReinforceTrainer`.
    """
    return ReinforceTrainer(policy, reward, updates=updates, clip=clip, **kwargs)


def _refuse_settings(group_size, baseline, max_new_tokens, temperature, microbatch_size, updates, clip):
    if baseline not in BASELINES:
        raise ValueError(f"`baseline` is one of {', '.join(map(repr, BASELINES))}. Received: {baseline!r}")
    if baseline == "leave_one_out" and group_size < 2:
        raise ValueError(f"Leaving one out takes a `group_size` of at least 2. Received: {group_size}")
    counts = {"group_size": group_size, "max_new_tokens": max_new_tokens, "microbatch_size": microbatch_size}
    for name, value in {**counts, "updates": updates}.items():
        if value < 1:
            raise ValueError(f"`{name}` is at least 1. Received: {value}")
    generation.check_settings(temperature=temperature)
    if temperature == 0:
        raise ValueError(
            "`temperature` is above 0: a policy that always takes the likeliest token has nothing to compare. "
            f"Received: {temperature}"
        )
    if updates > 1 and clip is None:
        raise ValueError(f"Several updates for one batch of rollouts need `clip`. Received: updates={updates}, no clip")
    if clip is not None and not 0 < clip < 1:
        raise ValueError(f"`clip` is between 0 and 1. Received: {clip}")
