"""Densities of values that were just drawn, from the noise they were made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

__all__ = ["densities_from_noise"]


@contextmanager
def densities_from_noise() -> Iterator[None]:
    r"""Inside, a multivariate normal scores its own draw without solving a triangular system.

    For :math:`z = \mu + L \epsilon` the quadratic form :math:`|L^{-1}(z - \mu)|^2` is
    :math:`|\epsilon|^2`, and its gradients with respect to :math:`\mu` and :math:`L` cancel
    those through :math:`z`. A copy with other parameters (as for path gradients) or another value
    is scored as usual.
    """
    draw, score = MultivariateNormal.rsample, MultivariateNormal.log_prob

    def rsample(self: MultivariateNormal, sample_shape: tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.distributions.utils._standard_normal(
            shape, dtype=self.loc.dtype, device=self.loc.device
        )
        factor = self._unbroadcasted_scale_tril
        value = self.loc + torch.matmul(factor, noise.unsqueeze(-1)).squeeze(-1)
        self._drawn = (value, noise, self.loc, factor)
        return value

    def log_prob(self: MultivariateNormal, value: Tensor) -> Tensor:
        drawn, noise, *law = getattr(self, "_drawn", (None, None))
        own = drawn is value and law[0] is self.loc and law[1] is self._unbroadcasted_scale_tril
        if not own:
            return score(self, value)
        diagonal = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1)
        constant = 0.5 * math.log(2 * math.pi) * noise.shape[-1]
        return -0.5 * noise.square().sum(-1) - diagonal.log().sum(-1) - constant

    MultivariateNormal.rsample, MultivariateNormal.log_prob = rsample, log_prob
    try:
        yield
    finally:
        MultivariateNormal.rsample, MultivariateNormal.log_prob = draw, score
