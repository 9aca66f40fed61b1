"""Which rows a step takes: every row once an epoch, whatever was killed and however many ranks there are."""

import collections
import itertools
import tracemalloc

import pytest

from nvembed_fast.training.mix import Draws, Mix, permuted, seed_of


def rows_of(mix, steps, counters=None):
    counters = mix.start() if counters is None else counters
    found = []
    for step in steps:
        rows, counters = mix.draw(step, counters)
        found.append(rows)
    return found, counters


@pytest.mark.parametrize("size", [*range(1, 20), 64, 1000, 4097])
def test_a_permutation_meets_every_number_once(size):
    assert sorted(permuted(i, size, b"k") for i in range(size)) == list(range(size))


def test_a_permutation_is_another_one_for_each_key():
    orders = {tuple(permuted(i, 6, b"%d" % key) for i in range(6)) for key in range(400)}
    assert len(orders) > 250  # of 720
    first = collections.Counter(permuted(0, 5, b"%d" % key) for key in range(2000))
    assert all(330 < first[i] < 470 for i in range(5)), first
    # neighbours do not stay neighbours
    order = [permuted(i, 10_000, b"k") for i in range(10_000)]
    assert sum(abs(a - b) < 10 for a, b in itertools.pairwise(order)) < 50


def test_an_epoch_has_every_row_once_across_resumes():
    mix = Mix({"a": 101, "b": 37}, {"a": 3, "b": 1}, batch=8, seed=5)
    whole, after = rows_of(mix, range(120))
    counters, resumed = mix.start(), []
    for step in range(120):  # a new process for each step
        mix = Mix({"a": 101, "b": 37}, {"a": 3, "b": 1}, batch=8, seed=5)
        (rows,), counters = rows_of(mix, [step], counters)
        resumed.append(rows)
    assert resumed == whole and counters == after
    taken = collections.defaultdict(list)
    for name, row in itertools.chain(*whole):
        taken[name].append(row)
    for name, size in mix.sizes.items():
        assert len(taken[name]) == after[name] > 3 * size
        passes = [taken[name][i : i + size] for i in range(0, after[name] - size + 1, size)]
        assert all(sorted(p) == list(range(size)) for p in passes)
        assert passes[0] != passes[1] != passes[2]
    assert 2.4 < after["a"] / after["b"] < 3.6


def test_a_step_is_a_function_of_its_seed_and_number():
    options = {"sizes": {"a": 50, "b": 50}, "weights": {"a": 1, "b": 1}, "batch": 10}
    mix = Mix(**options, seed=1)
    counters = {"a": 7, "b": 60}
    assert mix.draw(3, counters) == mix.draw(3, counters) == Mix(**options, seed=1).draw(3, counters)
    assert counters == {"a": 7, "b": 60}
    assert mix.draw(4, counters) != mix.draw(3, counters) != Mix(**options, seed=2).draw(3, counters)


def test_the_rows_of_a_seed_never_change():
    """A checkpoint goes on with the rows that a later version draws."""
    mix = Mix({"a": 100, "b": 1000}, {"a": 1, "b": 2}, batch=4, seed=0)
    assert rows_of(mix, range(2)) == FROZEN
    assert seed_of(1, "x") == FROZEN_SEED
    assert Draws(1).sample(10, 4) == FROZEN_SAMPLE


def test_batches_from_one_data_set():
    mix = Mix({"a": 20, "b": 20}, {"a": 1, "b": 3}, batch=5, seed=0, is_one_set=True)
    steps, after = rows_of(mix, range(200))
    names = [{name for name, _ in rows} for rows in steps]
    assert all(len(rows) == 5 for rows in steps) and all(len(n) == 1 for n in names)
    assert 25 < names.count({"a"}) < 75
    assert sum(after.values()) == 1000


def test_a_large_data_set_costs_neither_memory_nor_time():
    mix = Mix({"a": 10**8}, {"a": 1}, batch=256, seed=0)
    mix.draw(0, {"a": 0})
    tracemalloc.start()
    steps, _ = rows_of(mix, range(1, 4), {"a": 10**8 - 300})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000
    assert len(set(itertools.chain(*steps))) == 768 and max(row for _, row in steps[0]) > 9 * 10**7


def test_samples_have_no_number_twice():
    drawn = [tuple(Draws(seed).sample(7, 3)) for seed in range(2000)]
    assert all(len(set(d)) == 3 and set(d) <= set(range(7)) for d in drawn)
    assert len(set(drawn)) == 7 * 6 * 5
    assert sorted(Draws(1).sample(3, 9)) == [0, 1, 2] and Draws(1).sample(0, 3) == []
    assert all(0 <= x < 1 for x in Draws(3).uniform(1000))


def test_what_mix_refuses():
    with pytest.raises(ValueError, match=r"a\.jsonl has 7 rows, fewer than a batch of 8: lower the batch"):
        Mix({"a.jsonl": 7}, {"a.jsonl": 1}, batch=8, seed=0)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the weight of a must be a positive number"):
            Mix({"a": 9}, {"a": weight}, batch=8, seed=0)
    with pytest.raises(ValueError, match="there must be a data set"):
        Mix({}, {}, batch=8, seed=0)
    mix = Mix({"a": 9}, {"a": 1}, batch=8, seed=0)
    with pytest.raises(ValueError, match="those of b, and the data sets are a"):
        mix.draw(0, {"b": 0})


FROZEN = (
    [[("b", 378), ("b", 898), ("b", 564), ("b", 350)], [("a", 48), ("b", 467), ("b", 795), ("b", 369)]],
    {"a": 1, "b": 7},
)
FROZEN_SEED, FROZEN_SAMPLE = 9140341762003764691, [0, 7, 8, 2]
