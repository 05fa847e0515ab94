"""Pairs of answers → a policy that prefers the better ones, without a reward model between (DPO).

pairs ─→ rows ─→ log-probabilities of policy and reference ─→ loss ─→ gradients ─→ policy
"""

import jax
import numpy as np

from keras_gemma import kernels
from keras_gemma import startup
from keras_gemma.data import record_formats
from keras_gemma.data import refuse_rows_outside
from keras_gemma.data import text_checks
from keras_gemma.data.tuning import PAIR_FIELDS
from keras_gemma.rlhf import objectives
from keras_gemma.rlhf import rows
from keras_gemma.rlhf.loop import Loop
from keras_gemma.rlhf.policy_update import PolicyUpdate
from keras_gemma.rlhf.policy_update import on_host
from keras_gemma.rlhf.policy_update import placed

LOSSES = ("sigmoid", "ipo")


class DPOTrainer:
    """Trains a policy on pairs of answers directly (Rafailov et al., arXiv 2305.18290).

    The reference is the policy as it is when the trainer is made, as for `ReinforceTrainer`. On one CPU or TPU
    both answers are read behind one prompt, where that is shorter. JAX only.

    Args:
        policy: a compiled `GemmaCausalLM` with a preprocessor, and without dropout.
        beta: float. The larger, the closer to the reference.
        loss_type: `"sigmoid"`, that of DPO, or `"ipo"` (see `dpo_losses` and `ipo_losses`).
        label_smoothing: float from 0 to below 0.5, the share of pairs that is thought to be the wrong way round
            (conservative DPO). With `"sigmoid"` alone.
        microbatch_size: int, pairs whose activations are in memory at a time.
        seed: int. The order of the pairs follows from it.

    Attributes:
        step: int, steps made.

    Raises:
        ValueError: for settings out of range, and as `ReinforceTrainer`.

    Example:

    >>> import keras
    >>> from keras_gemma import GemmaCausalLM
    >>> from keras_gemma.rlhf import DPOTrainer
    >>> policy = GemmaCausalLM.from_preset("gemma_tiny_en", sequence_length=32)
    >>> policy.compile(keras.optimizers.Adam(1e-4))
    >>> pairs = [{"prompts": "The sea", "chosen": " is deep.", "rejected": " is is."}]
    >>> history = DPOTrainer(policy).fit(pairs, batch_size=1, epochs=3, verbose=0).history
    >>> round(history["loss"][0], 3), history["margin"][2] > history["margin"][1]
    (0.693, True)
    """

    def __init__(self, policy, *, beta=0.1, loss_type="sigmoid", label_smoothing=0.0, microbatch_size=4, seed=0):
        startup.require_jax("DPOTrainer")
        _refuse_loss(loss_type, label_smoothing)
        if beta <= 0 or microbatch_size < 1:
            raise ValueError(
                f"`beta` is above 0 and `microbatch_size` at least 1. Received: {beta} and {microbatch_size}"
            )
        self.policy = policy
        self.beta = beta
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.microbatch_size = microbatch_size
        self.seed = seed
        self.step = 0
        self.update = PolicyUpdate(policy, self._loss)
        self._validation = []

    def fit(
        self,
        pairs,
        batch_size=8,
        epochs=1,
        callbacks=(),
        verbose="auto",
        checkpoints=None,
        save_every_steps=10,
        validation_data=None,
    ):
        """Makes steps of `batch_size` pairs each, all pairs once an epoch but for a last, smaller batch.

        Args:
            pairs: list of dicts of `prompts` (or `prompt`), `chosen` and `rejected`, or a dict of such columns; what
                `data.preference_pairs` gives, and TRL's data sets. A prompt is a string or a dialogue that ends with
                the user, an answer a string or the assistant's message in a list. Answers as dialogues may repeat the
                prompt, which may then be left out, as it may where two texts begin alike.
            batch_size: int, pairs of a step.
            validation_data: optional, as `pairs`. After each epoch the history has what `evaluate` says of them, with
                `val_` in front of its names.
            epochs, callbacks, verbose, checkpoints, save_every_steps: as of `ReinforceTrainer.fit`.

        Returns:
            A `keras.callbacks.History` with the mean over each epoch of `loss`, `accuracy` (the share of pairs whose
            chosen answer gained on the rejected one; as much is no gain), `margin` (by how much, in nats times
            `beta`), `gradient_norm`, `chosen_logp` and `rejected_logp` (nats of a response).

        Raises:
            ValueError: for no pairs, missing fields, answers of several messages, and those that do not fit into a row.
            DamagedCheckpointError, ForeignCheckpointError, CheckpointNotSavedError, NonFiniteLossError: as of
                `ReinforceTrainer.fit`.
        """
        rows_of_pairs = self._rows_of_all(pairs)
        if not 1 <= batch_size <= len(rows_of_pairs):
            raise ValueError(
                f"A batch has 1 to all pairs. Received: batch_size={batch_size}, {len(rows_of_pairs)} pairs"
            )
        self._pairs, self._batch_size = rows_of_pairs, batch_size
        self._validation = [] if validation_data is None else self._batches(validation_data, batch_size)
        data = {"pairs": self._pairs, "batch_size": batch_size}
        steps = len(self._pairs) // batch_size
        return Loop(self, data, steps, epochs, callbacks, verbose, checkpoints, save_every_steps).run()

    def evaluate(self, pairs, batch_size=8):
        """What `fit` would report of pairs, without learning from them.

        Args:
            pairs: as of `fit`.
            batch_size: int, pairs that are read at a time.

        Returns:
            A dict of floats, the means over the pairs of `loss`, `accuracy`, `margin`, `chosen_logp` and
            `rejected_logp`.

        Raises:
            ValueError: as `fit`.
        """
        return self._evaluated(self._batches(pairs, batch_size))

    def validate(self):
        """What is logged of the validation data at the end of an epoch."""
        if not self._validation:
            return {}
        return {f"val_{name}": value for name, value in self._evaluated(self._validation).items()}

    def _batches(self, pairs, batch_size):
        """All pairs, a list of lists of rows."""
        of_pairs = self._rows_of_all(pairs)
        if batch_size < 1 or not of_pairs:
            raise ValueError(
                f"There is at least one pair, in batches of at least one. Received: batch_size={batch_size}, "
                f"{len(of_pairs)} pairs"
            )
        return [of_pairs[first : first + batch_size] for first in range(0, len(of_pairs), batch_size)]

    def _evaluated(self, batches):
        totals, count = {}, sum(map(len, batches))
        for pairs in batches:
            batch = self._batch(pairs)
            logps, _ = self.update.log_probabilities(batch)
            of_batch = {name: on_host(batch[name]) for name in ("mask", "reference", "row_weights")}
            loss, metrics, _ = self._loss(*_in_one(on_host(logps), None, of_batch))
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(pairs) / count
        return totals

    def _rows_of_all(self, pairs):
        if text_checks.is_fields(pairs):
            pairs = record_formats.records_of_columns(text_checks.plain(pairs))
        return [self._rows_of(number, pair) for number, pair in enumerate(pairs)]

    def _rows_of(self, number, pair):
        """Token ids of the prompt and of both answers."""
        try:
            pair = record_formats.pair(text_checks.plain(pair))
        except ValueError as error:
            raise ValueError(f"{error} (number {number})") from error
        if not isinstance(pair, dict) or not set(PAIR_FIELDS) <= set(pair):
            raise ValueError(
                f"A pair has {', '.join(map(repr, PAIR_FIELDS))}. Received: {text_checks.shown(pair)}, number {number}"
            )
        prompt, *answers = (pair[name] for name in PAIR_FIELDS)
        try:
            examples = [self._example(prompt, answer) for answer in answers]
        except ValueError as error:
            raise ValueError(f"{error} (number {number})") from error
        longest = max(len(ids) + len(answer) for ids, answer in examples)
        if longest > self.policy.preprocessor.sequence_length:
            raise ValueError(
                f"A prompt with its answer fits into `sequence_length={self.policy.preprocessor.sequence_length}`. "
                f"Received one of {longest} tokens, number {number}: raise it, or leave the pair out, as "
                "`data.preference_pairs` does"
            )
        row = [examples[0][0], examples[0][1], examples[1][1]]
        return refuse_rows_outside(row, self.policy.backbone.vocabulary_size, f"Tokens of pair {number}")

    def _example(self, prompt, answer):
        preprocessor = self.policy.preprocessor
        prompt = prompt if isinstance(prompt, list) else text_checks.text(prompt, "A prompt")
        # Only the last answer: what the model said before is the same in both.
        row = preprocessor.row({"prompts": prompt, "responses": answer})
        start, end = row.learned.index(True), len(row.ids) - row.learned[::-1].index(True)
        return row.ids[:start], row.ids[start:end]

    # === What a checkpoint has ===

    @property
    def reference(self):
        return self.update.reference

    def settings(self):
        """What has to be equal for a run to go on exactly, for json."""
        settings = {"beta": self.beta, "microbatch_size": self.microbatch_size, "seed": self.seed}
        # Checkpoints from before there were others say nothing of them.
        others = {"loss_type": (self.loss_type, "sigmoid"), "label_smoothing": (self.label_smoothing, 0.0)}
        return settings | {name: value for name, (value, usual) in others.items() if value != usual}

    def state(self):
        """What it knows besides weights and steps: nothing."""
        return {}

    def restore(self, state, reference):
        """Takes `reference` back."""
        self.update.reference = reference

    # === One step ===

    def make_step(self):
        """Makes the next step of `fit`: each pass over all pairs has an order of its own."""
        number, place = divmod(self.step, len(self._pairs) // self._batch_size)
        order = np.random.default_rng((self.seed, number)).permutation(len(self._pairs))
        chosen = [self._pairs[i] for i in order[place * self._batch_size : (place + 1) * self._batch_size]]
        logs, _ = self.update.step(self._batch(chosen))
        self.step += 1
        return logs

    def _batch(self, pairs):
        """Microbatches of pairs, the answers of a pair beside each other, the chosen one first."""
        size = self.microbatch_size + -self.microbatch_size % kernels.shards_of_batch()
        prompts = [prompt for prompt, *_ in pairs for _ in range(2)]
        answers = [answer for _, *both in pairs for answer in both]
        batch = placed(rows.microbatches(prompts, answers, 2 * size, continuations=2))
        logps = self.update.reference_log_probabilities(batch)
        batch["reference"] = on_host((logps * batch["mask"]).sum(axis=-1))
        return batch

    def _loss(self, logps, entropies, microbatch):
        """A microbatch's part of the loss, and of metrics."""
        of_responses = (logps * microbatch["mask"]).sum(axis=-1).reshape(-1, 2).T
        reference = microbatch["reference"].reshape(-1, 2).T
        # Of pairs: that of both answers.
        weights = microbatch["row_weights"].reshape(-1, 2).sum(axis=-1)
        if self.loss_type == "ipo":
            losses = objectives.ipo_losses(*of_responses, *reference, self.beta)
        else:
            losses = objectives.dpo_losses(*of_responses, *reference, self.beta, self.label_smoothing)
        margins = self.beta * objectives.ahead(*of_responses, *reference)
        metrics = {
            "accuracy": (margins > 0).astype("float32"),
            "margin": margins,
            "chosen_logp": of_responses[0],
            "rejected_logp": of_responses[1],
        }
        return (weights * losses).sum(), {name: (weights * values).sum() for name, values in metrics.items()}, {}


def _in_one(*trees):
    """Arrays `[M, R, …]` of trees as `[M R, …]`."""
    return jax.tree.map(lambda array: jax.numpy.reshape(array, (-1, *array.shape[2:])), trees)


def _refuse_loss(loss_type, label_smoothing):
    if loss_type not in LOSSES:
        raise ValueError(f"`loss_type` is one of {', '.join(map(repr, LOSSES))}. Received: {loss_type!r}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type != "sigmoid"):
        raise ValueError(
            "`label_smoothing` is at least 0 and below 0.5, and goes with `loss_type='sigmoid'` alone. "
            f"Received: {label_smoothing} with loss_type={loss_type!r}"
        )
