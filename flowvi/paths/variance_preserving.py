"""Schedules whose signal and noise are tied: variance preserving, sub-VP, learned."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from flowvi.paths.schedules import Schedule, ScheduleValues

__all__ = [
    "LearnedMonotone",
    "LinearLogSNR",
    "SubVariancePreserving",
    "VariancePreserving",
    "VariancePreservingCosine",
]


class _LogSNRSchedule(Schedule):
    r"""Variance-preserving schedule given by its log signal-to-noise ratio L.

    .. math:: \alpha^2 = \operatorname{sigmoid}(L), \qquad \sigma^2 = \operatorname{sigmoid}(-L)
    """

    @abstractmethod
    def _log_snr_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """L and its derivative in time."""

    def forward(self, t: Tensor) -> ScheduleValues:
        log_snr, rate = self._log_snr_and_rate(t)
        alpha, sigma = _half_sigmoid(log_snr), _half_sigmoid(-log_snr)
        # d log(alpha) / dL = sigma^2 / 2, d log(sigma) / dL = -alpha^2 / 2.
        return ScheduleValues(
            alpha, sigma, alpha * sigma**2 * rate / 2, -sigma * alpha**2 * rate / 2
        )

    def log_snr(self, t: Tensor) -> Tensor:
        return self._log_snr_and_rate(t)[0]


def _half_sigmoid(x: Tensor) -> Tensor:
    """Square root of the sigmoid, without underflow."""
    return torch.exp(torch.nn.functional.logsigmoid(x) / 2)


class LinearLogSNR(_LogSNRSchedule):
    r"""Variance preserving, with a log signal-to-noise ratio that is linear in time.

    Args:
        log_snr_min: value at t = 0 (noise).
        log_snr_max: value at t = 1 (data), larger.

    Raises:
        ValueError: if the two are not ordered so.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        section 3.2 and table 3 (time mirrored).

    Example:
        >>> LinearLogSNR(-5.0, 5.0)(torch.tensor(0.5)).alpha ** 2
        tensor(0.5000)
    """

    def __init__(self, log_snr_min: float = -5.0, log_snr_max: float = 13.3) -> None:
        super().__init__()
        self.register_buffer("ends", _ordered_ends(log_snr_min, log_snr_max))

    def _log_snr_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.ends.unbind()
        return start + (end - start) * t, (end - start).expand_as(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        start, end = self.ends.unbind()
        return (log_snr - start) / (end - start)


class VariancePreservingCosine(_LogSNRSchedule):
    r"""Variance preserving, with signal and noise on a quarter circle at constant speed.

    .. math:: \alpha = \cos\theta,\quad \sigma = \sin\theta, \qquad \theta \text{ linear in } t

    The arc is cut at the given log signal-to-noise ratios, which keeps both ends regular.

    Args:
        log_snr_min: value at t = 0 (noise).
        log_snr_max: value at t = 1 (data), larger.

    Raises:
        ValueError: if the two are not ordered so.

    References:
        Nichol and Dhariwal (2021), Improved denoising diffusion probabilistic models,
        arXiv:2102.09672, equation 17; Hoogeboom, Heek and Salimans (2023), Simple diffusion,
        arXiv:2301.11093, section 3.1 for the cut ends (time mirrored).

    Example:
        >>> VariancePreservingCosine()(torch.tensor(0.5)).sigma ** 2
        tensor(0.5000)
    """

    def __init__(self, log_snr_min: float = -15.0, log_snr_max: float = 15.0) -> None:
        super().__init__()
        # L = -2 log tan(theta).
        angles = torch.atan(torch.exp(-_ordered_ends(log_snr_min, log_snr_max) / 2))
        self.register_buffer("angles", angles)

    def _log_snr_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.angles.unbind()
        angle = start + (end - start) * t
        return -2 * angle.tan().log(), 4 * (start - end) / torch.sin(2 * angle)

    def time_of(self, log_snr: Tensor) -> Tensor:
        start, end = self.angles.unbind()
        return (torch.atan(torch.exp(-log_snr / 2)) - start) / (end - start)


class _LinearRate(Schedule):
    r"""Signal that decays under a rate linear in the mirrored time s = 1 - t.

    .. math:: -2 \log\alpha = \beta_{\min} s + (\beta_{\max} - \beta_{\min}) s^2 / 2
    """

    def __init__(self, rate_min: float = 0.1, rate_max: float = 20.0) -> None:
        super().__init__()
        if not 0 < rate_min < rate_max:
            raise ValueError(
                f"`rate_max` must be above `rate_min`, which must be positive; got {rate_max} and "
                f"{rate_min}."
            )
        rates = torch.tensor([rate_min, rate_max], dtype=torch.get_default_dtype())
        self.register_buffer("rates", rates)

    def _decay(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``-2 log(alpha)``, and the rate, which is minus its derivative in t."""
        low, high = self.rates.unbind()
        s = 1 - t
        return low * s + (high - low) * s**2 / 2, low + (high - low) * s

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        low, high = self.rates.unbind()
        # The root of the quadratic in the form without cancellation.
        return 1 - 2 * decay / (low + torch.sqrt(low**2 + 2 * (high - low) * decay))


class VariancePreserving(_LinearRate):
    r"""Variance preserving, with a noise rate that is linear in time (DDPM, VP-SDE).

    .. math:: \sigma^2 = 1 - \alpha^2, \qquad
        \log\alpha = -\beta_{\min} s / 2 - (\beta_{\max} - \beta_{\min}) s^2 / 4, \quad s = 1 - t

    The log signal-to-noise ratio is infinite at t = 1 (data).

    Args:
        rate_min: noise rate at the data end, positive.
        rate_max: noise rate at the prior end, larger.

    Raises:
        ValueError: if the two are not ordered so.

    References:
        Ho, Jain and Abbeel (2020), Denoising diffusion probabilistic models, arXiv:2006.11239;
        Song et al. (2021), Score-based generative modeling through stochastic differential
        equations, arXiv:2011.13456, equation 33 (time mirrored).

    Example:
        >>> values = VariancePreserving()(torch.tensor(0.3))
        >>> values.alpha**2 + values.sigma**2
        tensor(1.)
    """

    def forward(self, t: Tensor) -> ScheduleValues:
        decay, rate = self._decay(t)
        alpha, sigma = torch.exp(-decay / 2), torch.sqrt(-torch.expm1(-decay))
        return ScheduleValues(alpha, sigma, alpha * rate / 2, -(alpha**2) * rate / (2 * sigma))

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._decay(t)[0]))

    def time_of(self, log_snr: Tensor) -> Tensor:
        return self._time_of_decay(softplus(-log_snr))


class SubVariancePreserving(_LinearRate):
    r"""Signal of :class:`VariancePreserving`, with the smaller noise :math:`1 - \alpha^2`.

    Args:
        rate_min: noise rate at the data end, positive.
        rate_max: noise rate at the prior end, larger.

    Raises:
        ValueError: if the two are not ordered so.

    References:
        Song et al. (2021), Score-based generative modeling through stochastic differential
        equations, arXiv:2011.13456, equation 29 (time mirrored).

    Example:
        >>> values = SubVariancePreserving()(torch.tensor(0.3))
        >>> values.alpha**2 + values.sigma
        tensor(1.)
    """

    def forward(self, t: Tensor) -> ScheduleValues:
        decay, rate = self._decay(t)
        alpha = torch.exp(-decay / 2)
        return ScheduleValues(alpha, -torch.expm1(-decay), alpha * rate / 2, -(alpha**2) * rate)

    def log_snr(self, t: Tensor) -> Tensor:
        decay, _ = self._decay(t)
        return -decay - 2 * torch.log(-torch.expm1(-decay))

    def time_of(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = 1 / alpha - alpha = 2 sinh(-log alpha).
        return self._time_of_decay(2 * torch.asinh(torch.exp(-log_snr / 2) / 2))


class LearnedMonotone(_LogSNRSchedule):
    r"""Variance preserving, with a learned increasing log signal-to-noise ratio.

    .. math:: L(t) = L_0 + (L_1 - L_0) \frac{h(t) - h(0)}{h(1) - h(0)}, \qquad
        h(t) = t + \sum_j w_j \operatorname{sigmoid}(r_j (t - m_j)), \quad w_j, r_j > 0

    It starts close to linear. A continuous-time bound of a diffusion with the best noise does
    not depend on the interior, so only its variance trains it there; other noises do.

    Args:
        num_units: number of sigmoids, at least 1.
        log_snr_min: value at t = 0 (noise).
        log_snr_max: value at t = 1 (data), larger.
        learn_ends: train the two values as well.

    Raises:
        ValueError: if sizes are below 1 or ends are not ordered.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        appendix H (time mirrored).

    Example:
        >>> schedule = LearnedMonotone(8, -5.0, 5.0)
        >>> schedule.log_snr(torch.tensor([0.0, 1.0])).tolist()
        [-5.0, 5.0]
    """

    def __init__(
        self,
        num_units: int = 32,
        log_snr_min: float = -5.0,
        log_snr_max: float = 13.3,
        *,
        learn_ends: bool = False,
    ) -> None:
        super().__init__()
        if num_units < 1:
            raise ValueError(f"`num_units` must be at least 1; got {num_units}.")
        ends = _ordered_ends(log_snr_min, log_snr_max)
        width = ends[1] - ends[0]
        raw_ends = torch.stack([ends[0], width + torch.log(-torch.expm1(-width))])
        if learn_ends:
            self.raw_ends = nn.Parameter(raw_ends)
        else:
            self.register_buffer("raw_ends", raw_ends)
        self.middle = nn.Parameter((torch.arange(num_units) + 0.5).to(raw_ends) / num_units)
        self.raw_rate = nn.Parameter(raw_ends.new_full((num_units,), float(num_units)))
        # Together the sigmoids begin at a tenth of the linear part.
        small = math.log(math.expm1(0.1 / num_units))
        self.raw_weight = nn.Parameter(raw_ends.new_full((num_units,), small))

    def _height_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        weight, rate = softplus(self.raw_weight), softplus(self.raw_rate)
        s = torch.sigmoid(rate * (t.unsqueeze(-1) - self.middle))
        return t + (weight * s).sum(-1), 1 + (weight * rate * s * (1 - s)).sum(-1)

    def share_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the log signal-to-noise ratio is between its ends, from 0 to 1, and its rate."""
        low = self._height_and_rate(t.new_zeros(()))[0]
        high = self._height_and_rate(t.new_ones(()))[0]
        height, rate = self._height_and_rate(t)
        return (height - low) / (high - low), rate / (high - low)

    def _log_snr_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        share, rate = self.share_and_rate(t)
        width = softplus(self.raw_ends[1])
        return self.raw_ends[0] + width * share, width * rate


def _ordered_ends(log_snr_min: float, log_snr_max: float) -> Tensor:
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise ValueError(
            f"`log_snr_max` must be above `log_snr_min`, both finite; got {log_snr_max} and "
            f"{log_snr_min}."
        )
    return torch.tensor([log_snr_min, log_snr_max], dtype=torch.get_default_dtype())
