"""The loss of a rectified flow, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["RectifiedTerms"]


@dataclass(frozen=True)
class RectifiedTerms:
    r"""The parts of the loss of each item, in nats, averaged over draws.

    Args:
        coupling: divergence of the start, :math:`\log q(z_0 \mid z_1) - \log p_0(z_0)`, ``(B,)``.
        reference: :math:`\log N(z_1; z_0, \sigma^2 I)` of a Brownian bridge, 0 of other paths,
            ``(B,)``.
        path: estimated integral along the path, ``(B,)``: of :math:`(|f|^2 - 2 f \cdot g) /
            (2 \sigma^2)` for a Brownian bridge, of :math:`|f - g|^2 / (2 \sigma^2)` otherwise.
        has_bound: whether the sum bounds the log-density of the item.
    """

    coupling: Tensor
    reference: Tensor
    path: Tensor
    has_bound: bool

    @property
    def loss(self) -> Tensor:
        """``coupling + path - reference``, what training makes small, ``(B,)``."""
        return self.coupling + self.path - self.reference

    @property
    def elbo(self) -> Tensor:
        """Lower bound of the log-density of each item, ``(B,)``.

        Raises:
            NotImplementedError: if the loss bounds nothing.
        """
        if not self.has_bound:
            raise NotImplementedError(
                "The loss is no bound without a BrownianBridge and a coupling that has a density. "
                "Use loss."
            )
        return -self.loss
