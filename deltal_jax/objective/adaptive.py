r"""Estimators of the exponent: how the variance of a response's gradient grows with its length, and
which exponent of ΔL serves best.

The model is Var(g_i) = σ² A_i² L_i^β for the gradient of response i before its weight, A_i its
advantage. The halves a and b of a micro-batch k add the weighted gradients of half of its responses
each, so that g_a − g_b has about no mean and

    E y_k = σ² S_k(β),    y_k = ‖g_a − g_b‖²,    S_k(b) = Σ_{i in k} w_i² A_i² L_i^b

with the weights w_i that the loss really has: those of the mini-batch, of which only ratios matter.
The estimate is that of quasi-likelihood with a variance that grows as the square of the mean,

    β̂ = argmin_b [ mean_k log S_k(b) + log mean_k (y_k / S_k(b)) ],    σ̂² = mean_k y_k / S_k(β̂),

which is right whatever else the law of y_k is (Wedderburn, Biometrika 61, 1974): heavy tails make
it noisier, not wrong. Both means add over steps, on a grid of b, so a step leaves two numbers for
each point of it.

All is float64 in host memory. Responses with A_i = 0 take no part.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

#: The grid of b. Between its points the two means are smooth enough for a parabola.
BETAS = np.linspace(-1.0, 3.0, 33)
#: Of a fit at least: its standard error is then at most 1/2 where y_k is distributed exponentially.
LEAST_PAIRS, INFORMATION = 8, 4.0
#: Weight of the pull of `mse` towards α = 1.
PULL = 0.1


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The halves of some micro-batches, in as much as the fit needs them; they add."""

    count: int
    #: Σ_k log S_k(b) and Σ_k y_k / S_k(b) at each b of `BETAS`.
    log_scales: Float[np.ndarray, " G"]
    ratios: Float[np.ndarray, " G"]

    @classmethod
    def of(cls, spreads: Float[np.ndarray, " K"], scales: Float[np.ndarray, "K G"]) -> "Pairs":
        """From y_k and S_k(b). Micro-batches in which nothing moves (S_k = 0), or whose y_k is not
        finite, are left out."""
        known = np.isfinite(spreads) & (scales[:, 0] > 0)
        spreads, scales = spreads[known], scales[known]
        ratios = np.sum(spreads[:, None] / scales, axis=0)
        return cls(len(spreads), np.sum(np.log(scales), axis=0), ratios)


@dataclasses.dataclass(frozen=True)
class Growth:
    """A fit Var(g_i) = scale · A_i² · L_i^beta."""

    beta: float
    scale: float


def scales(
    weighted: Float[np.ndarray, " B"],
    lengths: Num[np.ndarray, " B"],
    betas: Float[np.ndarray, " G"],
) -> Float[np.ndarray, " G"]:
    """S(b) = Σ_i (w_i A_i)² L_i^b at each b; `weighted` is w_i A_i. Responses without a trained
    token count as nothing."""
    counted = np.asarray(lengths) > 0
    squares = np.asarray(weighted, np.float64)[counted] ** 2
    return squares @ np.asarray(lengths, np.float64)[counted][:, None] ** betas


def fit_growth(window: Sequence[Pairs]) -> Growth | None:
    """β̂ and σ̂² of the pairs of a window, β̂ within the grid; None where they tell too little.

    The second derivative of what is minimised, times the number of pairs, is the information: none
    where all lengths are equal, or all micro-batches hold the same mixture of them.
    """
    count = sum(pairs.count for pairs in window)
    if count < LEAST_PAIRS:
        return None
    ratios = np.sum([pairs.ratios for pairs in window], axis=0) / count
    if not np.all(ratios > 0):  # all y_k are 0
        return None
    log_ratios = np.log(ratios)
    values = np.sum([pairs.log_scales for pairs in window], axis=0) / count + log_ratios
    best = int(np.argmin(values))
    at = min(max(best, 1), len(BETAS) - 2)
    left, middle, right = values[at - 1 : at + 2]
    step = BETAS[1] - BETAS[0]
    curvature = (left - 2.0 * middle + right) / step**2
    if not curvature * count >= INFORMATION:
        return None
    beta = BETAS[at] - 0.5 * (right - left) / step / curvature
    beta = float(np.clip(beta, BETAS[0], BETAS[-1]))
    return Growth(beta, float(np.exp(np.interp(beta, BETAS, log_ratios))))


def agreement(
    alphas: Float[np.ndarray, " A"],
    lengths: Float[np.ndarray, " J"],
    inner: Float[np.ndarray, "J J"],
    toward: Float[np.ndarray, " J"],
) -> Float[np.ndarray, " A"]:
    r"""What `mse` maximises, at each exponent:

        J(α) = uᵀX / √(uᵀNu) − 0.1 (α − 1)²,    u_j = L̄_j^-α

    for classes j of responses of like length, mean length L̄_j and gradient sum G_j under weights
    of 1: N_jk = E⟨G_j, G_k⟩ is `inner`, X_j = E⟨G_j, R⟩ is `toward`, with R of norm 1 from earlier
    steps, so that R shares no noise with G. The first term is the mean length of the step's part
    along R by the root of its mean square. 0 for it where nothing moves.
    """
    shares = (lengths / np.max(lengths)) ** -alphas[:, None]
    squares = np.einsum("aj,jk,ak->a", shares, inner, shares)
    cosines = np.where(squares > 0, shares @ toward / np.sqrt(np.maximum(squares, 1e-300)), 0.0)
    return cosines - PULL * (alphas - 1.0) ** 2
