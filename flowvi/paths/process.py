"""All processes with the same marginals: forward SDE, probability-flow ODE, reverse SDE."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flowvi.paths.diffusion import Diffusion, as_diffusion

__all__ = ["ProcessFamily"]


class ProcessFamily:
    r"""Processes :math:`V_k` that share one family of marginals.

    .. math:: V_k = v + k\,(\nabla \cdot D + D\,s), \qquad D = b^2 / 2

    With velocity v and score s of the marginals, level k = 1 is the forward SDE
    :math:`dx = V_1 dt + b\,dW`, k = 0 the probability-flow ODE, k = -1 the reverse-time SDE, which
    runs from late to early times; in general the noise is :math:`b \sqrt{|k|}`, forward in time
    for positive and backward for negative k. Generation from noise to data by a score model is
    level 1 (any positive level), as time runs from 0 (noise) to 1 (data) here.

    Args:
        field: maps ``(x, t)`` to velocity and score, ``(*batch, dim)`` each.
        diffusion: b; a positive number, a function of time, or a :class:`Diffusion`.

    Shape:
        x: ``(*batch, dim)``; t: ``(*batch, 1)``.

    References:
        Maoutsa, Reich and Opper (2020), Interacting particle solutions of Fokker-Planck equations,
        arXiv:2006.00702, section 2; Song et al. (2021), Score-based generative modeling through
        stochastic differential equations, arXiv:2011.13456, equations 6 and 13; Albergo,
        Boffi and Vanden-Eijnden (2023), Stochastic interpolants, arXiv:2303.08797, section 2.4.

    Example:
        >>> import torch
        >>> brownian = ProcessFamily(lambda x, t: (x / (2 * t), -x / t), 1.0)
        >>> brownian.drift(torch.ones(2), torch.ones(1))
        tensor([0., 0.])
    """

    def __init__(
        self,
        field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        diffusion: float | Tensor | Callable | Diffusion,
    ) -> None:
        self.field = field
        self.diffusion = as_diffusion(diffusion)

    def drift(self, x: Tensor, t: Tensor, level: float = 1.0) -> Tensor:
        """Drift of the process of this level at ``(x, t)``."""
        velocity, score = self.field(x, t)
        if level == 0:
            return velocity
        half = self.diffusion(x, t).square() / 2
        return velocity + level * (self.diffusion.divergence(x, t) + half * score)

    def scale(self, x: Tensor, t: Tensor, level: float = 1.0) -> Tensor:
        """Noise of the process of this level per square root of time."""
        return self.diffusion(x, t) * abs(level) ** 0.5
