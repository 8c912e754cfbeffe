"""Log-weights per independent item, for bounds that exponentiate them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.objectives._constants import leaf_of
from flowvi.objectives.weights import LogWeight, is_identically_one

__all__ = ["ItemLogWeights", "from_items", "item_log_weights", "to_items"]


@dataclass(frozen=True)
class ItemLogWeights:
    r"""Importance log-weights of independent items, and the factor of their sum.

    A bound turns each item's particles into one number and then calls :meth:`total`:

    .. math:: \mathcal{L} = \text{scale} \sum_i
        \log \frac{1}{K} \sum_k \exp(\text{value}_{k i}) \qquad \text{(for IWAE)}

    Args:
        value: ``log p - log q`` of every particle and item, in nats, ``(num_particles, *items)``.
        scale: N/B of subsampled plates times ``poutine.scale``; a tensor has the items' shape.
        plates: plates of the item dimensions, from left to right.
    """

    value: Tensor
    scale: float | Tensor
    plates: tuple = ()

    def total(self, per_item: Tensor) -> Tensor:
        """``scale`` times the sum over items.

        Args:
            per_item: one number per item, shape ``items``.
        """
        return (per_item if is_identically_one(self.scale) else per_item * self.scale).sum()


def item_log_weights(
    runs: Sequence[Sequence[LogWeight]], num_particles: int, particle_dim: int, bound: str
) -> ItemLogWeights:
    r"""Sum log-weights down to the plates that all sites share.

    The items are the plates around every site of model and guide, particles excluded. With all
    latents inside a data plate the bound is taken for each datum by itself, and the factor N/B
    of a subsampled plate multiplies outside the logarithm. Where some sites are outside (global
    latents, a full batch), the whole weight is one item. Sites that share no plate but have
    different scales leave no weight to exponentiate, and are refused.

    Args:
        runs: what :func:`flowvi.objectives.log_weights` gives for each run of model and guide:
            one list if particles are vectorised, else one list per particle. All runs must have
            seen the same minibatch.
        num_particles: particles in each run.
        particle_dim: dim of their plate, negative.
        bound: name of the objective, for the messages.

    Shape:
        result.value: ``(len(runs) * num_particles, *items)``, in nats.

    Raises:
        NotImplementedError: if scales differ; if a site's log-density is only an estimate of its
            log-ratio; if a sequential plate is subsampled.
        ValueError: if there is no site, or items of different sizes.
    """
    for weights in runs:
        _check_sites(weights, bound)
    first = runs[0][0]
    _check_scales(runs[0], bound)
    shared = set.intersection(
        *({f.name for f in w.plates if _is_item(f, num_particles, particle_dim)} for w in runs[0])
    )
    frames = {f.name: f for f in first.plates if f.name in shared}
    plates = tuple(sorted(frames.values(), key=lambda f: f.dim))
    dims = [f.dim for f in plates]
    value = torch.cat([_sum(w, dims, num_particles, particle_dim, bound) for w in runs])
    scale = first.scale
    if torch.is_tensor(scale):
        scale = _scale_of_items(runs, dims, bound)
    return ItemLogWeights(value, scale, plates)


def to_items(value: Tensor, dims: Sequence[int], num_particles: int, particle_dim: int) -> Tensor:
    """Sum a site's term over every dim that is not one of the items.

    Args:
        value: term with dims aligned at the right, as a site's log-density.
        dims: dims of the items, negative, from left to right.
        num_particles: size of the particle plate; 1 where there is none.
        particle_dim: dim of that plate, negative.

    Shape:
        result: ``(num_particles, *items)``.
    """
    missing = -min(dims, default=0) - value.dim()
    if missing > 0:
        value = value.reshape((1,) * missing + value.shape)
    has_particles = num_particles > 1 and value.dim() == -particle_dim
    kept = {*dims, particle_dim} if has_particles else {*dims}
    rest = [d for d in range(-value.dim(), 0) if d not in kept]
    value = value.sum(rest) if rest else value
    return value if has_particles else value.expand(num_particles, *value.shape)


def from_items(value: Tensor, dims: Sequence[int], particle_dim: int, right: int = 0) -> Tensor:
    """Put the dims of ``(num_particles, *items)`` where a site has them.

    Args:
        value: one number per particle and item.
        dims: dims of the items, negative, from left to right.
        particle_dim: dim of the particle plate, negative; any number for a single particle.
        right: number of event dims of the site.

    Shape:
        result: broadcasts against the site's value.
    """
    lead = [particle_dim] if value.shape[0] > 1 else []
    sizes = dict(zip([*lead, *dims], value.shape if lead else value.shape[1:], strict=True))
    depth = -min(sizes, default=0)
    return value.reshape(*(sizes.get(d, 1) for d in range(-depth, 0)), *(1,) * right)


def _is_item(frame: object, num_particles: int, particle_dim: int) -> bool:
    return num_particles == 1 or frame.dim != particle_dim


def _sum(
    weights: Iterable[LogWeight], dims: list[int], num_particles: int, dim: int, bound: str
) -> Tensor:
    total = None
    for weight in weights:
        value = to_items(weight.value, dims, num_particles, dim)
        if total is not None and total.shape != value.shape:
            raise ValueError(
                f"{bound} must see the same items at every site; got shapes "
                f"{tuple(total.shape[1:])} and {tuple(value.shape[1:])} at "
                f"`{weight.sites[0]['name']}`."
            )
        total = value if total is None else total + value
    return total


def _check_sites(weights: Sequence[LogWeight], bound: str) -> None:
    if not weights:
        raise ValueError("`model` must have at least one sample site; got none.")
    for site in (site for weight in weights for site in weight.sites):
        leaf = leaf_of(site["fn"])
        if getattr(leaf, "is_log_ratio_estimate", False):
            raise NotImplementedError(
                f"{bound} exponentiates log-weights, but site `{site['name']}` draws from "
                f"{type(leaf).__name__}, whose log-density only estimates the log-ratio. "
                "Use the grid path SDEPath, or ELBO or STL."
            )
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized and frame.full_size not in (None, frame.size):
                raise NotImplementedError(
                    f"{bound} needs one log-weight per item, but site `{site['name']}` is in the "
                    f"sequential subsampled plate `{frame.name}`. Write it as "
                    f"`with pyro.plate(...)`, or use ELBO or STL."
                )


def _check_scales(weights: Sequence[LogWeight], bound: str) -> None:
    first = weights[0]
    for other in weights[1:]:
        if _may_be_equal(first.scale, other.scale):
            continue
        near, far = (first.sites[0]["name"], other.sites[0]["name"])
        plates = {f.name: f for w in (first, other) for f in w.plates}.values()
        common = {f.name for f in first.plates} & {f.name for f in other.plates}
        cause = [f"plate `{f.name}`" for f in plates if f.name not in common and _subsampled(f)]
        cause = " and ".join(cause) or "poutine.scale"
        raise NotImplementedError(
            f"{bound} exponentiates log-weights, so all sites must have one scale; site `{near}` "
            f"has {_shown(first.scale)} and site `{far}` has {_shown(other.scale)} ({cause}). "
            "Use ELBO or STL, or the full batch."
        )


def _subsampled(frame: object) -> bool:
    return frame.full_size not in (None, frame.size)


def _shown(scale: float | Tensor) -> str:
    return "a tensor" if torch.is_tensor(scale) else f"{scale:g}"


def _may_be_equal(a: float | Tensor, b: float | Tensor) -> bool:
    """Compare where that needs no value from a device; :func:`_scale_of_items` does the rest."""
    if torch.is_tensor(a) != torch.is_tensor(b):
        return False
    if not torch.is_tensor(a):
        return math.isclose(a, b, rel_tol=1e-9)
    if a is b or a.device.type != "cpu" or b.device.type != "cpu":
        return True
    return a.dim() == b.dim() and bool(torch.isclose(a, b).all())


def _scale_of_items(runs: Sequence[Sequence[LogWeight]], dims: list[int], bound: str) -> Tensor:
    """The common tensor scale, one number per item; NaN where scales on a device differ."""
    first = runs[0][0].scale
    if any(first.shape[d] > 1 for d in range(-first.dim(), 0) if d not in dims):
        raise NotImplementedError(
            f"{bound} needs one scale per item; site `{runs[0][0].sites[0]['name']}` has one of "
            f"shape {tuple(first.shape)}. Use ELBO or STL."
        )
    scale = first
    for weight in (w for weights in runs for w in weights):
        scale = torch.where(torch.isclose(first, weight.scale), scale, torch.nan)
    rest = [d for d in range(-scale.dim(), 0) if d not in dims]
    return scale.sum(rest) if rest else scale
