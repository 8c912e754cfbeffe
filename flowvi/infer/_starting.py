"""Putting a warm start into a guide, flow or stock, by what the guide offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from flowvi.infer.target import Target

if TYPE_CHECKING:
    from flowvi.infer.start import Start

__all__ = ["apply_start", "can_start"]

_STOCK = (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal)


def can_start(guide: Callable) -> bool:
    """Whether a guide can take the mean and covariance of a warm start."""
    return hasattr(guide, "whiten") or type(guide) in _STOCK


def apply_start(guide: Callable, start: Start, target: Target) -> None:
    """Set a guide's location and scale (or its whitening) from a warm start."""
    if hasattr(guide, "whiten_modes") and start.modes:
        guide.whiten_modes(start.modes)
    elif hasattr(guide, "whiten"):
        guide.whiten(start.loc, start.scale_tril)
    elif isinstance(guide, AutoNormal):
        _set_auto_normal(guide, start, target)
    else:
        _set_joint(guide, start)


def mean_field_scale(scale_tril: Tensor) -> Tensor:
    """Standard deviations of the mean-field Gaussian nearest to N(m, L L^T) in KL(q || p).

    They are the roots of the inverse diagonal of the precision, not the marginal ones.
    """
    return torch.cholesky_inverse(scale_tril).diagonal().rsqrt()


@torch.no_grad()
def _set_joint(guide: Callable, start: Start) -> None:
    guide.loc.data.copy_(start.loc)
    if isinstance(guide, AutoMultivariateNormal):
        scale = start.scale_tril.diagonal()
        guide.scale = scale
        guide.scale_tril = start.scale_tril / scale[:, None]
    elif isinstance(guide, AutoDiagonalNormal):
        guide.scale = mean_field_scale(start.scale_tril)


@torch.no_grad()
def _set_auto_normal(guide: AutoNormal, start: Start, target: Target) -> None:
    scale = mean_field_scale(start.scale_tril)
    for name, site in target.sites.items():
        owner, leaf = _descend(guide.locs, name)
        old = getattr(owner, leaf)
        old.data.copy_(start.loc[site.start : site.stop].reshape(old.shape))
        owner, leaf = _descend(guide.scales, name)
        old = getattr(owner, leaf)
        setattr(owner, leaf, scale[site.start : site.stop].reshape(old.shape))


def _descend(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The nested module that holds a dotted site name, and the last part of that name."""
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    return module, leaf
