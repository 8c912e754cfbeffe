"""Signal and noise over time, from t = 0 (noise) to t = 1 (data), with derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowvi.paths._derivative import time_derivative

__all__ = [
    "AlphaSigma",
    "Linear",
    "Schedule",
    "ScheduleValues",
    "VarianceExploding",
]

BISECTIONS = 60
CHECKED_TIMES = 64


@dataclass(frozen=True)
class ScheduleValues:
    """Values of a schedule and their derivatives in time, each of the shape of the times."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def log_snr(self) -> Tensor:
        """``2 log(alpha / sigma)``."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def d_log_snr(self) -> Tensor:
        """Its derivative in time; the two parts have one sign, so nothing cancels."""
        return 2 * (self.d_alpha / self.alpha - self.d_sigma / self.sigma)


class Schedule(nn.Module, ABC):
    r"""Signal :math:`\alpha` and noise :math:`\sigma` of :math:`x_t = \alpha y + \sigma\epsilon`.

    Time runs from t = 0 (noise) to t = 1 (data), so the log signal-to-noise ratio
    :math:`L = 2 \log(\alpha / \sigma)` increases. Literature with the other direction is mirrored.

    A subclass writes ``forward``; ``log_snr`` and ``time_of`` may be written where a closed form
    is at hand.

    Shape:
        t, log_snr and all results: any shape, elementwise.
    """

    @abstractmethod
    def forward(self, t: Tensor) -> ScheduleValues:
        """Values and derivatives at times in (0, 1)."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Log signal-to-noise ratio ``2 log(alpha / sigma)``."""
        return self(t).log_snr

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Time at which the log signal-to-noise ratio is ``log_snr``; carries gradients.

        By bisection; values outside the range give 0 or 1.
        """
        with torch.no_grad():
            low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
            for _ in range(BISECTIONS):
                t = (low + high) / 2
                early = self.log_snr(t) < log_snr
                low, high = torch.where(early, t, low), torch.where(early, high, t)
            t = (low + high) / 2
            slope = self(t).d_log_snr
        # Implicit function theorem; the value of the step is a rounding error.
        step = (log_snr - self.log_snr(t)) / slope
        return (t + step - step.detach()).clamp(0, 1)

    def check(self) -> None:
        """Refuse a schedule whose log signal-to-noise ratio does not increase.

        Raises:
            ValueError: if it decreases or is not finite somewhere inside (0, 1).
        """
        like = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0))
        if like.is_meta:
            return
        with torch.no_grad():
            t = torch.linspace(0, 1, CHECKED_TIMES + 2, dtype=like.dtype, device=like.device)
            log_snr = self.log_snr(t[1:-1])
        steps = log_snr.diff()
        if not bool((steps > 0).all()):
            worst = int(steps.nan_to_num(nan=-torch.inf).argmin())
            raise ValueError(
                "`schedule` must have an increasing log signal-to-noise ratio from t = 0 (noise) "
                f"to t = 1 (data); got {float(log_snr[worst]):.4g} and then "
                f"{float(log_snr[worst + 1]):.4g} near t = {float(t[worst + 1]):.3f}."
            )


class AlphaSigma(Schedule):
    """Schedule from any pair of functions of time, differentiated by forward mode.

    Args:
        alpha: signal, increasing relative to the noise; a callable or module.
        sigma: noise.

    Raises:
        ValueError: if the log signal-to-noise ratio does not increase.

    Example:
        >>> schedule = AlphaSigma(lambda t: t**2, lambda t: 1 - t**2)
        >>> schedule(torch.tensor(0.5)).d_alpha
        tensor(1.)
    """

    def __init__(
        self, alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.sigma = sigma
        self.check()

    def forward(self, t: Tensor) -> ScheduleValues:
        def pair(t: Tensor) -> tuple[Tensor, Tensor]:
            return self.alpha(t), self.sigma(t)

        values, rates = time_derivative(pair, t)
        return ScheduleValues(*values, *rates)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())


class Linear(Schedule):
    r"""Straight lines from noise to data (conditional optimal transport, rectified flow).

    .. math:: \alpha = t, \qquad \sigma = 1 - t

    The log signal-to-noise ratio is infinite at both ends.

    References:
        Liu, Gong and Liu (2023), Flow straight and fast, arXiv:2209.03003, equation 1; Lipman et
        al. (2023), Flow matching for generative modeling, arXiv:2210.02747, equation 20.

    Example:
        >>> Linear().time_of(torch.tensor(0.0))
        tensor(0.5000)
    """

    def forward(self, t: Tensor) -> ScheduleValues:
        return ScheduleValues(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.logit(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)


class VarianceExploding(Schedule):
    r"""Constant signal under noise that shrinks geometrically.

    .. math:: \alpha = 1, \qquad \sigma = \sigma_{\max}^{1-t}\,\sigma_{\min}^{t}

    Args:
        sigma_min: noise at the data end, positive.
        sigma_max: noise at the prior end, larger.

    Raises:
        ValueError: if the two are not ordered so.

    References:
        Song et al. (2021), Score-based generative modeling through stochastic differential
        equations, arXiv:2011.13456, equation 31 (time mirrored).

    Example:
        >>> VarianceExploding(0.01, 100.0)(torch.tensor(0.5)).sigma.round(decimals=3)
        tensor(1.)
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"`sigma_max` must be above `sigma_min`, which must be positive; got {sigma_max} "
                f"and {sigma_min}."
            )
        ends = torch.tensor([sigma_max, sigma_min], dtype=torch.get_default_dtype()).log()
        self.register_buffer("log_sigma", ends)

    def _log_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.log_sigma.unbind()
        return start + (end - start) * t, end - start

    def forward(self, t: Tensor) -> ScheduleValues:
        log_sigma, rate = self._log_sigma(t)
        sigma = log_sigma.exp()
        return ScheduleValues(torch.ones_like(t), sigma, torch.zeros_like(t), rate * sigma)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self._log_sigma(t)[0]

    def time_of(self, log_snr: Tensor) -> Tensor:
        start, end = self.log_sigma.unbind()
        return (-log_snr / 2 - start) / (end - start)
