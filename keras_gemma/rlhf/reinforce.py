"""REINFORCE with a penalty for leaving the model that it began as.

prompts ─→ rollouts ─→ rewards ─→ minus β · KL ─→ advantages ─→ gradients ─→ policy
"""

import time

import jax
import keras
import numpy as np
from jax import lax

from keras_gemma import kernels
from keras_gemma.rlhf import objectives
from keras_gemma.rlhf import rollouts as rolling
from keras_gemma.training.step import global_norm

BASELINES = ("leave_one_out", "moving_average")
MOMENTUM = 0.9


class ReinforceTrainer:
    """Improves a policy by rewards for what it writes (REINFORCE; Williams 1992), held close to what it was.

    Each step samples responses at full support, scores them, subtracts `kl_coefficient` times the KL estimate of the
    whole response, subtracts a baseline, and makes one step of the policy's optimizer, or several with clipped
    importance ratios. The reference of the KL is the policy as it is when the trainer is made: only weights that train
    are copied, so that adapters cost next to nothing. JAX only.

    Args:
        policy: a compiled `GemmaCausalLM` with a preprocessor, and without dropout.
        reward: a `GemmaRewardModel` of the same vocabulary, or a callable from a list of prompts and responses,
            lists of strings, to float rewards `[N]`.
        kl_coefficient: float, or an `AdaptiveCoefficient`.
        group_size: int, responses sampled for each prompt.
        baseline: `"leave_one_out"`, the mean of the other responses to the prompt, or `"moving_average"`, of earlier
            steps.
        max_new_tokens: int, most tokens of a response.
        temperature: float, of sampling and of all probabilities.
        penalty_without_end: float, subtracted from the reward of a response that is cut off at `max_new_tokens`.
        microbatch_size: int, rows whose activations are in memory at a time.
        updates: int, steps of the optimizer for each batch of rollouts; above 1 with `clip`.
        clip: optional float, how far importance ratios of tokens count (PPO's clipping).
        seed: int. Prompts' order and samples follow from it.

    Attributes:
        samples: list of dicts of the last step, `prompt`, `response`, `reward`, `kl` and `ended`.
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
    >>> history.history["kl"]
    [0.0]
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
        _refuse_policy(policy)
        _refuse_settings(group_size, baseline, max_new_tokens, temperature, microbatch_size, updates, clip)
        if hasattr(reward, "score_tokens"):
            _refuse_other_vocabulary(policy, reward)
        elif not callable(reward):
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
        self._average = 0.0
        self._stop_token_ids = list(policy.preprocessor.tokenizer.stop_token_ids)
        self._reference = [jax.numpy.array(v.value, copy=True) for v in policy.trainable_variables]
        self._score = jax.jit(self._scores)
        self._update = jax.jit(self._updated, donate_argnums=(0, 1))
        policy.optimizer.build(policy.trainable_variables)

    # === The loop ===

    def fit(self, prompts, batch_size=8, steps=None, epochs=1, callbacks=(), verbose="auto"):
        """Makes steps of `batch_size` prompts each.

        Args:
            prompts: list of strings, or of dialogues that end with the user.
            batch_size: int, prompts of a step; each has `group_size` responses.
            steps: optional int, steps of an epoch. By default one pass over the prompts, without a last, smaller batch.
            epochs: int.
            callbacks: Keras callbacks. A step is a batch to them.
            verbose: as of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History` with the mean over each epoch of `reward`, `reward_std`, `penalised_reward`,
            `kl` (nats of a response), `kl_per_token`, `kl_coefficient`, `entropy` (nats of a token), `response_length`,
            `ended` (share), `gradient_norm`, `loss`, `rollout_seconds`, `score_seconds` and `update_seconds`.

        Raises:
            ValueError: for no prompts, empty ones, those that leave no room, and rewards that are not one finite number
                for each response.
        """
        rows = self._checked(prompts, batch_size)
        steps = steps or len(prompts) // batch_size
        verbose = 1 if verbose == "auto" else verbose
        callbacks = keras.callbacks.CallbackList(
            list(callbacks),
            add_history=True,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=epochs,
            steps=steps,
            model=self.policy,
        )
        self.policy.stop_training = False
        callbacks.on_train_begin()
        for epoch in range(epochs):
            callbacks.on_epoch_begin(epoch)
            sums = {}
            for index in range(steps):
                callbacks.on_train_batch_begin(index)
                logs = self.train_on(self._drawn(prompts, rows, batch_size))
                sums = {name: sums.get(name, 0.0) + value for name, value in logs.items()}
                callbacks.on_train_batch_end(index, logs)
            callbacks.on_epoch_end(epoch, {name: value / steps for name, value in sums.items()})
            if self.policy.stop_training:
                break
        callbacks.on_train_end()
        return self.policy.history

    def _checked(self, prompts, batch_size):
        """Token ids of all prompts, before anything is trained."""
        if not 1 <= batch_size <= len(prompts):
            raise ValueError(f"A batch has 1 to all prompts. Received: batch_size={batch_size}, {len(prompts)} prompts")
        preprocessor = self.policy.preprocessor
        rows = [preprocessor.prompt_ids(prompt) for prompt in prompts]
        limits = [preprocessor.sequence_length - self.max_new_tokens]
        if hasattr(self.reward, "score_tokens") and self.reward.preprocessor is not None:
            # A response without an end is given one to be scored.
            limits.append(self.reward.preprocessor.sequence_length - self.max_new_tokens - 1)
        for number, (prompt, row) in enumerate(zip(prompts, rows)):
            if not prompt or (isinstance(prompt, str) and not prompt.strip()):
                raise ValueError(f"A prompt says something. Received: {prompt!r}, number {number}")
            if len(row) > min(limits):
                raise ValueError(
                    f"A prompt leaves room for `max_new_tokens={self.max_new_tokens}` in the `sequence_length` of "
                    f"policy and reward model: it has at most {min(limits)} tokens. Received one of {len(row)}, "
                    f"number {number}"
                )
        return rows

    def _drawn(self, prompts, rows, batch_size):
        """The prompts of a step, and their ids: each pass over all of them in an order of its own."""
        steps_of_pass = len(prompts) // batch_size
        number, place = divmod(self.step, steps_of_pass)
        order = np.random.default_rng((self.seed, number)).permutation(len(prompts))
        chosen = order[place * batch_size : (place + 1) * batch_size]
        return [prompts[i] for i in chosen], [rows[i] for i in chosen]

    # === One step ===

    def train_on(self, drawn):
        """Makes one step with prompts and their token ids; returns what is logged of it, a dict of floats."""
        prompts, rows = drawn
        began = time.monotonic()
        seed = int(np.random.SeedSequence((self.seed, self.step)).generate_state(1)[0] >> 1)
        rollouts = rolling.sample(
            self.policy, rows, self.group_size, self.max_new_tokens, self.temperature, self._stop_token_ids, seed
        )
        sampled = time.monotonic()
        batch = rollouts.microbatches(self.microbatch_size)
        logps, entropies = self._score(self._trainable(), batch)
        reference_logps, _ = self._score(self._reference, batch)
        kl = _rows(objectives.sequence_kl(logps, reference_logps, batch["mask"]), len(rollouts))
        rewards = self._rewards(prompts, rollouts)
        scored = time.monotonic()
        coefficient = self.kl_coefficient.value
        penalised = (rewards - coefficient * kl - self.penalty_without_end * ~rollouts.ended).astype("float32")
        batch["advantages"] = _as_microbatches(self._advantages(penalised), batch["row_weights"])
        for _ in range(self.updates):
            loss, norm = self._apply(batch, logps)
        self.kl_coefficient.update(float(kl.mean()))
        self.step += 1
        self._remember(prompts, rollouts, rewards, kl)
        actions = rollouts.lengths.sum()
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "penalised_reward": float(penalised.mean()),
            "kl": float(kl.mean()),
            "kl_per_token": float(kl.sum() / actions),
            "kl_coefficient": coefficient,
            "entropy": float(np.sum(entropies * batch["mask"]) / actions),
            "response_length": float(rollouts.lengths.mean()),
            "ended": float(rollouts.ended.mean()),
            "loss": float(loss),
            "gradient_norm": float(norm),
            "rollout_seconds": sampled - began,
            "score_seconds": scored - sampled,
            "update_seconds": time.monotonic() - scored,
        }

    def _rewards(self, prompts, rollouts):
        """Float32 array `[N]`."""
        if hasattr(self.reward, "score_tokens"):
            end = self.policy.preprocessor.tokenizer.end_token_id
            rows = [
                prompt + response + ([] if ended else [end])
                for prompt, response, ended in zip(rollouts.prompts, rollouts.responses, rollouts.ended)
            ]
            rewards = self.reward.score_tokens(rows, self.microbatch_size)
        else:
            texts = [self.policy.preprocessor.decode(response) for response in rollouts.responses]
            repeated = [prompt for prompt in prompts for _ in range(self.group_size)]
            rewards = np.asarray(self.reward(repeated, texts), "float32")
        if rewards.shape != (len(rollouts),):
            raise ValueError(
                f"A reward is one number for each of {len(rollouts)} responses. Received: shape {rewards.shape}"
            )
        if not np.isfinite(rewards).all():
            first = int(np.argmin(np.isfinite(rewards)))
            raise ValueError(
                f"Rewards are finite. Received: {rewards[first]} for "
                f"{self.policy.preprocessor.decode(rollouts.responses[first])!r}"
            )
        return rewards

    def _advantages(self, penalised):
        if self.baseline == "leave_one_out":
            return np.array(objectives.leave_one_out(penalised, self.group_size))
        advantages = penalised - self._average
        self._average = MOMENTUM * self._average + (1 - MOMENTUM) * float(penalised.mean())
        return advantages

    def _remember(self, prompts, rollouts, rewards, kl):
        decode = self.policy.preprocessor.decode
        self.samples = [
            {
                "prompt": prompts[i // self.group_size],
                "response": decode(rollouts.responses[i]),
                "reward": float(rewards[i]),
                "kl": float(kl[i]),
                "ended": bool(rollouts.ended[i]),
            }
            for i in range(len(rollouts))
        ]

    def _apply(self, batch, sampled_logps):
        trainable, optimizer_variables, loss, norm = self._update(
            self._trainable(), [v.value for v in self.policy.optimizer.variables], batch, sampled_logps
        )
        for variable, value in zip(self.policy.trainable_variables, trainable):
            variable.assign(value)
        for variable, value in zip(self.policy.optimizer.variables, optimizer_variables):
            variable.assign(value)
        return loss, norm

    def _trainable(self):
        return [variable.value for variable in self.policy.trainable_variables]

    # === Programs ===

    def _scores(self, trainable, batch):
        """Log-probabilities and entropies `[M, R, T]` of what was sampled, under given weights."""

        def of_microbatch(rows):
            with self._with(trainable):
                return kernels.token_log_probabilities(*self._states(rows, training=False), rows["targets"])

        return lax.map(of_microbatch, batch)

    def gradients(self, trainable, batch, sampled_logps):
        """Loss, its gradients and nothing else, of microbatches with `advantages` `[M, R]`.

        The gradient goes through the vocabulary as that of a weighted cross-entropy: the weight of a token is the
        derivative of the loss by its log-probability.
        """

        def objective(trainable, rows):
            with self._with(trainable):
                hidden, embeddings = self._states(rows, training=True)
                logps, _ = kernels.token_log_probabilities(hidden, embeddings, rows["targets"])
                loss, slopes = jax.value_and_grad(self._loss)(logps, rows)
                return kernels.vocabulary_loss(hidden, embeddings, rows["targets"], -slopes).objective, loss

        def add_microbatch(carry, rows):
            (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(trainable, rows)
            return (carry[0] + loss, [total + new for total, new in zip(carry[1], gradients)]), None

        start = jax.numpy.float32(0), [jax.numpy.zeros_like(value) for value in trainable]
        (loss, gradients), _ = lax.scan(add_microbatch, start, {**batch, "sampled_logps": sampled_logps})
        return loss, gradients

    def _loss(self, logps, rows):
        if self.clip is None:
            losses = objectives.reinforce_losses(logps, rows["advantages"], rows["mask"])
        else:
            losses = objectives.clipped_losses(
                logps, rows["sampled_logps"], rows["advantages"], rows["mask"], self.clip
            )
        return jax.numpy.sum(rows["row_weights"] * losses)

    def _updated(self, trainable, optimizer_variables, batch, sampled_logps):
        loss, gradients = self.gradients(trainable, batch, sampled_logps)
        norm = global_norm(gradients)
        trainable, optimizer_variables = self.policy.optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return trainable, optimizer_variables, loss, norm

    def _with(self, trainable):
        return keras.StatelessScope(state_mapping=list(zip(self.policy.trainable_variables, trainable)))

    def _states(self, rows, training):
        """Hidden states `[R, T, D]`, at the temperature, and the embeddings that make logits of them."""
        backbone = self.policy.backbone
        x = {"token_ids": rows["token_ids"], "padding_mask": rows["padding_mask"]}
        return backbone(x, training=training) / self.temperature, backbone.token_embedding.embeddings


def _rows(values, count):
    """The first `count` of `[M, R]` as a NumPy array."""
    return np.asarray(values).reshape(-1)[:count]


def _as_microbatches(values, like):
    padded = np.zeros(like.size, "float32")
    padded[: len(values)] = values
    return padded.reshape(like.shape)


def _refuse_policy(policy):
    if keras.backend.backend() != "jax":
        raise ValueError(f"Policies are trained on JAX. Received: the backend {keras.backend.backend()}")
    if policy.preprocessor is None or policy.optimizer is None:
        raise ValueError(
            "A policy has a preprocessor and an optimizer. Received one without: give it one, `compile` it"
        )
    if policy.backbone.dropout:
        raise ValueError(
            "With dropout, what is learned from is not what sampled. "
            f"Received: a policy with dropout={policy.backbone.dropout}"
        )
    if policy.backbone.token_embedding.quantization_mode is not None:
        raise ValueError("A policy trains in floating point. Received: a quantised one")


def _refuse_settings(group_size, baseline, max_new_tokens, temperature, microbatch_size, updates, clip):
    if baseline not in BASELINES:
        raise ValueError(f"`baseline` is one of {', '.join(map(repr, BASELINES))}. Received: {baseline!r}")
    if baseline == "leave_one_out" and group_size < 2:
        raise ValueError(f"Leaving one out takes a `group_size` of at least 2. Received: {group_size}")
    counts = {"group_size": group_size, "max_new_tokens": max_new_tokens, "microbatch_size": microbatch_size}
    for name, value in {**counts, "updates": updates}.items():
        if value < 1:
            raise ValueError(f"`{name}` is at least 1. Received: {value}")
    if temperature <= 0:
        raise ValueError(f"`temperature` is above 0. Received: {temperature}")
    if updates > 1 and clip is None:
        raise ValueError(f"Several updates for one batch of rollouts need `clip`. Received: updates={updates}, no clip")
    if clip is not None and not 0 < clip < 1:
        raise ValueError(f"`clip` is between 0 and 1. Received: {clip}")


def _refuse_other_vocabulary(policy, reward):
    theirs = getattr(reward.preprocessor, "tokenizer", None)
    if theirs is not None and theirs.proto != policy.preprocessor.tokenizer.proto:
        raise ValueError(
            "A reward model reads the very tokens that the policy wrote, so both have one vocabulary. Received: two"
        )
