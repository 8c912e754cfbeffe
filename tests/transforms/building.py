"""What the property tests of transforms share."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from registry import TRANSFORMS, Case
from torch import Tensor, nn

from flowvi.transforms import FlowTransform

NAMES = sorted(TRANSFORMS)
CONDITIONAL = [name for name in NAMES if TRANSFORMS[name].context_dim]
every = pytest.mark.parametrize("name", NAMES)
both_states = pytest.mark.parametrize("drawn", [False, True], ids=["start", "drawn"])


def build(name: str, drawn: bool, scale: float = 1.0) -> tuple[Case, FlowTransform]:
    case = TRANSFORMS[name]
    transform = case.make()
    if drawn:
        redraw(transform, scale * case.scale)
    return case, transform


def redraw(module: nn.Module, scale: float = 0.6) -> nn.Module:
    """The module with all parameters normal of the given standard deviation."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().mul_(scale)
    return module


def context_of(case: Case, *batch: int) -> Tensor | None:
    return torch.randn(*batch, case.context_dim) if case.context_dim else None


class SkewBase(nn.Module):
    """A base law without symmetry, so that rotations matter."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        number = torch.arange(math.prod(event_shape)).reshape(event_shape)
        self.register_buffer("loc", 0.3 + 0.2 * number)
        self.register_buffer("scale", 1.1 + 0.3 * number)

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.loc, self.scale).to_event(self.loc.dim())
