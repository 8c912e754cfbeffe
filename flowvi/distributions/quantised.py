"""Whole levels as the floor of a real image, which ties a density to pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from flowvi.distributions.pixels import _PixelLaw, check_levels

__all__ = ["Quantised"]


class Quantised(_PixelLaw):
    r"""The level of a real pixel, without noise: :math:`x = \lfloor v \rfloor`, cut to the levels.

    With :math:`v \sim p` it makes a density one of whole levels,
    :math:`P(x) = \int_{[0, 1)} p(x + u)\, du`. A posterior that draws ``v`` from ``x`` to
    ``x + 1`` is called dequantisation; the ELBO is then the bound of Theis et al.

    Args:
        value: real pixels v, in the units of levels.
        num_levels: number of levels n, at least 2; values are 0 to n - 1.

    Shape:
        value, x: ``(*batch,)``, and so is the log-probability: 0 or minus infinity.

    References:
        Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models,
        arXiv:1511.01844, section 3.1.

    Example:
        >>> Quantised(torch.tensor([3.7, -0.2, 99.0]), 17).sample()
        tensor([ 3.,  0., 16.])
    """

    def __init__(
        self, value: Tensor, num_levels: int = 256, *, validate_args: bool | None = None
    ) -> None:
        self.num_levels = check_levels(num_levels)
        super().__init__(value, validate_args=validate_args)

    def _with(self, params: list[Tensor]) -> Quantised:
        return Quantised(params[0], self.num_levels, validate_args=self._validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_levels - 1)

    @property
    def mean(self) -> Tensor:
        return self._params[0].floor().clamp(0, self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args and not value.is_meta:
            self._validate_sample(value)
        agrees = value == self.mean
        return torch.where(agrees, 0.0, -torch.inf).to(self._params[0].dtype)

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.mean.detach().expand(self._extended_shape(torch.Size(sample_shape)))
