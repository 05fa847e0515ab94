"""How responses lie in rows, and that it makes no difference what lies where."""

import jax
import keras
import numpy as np
import pytest

from keras_gemma.kernels import continuations
from keras_gemma.rlhf import ReinforceTrainer
from keras_gemma.rlhf import rows

PROMPTS = [[2, 5, 6], [2, 7]]
RESPONSES = [[8, 1], [9, 10, 1], [11], [12, 13, 14]]


def repeated(prompts, count):
    return [prompt for prompt in prompts for _ in range(count)]


def test_each_on_its_own():
    batch = rows.microbatches(repeated(PROMPTS, 2), RESPONSES, 3)
    assert {name: array.shape[:2] for name, array in batch.items()} == dict.fromkeys(batch, (2, 3))
    ids, columns, targets = (batch[name].reshape(6, -1) for name in ("token_ids", "columns", "targets"))
    assert [row[:5].tolist() for row in ids[:4]] == [
        [2, 5, 6, 8, 0], [2, 5, 6, 9, 10], [2, 7, 0, 0, 0], [2, 7, 12, 13, 0],
    ]  # fmt: skip
    assert columns[:4].tolist() == [[2, 3, 0], [2, 3, 4], [1, 0, 0], [1, 2, 3]]
    assert targets[:4].tolist() == [[8, 1, 0], [9, 10, 1], [11, 0, 0], [12, 13, 14]]
    np.testing.assert_array_equal(batch["row_weights"], [[0.25, 0.25, 0.25], [0.25, 0, 0]])


def test_behind_a_prompt_that_stands_once():
    batch = rows.microbatches(repeated(PROMPTS, 2), RESPONSES, 2, continuations=2)
    # Prompts end where the continuations begin, which are two columns each: the last token predicts none.
    first = rows.SMALLEST_PROMPT
    assert batch["token_ids"].shape == (2, 1, first + 2 * 2)
    assert batch["token_ids"][:, 0, first - 3 :].tolist() == [[2, 5, 6, 8, 0, 9, 10], [0, 2, 7, 0, 0, 12, 13]]
    assert batch["positions"][:, 0, first - 3 :].tolist() == [[0, 1, 2, 3, 0, 3, 4], [0, 0, 1, 0, 0, 2, 3]]
    assert batch["padding_mask"][:, 0, first - 3 :].tolist() == [[1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 1, 1]]
    assert batch["targets"].tolist() == [[[8, 1, 0], [9, 10, 1]], [[11, 0, 0], [12, 13, 14]]]


def test_a_prompt_stands_once_where_that_is_shorter():
    def columns(prompt, response, continuations, count):
        responses = [[8] * response for _ in range(2 * count)]
        batch = rows.microbatches([[2] * prompt] * (2 * count), responses, count, continuations)
        return batch["token_ids"].shape[1:]

    assert columns(64, 64, 1, 4) == (4, 128)
    assert columns(64, 64, 4, 4) == (1, 64 + 4 * 63)
    # As many as a microbatch has, where it does not hold a group.
    assert columns(64, 64, 8, 4) == (1, 64 + 4 * 63)
    assert columns(64, 64, 6, 4) == (2, 64 + 2 * 63)
    # The longest response has the shortest prompt.
    prompts, responses = [[2] * 4] * 2 + [[2] * 60] * 2, [[8] * 60] * 2 + [[8] * 4] * 2
    assert rows.microbatches(prompts, responses, 2, 2)["token_ids"].shape[1:] == (2, 64)


def test_a_gpu_has_rows_without_padding_in_front(monkeypatch):
    monkeypatch.setattr(continuations, "jax_platform", lambda: "gpu")
    assert "columns" in rows.microbatches([[2] * 40] * 4, [[8] * 30] * 4, 4, continuations=4)


def test_devices_that_share_a_batch_have_rows_of_their_own():
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()))
    try:
        batch = rows.microbatches([[2] * 40] * 4, [[8] * 30] * 4, 4, continuations=4)
    finally:
        keras.distribution.set_distribution(None)
    assert batch["token_ids"].shape[1] == 4 and "columns" in batch


@pytest.mark.parametrize("group, count", [(4, 4), (4, 8), (3, 6), (6, 4)])
def test_what_is_learned_does_not_depend_on_it(model, group, count):
    random = np.random.default_rng(0)
    prompts = repeated([random.integers(2, 20, n).tolist() for n in (3, 9, 5)], group)
    responses = [random.integers(2, 20, n).tolist() for n in random.integers(1, 9, len(prompts))]
    trainer = ReinforceTrainer(model, lambda prompts, texts: [0.0] * len(texts), temperature=0.7)
    advantages = random.normal(size=len(prompts)).astype("float32")
    trained, frozen = trainer.update.trained(), [v.value for v in model.non_trainable_variables]

    def learned(sharing):
        batch = rows.microbatches(prompts, responses, count, sharing)
        logps, entropies = trainer.update.log_probabilities(batch)
        scored = [(np.array(x) * batch["mask"]).reshape(-1, batch["mask"].shape[-1]) for x in (logps, entropies)]
        batch |= {"advantages": rows.in_rows(advantages, batch), "reference_logps": np.array(logps)}
        loss, gradients, *_ = jax.jit(trainer.update.gradients)(trained, frozen, batch)
        return [one[: len(prompts)] for one in scored], loss, gradients, batch["token_ids"].shape

    *expected, of_rows = learned(1)
    *found, shared = learned(group)
    assert shared[1] < of_rows[1]
    for one, other in zip(*map(jax.tree.leaves, (found, expected))):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(np.abs(other).max(), 1e-3))
