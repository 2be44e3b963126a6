"""How long the responses of a step are."""

import dataclasses
import math
from statistics import NormalDist

import numpy as np

#: The 95th percentile of the standard normal distribution.
Z95 = 1.6448536269514722


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the responses of a step."""

    mean: float
    p95: float

    def drawn(self, count: int, limit: int) -> np.ndarray:
        """So many at even quantiles of the log-normal distribution with this mean and 95th
        percentile, at least 1 and cut off at the limit; Int[count].

        p95 / mean = exp(σ z − σ²/2), of whose two solutions the smaller σ is taken; a ratio above
        the largest there is, exp(z²/2) = 3.87, counts as that.
        """
        ratio = math.log(max(self.p95 / self.mean, 1.0))
        sigma = Z95 - math.sqrt(max(Z95**2 - 2 * ratio, 0.0))
        centre = math.log(self.mean) - sigma**2 / 2
        normal = NormalDist()
        quantiles = np.asarray([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
        return np.clip(np.rint(np.exp(centre + sigma * quantiles)), 1, limit).astype(np.int64)
