"""A Gaussian process on ridge coordinates whose hyper-parameters are averaged over, not fitted.

Symbols: n observations, N points, D other features, G other parameters, S samples of the
hyper-parameters, T their number. In whitened form w ~ N(0, I) they are theta = mean + sd * w:

    exponent, ln Bc, offset   the ridge, z = (ln lr - ridge(B) - offset) / ln 5
    ln length                 of z, of u = scaled ln B, and of each other parameter
    ln amplitude, ln noise    of the part that no basis function explains, and of the noise

    f = sum_p weight_p basis_p(z, u, x) + amplitude * Matern52(z, u, x), weight_p normal
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtrs

from bs_optuna.sampling.kernel import covariance
from bs_optuna.sampling.kernel import squared
from bs_optuna.science.ridge import Anchor
from bs_optuna.science.ridge import ridge


Array = NDArray[np.float64]

# A learning rate off by a factor of five is about as bad as a middling setting.
RIDGE_UNIT = math.log(5.0)
# Normal priors, mean and standard deviation, of the logarithms of: lengths of z, of u and of
# another parameter (in units of half its range: most functions bend once or twice over a
# range); amplitude of what no basis function explains (values have deviation 1); and noise.
_LENGTH_Z = (math.log(0.8), 0.6)
_LENGTH_U = (0.0, 0.6)
_LENGTH_OTHER = (0.0, 0.8)
_AMPLITUDE = (math.log(0.7), 0.5)
_NOISE = math.log(0.03)  # its deviation depends on what the model is for
# Deviation of the weights of the valley (mean 1: where lr is wrong, training is worse) and of its
# tilt (too large a learning rate may be worse than too small a one, or the reverse).
_VALLEY_SD = 1.0
_TILT_SD = 0.7
_JITTER = 1e-6
_CACHED = 2**17  # numbers


@dataclass(frozen=True)
class Points:
    """Where the function is asked for or was observed.

    Attributes:
        log_batch_size: ln B, (N,); without meaning in a space that has no ridge.
        log_learning_rate: ln lr, (N,), turned into what it is worth at the reference's momentum;
            likewise.
        other: Features of the other parameters, (N, D).
    """

    log_batch_size: Array
    log_learning_rate: Array
    other: Array

    def __len__(self) -> int:
        return len(self.other)

    def __getitem__(self, which: NDArray[np.int_]) -> Points:
        ridge = self.log_batch_size[which], self.log_learning_rate[which]
        return Points(*ridge, self.other[which])


@dataclass(frozen=True)
class Observations:
    """What was seen.

    Attributes:
        points: Where, n of them.
        values: Standardised, lower is better, (n,).
        doubts: Extra noise variance of each, (n,).
    """

    points: Points
    values: Array
    doubts: Array

    def __getitem__(self, which: NDArray[np.int_]) -> Observations:
        return Observations(self.points[which], self.values[which], self.doubts[which])


class Model:
    """Prior over functions and hyper-parameters, for one search space.

    Args:
        anchor: The scaling prior in the space; None in a space without a ridge.
        log_batch_sizes: Lowest and highest ln B; None likewise.
        owners: Parameter of each other feature, (D,).
        nominal: Whether each other feature belongs to a nominal parameter, (D,).
        log_noise_sd: How far the logarithm of the noise may be from what it usually is.
    """

    def __init__(
        self,
        anchor: Anchor | None,
        log_batch_sizes: tuple[float, float] | None,
        owners: NDArray[np.int_],
        nominal: NDArray[np.bool_],
        log_noise_sd: float = 1.0,
    ) -> None:
        self._anchor = anchor
        groups, self._groups = np.unique(owners, return_inverse=True)
        self._numeric = ~nominal
        count = len(groups)
        self._total = max(count + (2 if anchor else 0), 1)
        mean: list[float] = []
        sd: list[float] = []
        if anchor is not None and log_batch_sizes is not None:
            self._half = max(0.5 * (log_batch_sizes[1] - log_batch_sizes[0]), 0.5)
            mean += [anchor.exponent, anchor.log_critical, 0.0]
            sd += [anchor.exponent_sd, anchor.log_critical_sd, anchor.log_learning_rate_sd]
        # Lengths grow with the square root of the number of parameters, so that functions stay
        # as smooth along a diagonal (Hvarfner 2024, arXiv 2402.02229).
        growth = 0.5 * math.log(max(self._total, 2) / 2.0)
        if anchor is not None:
            mean += [_LENGTH_Z[0] + growth, _LENGTH_U[0] + growth]
            sd += [_LENGTH_Z[1], _LENGTH_U[1]]
        mean += [_LENGTH_OTHER[0] + growth] * count + [_AMPLITUDE[0], _NOISE]
        sd += [_LENGTH_OTHER[1]] * count + [_AMPLITUDE[1], log_noise_sd]
        self._mean, self._sd = np.array(mean), np.array(sd)

    @property
    def size(self) -> int:
        """T, the number of hyper-parameters."""
        return len(self._mean)

    def theta(self, w: Array) -> Array:
        """Hyper-parameters of whitened ones, same shape."""
        return self._mean + self._sd * w

    def distance(self, theta: Array, points: Points) -> Array:
        """z, how far ln lr lies above the ridge, in units of ln 5; (S, N). Needs an anchor."""
        assert self._anchor is not None
        origin = np.array([self._anchor.log_batch_size])
        a, critical, offset = theta[:, [0]], theta[:, [1]], theta[:, [2]]
        rho = ridge(points.log_batch_size, a, critical) - ridge(origin, a, critical)
        centre = self._anchor.log_learning_rate + offset + rho
        z: Array = (points.log_learning_rate - centre) / RIDGE_UNIT
        return z

    def inputs(self, theta: Array, points: Points) -> tuple[Array, Array, Array]:
        """Scaled inputs (S, D+2, N), basis (S, P, N) and mean (S, N) at each sample."""
        n, s, d = len(points), len(theta), points.other.shape[1]
        # All slopes together have about the variance of the values; curvatures are half as large.
        slope = 1.0 / math.sqrt(self._total)
        other = points.other.T
        squares = other[self._numeric] ** 2
        own = 0 if self._anchor is None else 2
        scaled = np.empty((s, own + d, n))
        basis = np.empty((s, 1 + d + len(squares) + 2 * own, n))
        mean, k = np.zeros((s, n)), 0
        if self._anchor is not None:
            z = self.distance(theta, points)
            u = (points.log_batch_size - self._anchor.log_batch_size) / self._half
            # A valley along the ridge: its weight has mean 1, so this is also the prior mean.
            mean, k = np.log1p(z * z), 3
            scaled[:, 0], scaled[:, 1] = z, u
            basis[:, -4], basis[:, -3] = slope * u, 0.5 * slope * u * u
            basis[:, -2], basis[:, -1] = _VALLEY_SD * mean, _TILT_SD * z
        scaled[:, own:] = other
        basis[:, 0] = 1.0
        basis[:, 1 : 1 + d] = slope * other
        basis[:, 1 + d : 1 + d + len(squares)] = 0.5 * slope * squares
        lengths = np.exp(theta[:, k:-2, None])
        scaled[:, :own] /= lengths[:, :own]
        scaled[:, own:] /= lengths[:, own + self._groups]
        return scaled, basis, mean

    def covariance(
        self, theta: Array, left: tuple[Array, Array, Array], right: tuple[Array, Array, Array]
    ) -> Array:
        """Prior covariance between two sets of inputs, (S, N, N')."""
        return covariance(2.0 * theta[:, -2], left[:2], right[:2])

    def log_posterior(self, w: Array, seen: Observations) -> Array:
        """Log posterior of w, (S,)."""
        # A few at a time: large arrays go back to the system, and are slow to come again.
        step = max(_CACHED // len(seen.values) ** 2, 1) if len(seen.values) else len(w)
        parts = [self.factor(w[s : s + step], seen)[2] for s in range(0, len(w), step)]
        return np.concatenate(parts)

    def factor(self, w: Array, seen: Observations) -> tuple[Array, Array, Array]:
        """Cholesky factor (S, n, n), whitened residual (S, n) and log posterior of w (S,)."""
        theta = self.theta(w)
        inputs = self.inputs(theta, seen.points)
        noise = np.exp(2.0 * theta[:, -1])[:, None] + seen.doubts + _JITTER
        covariance = self.covariance(theta, inputs, inputs)
        index = np.arange(len(seen.points))
        covariance[:, index, index] += noise
        factor = np.linalg.cholesky(covariance).astype(float)
        residual = seen.values - inputs[2]
        whitened = np.stack([_forward_solved(factor[s], residual[s]) for s in range(len(w))])
        log_det = np.log(factor[:, index, index]).sum(-1)
        log_posterior: Array = -0.5 * (whitened**2).sum(-1) - log_det - 0.5 * (w**2).sum(-1)
        return factor, whitened, log_posterior


def _forward_solved(lower: Array, right: Array) -> Array:
    """L^-1 b by LAPACK itself; at these sizes the checks around it take three times as long."""
    solved: Array
    solved, _ = dtrtrs(lower.T, right, lower=0, trans=1)  # its transpose is in Fortran's order
    return solved


class Posterior:
    """The function after observations, one Gaussian process for each sample of w.

    Args:
        model: The prior.
        w: Samples of the whitened hyper-parameters, (S, T).
        seen: The observations.
    """

    def __init__(self, model: Model, w: Array, seen: Observations) -> None:
        self.model, self.w, self.seen = model, w, seen
        self.theta = model.theta(w)
        self._inputs = model.inputs(self.theta, seen.points)
        self._factor, self._whitened, _ = model.factor(w, seen)

    def predict(self, points: Points) -> tuple[Array, Array]:
        """Mean and standard deviation of the function, (S, N) each."""
        inputs = self.model.inputs(self.theta, points)
        cross = self.model.covariance(self.theta, self._inputs, inputs)
        mean = np.empty((len(self.w), len(points)))
        variance = np.exp(2.0 * self.theta[:, [-2]]) + squared(inputs[1])
        for s in range(len(self.w)):
            v = _forward_solved(self._factor[s], cross[s])
            mean[s] = inputs[2][s] + v.T @ self._whitened[s]
            variance[s] -= np.einsum("nm,nm->m", v, v)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def draws(self, points: Points, rng: np.random.Generator, count: int) -> Array:
        """Functions drawn from the posterior at points, (S * count, N)."""
        inputs = self.model.inputs(self.theta, points)
        cross = self.model.covariance(self.theta, self._inputs, inputs)
        own = self.model.covariance(self.theta, inputs, inputs)
        drawn = []
        for s in range(len(self.w)):
            v = _forward_solved(self._factor[s], cross[s])
            mean = inputs[2][s] + v.T @ self._whitened[s]
            values, vectors = np.linalg.eigh(own[s] - v.T @ v)
            root = vectors * np.sqrt(np.maximum(values, 0.0))
            drawn.append(mean + rng.standard_normal((count, len(points))) @ root.T)
        return np.concatenate(drawn)
