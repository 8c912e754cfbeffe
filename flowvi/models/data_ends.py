"""Laws of data at the end of a diffusion, where a state is the data with little noise."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Distribution, Normal
from torch import Tensor

from flowvi.models.likelihoods import CategoricalLikelihood, Likelihood, NormalLikelihood

__all__ = ["DataEnd", "LevelEnd", "RealEnd"]


class DataEnd(Likelihood):
    r"""Base of laws :math:`p(x \mid z_1)` of an item given the last state of its path.

    The state is :math:`\alpha y + \sigma \epsilon` with the encoded item y. A new one writes
    ``encode``, ``at`` and ``cell_size``.

    Shape:
        x: ``(B, *event_shape)``; y and state: ``(*batch, num_pixels)``.
    """

    def encode(self, x: Tensor, like: Tensor) -> Tensor:
        """Items as vectors ``(B, num_pixels)`` of real numbers, of the dtype of ``like``."""
        return x.to(like.dtype).flatten(1)

    def at(self, state: Tensor, alpha: Tensor, sigma: Tensor) -> Distribution:
        """Law of an item given its last state."""
        raise NotImplementedError

    @property
    def cell_size(self) -> float:
        """Width of the cell of encoded numbers that one value stands for; 0 for real numbers."""
        return 0.0


class RealEnd(DataEnd):
    r"""Real numbers, normal around the last state without its factor.

    .. math:: x \sim N(z_1 / \alpha, \sigma^2 / \alpha^2)

    Args:
        event_shape: shape of an item.

    Example:
        >>> law = RealEnd((2,)).at(torch.zeros(5, 2), torch.tensor(1.0), torch.tensor(0.1))
        >>> law.batch_shape, law.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    num_params = 2
    takes_integers = False
    _check_values = NormalLikelihood._check_values

    def at(self, state: Tensor, alpha: Tensor, sigma: Tensor) -> Distribution:
        loc = state / alpha
        pair = torch.stack([loc, (sigma / alpha).expand_as(loc)], -2)
        return self(pair.unflatten(-1, self.event_shape))

    def _law(self, params: Tensor) -> Distribution:
        return Normal(*params.unbind(-1), validate_args=False)


class LevelEnd(CategoricalLikelihood, DataEnd):
    r"""Whole levels, spread evenly over [-1, 1] and found again in the last state.

    .. math:: p(x = k \mid z_1) \propto \exp\!\Big(
        -\frac{(z_1 / \alpha - y_k)^2}{2 \sigma^2 / \alpha^2}\Big), \qquad
        y_k = \frac{2 k}{n - 1} - 1

    Args:
        event_shape: shape of an image.
        num_levels: number of levels n, at least 2; images hold 0 to n - 1.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        for the decoder of the last state.

    Example:
        >>> end = LevelEnd((1, 2, 2), num_levels=3)
        >>> end.encode(torch.tensor([[[[0, 1], [2, 2]]]]), torch.empty(0))
        tensor([[-1.,  0.,  1.,  1.]])
    """

    def encode(self, x: Tensor, like: Tensor) -> Tensor:
        return (2 * self.inputs(x, like) - 1).flatten(1)

    def at(self, state: Tensor, alpha: Tensor, sigma: Tensor) -> Distribution:
        loc = (state / alpha).unsqueeze(-2)
        levels = torch.linspace(-1, 1, self.num_levels, dtype=loc.dtype, device=loc.device)
        logits = -((loc - levels.unsqueeze(-1)) * (alpha / sigma).unsqueeze(-1)).square() / 2
        return self(logits.unflatten(-1, self.event_shape))

    @property
    def cell_size(self) -> float:
        return 2 / (self.num_levels - 1)


def log_volume(end: DataEnd) -> float:
    """Logarithm of the volume of the cell of encoded numbers that an item stands for; or 0."""
    return end.num_pixels * math.log(end.cell_size) if end.cell_size else 0.0
