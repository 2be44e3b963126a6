"""The soft punishment of long responses: numbers by hand, and laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.tasks.shaping import soft_overlong_punishment


def test_the_papers_limit_and_buffer_by_hand():
    """M = 3072, b = 2048: free up to M − b = 1024, then −(L − 1024)/2048."""
    lengths = np.asarray([1, 1023, 1024, 1025, 1536, 2048, 2560, 3071, 3072])
    # beyond:            −,    −,    0,    1,   512,  1024, 1536, 2047, 2048, each over 2048
    expected = [0, 0, 0, -1 / 2048, -0.25, -0.5, -0.75, -2047 / 2048, -1]
    np.testing.assert_array_equal(soft_overlong_punishment(lengths, 3072, 2048), expected)


def test_small_numbers_by_hand():
    """M = 10, b = 4, factor 0.5: from 6 on, an eighth a token."""
    found = soft_overlong_punishment(np.arange(5, 11), 10, 4, 0.5)
    np.testing.assert_array_equal(found, [0, 0, -0.125, -0.25, -0.375, -0.5])


def test_a_buffer_of_the_whole_limit_begins_at_the_first_token():
    np.testing.assert_array_equal(soft_overlong_punishment(np.asarray([1, 4]), 4, 4), [-0.25, -1])


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(1, 50),
    st.floats(1e-3, 10),
)
def test_it_is_never_positive_falls_with_the_length_and_ends_at_the_factor(lengths, buffer, factor):
    lengths = np.sort(np.asarray(lengths))
    found = soft_overlong_punishment(lengths, 50, buffer, factor)
    assert np.all(found <= 0) and np.all(np.diff(found) <= 0)
    np.testing.assert_array_equal(found == 0, lengths <= 50 - buffer)
    at_limit = soft_overlong_punishment(np.asarray([50]), 50, buffer, factor)
    assert at_limit[0] == pytest.approx(-factor)
