"""Four densities in the plane that are hard for flows, simulated."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["TOYS"]


def eight_gaussians(number: int, generator: torch.Generator) -> Tensor:
    """Eight narrow Gaussians on a circle of radius 2."""
    angle = torch.randint(8, (number,), generator=generator) * (math.pi / 4)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    return centre + 0.2 * torch.randn(number, 2, generator=generator)


def moons(number: int, generator: torch.Generator) -> Tensor:
    """Two interleaved half circles with noise."""
    angle = math.pi * torch.rand(number, generator=generator)
    upper = torch.rand(number, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    noise = 0.1 * torch.randn(number, 2, generator=generator)
    return 1.5 * (torch.stack([x - 0.5, y - 0.25], -1) + noise)


def pinwheel(number: int, generator: torch.Generator) -> Tensor:
    """Five arms, narrow in angle, twisted by their radius."""
    radius = 1 + 0.3 * torch.randn(number, generator=generator)
    width = 0.05 * torch.randn(number, generator=generator)
    arm = torch.randint(5, (number,), generator=generator) * (2 * math.pi / 5)
    angle = arm + 0.25 * radius.exp()
    point = torch.stack([radius, width], -1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    return 1.5 * (point.unsqueeze(-2) @ turn.reshape(-1, 2, 2)).squeeze(-2)


def checkerboard(number: int, generator: torch.Generator) -> Tensor:
    """The dark squares of a board of four by four."""
    x = 4 * torch.rand(number, generator=generator) - 2
    row = torch.randint(2, (number,), generator=generator)
    y = torch.rand(number, generator=generator) - 2 * row + x.floor() % 2
    return torch.stack([x, y], -1)


TOYS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "eight Gaussians": eight_gaussians,
    "moons": moons,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
}
