"""Laws of which checkpoints stay."""

import math

from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.checkpoints.retention import Keep, Saved, best, kept

keeps = st.builds(Keep, st.integers(1, 4), st.integers(0, 4), st.integers(0, 4), st.just("m"))
values = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf]))


@st.composite
def checkpoints(draw):
    """After a warm-up of some steps, numbered through."""
    warm_up = draw(st.integers(0, 5))
    numbers = draw(st.sets(st.integers(0, 20), min_size=1))
    found = {}
    for number in numbers:
        value = draw(values)
        step = number - warm_up if number >= warm_up else None
        found[number] = Saved(step, {} if value is None else {"m": value})
    return found


@given(checkpoints(), keeps)
def test_each_rule_keeps_its_own_and_nothing_else_stays(found, keep):
    stay = kept(found, keep)
    newest = set(sorted(found)[-keep.last :])
    after = {number: saved.step for number, saved in found.items() if saved.step is not None}
    regular = {number for number, step in after.items() if keep.every and step % keep.every == 0}
    chosen = set(best(found, keep))
    assert stay == newest | regular | chosen and max(found) in stay
    known = {number: saved.metrics.get("m", math.nan) for number, saved in found.items()}
    measured = {number: value for number, value in known.items() if math.isfinite(value)}
    assert len(chosen) == min(keep.best, len(measured))
    assert all(measured[a] >= measured[b] for a in chosen for b in measured.keys() - chosen)


@given(checkpoints(), keeps)
def test_what_goes_once_is_not_missed_later(found, keep):
    """Deleting after every save leaves what one deletion at the end would."""
    left = {}
    for number in sorted(found):
        left[number] = found[number]
        left = {n: left[n] for n in kept(left, keep)}
    assert left.keys() == kept(found, keep)
