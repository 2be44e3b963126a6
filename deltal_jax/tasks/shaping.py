"""Changes to the rewards of graded responses: arrays in, arrays out."""

import numpy as np
from jaxtyping import Float, Int


def soft_overlong_punishment(
    lengths: Int[np.ndarray, " B"], limit: int, buffer: int, factor: float = 1.0
) -> Float[np.ndarray, " B"]:
    """What is added to the reward of a response that comes close to the limit.

        min(−(L − (M − b)) / b · factor, 0)

    L is the response's length in tokens (EOS included), M the limit and b the buffer, the last
    tokens before it: 0 up to M − b, then falling in a line to −factor at M.

    Source: Yu et al., arXiv 2503.14476, section 3.4.
    """
    beyond = np.asarray(lengths, np.float64) - (limit - buffer)
    return np.minimum(-beyond / buffer * factor, 0.0)
