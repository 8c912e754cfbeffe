"""Regression on a path's velocity or drift with a weight of its own: flow matching."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flowvi.paths.base import Path, PathPoint
from flowvi.paths.diffusion import Diffusion

__all__ = ["matched"]


def matched(path: Path, scale: float = 1.0, *, noisy: bool = False) -> Path:
    r"""The same marginals for a loss that compares drifts with a constant weight.

    .. math:: \int_0^1 E\,\frac{|f(x_t, t) - \dot x_t|^2}{2\,scale^2}\,dt

    Flow matching: the least f is the velocity of the marginals, whose flow carries the law of the
    starts to that of the data. The weight is not the noise of any process, so the loss bounds
    nothing.

    What the path is conditioned on is up to the path: the data (a
    :class:`~flowvi.paths.GaussianPath` from a standard normal), the start (one that fades into
    noise), or both (:class:`~flowvi.paths.StochasticInterpolant`).

    Args:
        path: gives the states, their velocity, and with ``noisy`` the drift and its noise b.
        scale: the smaller, the more the loss weighs against other terms; positive.
        noisy: compare with the drift of the process of noise b in place of the velocity, so that
            f generates with that noise; needs a path with a density.

    Raises:
        TypeError: if ``path`` is no path.
        NotImplementedError: if ``noisy`` is asked of a path without noise.

    References:
        Lipman, Chen, Ben-Hamu, Nickel and Le (2023), Flow matching for generative modeling,
        arXiv:2210.02747, equation 9; Tong et al. (2024), Improving and generalizing flow-based
        generative models, arXiv:2302.00482, section 3; Albergo, Boffi and Vanden-Eijnden
        (2023), Stochastic interpolants, arXiv:2303.08797, section 2.

    Example:
        >>> import torch
        >>> from flowvi.paths import GaussianPath
        >>> path = matched(GaussianPath(1, lambda y, t: t * y, lambda y, t: 1 - 0.9 * t, 1.0))
        >>> path.point(torch.ones(1), torch.tensor([0.5]), torch.tensor([2.0])).drift
        tensor([1.1000])
    """
    if not isinstance(path, Path):
        raise TypeError(f"`path` must be a Path; got {type(path).__name__}.")
    if noisy and path.generating_diffusion is None:
        raise NotImplementedError(
            f"{type(path).__name__} has no noise that a drift could go with. Leave `noisy` out, "
            "or give it a gamma."
        )
    return _Matched(path, scale, noisy)


class _Matched(Path):
    """A path whose points carry another drift, and a weight in place of b."""

    def __init__(self, path: Path, scale: float, noisy: bool) -> None:
        super().__init__(path.dim, scale)
        self.path = path
        self.noisy = noisy
        self.takes_start = path.takes_start

    @property
    def noise_dim(self) -> int:
        return self.path.noise_dim

    @property
    def generating_diffusion(self) -> Diffusion | None:
        return self.path.generating_diffusion if self.noisy else None

    def transform(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.path.transform(eps, t, y)

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        point = self.path.point(eps, t, y)
        drift = point.drift if self.noisy else point.velocity
        weight = self.diffusion(point.state, t).expand_as(point.state)
        return replace(point, drift=drift, diffusion=weight, data=None, noise=None)

    def noise_of(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.path.noise_of(x, t, y)

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.path.log_prob(x, t, y)
