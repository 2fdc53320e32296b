"""The Gaussian process against scikit-learn's, and its sampler of hyper-parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.gaussian_process.kernels import Kernel
from sklearn.gaussian_process.kernels import Matern

from bs_optuna.sampling.ensemble import explore
from bs_optuna.sampling.kernel import covariance
from bs_optuna.sampling.surrogate import Model
from bs_optuna.sampling.surrogate import Observations
from bs_optuna.sampling.surrogate import Points
from bs_optuna.sampling.surrogate import Posterior
from bs_optuna.science.prior import ScalingPrior


def ridge_model() -> Model:
    anchor = ScalingPrior.for_optimizer("adamw").anchored_in((16, 4096), (1e-5, 1e-1))
    return Model(anchor, (math.log(16), math.log(4096)), np.array([2]), np.array([False]))


def points(rng: np.random.Generator, count: int) -> Points:
    return Points(
        rng.uniform(math.log(16), math.log(4096), count),
        rng.uniform(math.log(1e-5), math.log(1e-1), count),
        rng.uniform(-1, 1, (count, 1)),
    )


def observed(rng: np.random.Generator, count: int) -> Observations:
    where = points(rng, count)
    off = where.log_learning_rate - math.log(1e-3) - 0.5 * (where.log_batch_size - 5.5)
    values = 0.2 * off**2 - 1.0 + 0.3 * where.other[:, 0]
    return Observations(where, values, rng.uniform(0.0, 0.1, count))


def test_covariance_is_scikit_learns() -> None:
    """Of so many points that not all samples are worked on at a time."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(5, 3, 120)), rng.normal(size=(5, 3, 150))
    left_basis, right_basis = rng.normal(size=(5, 2, 120)), rng.normal(size=(5, 2, 150))
    log_variance = rng.normal(size=5)
    ours = covariance(log_variance, (left, left_basis), (right, right_basis))
    for k in range(5):
        expected = np.exp(log_variance[k]) * Matern(nu=2.5)(left[k].T, right[k].T)
        expected += left_basis[k].T @ right_basis[k]
        np.testing.assert_allclose(ours[k], expected, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_posterior_is_scikit_learns(seed: int) -> None:
    """At fixed hyper-parameters: the same features go through an independent implementation."""
    rng = np.random.default_rng(seed)
    model, seen, asked = ridge_model(), observed(rng, 12), points(rng, 20)
    w = rng.standard_normal((1, model.size))
    mean, sd = Posterior(model, w, seen).predict(asked)

    theta = model.theta(w)
    scaled, basis, prior_mean = (a[0].T for a in model.inputs(theta, seen.points))
    scaled_asked, basis_asked, mean_asked = (a[0].T for a in model.inputs(theta, asked))
    d = scaled.shape[1]
    kernel = _on(slice(0, d), ConstantKernel(np.exp(2 * theta[0, -2])) * Matern(nu=2.5)) + _on(
        slice(d, None), DotProduct(sigma_0=0.0)
    )
    noise = np.exp(2 * theta[0, -1]) + seen.doubts + 1e-6
    theirs = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)
    theirs.fit(np.hstack([scaled, basis]), seen.values - prior_mean)
    expected, expected_sd = theirs.predict(np.hstack([scaled_asked, basis_asked]), return_std=True)
    np.testing.assert_allclose(mean[0], expected + mean_asked, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sd[0], expected_sd, rtol=1e-4, atol=1e-5)
    evidence = theirs.log_marginal_likelihood_value_
    ours = model.factor(w, seen)[2][0] + 0.5 * (w**2).sum() - 6 * math.log(2 * math.pi)
    assert ours == pytest.approx(evidence, rel=1e-6)


def test_draws_have_the_predicted_moments() -> None:
    rng = np.random.default_rng(0)
    model, seen, asked = ridge_model(), observed(rng, 8), points(rng, 4)
    posterior = Posterior(model, rng.standard_normal((1, model.size)), seen)
    mean, sd = posterior.predict(asked)
    draws = posterior.draws(asked, rng, 20_000)
    np.testing.assert_allclose(draws.mean(0), mean[0], atol=0.05)
    np.testing.assert_allclose(draws.std(0), sd[0], rtol=0.05)


def test_walkers_keep_to_the_prior_without_observations() -> None:
    rng = np.random.default_rng(0)
    model = ridge_model()
    nothing = Observations(points(rng, 0), np.zeros(0), np.zeros(0))
    w = rng.standard_normal((200, model.size)) * 0.2 + 1.0
    w = explore(model, nothing, w, rng, 200)
    assert np.abs(w.mean(0)).max() < 0.35
    assert np.abs(w.std(0) - 1.0).max() < 0.25


def test_log_posterior_is_the_same_for_many_at_once() -> None:
    rng = np.random.default_rng(0)
    model, seen = ridge_model(), observed(rng, 150)
    w = rng.standard_normal((8, model.size))
    alone = [model.factor(one[None], seen)[2][0] for one in w]
    np.testing.assert_allclose(model.log_posterior(w, seen), alone, rtol=1e-9)


def test_walkers_find_the_slope_of_a_ridge() -> None:
    rng = np.random.default_rng(0)
    model = ridge_model()
    where = points(rng, 60)
    off = where.log_learning_rate - math.log(1e-3) - np.array(0.9) * (where.log_batch_size - 5.5)
    seen = Observations(where, np.log1p(off**2), np.zeros(60))
    w = explore(model, seen, rng.standard_normal((48, model.size)), rng, 60)
    assert np.median(model.theta(w)[:, 0]) == pytest.approx(0.9, abs=0.15)


@pytest.mark.parametrize("seed", range(3))
def test_walkers_that_are_stuck_come_back(seed: int) -> None:
    """Some start where all is noise around a flat function, and stretch moves lead nowhere."""
    rng = np.random.default_rng(seed)
    model, where = ridge_model(), points(np.random.default_rng(0), 20)
    off = where.log_learning_rate - math.log(1e-3) - 0.5 * (where.log_batch_size - 5.5)
    values = np.log1p(off**2)
    seen = Observations(where, (values - values.mean()) / values.std(), np.zeros(20))
    w = rng.standard_normal((48, model.size))
    w[:3] = 3.3 * np.array([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0])
    after = model.factor(explore(model, seen, w, rng, 40), seen)[2]
    assert after.min() > np.median(after) - 30.0


class _on(Kernel):
    """A scikit-learn kernel on some of the columns."""

    def __init__(self, columns: slice, kernel: Kernel) -> None:
        self.columns, self.kernel = columns, kernel

    def __call__(self, x, y=None, eval_gradient=False):  # type: ignore[no-untyped-def]
        del eval_gradient
        return self.kernel(x[:, self.columns], None if y is None else y[:, self.columns])

    def diag(self, x):  # type: ignore[no-untyped-def]
        return self.kernel.diag(x[:, self.columns])

    def is_stationary(self) -> bool:
        return False
