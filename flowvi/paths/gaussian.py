"""Gaussian marginals: any mean and scale over time, and those of a diffusion with a schedule."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor

from flowvi.paths._derivative import time_derivative
from flowvi.paths.base import Path, PathPoint
from flowvi.paths.diffusion import Diffusion, TimeDiffusion
from flowvi.paths.schedules import Schedule, ScheduleValues

__all__ = ["DiffusionPath", "GaussianPath", "ScheduleDiffusion"]

Function = Callable[[Tensor | None, Tensor], Tensor]


class _NormalMarginals(Path):
    """Base of paths whose marginals are independent normals; a new one writes ``moments``."""

    @abstractmethod
    def moments(self, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and scale of the marginal."""

    def transform(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        mean, scale = self.moments(t, y)
        return mean + scale * eps

    def noise_of(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        mean, scale = self.moments(t, y)
        return (x - mean) / scale

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        mean, scale = self.moments(t, y)
        return normal_log_prob(x, mean, scale)


class GaussianPath(_NormalMarginals):
    r"""Independent normal marginals with any mean and scale over time.

    .. math:: x_t = \alpha(y, t) + \beta(y, t)\,\epsilon, \qquad
        v = \alpha' + \beta'\epsilon, \qquad s = -\epsilon / \beta

    Both may be formulas or networks; their time derivatives come from forward mode.

    Args:
        dim: number of dimensions of the state.
        alpha: mean, called with ``(y, t)``; values ``(*batch, dim)``.
        beta: scale, positive, called with ``(y, t)``; values broadcast to ``(*batch, dim)``.
        diffusion: b; a positive number, a function of time, or a :class:`Diffusion`.

    Shape:
        y: what ``alpha`` and ``beta`` understand; t: ``(*batch, 1)``; state: ``(*batch, dim)``.

    References:
        Bartosh, Vetrov and Naesseth (2025), SDE matching, arXiv:2502.02472, sections 4.2 and 4.3.

    Example:
        >>> path = GaussianPath(2, lambda y, t: t * y, lambda y, t: 1.5 - t, diffusion=0.5)
        >>> path.sample(torch.full((4, 1), 0.5), torch.ones(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        dim: int,
        alpha: Function,
        beta: Function,
        diffusion: float | Tensor | Callable | Diffusion,
    ) -> None:
        super().__init__(dim, diffusion)
        self.alpha = alpha
        self.beta = beta

    def moments(self, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.alpha(y, t), self.beta(y, t)

    def moments_and_rates(
        self, t: Tensor, y: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Mean and scale, and the derivatives of both in time."""
        return time_derivative(lambda t: self.moments(t, y), t)

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        (mean, scale), (d_mean, d_scale) = self.moments_and_rates(t, y)
        state, velocity, score = mean + scale * eps, d_mean + d_scale * eps, -eps / scale
        return self._complete(state, t, velocity, score)

    def field_and_log_prob(
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        (mean, scale), (d_mean, d_scale) = self.moments_and_rates(t, y)
        eps = (x - mean) / scale
        return d_mean + d_scale * eps, -eps / scale, normal_log_prob(x, mean, scale)


class ScheduleDiffusion(TimeDiffusion):
    r"""Diffusion of the noising process that a schedule describes, or a multiple of it.

    .. math:: b^2 = \rho\,\sigma^2 L', \qquad L = 2 \log(\alpha / \sigma)

    With ratio 1 it is the best noise: run backwards, the posterior process is then the plain
    noising process, and the bound of a diffusion with the exact denoiser is tight. Any other
    ratio multiplies the diffusion term by :math:`(1 + \rho)^2 / (4 \rho)`.

    Args:
        schedule: signal and noise over time.
        ratio: :math:`\rho`; a positive number, or a function of time.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self, schedule: Schedule, ratio: float | Callable[[Tensor], Tensor] = 1.0
    ) -> None:
        if isinstance(ratio, Real) and not 0 < ratio < math.inf:
            raise ValueError(f"`ratio` must be positive and finite; got {ratio!r}.")
        Diffusion.__init__(self)
        self.schedule = schedule
        self.ratio = ratio

    def at(self, t: Tensor) -> Tensor:
        ratio = self.ratio(t) if callable(self.ratio) else self.ratio
        values = self.schedule(t)
        return values.sigma * torch.sqrt(ratio * values.d_log_snr)


class DiffusionPath(_NormalMarginals):
    r"""Marginals of a diffusion: encoded data, faded into noise by a schedule.

    .. math:: x_t = \alpha(t)\,F_\phi(y, t) + \sigma(t)\,\epsilon

    Without an encoder F is the data itself (VDM). With a learned one (DiffEnc) the target of a
    data prediction is :math:`F + 2 F' / (L' (1 + \rho))` with
    :math:`\rho = b^2 / (\sigma^2 L')`; that is :math:`F + dF/dL` for the best noise.

    Args:
        dim: number of dimensions of data and state.
        schedule: signal and noise over time.
        encoder: F, called with ``(y, t)``; the identity if left out.
        diffusion: b, a function of time alone; :class:`ScheduleDiffusion` of the schedule if left
            out.

    Shape:
        y: ``(*some_batch, dim)`` without an encoder; t: ``(*batch, 1)``; state: ``(*batch, dim)``.

    Raises:
        TypeError: if ``schedule`` is no :class:`Schedule`.
        ValueError: if the log signal-to-noise ratio of the schedule does not increase.
        NotImplementedError: if ``diffusion`` depends on the state.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        equations 1 and 15; Nielsen, Christensen, Dittadi and Winther (2024), DiffEnc,
        arXiv:2310.19789, equations 6 and 17 (times mirrored in both).

    Example:
        >>> from flowvi.paths import LinearLogSNR
        >>> path = DiffusionPath(2, LinearLogSNR())
        >>> point = path.point(torch.zeros(3, 2), torch.full((3, 1), 0.5), torch.ones(3, 2))
        >>> point.data
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """

    has_target = True

    def __init__(
        self,
        dim: int,
        schedule: Schedule,
        encoder: Function | None = None,
        diffusion: float | Tensor | Callable | Diffusion | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"`schedule` must be a Schedule; got {type(schedule).__name__}.")
        schedule.check()
        super().__init__(dim, ScheduleDiffusion(schedule) if diffusion is None else diffusion)
        if not isinstance(self.diffusion, TimeDiffusion):
            raise NotImplementedError(
                "A diffusion that depends on the state leaves no target for predictions. "
                "Use a GaussianPath with alpha and beta of the schedule."
            )
        self.schedule = schedule
        self.encoder = encoder

    def moments(self, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values = self.schedule(t)
        return values.alpha * self._encode(y, t), values.sigma

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        values = self.schedule(t)
        code, rate = self._encode_with_rate(y, t)
        state = values.alpha * code + values.sigma * eps
        velocity = values.d_alpha * code + values.d_sigma * eps
        if rate is not None:
            velocity = velocity + values.alpha * rate
        point = self._complete(state, t, velocity, -eps / values.sigma)
        data, noise = _target(values, point.diffusion, code, rate, eps)
        return replace(point, data=data.expand_as(state), noise=noise)

    def target_of_drift(self, x: Tensor, drift: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise at which the prior's formula gives this drift."""
        values = self.schedule(t)
        of_data, of_noise = self.drift_rates(t, values, self.diffusion.at(t))
        det = values.alpha * of_noise - values.sigma * of_data
        data = (x * of_noise - values.sigma * drift) / det
        return data, (values.alpha * drift - of_data * x) / det

    def drift_rates(self, t: Tensor, values: ScheduleValues, b: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of data and noise in the drift.

        Args:
            t: times.
            values: the schedule there.
            b: the diffusion there.
        """
        return values.d_alpha, values.d_sigma - b.square() / (2 * values.sigma)

    def _encode(self, y: Tensor, t: Tensor) -> Tensor:
        return y if self.encoder is None else self.encoder(y, t)

    def _encode_with_rate(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.encoder is None:
            return y, None
        return time_derivative(lambda t: self.encoder(y, t), t)


def _target(
    values: ScheduleValues, b: Tensor, code: Tensor, rate: Tensor | None, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Data and noise at which the prior's formula for the drift gives the posterior's.

    That formula is ``alpha' d + (sigma' - b^2 / (2 sigma)) n`` with ``alpha d + sigma n`` the
    state. The extra velocity ``alpha F'`` is made up by moving d at a fixed state.
    """
    if rate is None:
        return code, eps
    # Per unit of d: alpha L' / 2 + alpha b^2 / (2 sigma^2).
    growth = values.d_log_snr + (b / values.sigma).square()
    shift = 2 * rate / growth
    return code + shift, eps - values.alpha / values.sigma * shift


def normal_log_prob(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Log-density of independent normals, summed over the last dim."""
    z = (x - mean) / scale
    return (-z.square() / 2 - scale.log() - math.log(2 * math.pi) / 2).sum(-1)
