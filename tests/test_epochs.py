"""Orders of a data set: whole epochs, by seed, the same wherever one begins."""

import subprocess
import sys

import hypothesis.strategies as st
from hypothesis import given, settings

from deltal_jax.data.epochs import epochs, order_fingerprint


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 200), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_has_everything_once(count, seed, epoch):
    order = epochs(count, seed, lambda i: i)
    found = [order[epoch * count + i] for i in range(count)]
    assert sorted(found) == list(range(count))


def test_orders_differ_by_seed_and_epoch_and_are_the_same_from_any_position():
    order, again, other = (epochs(1000, seed, lambda i: i) for seed in (1, 1, 2))
    first, second = ([order[e * 1000 + i] for i in range(1000)] for e in (0, 1))
    assert first != second != list(range(1000)) != first
    assert first != [other[i] for i in range(1000)]
    assert [again[i] for i in (1999, 0, 1000)] == [second[-1], first[0], second[0]]
    # Where something comes in one epoch says nothing of the next: a fixed point in a thousand each.
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_what_is_read_is_what_was_asked_for_and_none_stays_in_its_place():
    read = []

    def even(number):
        read.append(number)
        return None if number % 2 else str(number)

    order = epochs(10, 3, even)
    assert read == []
    found = [order[position] for position in range(20)]
    assert found == [None if number % 2 else str(number) for number in read]
    assert len(read) == 20


def test_a_fingerprint_of_an_order_takes_no_time_however_long_the_order_is():
    assert len(set(order_fingerprint(10**9).split())) == 8
    assert order_fingerprint(10**9) == order_fingerprint(10**9) != order_fingerprint(10**6)


def test_grain_is_imported_by_those_who_read_files_alone():
    modules = "sys, deltal_jax.tasks.catalog, deltal_jax.data.epochs"
    code = f"import {modules}; print('grain' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "False\n"
