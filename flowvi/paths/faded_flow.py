"""Data that a schedule fades into the noise of a flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from flowvi.paths.diffusion import Diffusion
from flowvi.paths.flow_path import FlowPath
from flowvi.paths.gaussian import ScheduleDiffusion
from flowvi.paths.schedules import Schedule

if TYPE_CHECKING:
    from flowvi.transforms import FlowTransform

__all__ = ["FadedFlowPath"]


class FadedFlowPath(FlowPath):
    r"""Marginals of a flow that narrow to the data.

    .. math:: x_t = \alpha(t)\,y + \sigma(t)\,T(\epsilon \mid c(y, t))

    With T the identity it is the plain diffusion; a learned T bends the noise, given data and
    time, and need not be Gaussian. At the data end the noise is small, so a decoder that divides
    by :math:`\alpha` serves.

    Args:
        transform: T, with ``context_dim`` at least 1 and a cheap inverse.
        schedule: signal and noise over time.
        diffusion: b; the schedule's own if left out.
        context: makes the context vector of ``(y, t)``, as for :class:`FlowPath`.

    Shape:
        y: ``(*some_batch, input_dim)``; t: ``(*batch, 1)``; state: ``(*batch, input_dim)``.

    Raises:
        TypeError: if ``schedule`` is no :class:`Schedule`.
        ValueError: if the log signal-to-noise ratio of the schedule does not increase, or the
            transform takes no context.
        NotImplementedError: if the transform has no inverse or a slow one.

    References:
        Bartosh, Vetrov and Naesseth (2024), Neural flow diffusion models, arXiv:2404.12940,
        section 3 (time mirrored).

    Example:
        >>> import torch
        >>> from flowvi.flows import realnvp
        >>> from flowvi.paths import LinearLogSNR
        >>> path = FadedFlowPath(realnvp(2, context_dim=3).transform, LinearLogSNR())
        >>> path.sample(torch.full((5, 1), 0.5), torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        transform: FlowTransform,
        schedule: Schedule,
        diffusion: float | Tensor | Callable | Diffusion | None = None,
        context: Callable[[Tensor | None, Tensor], Tensor] | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"`schedule` must be a Schedule; got {type(schedule).__name__}.")
        schedule.check()
        diffusion = ScheduleDiffusion(schedule) if diffusion is None else diffusion
        super().__init__(transform, diffusion, context)
        if self._forward_only:
            raise NotImplementedError(
                f"{type(transform).__name__} inverts slowly, and its score would rest on that. "
                "Use a coupling, or its inverse."
            )
        self.schedule = schedule

    def transform(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        values = self.schedule(t)
        return values.alpha * y + values.sigma * super().transform(eps, t, y)

    def noise_of(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        values = self.schedule(t)
        return super().noise_of((x - values.alpha * y) / values.sigma, t, y)

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        values = self.schedule(t)
        noise = (x - values.alpha * y) / values.sigma
        return super().log_prob(noise, t, y) - self.dim * values.sigma.log().squeeze(-1)
