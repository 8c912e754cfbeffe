"""Features of times and of coordinates for networks that depend on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["FourierFeatures", "FourierTime", "SinusoidalTime"]


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


class SinusoidalTime(nn.Module):
    r"""Sines and cosines of a time at frequencies that grow geometrically.

    .. math:: \phi(t) = (\sin \omega_k t, \cos \omega_k t), \qquad
        \omega_k = \omega_{\max}^{k / (K - 1)}

    Unlike :class:`FourierTime` it resolves times that are very close, as noise levels are near
    the data.

    Args:
        num_frequencies: number of frequencies ``K``, at least 2.
        max_frequency: the largest one, above 1.

    Shape:
        t: ``(*times)``; output: ``(*times, 2 * K)``.

    Raises:
        ValueError: if a number is too small.

    References:
        Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762, section 3.5, as used
        by Ho, Jain and Abbeel (2020), arXiv:2006.11239, for times.

    Example:
        >>> SinusoidalTime(4)(torch.zeros(3)).shape
        torch.Size([3, 8])
    """

    def __init__(self, num_frequencies: int = 16, max_frequency: float = 1000.0) -> None:
        super().__init__()
        if num_frequencies < 2:
            raise ValueError(f"`num_frequencies` must be at least 2; got {num_frequencies}.")
        if not max_frequency > 1:
            raise ValueError(f"`max_frequency` must be above 1; got {max_frequency}.")
        exponents = torch.linspace(0, math.log(max_frequency), num_frequencies)
        self.register_buffer("frequencies", exponents.exp(), persistent=False)
        self.output_dim = 2 * num_frequencies

    def forward(self, t: Tensor) -> Tensor:
        angle = t.unsqueeze(-1) * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)


class FourierFeatures(nn.Module):
    r"""A vector with sines and cosines of its own coordinates appended.

    .. math:: x \mapsto (x, \sin 2^n \pi x, \cos 2^n \pi x), \qquad n = n_0, \dots, n_1

    High frequencies tell nearby values apart, as the last bits of pixels are.

    Args:
        min_exponent: :math:`n_0`.
        max_exponent: :math:`n_1`, not smaller.

    Shape:
        x: ``(*batch, dim)``; output: ``(*batch, multiple * dim)``.

    Raises:
        ValueError: if the exponents are not ordered.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        appendix C.

    Example:
        >>> features = FourierFeatures(0, 1)
        >>> features.multiple, features(torch.zeros(3, 2)).shape
        (5, torch.Size([3, 10]))
    """

    def __init__(self, min_exponent: int = 0, max_exponent: int = 3) -> None:
        super().__init__()
        if max_exponent < min_exponent:
            raise ValueError(
                f"`max_exponent` must not be below `min_exponent`; got {max_exponent} and "
                f"{min_exponent}."
            )
        exponents = torch.arange(min_exponent, max_exponent + 1)
        frequencies = math.pi * 2.0 ** exponents.to(torch.get_default_dtype())
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.multiple = 1 + 2 * len(exponents)

    def forward(self, x: Tensor, dim: int = -1) -> Tensor:
        """Features along the dim ``dim``, which grows."""
        parts = [x]
        for frequency in self.frequencies.unbind():
            angle = frequency * x
            parts += [angle.sin(), angle.cos()]
        return torch.cat(parts, dim)
