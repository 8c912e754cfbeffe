"""Handler that prepares guide sites for path gradients: stopped laws, antithetics, clipping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import (
    Delta,
    Distribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowvi.objectives._constants import leaf_of, with_path_derivative

__all__ = ["PathMessenger", "check_clip_factor", "clip_rows"]


class PathMessenger(Messenger):
    """Prepare every latent site of a guide for the path-gradient estimator.

    Args:
        num_particles: size of the particle plate; 1 where there is none.
        particle_dim: dim of that plate, negative.
        antithetic: draw the particles in opposite pairs where the law allows it.
        clip_factor: see :class:`flowvi.objectives.STL`.
    """

    def __init__(
        self, num_particles: int, particle_dim: int, antithetic: bool, clip_factor: float | None
    ) -> None:
        super().__init__()
        self._num_particles = num_particles
        self._particle_dim = particle_dim
        self._antithetic = antithetic and num_particles > 1 and num_particles % 2 == 0
        self._clip_factor = clip_factor if num_particles > 1 else None

    def _pyro_sample(self, msg: dict) -> None:
        if self._skips(msg):
            return
        if hasattr(leaf_of(msg["fn"]), "path_derivative"):
            msg["fn"] = with_path_derivative(msg["fn"], self._antithetic and self._leads(msg))

    def _pyro_post_sample(self, msg: dict) -> None:
        fn, value = msg["fn"], msg["value"]
        if self._skips(msg) or not torch.is_tensor(value):
            return
        leaf = leaf_of(fn)
        in_batch = value.dim() - fn.event_dim == -self._particle_dim
        if isinstance(leaf, Delta) or not in_batch:
            return
        if self._antithetic and isinstance(leaf, _SYMMETRIC):
            value = msg["value"] = _reflect(value, fn.mean)
        if self._clip_factor is not None and value.requires_grad:
            whiten, factor, event_dim = _whitening(leaf, value), self._clip_factor, fn.event_dim
            value.register_hook(lambda grad: clip_rows(grad, whiten(grad), factor, event_dim))

    def _skips(self, msg: dict) -> bool:
        return msg["is_observed"] or site_is_subsample(msg)

    def _leads(self, msg: dict) -> bool:
        shape = msg["fn"].batch_shape
        return len(shape) == -self._particle_dim and shape[0] == self._num_particles


_SYMMETRIC = (Normal, MultivariateNormal, LowRankMultivariateNormal)


def _reflect(value: Tensor, mean: Tensor) -> Tensor:
    """Replace the second half by the mirror images of the first; gradients stay those of draws."""
    half = value.shape[0] // 2
    mean = mean.expand(value.shape)
    return torch.cat([value[:half], 2 * mean[half:] - value[:half]])


def _whitening(leaf: Distribution, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Map of a gradient into coordinates in which the draws have about unit scale."""
    parts = getattr(getattr(leaf, "transform", None), "parts", ())
    outermost = parts[-1] if len(parts) else getattr(leaf, "transform", leaf)
    factor = getattr(outermost, "scale_tril", None)
    if torch.is_tensor(factor) and factor.dim() == 2:
        factor = factor.detach()
        return lambda grad: grad @ factor
    scale = value.detach().std(0)
    return lambda grad: grad * scale


def clip_rows(grad: Tensor, whitened: Tensor, factor: float, event_dim: int) -> Tensor:
    """Shorten each draw's gradient to ``factor`` times the median length over the draws.

    A draw whose gradient is not finite gets none.

    Args:
        grad: gradient of the loss for the draws, leading dimension the particles.
        whitened: the same in coordinates in which lengths are compared.
        factor: bound, in units of the median length.
        event_dim: number of dims on the right that make one draw.
    """
    lead = grad.shape[: grad.dim() - event_dim]
    norm = whitened.reshape(*lead, -1).norm(dim=-1)
    finite = norm.isfinite()
    # Not median(), which a compiled step could not call without Python.
    lengths = norm.where(finite, norm.new_full((), torch.inf))
    bound = factor * lengths.kthvalue((len(lengths) + 1) // 2, 0).values
    scale = torch.where(norm > bound, bound / norm, torch.ones_like(norm))
    keep = finite.reshape(*lead, *(1,) * event_dim)
    return torch.where(keep, grad * scale.reshape(keep.shape), torch.zeros_like(grad))


def check_clip_factor(clip_factor: float | None) -> None:
    """Refuse a bound on the draws' gradients that is not positive.

    Raises:
        ValueError: naming the value.
    """
    if clip_factor is not None and not clip_factor > 0:
        raise ValueError(f"`clip_factor` must be positive; got {clip_factor!r}.")
