"""A diffusion of finitely many layers as a path: the hierarchical VAE behind a diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor

from flowvi.paths.base import PathPoint
from flowvi.paths.diffusion import Diffusion, TimeDiffusion
from flowvi.paths.gaussian import DiffusionPath, Function
from flowvi.paths.schedules import Schedule, ScheduleValues
from flowvi.paths.times import TimeLaw

__all__ = ["ChainPath", "LayerTimes"]


class LayerTimes(TimeLaw):
    r"""Times of the layers of a chain, :math:`0, 1/T, \dots, (T - 1)/T`, all equally likely.

    A sum over layers is T times its mean. Drawn T times for an item (``num_times=T``), evenly
    spread, every layer comes exactly once.

    Args:
        num_layers: T, at least 1.
        stratified: draw on a shifted grid; otherwise independently.

    Raises:
        ValueError: if ``num_layers`` is not a positive integer.

    Example:
        >>> times, weights = LayerTimes(4).draw((4, 1), torch.empty(0))
        >>> times.sort(0).values.flatten().tolist()
        [0.0, 0.25, 0.5, 0.75]
    """

    def __init__(self, num_layers: int, *, stratified: bool = True) -> None:
        super().__init__(0.0, 1.0, stratified=stratified)
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"`num_layers` must be an integer of at least 1; got {num_layers!r}.")
        self.num_layers = num_layers

    def place(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        layer = torch.floor(uniform * self.num_layers).clamp(max=self.num_layers - 1)
        return layer / self.num_layers, torch.ones_like(uniform)


class ChainPath(DiffusionPath):
    r"""Diffusion with T layers: a hierarchical VAE whose layers have Gaussian transitions.

    .. math:: q(x_s \mid x_t, y) = N\Big(\alpha_s F_s
        + \kappa \tfrac{\sigma_s}{\sigma_t} (x_t - \alpha_t F_t),\; (1 - \kappa^2) \sigma_s^2\Big),
        \qquad \kappa^2 = \mathrm{SNR}_t / \mathrm{SNR}_s, \quad s = t + 1/T

    The prior's transition has the prediction in place of the encoded data, and the same variance.
    Written as a step :math:`x_t + g / T` with noise :math:`b / \sqrt T`, the integrand
    :math:`|f - g|^2 / (2 b^2)` is T times the divergence of the two transitions, so the laws of
    continuous time serve as they are, with :class:`LayerTimes`. The divergence is
    :math:`\tfrac12 (\mathrm{SNR}_s - \mathrm{SNR}_t) |\hat d - d|^2`, with the target
    :math:`d = F_t + (F_s - F_t) / (1 - \kappa^2)`, which is :math:`F + dF/dL` in the limit.

    Args:
        dim: number of dimensions of data and state.
        schedule: signal and noise over time, finite at both ends.
        num_layers: T, at least 1.
        encoder: F, called with ``(y, t)``; the identity if left out.

    Raises:
        TypeError: if ``schedule`` is no :class:`Schedule`.
        ValueError: if the log signal-to-noise ratio of the schedule does not increase or
            ``num_layers`` is not a positive integer.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        section 4.1 and appendix A; Nielsen, Christensen, Dittadi and Winther (2024),
        DiffEnc, arXiv:2310.19789, section 3, for the encoded layers (times mirrored in both).

    Example:
        >>> from flowvi.paths import LinearLogSNR
        >>> path = ChainPath(2, LinearLogSNR(), num_layers=10)
        >>> path.point(torch.zeros(3, 2), torch.full((3, 1), 0.5), torch.ones(3, 2)).data
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """

    def __init__(
        self, dim: int, schedule: Schedule, num_layers: int, encoder: Function | None = None
    ) -> None:
        times = LayerTimes(num_layers)
        super().__init__(dim, schedule, encoder, _LayerDiffusion(schedule, num_layers))
        self.times = times

    @property
    def num_layers(self) -> int:
        """Number of layers T."""
        return self.times.num_layers

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        """As for any path; the velocity takes the encoder's change over a layer for its rate."""
        values = self.schedule(t)
        code = data = self._encode(y, t)
        state = values.alpha * code + values.sigma * eps
        velocity, noise = values.d_alpha * code + values.d_sigma * eps, eps
        if self.encoder is not None:
            s = after(t, self.num_layers)
            change = self._encode(y, s) - code
            velocity = velocity + values.alpha * change * self.num_layers
            shift = change / -torch.expm1(values.log_snr - self.schedule.log_snr(s))
            data, noise = code + shift, eps - values.alpha / values.sigma * shift
        b = self.diffusion.at(t)
        of_data, of_noise = self.drift_rates(t, values, b)
        return PathPoint(
            state,
            velocity,
            -eps / values.sigma,
            of_data * data + of_noise * noise,
            b.expand_as(state),
            data.expand_as(state),
            noise.expand_as(state),
        )

    def drift_rates(self, t: Tensor, values: ScheduleValues, b: Tensor) -> tuple[Tensor, Tensor]:
        then = self.schedule(after(t, self.num_layers))
        kept = torch.exp((values.log_snr - then.log_snr) / 2)
        of_data = (then.alpha - values.alpha) * self.num_layers
        return of_data, (kept * then.sigma - values.sigma) * self.num_layers


class _LayerDiffusion(TimeDiffusion):
    """Standard deviation of a transition per square root of the step."""

    def __init__(self, schedule: Schedule, num_layers: int) -> None:
        Diffusion.__init__(self)
        self.schedule = schedule
        self.num_layers = num_layers

    def at(self, t: Tensor) -> Tensor:
        then = self.schedule(after(t, self.num_layers))
        fresh = -torch.expm1(self.schedule.log_snr(t) - then.log_snr)
        return then.sigma * torch.sqrt(fresh * self.num_layers)


def after(t: Tensor, num_layers: int) -> Tensor:
    """Time of the next layer, at most 1; without rounding error at the layers' own times."""
    return ((torch.round(t * num_layers) + 1) / num_layers).clamp(max=1.0)
