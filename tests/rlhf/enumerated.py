"""Policies so small that everything they can write is listed."""

import jax
import keras
import numpy as np

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.rlhf import rollouts as rolling

TOKENS, LONGEST, PROMPT, END = 5, 3, [2, 3], 1


def responses(tokens=TOKENS):
    """All responses of up to `LONGEST` tokens: those that end, and those that are cut off."""
    listed = [[]]
    whole = []
    for _ in range(LONGEST):
        listed = [[*one, token] for one in listed for token in range(tokens)]
        whole += [one for one in listed if one[-1] == END]
        listed = [one for one in listed if one[-1] != END]
    return whole + listed


RESPONSES = responses()


class Worth:
    """A reward of token ids that knows each response's worth."""

    preprocessor = None

    def __init__(self, seed=3, listed=RESPONSES, spread=1.0):
        worth = np.random.default_rng(seed).normal(0, spread, len(listed)).astype("float32")
        self.of = {tuple(one): value for one, value in zip(listed, worth)}

    def score_tokens(self, rows, batch_size):
        scored = []
        for row in rows:
            response = tuple(row[len(PROMPT) :])
            # What was cut off has been given an end.
            scored.append(self.of[response if response in self.of else response[:-1]])
        return np.array(scored, "float32")


def policy_of(preprocessor, seed=0, spread=0.6, tokens=TOKENS, hidden_dim=16, **kwargs):
    """A compiled policy with a vocabulary of `tokens`."""
    keras.utils.set_random_seed(seed)
    backbone = GemmaBackbone(
        vocabulary_size=tokens, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=hidden_dim,
        intermediate_dim=2 * hidden_dim, head_dim=hidden_dim // 2, **kwargs,
    )  # fmt: skip
    policy = GemmaCausalLM(backbone, preprocessor)
    random = np.random.default_rng(seed)
    for variable in policy.trainable_variables:
        variable.assign(random.normal(0, spread, variable.shape))
    policy.compile(keras.optimizers.SGD(0.1))
    return policy


def log_probabilities(policy, temperature=1.0, listed=RESPONSES):
    """Of all responses, from plain logits."""
    return jax.jit(log_probabilities_of, static_argnums=(0, 2, 3))(
        policy, [v.value for v in policy.trainable_variables], temperature, tuple(map(tuple, listed))
    )


def log_probabilities_of(policy, trained, temperature=1.0, listed=RESPONSES):
    """The same as a function of what trains."""
    ids = np.zeros((len(listed), len(PROMPT) + LONGEST), "int32")
    learned = np.zeros((len(listed), LONGEST))
    for row, mask, response in zip(ids, learned, listed):
        row[: len(PROMPT) + len(response)] = [*PROMPT, *response]
        mask[: len(response)] = 1
    with keras.StatelessScope(state_mapping=list(zip(policy.trainable_variables, trained))):
        logits = policy({"token_ids": ids, "padding_mask": np.ones_like(ids)}) / temperature
    logps = jax.nn.log_softmax(logits, axis=-1)[:, len(PROMPT) - 1 : -1]
    of_tokens = jax.numpy.take_along_axis(logps, ids[:, len(PROMPT) :, None], axis=-1)[..., 0]
    return (of_tokens * learned).sum(axis=-1)


def all_of_them(listed=RESPONSES):
    ended = np.array([one[-1] == END for one in listed])
    return rolling.Rollouts([PROMPT] * len(listed), listed, ended)
