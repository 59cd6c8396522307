"""Filling batches by shape, and making them ready in the background."""

import threading
from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroute_jax.engine.pipeline import ahead, full_groups

LIMITS = {"a": 3, "b": 1, "c": 4}


@given(st.lists(st.sampled_from("abc")))
def test_groups_are_of_one_key_full_and_complete(keys):
    items = list(enumerate(keys))
    keyed = list(full_groups(items, lambda item: item[1], LIMITS.get))
    groups = [group for _, group in keyed]
    assert sorted(item for group in groups for item in group) == items
    assert all(group == sorted(group) and {found for _, found in group} == {key} for key, group in keyed)
    short = Counter(group[0][1] for group in groups if len(group) < LIMITS[group[0][1]])
    assert all(times == 1 for times in short.values()) and all(len(group) <= LIMITS[group[0][1]] for group in groups)


def test_a_group_comes_as_soon_as_it_is_full():
    endless = (("a", number) for number in count())
    first = next(full_groups(endless, lambda item: item[0], LIMITS.get))
    assert first == ("a", [("a", 0), ("a", 1), ("a", 2)])


@pytest.mark.parametrize("depth", [1, 4])
def test_lookahead_is_bounded_ordered_and_passes_errors_on(depth):
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number
        raise ValueError("no more")

    ready = ahead(items(), depth)
    assert next(ready) == 0
    ready.close()
    assert len(made) <= 2 + depth
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    made.clear()
    found = []
    with pytest.raises(ValueError, match="no more"):
        for number in ahead(items(), depth):
            assert len(made) <= number + 2 + depth
            found.append(number)
    assert found == list(range(20))


def test_lookahead_works_while_the_item_before_is_in_use():
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    for number in ahead(items(), 1):
        assert number == 2 or second.wait(10)
