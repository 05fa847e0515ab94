"""Who sees what, how often and when."""

import collections
import itertools

import grain
import pytest

from keras_gemma.data import Stage
from keras_gemma.data import mixture

SIZES = {"web": 60, "code": 24, "books": 12}


def source(name, size=None):
    return grain.MapDataset.source([(name, i) for i in range(size or SIZES[name])])


SOURCES = {name: source(name) for name in SIZES}


def drawn(stages, count=None, sources=SOURCES, **kwargs):
    dataset = mixture(sources, stages, **{"host_index": 0, "host_count": 1, **kwargs})
    return [dataset[i] for i in range(len(dataset) if count is None else count)]


def shares(examples):
    counts = collections.Counter(name for name, _ in examples)
    return {name: counts[name] / len(examples) for name in SIZES}


# === Shares ===


def test_shares_are_kept_in_every_stretch():
    weights = {"web": 0.7, "code": 0.2, "books": 0.1}
    examples = drawn(weights, 1000, shuffle=False)
    assert shares(examples) == pytest.approx(weights, abs=0.002)
    for start in range(0, 950, 7):
        assert shares(examples[start : start + 50]) == pytest.approx(weights, abs=0.05)


@pytest.mark.parametrize(
    "weights", [{"web": 1 / 3, "code": 1 / 3, "books": 1 / 3}, {"web": 7, "code": 0.02, "books": 2}]
)
def test_weights_need_not_sum_to_1(weights):
    total = sum(weights.values())
    expected = {name: weight / total for name, weight in weights.items()}
    assert shares(drawn(weights, 4000, shuffle=False)) == pytest.approx(expected, abs=1e-3)


def test_shares_change_at_the_border_of_stages():
    stages = [
        Stage({"web": 0.8, "code": 0.2}, examples=100),
        Stage({"web": 0.25, "books": 0.75}, examples=40),
        Stage({"code": 1}),
    ]
    examples = drawn(stages, 200)
    assert shares(examples[:100]) == {"web": 0.8, "code": 0.2, "books": 0}
    assert shares(examples[100:140]) == {"web": 0.25, "code": 0, "books": 0.75}
    assert shares(examples[140:]) == {"web": 0, "code": 1, "books": 0}


def test_a_mixture_ends_with_its_last_stage():
    assert len(drawn([Stage({"web": 1}, 10), Stage({"code": 1}, 5)])) == 15
    assert len(mixture(SOURCES, {"web": 1}, host_index=0, host_count=1)) > 10**18


# === Passes ===


def passes_of(examples, name, size):
    numbers = [number for source_name, number in examples if source_name == name]
    return [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]


def test_no_example_comes_again_before_its_source_is_used_up_across_stages():
    stages = [Stage({"web": 0.5, "code": 0.5}, 37), Stage({"web": 0.9, "code": 0.1}, 51), Stage({"web": 1, "code": 2})]
    examples = drawn(stages, 400)
    for name in ("web", "code"):
        passes = passes_of(examples, name, SIZES[name])
        assert len(passes) > 1
        for numbers in passes:
            assert sorted(numbers) == list(range(SIZES[name]))


def test_every_pass_has_an_order_of_its_own():
    passes = passes_of(drawn({"web": 1}, 180), "web", 60)
    assert len({tuple(numbers) for numbers in [*passes, range(60)]}) == 4


def test_a_repeated_mixture_goes_on():
    dataset = mixture(SOURCES, [Stage({"code": 1, "web": 2}, 36)], host_index=0, host_count=1).repeat(5)
    examples = [dataset[i] for i in range(len(dataset))]
    assert len(examples) == 180
    assert shares(examples[36:72]) == shares(examples[:36])
    assert all(sorted(numbers) == list(range(24)) for numbers in passes_of(examples, "code", 24))


def test_the_seed_chooses_the_order():
    first = drawn({"web": 1, "code": 1}, 50)
    assert drawn({"web": 1, "code": 1}, 50) == first
    assert drawn({"web": 1, "code": 1}, 50, seed=1) != first
    fewer = {name: SOURCES[name] for name in ("code", "web")}
    assert drawn({"web": 1}, 50) == drawn({"web": 1}, 50, sources=fewer)


def test_without_shuffle_the_order_of_sources_is_kept():
    assert drawn({"books": 1}, 24, shuffle=False) == [("books", i) for i in range(12)] * 2


# === Hosts ===


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_every_source_and_keep_the_weights(hosts):
    weights = {"web": 0.5, "code": 0.25, "books": 0.25}
    by_host = [drawn(weights, 60, host_index=i, host_count=hosts) for i in range(hosts)]
    for examples in by_host:
        assert shares(examples) == pytest.approx(weights, abs=0.01)
    for one, other in itertools.combinations(map(set, by_host), 2):
        assert not one & other
    assert set().union(*by_host) == {(name, i) for name, size in SIZES.items() for i in range(size)}


def test_stages_change_at_the_same_time_on_every_host():
    stages = [Stage({"web": 1}, examples=21), Stage({"code": 1}, examples=10)]
    for host in (0, 1):
        assert [name for name, _ in drawn(stages, host_index=host, host_count=2)] == ["web"] * 10 + ["code"] * 5


def test_hosts_are_those_of_jax_by_default(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    default = mixture(SOURCES, {"books": 1})
    assert [default[i] for i in range(6)] == drawn({"books": 1}, 6, host_index=1, host_count=2)


# === State ===


def test_a_restored_iterator_goes_on_with_the_same_examples():
    stages = [Stage({"web": 1, "code": 1}, 30), Stage({"books": 1}, 30)]
    dataset = mixture(SOURCES, stages, host_index=1, host_count=2).to_iter_dataset()
    iterator = iter(dataset)
    expected = list(iterator)
    for seen in (0, 7, 15, 29):
        iterator = iter(dataset)
        for _ in range(seen):
            next(iterator)
        restored = iter(dataset)
        restored.set_state(iterator.get_state())
        assert list(restored) == expected[seen:]


# === Errors ===


@pytest.mark.parametrize(
    "stages, rule",
    [
        ([], "At least one stage"),
        ({"wiki": 1}, r"unknown sources \['wiki'\].*books.*code.*web"),
        ({"web": -1, "code": 2}, "not negative"),
        ({"web": 0}, "one is above 0"),
        ({}, "one is above 0"),
        ({"web": float("nan")}, "finite"),
        ([Stage({"web": 1}), Stage({"code": 1}, 3)], "Only the last stage"),
        ([Stage({"web": 1}, 1)], "an example for each of 2 hosts"),
    ],
)
def test_stages_that_cannot_be_mixed_are_refused(stages, rule):
    with pytest.raises(ValueError, match=rule):
        mixture(SOURCES, stages, host_index=0, host_count=2)


def test_sources_that_cannot_be_mixed_are_refused():
    for sources in ({"web": source("web", 2)}, {"web": SOURCES["web"].repeat()}):
        with pytest.raises(ValueError, match=r"finite and has an example for each of 3 hosts.*'web' has"):
            mixture(sources, {"web": 1}, host_index=0, host_count=3)


@pytest.mark.parametrize(
    "hosts, rule", [((2, 2), "counts from 0"), ((-1, 2), "counts from 0"), ((0, None), "together")]
)
def test_hosts_that_cannot_be_are_refused(hosts, rule):
    with pytest.raises(ValueError, match=rule):
        mixture(SOURCES, {"web": 1}, host_index=hosts[0], host_count=hosts[1])
