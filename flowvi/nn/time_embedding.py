"""Features of time for networks that depend on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["FourierTime"]


class FourierTime(nn.Module):
    r"""Cosines and sines of a time in [0, 1].

    .. math:: \phi(t) = (\cos \pi t, \dots, \cos K \pi t, \sin \pi t, \dots, \sin K \pi t)

    The first cosine is monotone, so different times have different features.

    Args:
        num_frequencies: number of frequencies ``K``, at least 1.

    Shape:
        t: ``(*times)``; output: ``(*times, 2 * K)``.

    Raises:
        ValueError: if ``num_frequencies`` is below 1.

    Example:
        >>> FourierTime(2)(torch.tensor([0.0, 1.0]))[:, :2]
        tensor([[ 1.,  1.],
                [-1.,  1.]])
    """

    def __init__(self, num_frequencies: int = 3) -> None:
        super().__init__()
        if num_frequencies < 1:
            raise ValueError(f"`num_frequencies` must be at least 1; got {num_frequencies}.")
        frequencies = math.pi * torch.arange(1, num_frequencies + 1)
        self.register_buffer(
            "frequencies", frequencies.to(torch.get_default_dtype()), persistent=False
        )
        self.output_dim = 2 * num_frequencies

    def forward(self, t: Tensor) -> Tensor:
        angle = t.unsqueeze(-1) * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], -1)
