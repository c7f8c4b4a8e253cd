"""The scaling law of a series of models: loss as a function of parameters and training tokens.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, approach 3).
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray
_EXPONENTS = np.arange(0.01, 1.5, 0.01)
MIN_LEVELS = 3
"""the fewest sizes, and the fewest token budgets, that determine an exponent besides E"""


class Law(NamedTuple):
    """A fitted law."""

    e: float
    """loss of an infinite model after infinitely many tokens, in nats per token"""
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, num_parameters: float, tokens: float) -> float:
        """Return the loss that the law expects."""
        return self.e + self.a / num_parameters**self.alpha + self.b / tokens**self.beta


class Fit(NamedTuple):
    """The law of a series, and those of its bootstrap samples."""

    law: Law
    samples: list[Law]
    residuals: list[float]
    """measured less fitted loss, in the order of the points"""

    def interval(self, num_parameters: float, tokens: float) -> tuple[float, float]:
        """Return the 95% interval of the expected loss."""
        low, high = np.quantile([law.loss(num_parameters, tokens) for law in self.samples], (0.025, 0.975))
        return float(low), float(high)

    def describe(self, num_parameters: float, tokens: float) -> list[str]:
        """Return the law in words, and what it says about a larger model."""
        ranges = np.quantile(np.array(self.samples), (0.025, 0.975), axis=0).T
        constants = (
            f"{name} = {value:.4g} [{low:.4g}, {high:.4g}]"
            for name, value, (low, high) in zip(("E", "A", "alpha", "B", "beta"), self.law, ranges, strict=True)
        )
        low, high = self.interval(num_parameters, tokens)
        spread = float(np.sqrt(np.mean(np.square(self.residuals))))
        expected = f"{self.law.loss(num_parameters, tokens):.2f} [{low:.2f}, {high:.2f}]"
        lines = [
            f"L(N, D) = E + A / N^alpha + B / D^beta, {len(self.residuals)} runs: {', '.join(constants)}. "
            f"Intervals: 95%, {len(self.samples):,} bootstrap samples of the residuals, whose root mean square is "
            f"{spread:.4f}.",
            f"{num_parameters / 1e6:,.0f}M parameters after {tokens / 1e9:,.0f}B tokens: {expected} nats per token of "
            "this text and this tokenizer. The interval knows the noise of these runs only, not whether the law holds "
            "so far beyond them.",
        ]
        if {self.law.alpha, self.law.beta} & {float(_EXPONENTS[0]), float(_EXPONENTS[-1])}:
            lines.append("An exponent is at the edge of what was tried: these runs do not determine it.")
        return lines


def fit_law(points: Sequence[tuple[float, float, float]], num_samples: int = 1000) -> Fit | None:
    """Fit the law by least squares of the relative error; None if the points cannot determine it.

    For given exponents the loss is linear in E, A and B. So all exponents on a grid are tried, and no optimum is
    missed. The bootstrap adds resampled residuals to the fitted losses, with seed 0.

    Args:
        points: (parameters, tokens, loss in nats per token) of each run.
        num_samples: bootstrap samples.
    """
    n, d, losses = np.array(points, dtype=np.float64).reshape(-1, 3).T
    if min(len(set(n)), len(set(d))) < MIN_LEVELS or len(points) < len(Law._fields) + 1:
        return None
    law = _fit(n, d, losses[:, None], weights=1 / losses)[0]
    if np.isnan(law.e):
        return None
    fitted = np.array([law.loss(*point) for point in zip(n, d, strict=True)])
    residuals = losses - fitted
    # Residuals of a fit are smaller than the noise: it has used up a degree of freedom per constant.
    noise = (residuals - residuals.mean()) * np.sqrt(len(losses) / (len(losses) - len(law)))
    drawn = np.random.default_rng(0).choice(noise, size=(len(losses), num_samples))
    samples = [sample for sample in _fit(n, d, fitted[:, None] + drawn, weights=1 / losses) if not np.isnan(sample.e)]
    return Fit(law, samples, residuals.tolist())


def _fit(n: Floats, d: Floats, losses: Floats, weights: Floats) -> list[Law]:
    """Return the law of each column of `losses`, [runs, columns]."""
    n_unit, d_unit = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # keeps the equations well-conditioned
    y = losses * weights[:, None]
    num_columns = losses.shape[1]
    best_error = np.full(num_columns, np.inf)
    best = np.full((num_columns, len(Law._fields)), np.nan)  # stays if loss rises with size or tokens
    d_powers = (d / d_unit) ** -_EXPONENTS[:, None]  # [betas, runs]
    for alpha in _EXPONENTS:
        n_powers = np.broadcast_to((n / n_unit) ** -alpha, d_powers.shape)
        x = np.stack([np.ones_like(d_powers), n_powers, d_powers], axis=-1) * weights[:, None]  # [betas, runs, 3]
        solutions = np.linalg.pinv(x) @ y  # [betas, 3, columns]
        errors = np.square(x @ solutions - y).sum(axis=1)  # [betas, columns]
        errors[(solutions <= 0).any(axis=1)] = np.inf
        chosen = errors.argmin(axis=0)
        error = errors[chosen, np.arange(num_columns)]
        e, a, b = solutions[chosen, :, np.arange(num_columns)].T
        beta = _EXPONENTS[chosen]
        rows = np.stack([e, a * n_unit**alpha, np.full(num_columns, alpha), b * d_unit**beta, beta], axis=1)
        best[error < best_error] = rows[error < best_error]
        best_error = np.minimum(error, best_error)
    return [Law(*map(float, row)) for row in best]
