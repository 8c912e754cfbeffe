"""Paths between two given points: stochastic interpolants and Brownian bridges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowvi.paths._derivative import time_derivative
from flowvi.paths.base import Path, PathPoint
from flowvi.paths.diffusion import Diffusion, TimeDiffusion
from flowvi.paths.gaussian import normal_log_prob
from flowvi.paths.schedules import Linear, Schedule

__all__ = ["BridgeNoise", "BrownianBridge", "InterpolantNoise", "StochasticInterpolant"]


class InterpolantNoise(nn.Module, ABC):
    r"""Scale :math:`\gamma(t)` of the noise of an interpolant, with its derivative.

    Shape:
        t and both results: ``(*batch, 1)``.
    """

    @abstractmethod
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Gamma and its time derivative."""


class BridgeNoise(InterpolantNoise):
    r"""Scale of a Brownian bridge, :math:`\gamma = \sigma \sqrt{t (1 - t)}`.

    Args:
        sigma: a positive number or a parameter.
    """

    def __init__(self, sigma: float | Tensor = 1.0) -> None:
        super().__init__()
        self.sigma = TimeDiffusion(sigma)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma, root = self.sigma.at(t), torch.sqrt(t * (1 - t))
        return sigma * root, sigma * (1 - 2 * t) / (2 * root)


class _ByForwardMode(InterpolantNoise):
    """Scale given by any function of time."""

    def __init__(self, gamma: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return time_derivative(self.gamma, t)


class StochasticInterpolant(Path):
    r"""Path from a drawn start to the data, with noise in between.

    .. math:: x_t = \sigma(t)\,x_0 + \alpha(t)\,x_1 + \gamma(t)\,\epsilon

    The start :math:`x_0` belongs to what the path is conditioned on: ``y`` is start and end side
    by side, and the posterior draws the start from a law of its own. Without gamma the path is a
    curve: its drift is its velocity, and the bound is the limit of vanishing path noise up to
    a constant (rectified flow).

    Args:
        dim: number of dimensions of the state.
        gamma: scale of the noise, a function of time or an :class:`InterpolantNoise`; ``None``
            for no noise.
        diffusion: b; a positive number, a function of time, or a :class:`Diffusion`.
        schedule: gives the weights of start and end; straight lines if left out.

    Shape:
        y: ``(*some_batch, 2 * dim)``, start and then end; t: ``(*batch, 1)``.

    References:
        Albergo, Boffi and Vanden-Eijnden (2023), Stochastic interpolants, arXiv:2303.08797,
        definition 1 and section 2.4.

    Example:
        >>> path = StochasticInterpolant(1, lambda t: t * (1 - t), diffusion=0.5)
        >>> path.transform(torch.zeros(1), torch.tensor([0.25]), torch.tensor([0.0, 4.0]))
        tensor([1.])
    """

    takes_start = True

    def __init__(
        self,
        dim: int,
        gamma: Callable[[Tensor], Tensor] | InterpolantNoise | None,
        diffusion: float | Tensor | Callable | Diffusion,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(dim, diffusion)
        known = gamma is None or isinstance(gamma, InterpolantNoise)
        self.gamma = gamma if known else _ByForwardMode(gamma)
        self.schedule = Linear() if schedule is None else schedule

    @property
    def noise_dim(self) -> int:
        return 0 if self.gamma is None else self.dim

    @property
    def generating_diffusion(self) -> Diffusion | None:
        return None if self.gamma is None else self.diffusion

    def transform(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        start, end = self.ends(y)
        values = self.schedule(t)
        state = values.sigma * start + values.alpha * end
        return state if self.gamma is None else state + self.gamma(t)[0] * eps

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        start, end = self.ends(y)
        values = self.schedule(t)
        state = values.sigma * start + values.alpha * end
        velocity, score = values.d_sigma * start + values.d_alpha * end, None
        if self.gamma is not None:
            gamma, rate = self.gamma(t)
            state, velocity, score = state + gamma * eps, velocity + rate * eps, -eps / gamma
        return self._complete(state, t, velocity, score)

    def noise_of(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        mean, scale = self._moments(t, y)
        return (x - mean) / scale

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return normal_log_prob(x, *self._moments(t, y))

    def ends(self, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Start and end that ``y`` holds side by side."""
        if y is None or y.shape[-1] != 2 * self.dim:
            got = None if y is None else f"shape {tuple(y.shape)}"
            raise ValueError(
                f"`y` must end with size {2 * self.dim} (start and end side by side); got {got}."
            )
        return y[..., : self.dim], y[..., self.dim :]

    def _moments(self, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.gamma is None:
            raise NotImplementedError(
                "A StochasticInterpolant without gamma has no density. Give it a gamma."
            )
        zero = t.new_zeros(())
        return self.transform(zero, t, y), self.gamma(t)[0]


class BrownianBridge(StochasticInterpolant):
    r"""Brownian motion of noise :math:`\sigma` from a drawn start, tied to the data at t = 1.

    .. math:: x_t = (1 - t)\,x_0 + t\,x_1 + \sigma \sqrt{t (1 - t)}\,\epsilon, \qquad
        g = \frac{x_1 - x_t}{1 - t}, \qquad b = \sigma

    The end is the data itself, so the bound is taken against the untied Brownian motion, whose
    transition density :math:`N(x_1; x_0, \sigma^2 I)` is ``reference_log_prob``; a
    :class:`~flowvi.distributions.PathPrior` does so by itself.

    Args:
        dim: number of dimensions of the state.
        sigma: noise of the process; a positive number or a parameter.

    Shape:
        y: ``(*some_batch, 2 * dim)``, start and then end; t: ``(*batch, 1)``.

    References:
        Girsanov's theorem against Brownian motion; Shi, De Bortoli, Campbell and Doucet (2023),
        Diffusion Schroedinger bridge matching, arXiv:2303.16852, section 2, for the bridges.

    Example:
        >>> bridge = BrownianBridge(1, sigma=0.5)
        >>> bridge.sample(torch.full((4, 1), 0.5), torch.zeros(4, 2)).shape
        torch.Size([4, 1])
    """

    is_reference_bridge = True

    def __init__(self, dim: int, sigma: float | Tensor = 1.0) -> None:
        super().__init__(dim, BridgeNoise(sigma), sigma)
        self.gamma.sigma = self.diffusion

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        start, end = self.ends(y)
        gamma, rate = self.gamma(t)
        line = end - start
        # Velocity plus score term; written out, the two singular parts cancel at t = 0.
        b = self.diffusion.at(t)
        drift = line - b * torch.sqrt(t / (1 - t)) * eps
        state = (1 - t) * start + t * end + gamma * eps
        return PathPoint(state, line + rate * eps, -eps / gamma, drift, b.expand_as(state))

    def reference_log_prob(self, start: Tensor, end: Tensor) -> Tensor:
        """Log-density of the end under the untied process, ``(*batch,)``, in nats."""
        return normal_log_prob(end, start, self.diffusion.at(torch.ones_like(end[..., :1])))
