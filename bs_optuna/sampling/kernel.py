"""The prior covariance: a Matern kernel of smoothness 5/2 and the products of basis functions.

S samples of the hyper-parameters, N and N' points, D scaled inputs, P basis functions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

# So many numbers are worked on at a time: most of a suggestion's time is spent here, and arrays
# that leave the cache, or are made anew, take two to three times as long.
_CACHED = 2**15


def covariance(log_variance: Array, left: tuple[Array, Array], right: tuple[Array, Array]) -> Array:
    """Prior covariance between two sets of points at each sample, (S, N, N').

    Args:
        log_variance: Of the part that no basis function explains, (S,).
        left: Scaled inputs (S, D, N) and basis functions (S, P, N) of some points.
        right: Those of others, (S, D, N') and (S, P, N').
    """
    rows, columns = _factors(left[0], right[0])
    samples, n, m = len(rows), rows.shape[1], columns.shape[2]
    transposed = left[1].transpose(0, 2, 1)
    kernel = np.empty((samples, n, m))
    step = max(_CACHED // max(n * m, 1), 1)
    room = np.empty((min(step, samples), n, m))
    for part in (slice(s, s + step) for s in range(0, samples, step)):
        k = np.matmul(rows[part], columns[part], out=kernel[part])
        np.maximum(k, 0.0, out=k)
        r = np.sqrt(k, out=room[: len(k)])
        # v * (1 + r + r**2 / 3) * exp(-r)
        k *= 1.0 / 3.0
        k += r
        k += 1.0
        k *= np.exp(np.subtract(log_variance[part, None, None], r, out=r), out=r)
        k += np.matmul(transposed[part], right[1][part], out=r)
    return kernel


def squared(vectors: Array) -> Array:
    """Squared lengths (S, N) of vectors (S, D, N)."""
    lengths: Array = np.einsum("sdn,sdn->sn", vectors, vectors)
    return lengths


def _factors(left: Array, right: Array) -> tuple[Array, Array]:
    """Arrays (S, N, D+2) and (S, D+2, N') whose product is five times the squared distance."""
    d = left.shape[1]
    rows = np.empty((len(left), d + 2, left.shape[2]))
    columns = np.empty((len(right), d + 2, right.shape[2]))
    np.multiply(left, -10.0, out=rows[:, :d])
    np.multiply(squared(left), 5.0, out=rows[:, d])
    rows[:, d + 1] = 1.0
    columns[:, :d] = right
    columns[:, d] = 1.0
    np.multiply(squared(right), 5.0, out=columns[:, d + 1])
    return rows.transpose(0, 2, 1), columns
