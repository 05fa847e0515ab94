"""The trainer, on models so small that everything they can write is listed."""

import itertools

import jax
import keras
import keras_hub
import numpy as np
import pytest

from keras_gemma.models import GemmaRewardModel
from keras_gemma.models import GemmaRewardModelPreprocessor
from keras_gemma.rlhf import AdaptiveCoefficient
from keras_gemma.rlhf import ReinforceTrainer
from keras_gemma.rlhf import objectives
from keras_gemma.rlhf import rollouts as rolling
from tests.rlhf.enumerated import END
from tests.rlhf.enumerated import LONGEST
from tests.rlhf.enumerated import PROMPT
from tests.rlhf.enumerated import RESPONSES
from tests.rlhf.enumerated import Worth
from tests.rlhf.enumerated import all_of_them
from tests.rlhf.enumerated import log_probabilities
from tests.rlhf.enumerated import log_probabilities_of
from tests.rlhf.enumerated import responses

BETA = 0.3


def as_rows(values, batch):
    """A value for each response, where its row is."""
    padded = np.zeros(batch["row_weights"].size, "float32")
    padded[: len(RESPONSES)] = values
    return padded.reshape(batch["row_weights"].shape)


def test_everything_that_can_be_written_is_listed(make_policy):
    np.testing.assert_allclose(np.exp(log_probabilities(make_policy())).sum(), 1.0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_come_from_all_of_the_policy(make_policy, temperature):
    policy = make_policy()
    expected = np.exp(np.array(log_probabilities(policy, temperature)))
    counts = dict.fromkeys(map(tuple, RESPONSES), 0)
    seeds, rows = 16, 2048
    for seed in range(seeds):
        drawn = rolling.sample(policy, [PROMPT], rows, LONGEST, temperature, [END], seed)
        for response, ended in zip(drawn.responses, drawn.ended):
            counts[tuple(response)] += 1
            assert ended == (response[-1] == END)
    error = np.array(list(counts.values())) - seeds * rows * expected
    # Five standard deviations of a binomial distribution; rare responses are Poisson's.
    assert (np.abs(error) < 4 + 5 * np.sqrt(seeds * rows * expected * (1 - expected))).all()
    again = rolling.sample(policy, [PROMPT], 64, LONGEST, temperature, [END], seeds - 1).responses
    assert again == drawn.responses[:64] or len(set(map(tuple, again))) > 5
    other = rolling.sample(policy, [PROMPT], 64, LONGEST, temperature, [END], seeds).responses
    assert other != again


@pytest.mark.parametrize("temperature, clip", [(1.0, None), (0.7, None), (1.0, 0.2)])
def test_the_gradient_is_that_of_reward_and_divergence(make_policy, temperature, clip):
    """T3 without noise: every response with its probability in place of samples; away from the reference."""
    policy = make_policy(spread=0.25)
    trainer = ReinforceTrainer(
        policy, Worth(), kl_coefficient=BETA, temperature=temperature, microbatch_size=16, clip=clip
    )
    reference = np.array(log_probabilities(policy, temperature))
    random = np.random.default_rng(7)
    for variable in policy.trainable_variables:
        variable.assign(variable + random.normal(0, 0.2, variable.shape))
    rewards = np.array(list(trainer.reward.of.values()))

    trainable = [v.value for v in policy.trainable_variables]
    exact = exact_gradient(policy, reference, rewards, temperature)

    batch = all_of_them().microbatches(16)
    logps, _ = trainer.update.log_probabilities(batch)
    reference_logps = trainer.update.reference_log_probabilities(batch)
    kl = np.sum((logps - reference_logps) * batch["mask"], axis=-1).reshape(-1)[: len(RESPONSES)]
    np.testing.assert_allclose(kl, np.array(log_probabilities(policy, temperature)) - reference, atol=1e-4)
    probabilities = np.exp(np.array(log_probabilities(policy, temperature)))
    # Any baseline that knows nothing of the response leaves the mean as it is.
    batch["advantages"] = as_rows(rewards - BETA * kl - 0.4, batch)
    batch["row_weights"] = as_rows(probabilities, batch)
    batch["sampled_logps"] = np.array(logps)
    batch["reference_logps"] = np.array(reference_logps)
    frozen = [v.value for v in policy.non_trainable_variables]
    gradients_of = jax.jit(lambda batch: trainer.update.gradients(trainable, frozen, batch)[1])
    assert distance(gradients_of(batch), exact) < 1e-4

    # What goes wrong in practice is seen here.
    lengths = np.array([len(one) for one in RESPONSES])
    mask = batch["mask"]
    without_end = mask * (batch["targets"] != END)
    spread = (rewards - BETA * kl).std()
    for wrong in (
        {"mask": without_end},
        {"advantages": as_rows((rewards - BETA * kl) / lengths, batch)},
        {"advantages": as_rows(rewards - BETA * kl / lengths, batch)},
        {"advantages": as_rows((rewards - BETA * kl - 0.4) / spread, batch)},
        {"advantages": as_rows(rewards + BETA * kl, batch)},
        {"advantages": as_rows(rewards, batch)},
    ):
        assert distance(gradients_of({**batch, **wrong}), exact) > 0.03, list(wrong)
    trainer.update.temperature = 1.3
    gradients = jax.jit(lambda: trainer.update.gradients(trainable, frozen, batch)[1])()
    assert distance(gradients, exact) > 0.03


@pytest.mark.parametrize("baseline", ["leave_one_out", "moving_average"])
def test_one_pass_learns_what_two_do(make_policy, baseline, monkeypatch):
    seen = []
    decide = ReinforceTrainer._learns_in_one_pass

    def train(in_one_pass):
        def decided(trainer, batch):
            seen.append(decide(trainer, batch))
            return in_one_pass

        monkeypatch.setattr(ReinforceTrainer, "_learns_in_one_pass", decided)
        policy = make_policy()
        policy.compile(keras.optimizers.SGD(0.03))
        trainer = ReinforceTrainer(
            policy,
            Worth(),
            kl_coefficient=0.4,
            baseline=baseline,
            group_size=4,
            max_new_tokens=LONGEST,
            penalty_without_end=0.5,
            microbatch_size=8,
        )
        logs = [trainer.train_on([PROMPT] * 4, [PROMPT] * 4) for _ in range(4)]
        return logs, [np.array(variable) for variable in policy.trainable_variables]

    one, two = train(True), train(False)
    assert all(seen)
    for by_one, by_two in zip(one[0], two[0]):
        for name in ("reward", "kl", "penalised_reward", "entropy", "gradient_norm", "loss"):
            np.testing.assert_allclose(by_one[name], by_two[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert abs(one[0][-1]["kl"]) > 0.01
    for by_one, by_two in zip(one[1], two[1]):
        np.testing.assert_allclose(by_one, by_two, atol=1e-4)


def test_groups_that_are_cut_apart_are_scored_first(make_policy):
    """Advantages of parts of groups would be others."""
    in_one = {}
    for baseline in ("leave_one_out", "moving_average"):
        policy = make_policy()
        policy.compile(keras.optimizers.SGD(0.03))
        for size in (4, 6, 8):
            settings = {"baseline": baseline, "group_size": 4, "max_new_tokens": LONGEST, "microbatch_size": size}
            trainer = ReinforceTrainer(policy, Worth(), **settings)
            in_one[baseline, size] = trainer._learns_in_one_pass({"rewards": np.zeros((2, size))})
    assert [size for (baseline, size), yes in in_one.items() if not yes] == [6]
    trainer = ReinforceTrainer(policy, Worth(), clip=0.2, max_new_tokens=LONGEST)
    assert not trainer._learns_in_one_pass({"rewards": np.zeros((2, 8))})


def test_the_gradient_of_groups_is_that_of_reward_and_divergence(make_policy, monkeypatch):
    """T3 without noise, baseline included: every pair of responses that two samples can be."""
    listed = responses(tokens=4)
    policy = make_policy(tokens=4, spread=0.25)
    worth = Worth(listed=listed)
    trainer = ReinforceTrainer(policy, worth, kl_coefficient=BETA, group_size=2, microbatch_size=2)
    reference = np.array(log_probabilities(policy, listed=listed))
    random = np.random.default_rng(7)
    for variable in policy.trainable_variables:
        variable.assign(variable + random.normal(0, 0.2, variable.shape))
    rewards = np.array([worth.of[tuple(one)] for one in listed])
    exact = exact_gradient(policy, reference, rewards, listed=listed)

    pairs = list(itertools.product(range(len(listed)), repeat=2))
    drawn = np.array(pairs).reshape(-1)
    probabilities = np.exp(np.array(log_probabilities(policy, listed=listed)))[np.array(pairs)].prod(axis=1)
    batch = all_of_them([listed[i] for i in drawn]).microbatches(len(drawn))
    batch["reference_logps"] = np.array(trainer.update.reference_log_probabilities(batch))
    batch["rewards"] = rewards[drawn][None].astype("float32")
    batch["kl_coefficients"] = np.full((1, len(drawn)), BETA, "float32")
    batch["row_weights"] = np.repeat(probabilities, 2)[None].astype("float32") / 2
    trainable, frozen = (
        [v.value for v in part] for part in (policy.trainable_variables, policy.non_trainable_variables)
    )

    def error():
        return distance(jax.jit(lambda: trainer.update.gradients(trainable, frozen, batch)[1])(), exact)

    assert trainer._learns_in_one_pass(batch)
    assert error() < 1e-4

    def minus_mean(penalised, group_size, *_):
        groups = penalised.reshape(-1, group_size)
        return (groups - groups.mean(axis=1, keepdims=True)).reshape(-1)

    def in_standard_deviations(penalised, group_size, *_):
        groups = penalised.reshape(-1, group_size)
        return minus_mean(penalised, group_size) / np.repeat(groups.std(axis=1) + 1e-4, group_size)

    # The mean that includes a response itself, and what is made of it.
    for wrong in (minus_mean, in_standard_deviations):
        with monkeypatch.context() as patch:
            patch.setattr(objectives, "leave_one_out", wrong)
            assert error() > 0.03, wrong


def exact_gradient(policy, reference, rewards, temperature=1.0, listed=RESPONSES):
    """Of the mean of reward minus β times the divergence, by a sum over all responses."""

    def objective(trainable):
        logps = log_probabilities_of(policy, trainable, temperature, listed)
        return -jax.numpy.sum(jax.numpy.exp(logps) * (rewards - BETA * (logps - reference)))

    return jax.jit(jax.grad(objective))([v.value for v in policy.trainable_variables])


def distance(gradients, exact):
    error = sum(np.sum(np.square(g - e)) for g, e in zip(gradients, exact))
    return np.sqrt(error / sum(np.sum(np.square(e)) for e in exact))


def test_training_ends_at_the_best_trade(make_policy):
    """T1: eight arms; the optimum is the reference, each arm weighted with exp(reward / β)."""
    assert distance_of_arms(make_policy) < 0.02


def distance_of_arms(make_policy, kl_coefficient=0.5):
    """Total variation from the best trade at a coefficient of 0.5, after training at another perhaps."""
    policy = make_policy(spread=0.3, tokens=8)
    policy.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.06, 100)))
    rewards = np.random.default_rng(1).normal(0, 0.5, 8).astype("float32")

    class Arms:
        preprocessor = None

        def score_tokens(self, rows, batch_size):
            return rewards[[row[len(PROMPT)] for row in rows]]

    def probabilities():
        ids = np.array([PROMPT])
        return np.array(jax.nn.softmax(policy({"token_ids": ids, "padding_mask": np.ones_like(ids)})[0, -1]))

    best = probabilities() * np.exp(rewards / 0.5)
    trainer = ReinforceTrainer(
        policy, Arms(), kl_coefficient=kl_coefficient, group_size=256, max_new_tokens=1, microbatch_size=256
    )
    for _ in range(100):
        trainer.train_on([PROMPT], [PROMPT])
    return 0.5 * np.abs(probabilities() - best / best.sum()).sum()


def of_the_wrong_sign(patch):
    right = objectives.sequence_kl
    patch.setattr(objectives, "sequence_kl", lambda one, other, mask: -right(one, other, mask))


def as_a_loss(estimate):
    """The divergence descended by the gradient of its estimate from tokens, and not weighed against the reward."""

    def mistake(patch):
        right = ReinforceTrainer._loss

        def loss(trainer, logps, entropies, microbatch):
            of_rewards = {**microbatch, "kl_coefficients": 0.0 * microbatch["kl_coefficients"]}
            value, *rest = right(trainer, logps, entropies, of_rewards)
            estimates = estimate(logps - microbatch["reference_logps"]) * microbatch["mask"]
            weights = microbatch["kl_coefficients"] * microbatch["row_weights"]
            return value + (weights * estimates.sum(axis=-1)).sum(), *rest

        patch.setattr(ReinforceTrainer, "_loss", loss)

    return mistake


# Of a token's log-ratio, after Schulman (2020).
k1_as_a_loss = as_a_loss(lambda log_ratio: log_ratio)
k3_as_a_loss = as_a_loss(lambda log_ratio: jax.numpy.exp(-log_ratio) - 1 + log_ratio)


@pytest.mark.parametrize("mistake", [k1_as_a_loss, k3_as_a_loss, of_the_wrong_sign], ids=["k1", "k3", "sign"])
def test_mistakes_choose_other_arms(make_policy, monkeypatch, mistake):
    """What goes wrong in practice misses the threshold of T1 by far."""
    mistake(monkeypatch)
    assert distance_of_arms(make_policy) > 0.06


def test_without_divergence_other_arms_are_chosen(make_policy):
    assert distance_of_arms(make_policy, kl_coefficient=0.0) > 0.2


@pytest.mark.slow
def test_training_on_sequences_ends_at_the_best_trade(make_policy):
    """T2: as T1, for responses of several tokens with an end; any that are cut off are worth what they are worth."""
    distance, _ = trained_on_sequences(make_policy)
    assert distance < 0.02


def without_end(patch):
    arrays_of = rolling.Rollouts.microbatches

    def masked(rollouts, count):
        batch = arrays_of(rollouts, count)
        return {**batch, "mask": batch["mask"] * (batch["targets"] != END)}

    patch.setattr(rolling.Rollouts, "microbatches", masked)


def divergence_per_token(patch):
    whole = objectives.sequence_kl
    patch.setattr(objectives, "sequence_kl", lambda one, other, mask: whole(one, other, mask) / mask.sum(axis=-1))


def divergence_of_its_own_token(patch):
    """Every token pays for its own log-ratio alone, and not for what it leads to."""

    def loss(trainer, logps, entropies, microbatch):
        mask, weights = microbatch["mask"], microbatch["row_weights"]
        log_ratios = (jax.lax.stop_gradient(logps) - microbatch["reference_logps"]) * mask
        of_rewards = objectives.leave_one_out(microbatch["rewards"], trainer.group_size)
        advantages = of_rewards[:, None] - microbatch["kl_coefficients"][:, None] * log_ratios
        of_rows = {"kl": log_ratios.sum(axis=-1), "entropies": (entropies * mask).sum(axis=-1)}
        return -(weights[:, None] * advantages * logps * mask).sum(), {}, of_rows

    patch.setattr(ReinforceTrainer, "_loss", loss)


def not_all_of_the_policy(patch):
    patch.setattr(keras_hub.samplers, "RandomSampler", lambda temperature: keras_hub.samplers.TopKSampler(k=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake", [without_end, divergence_per_token, divergence_of_its_own_token, not_all_of_the_policy]
)
def test_mistakes_end_elsewhere(make_policy, monkeypatch, mistake):
    """What goes wrong in practice misses the threshold of T2 by far."""
    mistake(monkeypatch)
    distance, _ = trained_on_sequences(make_policy)
    assert distance > 0.06


def trained_on_sequences(make_policy, steps=300):
    """Total variation from the best trade after training, and the trainer."""
    listed = responses(tokens=4)
    policy = make_policy(tokens=4, hidden_dim=32, spread=0.1)
    # At four times the rate a policy may lose responses for good: nothing is learned of what is never drawn.
    policy.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.005, steps)))
    worth = Worth(listed=listed, spread=0.5)
    best = np.exp(np.array(log_probabilities(policy, listed=listed)) + np.array(list(worth.of.values())) / 0.5)
    trainer = ReinforceTrainer(
        policy, worth, kl_coefficient=0.5, group_size=512, max_new_tokens=LONGEST, microbatch_size=512
    )
    for _ in range(steps):
        trainer.train_on([PROMPT], [PROMPT])
    found = np.exp(np.array(log_probabilities(policy, listed=listed)))
    return 0.5 * np.abs(found - best / best.sum()).sum(), trainer


def test_the_first_step(make_policy):
    policy = make_policy()
    trainer = ReinforceTrainer(policy, Worth(), group_size=32, max_new_tokens=LONGEST, microbatch_size=16, clip=0.2)
    of_all = dict(zip(map(tuple, RESPONSES), np.array(log_probabilities(policy))))
    drawn = rolling.sample(policy, [PROMPT], 32, LONGEST, 1.0, [END], 0)
    batch = drawn.microbatches(16)
    logps, _ = trainer.update.log_probabilities(batch)
    of_drawn = (logps * batch["mask"]).sum(axis=-1).reshape(-1)
    np.testing.assert_allclose(of_drawn, [of_all[tuple(one)] for one in drawn.responses], atol=1e-5)
    logs = trainer.train_on([PROMPT], [PROMPT])
    assert logs["kl"] == 0.0 and logs["kl_per_token"] == 0.0
    np.testing.assert_allclose(logs["penalised_reward"], logs["reward"], rtol=1e-6)
    assert logs["gradient_norm"] > 0
    seen = [trainer.samples]
    assert logs["ratio"] == 1.0 and logs["clipped"] == 0.0
    logs = trainer.train_on([PROMPT], [PROMPT])
    assert logs["kl"] != 0.0
    assert [one["response"] for one in trainer.samples] != [one["response"] for one in seen[0]]
    assert abs(sum(one["reward"] for one in trainer.samples) / 32 - logs["reward"]) < 1e-5


def test_a_larger_coefficient_stays_closer(make_policy):
    distances = []
    for coefficient in (0.01, 3.0):
        policy = make_policy()
        policy.compile(keras.optimizers.Adam(0.03))
        trainer = ReinforceTrainer(
            policy, Worth(), kl_coefficient=coefficient, group_size=64, max_new_tokens=LONGEST, microbatch_size=64
        )
        logs = [trainer.train_on([PROMPT], [PROMPT]) for _ in range(40)]
        distances.append(np.mean([one["kl"] for one in logs[-5:]]))
    assert distances[1] < 0.3 * distances[0]


def test_the_reward_rises_within_the_budget(make_policy):
    """T5: a coefficient that follows a target keeps the divergence there; fixed at a third of its beginning, none."""
    budget, divergences = 0.3, []
    for coefficient in (AdaptiveCoefficient(0.3, budget, rate=0.2), 0.1):
        policy = make_policy()
        policy.compile(keras.optimizers.Adam(0.003))
        trainer = ReinforceTrainer(
            policy, Worth(), kl_coefficient=coefficient, group_size=128, max_new_tokens=LONGEST, microbatch_size=128
        )
        logs = [trainer.train_on([PROMPT], [PROMPT]) for _ in range(120)]
        rewards, kl = ([one[name] for one in logs] for name in ("reward", "kl"))
        assert np.mean(rewards[20:]) > np.mean(rewards[:3]) + 0.1
        # The coefficient first goes past what it has to be.
        divergences.append(np.mean(kl[60:]))
    assert 0.7 * budget < divergences[0] < 1.3 * budget and divergences[1] > 3 * budget, divergences


def test_responses_without_an_end_cost(make_policy):
    policy = make_policy()
    trainer = ReinforceTrainer(
        policy, Worth(), group_size=64, max_new_tokens=LONGEST, kl_coefficient=0.0, penalty_without_end=5.0
    )
    logs = trainer.train_on([PROMPT], [PROMPT])
    np.testing.assert_allclose(logs["reward"] - logs["penalised_reward"], 5.0 * (1 - logs["ended"]), rtol=1e-5)
    assert 0 < logs["ended"] < 1


def test_several_updates_and_a_moving_average(make_policy):
    weights = []
    for updates in (1, 3):
        policy = make_policy()
        trainer = ReinforceTrainer(
            policy, Worth(), group_size=16, baseline="moving_average", max_new_tokens=LONGEST, updates=updates, clip=0.2
        )
        rewards = [trainer.train_on([PROMPT], [PROMPT])["penalised_reward"] for _ in range(2)]
        np.testing.assert_allclose(trainer._average, 0.9 * rewards[0] + 0.1 * rewards[1], rtol=1e-5)
        assert int(policy.optimizer.iterations) == 2 * updates
        weights.append(np.array(policy.trainable_variables[0]))
    assert np.abs(weights[0] - weights[1]).max() > 0


def test_microbatches_make_the_same_step(make_policy):
    weights = []
    for rows in (32, 5):
        policy = make_policy()
        trainer = ReinforceTrainer(policy, Worth(), group_size=32, max_new_tokens=LONGEST, microbatch_size=rows)
        trainer.train_on([PROMPT], [PROMPT])
        weights.append(policy.get_weights())
    for one, other in zip(*weights):
        np.testing.assert_allclose(one, other, atol=1e-5)


# === fit ===


def test_fit_draws_every_prompt_and_reports_each_quantity(model):
    asked = []

    def reward(prompts, texts):
        asked.append(list(prompts))
        return np.array([text.count("e") for text in texts])

    trainer = ReinforceTrainer(
        model, reward, group_size=2, max_new_tokens=4, kl_coefficient=AdaptiveCoefficient(0.1, 1)
    )
    told = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: told.steps.append(logs))
    told.steps = []
    prompts = ["the", "You", "any", "Source"]
    history = trainer.fit(prompts, batch_size=2, epochs=2, callbacks=[told], verbose=0).history
    assert len(asked) == 4 and all(one[0] == one[1] and one[2] == one[3] for one in asked)
    assert sorted(asked[0][::2] + asked[1][::2]) == sorted(asked[2][::2] + asked[3][::2]) == sorted(prompts)
    names = {
        "reward", "reward_std", "rewarded", "penalised_reward", "kl", "kl_per_token", "kl_coefficient", "entropy",
        "response_length", "ended", "cut_off", "equal_groups", "loss", "gradient_norm",
        "rollout_seconds", "score_seconds", "update_seconds",
    }  # fmt: skip
    assert set(history) == names and len(history["kl"]) == 2
    np.testing.assert_allclose(history["reward"][1], np.mean([one["reward"] for one in told.steps[2:]]))
    assert {one["prompt"] for one in trainer.samples} <= set(prompts)


def test_adapters_are_all_that_changes_and_the_reference_is_what_they_were(model):
    model.backbone.enable_lora(2)
    model.compile(keras.optimizers.Adam(1e-2))
    frozen = [np.array(variable) for variable in model.non_trainable_variables]
    trainer = ReinforceTrainer(
        model, lambda prompts, texts: [len(text) for text in texts], group_size=2, max_new_tokens=4
    )
    assert sum(value.size for value in trainer.reference) == sum(np.prod(v.shape) for v in model.trainable_variables)
    history = trainer.fit(["the", "You"], batch_size=2, epochs=2, verbose=0).history
    assert abs(history["kl"][0]) < 1e-4 < abs(history["kl"][1])
    for variable, before in zip(model.non_trainable_variables, frozen):
        np.testing.assert_array_equal(variable, before)


def test_a_reward_model_judges_the_very_tokens(model, tokenizer):
    preprocessor = GemmaRewardModelPreprocessor(tokenizer, sequence_length=32)
    judge = GemmaRewardModel(model.backbone, preprocessor)
    trainer = ReinforceTrainer(model, judge, group_size=2, max_new_tokens=4)
    trainer.fit(["the", "You"], batch_size=2, verbose=0)
    assert len({one["reward"] for one in trainer.samples}) > 1


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"baseline": "mean"}, "'leave_one_out', 'moving_average'. Received: 'mean'"),
        ({"group_size": 1}, "`group_size` of at least 2"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": float("nan")}, "Received: nan"),
        ({"updates": 2}, "need `clip`"),
        ({"clip": 1.5}, "between 0 and 1"),
        ({"reward": "good"}, "or a callable"),
        ({"kl_coefficient": -1.0}, "at least 0"),
    ],
)
def test_settings_that_are_refused(model, settings, part):
    with pytest.raises(ValueError, match=part):
        ReinforceTrainer(model, **{"reward": lambda prompts, texts: [0.0] * len(texts), **settings})


def test_policies_that_are_refused(make_model, tokenizer):
    with pytest.raises(ValueError, match=r"dropout=0\.5"):
        ReinforceTrainer(make_model(dropout=0.5), len)
    with pytest.raises(ValueError, match="has a preprocessor"):
        ReinforceTrainer(make_model(with_preprocessor=False), len)


@pytest.mark.parametrize(
    "reward, part",
    [
        (lambda prompts, texts: [0.0], r"one number for each of 4 responses. Received: shape \(1,\)"),
        (lambda prompts, texts: [np.nan, 0.0, 0.0, 0.0], "Rewards are finite. Received: nan"),
    ],
)
def test_rewards_that_are_none(model, reward, part):
    before = model.get_weights()
    with pytest.raises(ValueError, match=part):
        ReinforceTrainer(model, reward, group_size=2, max_new_tokens=4).fit(["the", "You"], batch_size=2, verbose=0)
    for one, other in zip(model.get_weights(), before):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "prompts, part",
    [
        (["the", ""], "A prompt says something.*number 1"),
        (["the", "any " * 30], r"at most 20 tokens. Received one of \d+, number 1"),
        (["the"], "batch_size=2, 1 prompts"),
    ],
)
def test_prompts_that_are_refused(model, prompts, part):
    trainer = ReinforceTrainer(model, lambda prompts, texts: [0.0] * len(texts), group_size=2, max_new_tokens=4)
    with pytest.raises(ValueError, match=part):
        trainer.fit(prompts, batch_size=2, verbose=0)


def test_two_vocabularies_are_refused(model):
    judge = GemmaRewardModel.from_preset("gemma_tiny_en", load_weights=False, sequence_length=32)
    with pytest.raises(ValueError, match="one vocabulary"):
        ReinforceTrainer(model, judge)
