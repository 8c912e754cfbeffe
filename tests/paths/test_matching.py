"""Matched paths: the path's own states, another drift, a weight of its own."""

from __future__ import annotations

import pytest
import torch

from flowvi.paths import BrownianBridge, GaussianPath, StochasticInterpolant, matched


def lipman(smallest: float = 0.1) -> GaussianPath:
    """Conditional path of flow matching, a standard normal that shrinks onto the item."""
    return GaussianPath(2, lambda y, t: t * y, lambda y, t: 1 - (1 - smallest) * t, 0.8)


def test_drift_is_the_published_velocity_given_the_item():
    y, t = torch.randn(5, 2), torch.rand(5, 1)
    path = matched(lipman(), 0.3)
    point = path.point(path.draw_noise((5,)), t, y)
    # Lipman et al. (2023), equation 21.
    want = (y - 0.9 * point.state) / (1 - 0.9 * t)
    torch.testing.assert_close(point.drift, want)
    torch.testing.assert_close(point.diffusion, torch.full((5, 2), 0.3))
    assert path.generating_diffusion is None


def test_noisy_drift_is_that_of_the_path():
    inner = StochasticInterpolant(2, lambda t: t * (1 - t), lambda t: (t * (1 - t)).sqrt())
    y, t, eps = torch.randn(5, 4), torch.rand(5, 1), torch.randn(5, 2)
    path = matched(inner, noisy=True)
    # b^2 / (2 gamma) is 1/2 here, so the noise enters with gamma' - 1/2.
    want = y[:, 2:] - y[:, :2] + (1 - 2 * t - 0.5) * eps
    torch.testing.assert_close(path.point(eps, t, y).drift, want)
    assert path.generating_diffusion is inner.diffusion
    assert path.takes_start


def test_states_and_densities_are_those_of_the_path():
    inner = lipman()
    path = matched(inner)
    y, t, eps = torch.randn(5, 2), torch.rand(5, 1), torch.randn(5, 2)
    x = inner.transform(eps, t, y)
    assert torch.equal(path.transform(eps, t, y), x)
    torch.testing.assert_close(path.noise_of(x, t, y), eps)
    assert torch.equal(path.log_prob(x, t, y), inner.log_prob(x, t, y))
    assert not path.takes_start


def test_noise_of_trained_processes():
    bridge = BrownianBridge(2, 0.7)
    assert bridge.generating_diffusion is bridge.diffusion
    assert StochasticInterpolant(2, None, 0.5).generating_diffusion is None


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(TypeError, match="`path` must be a Path; got int"):
        matched(3)
    with pytest.raises(NotImplementedError, match="has no noise that a drift could go with"):
        matched(StochasticInterpolant(2, None, 0.5), noisy=True)
    with pytest.raises(ValueError, match="`diffusion` must be positive and finite; got -1"):
        matched(lipman(), -1)
