"""Intervals that hold for small samples."""

import math


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share among `count` independent trials.

    Both ends are NaN where the share is not in [0, 1] or the count is not positive.
    """
    if not (0 <= share <= 1 and count > 0):
        return math.nan, math.nan
    z2 = 1.959963984540054**2 / count
    centre, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))
