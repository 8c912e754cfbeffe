"""A learned schedule whose interior is trained by the variance of the loss."""

from __future__ import annotations

from torch import Tensor

from flowvi.paths.variance_preserving import LearnedMonotone

__all__ = ["VarianceTrained"]


class VarianceTrained(LearnedMonotone):
    r"""Learned increasing log signal-to-noise ratio whose interior lowers the loss's variance.

    A continuous-time bound with the best noise does not depend on the interior of the schedule,
    but the variance of its estimate does. Each item's gradient for the interior is therefore
    multiplied by the item's own loss,

    .. math:: \sum_i \frac{l_i}{\bar l} \frac{\partial l_i}{\partial \eta}
        = \frac{1}{2 \bar l} \frac{\partial}{\partial \eta} \sum_i l_i^2,

    on its way back, so one backward pass trains network and schedule. Ends and everything else
    get the plain gradient. A model calls :meth:`record` with the losses of a step.

    Args:
        num_units: as for :class:`LearnedMonotone`.
        log_snr_min: likewise.
        log_snr_max: likewise.
        learn_ends: likewise.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        appendix I (time mirrored).

    Example:
        >>> import torch
        >>> schedule = VarianceTrained(8, -5.0, 5.0)
        >>> schedule.record(torch.ones(3, 1))
        >>> schedule.log_snr(torch.tensor([0.0, 1.0])).tolist()
        [-5.0, 5.0]
    """

    _losses: Tensor | None = None

    def record(self, losses: Tensor) -> None:
        """Take the losses of a step, of the shape of its random times."""
        self._losses = losses.detach()

    def share_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        pair = super().share_and_rate(t)
        for part in pair:
            if part.requires_grad:
                part.register_hook(self._weigh)
        return pair

    def _weigh(self, grad: Tensor) -> Tensor:
        # Calls at the ends have other shapes; no gradient for the interior comes from there.
        if self._losses is None or self._losses.shape != grad.shape:
            return grad
        return grad * (self._losses / self._losses.mean())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_losses": None}
