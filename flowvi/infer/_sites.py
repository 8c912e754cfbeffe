"""Which latent sites a Pyro model has, found by running it once, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from flowvi.transforms.base import common_shape

__all__ = ["Prototype", "Site", "inspect_model"]


@dataclass(frozen=True)
class Site:
    """One latent site: its shapes, and which slice of the flat unconstrained vector it is.

    Args:
        name: name of the site.
        transform: ``biject_to(support)``, from unconstrained to constrained values.
        shape: shape of a constrained value, plates included.
        unconstrained_shape: shape before ``transform``; differs for a simplex, say.
        event_dim: number of event dimensions of the constrained value.
        start: first index of the site in the flat vector.
        stop: one past its last index.
        dtype: dtype of the site's values.
        device: device of the site's values.
    """

    name: str
    transform: Transform
    shape: torch.Size
    unconstrained_shape: torch.Size
    event_dim: int
    start: int
    stop: int
    dtype: torch.dtype
    device: torch.device

    @property
    def labels(self) -> list[str]:
        """One label per unconstrained coordinate: ``name``, ``name[2]``, ``name[0,1]``."""
        if not self.unconstrained_shape:
            return [self.name]
        grid = itertools.product(*map(range, self.unconstrained_shape))
        return [f"{self.name}[{','.join(map(str, index))}]" for index in grid]

    @property
    def is_identity(self) -> bool:
        """Whether the support is the whole real space, so that nothing is transformed."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return isinstance(transform, ComposeTransform) and not transform.parts


@dataclass(frozen=True)
class Prototype:
    """What one run of a model shows: latent sites, observed data, the depth of its plates."""

    sites: dict[str, Site]
    observed: dict[str, Tensor]
    observed_batch: dict[str, torch.Size]
    max_plate_nesting: int


class _Record(Messenger):
    """Fill latent sites with random feasible values and record every site."""

    def __init__(self) -> None:
        super().__init__()
        self.latent: dict[str, dict[str, Any]] = {}
        self.observed: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample):
            _check_plate(msg)
        elif not msg["is_observed"] and msg["value"] is None:
            msg["value"] = _feasible_value(msg["name"], msg["fn"])

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not isinstance(msg["fn"], _Subsample):
            sites = self.observed if msg["is_observed"] else self.latent
            sites[msg["name"]] = {key: msg[key] for key in ("fn", "value", "mask", "infer")}
            sites[msg["name"]]["frames"] = msg["cond_indep_stack"]


def inspect_model(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Prototype:
    """Run ``model`` twice on random latent values and describe its sites.

    The global random state is left as it was.

    Raises:
        ValueError: if the model has no latent site, a subsampled or empty plate, non-finite
            observed data, observed data outside its support, or sites that differ between runs.
        NotImplementedError: if a latent site is discrete or its support depends on other sites.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        records = []
        for _ in range(2):
            record = _Record()
            with record:
                model(*args, **kwargs)
            records.append(record)
    first, second = records
    for name, site in first.observed.items():
        _check_observed(name, site)
    if not first.latent:
        raise ValueError(
            "`model` must have at least one latent sample site; got none. "
            "Check that not every site is observed or blocked."
        )
    _check_same_sites(first.latent, second.latent)
    sites, start = {}, 0
    for name, recorded in first.latent.items():
        sites[name] = _make_site(name, recorded, start)
        start = sites[name].stop
    observed = {
        name: site["value"]
        for name, site in first.observed.items()
        if not site["infer"].get("is_auxiliary") and not site["infer"].get("_deterministic")
    }
    batch = {name: _batch_shape(first.observed[name]) for name in observed}
    depth = max(map(_plate_depth, [*first.latent.values(), *first.observed.values()]))
    return Prototype(sites, observed, batch, depth)


def _make_site(name: str, recorded: dict[str, Any], start: int) -> Site:
    fn, value = recorded["fn"], recorded["value"]
    transform = biject_to(fn.support)
    unconstrained_shape = transform.inv(value).shape if value.numel() else value.shape
    size = math.prod(unconstrained_shape)
    if size == 0:
        raise ValueError(
            f"Latent site `{name}` must have at least one element; got shape {tuple(value.shape)}."
        )
    return Site(
        name=name,
        transform=transform,
        shape=value.shape,
        unconstrained_shape=unconstrained_shape,
        event_dim=fn.event_dim,
        start=start,
        stop=start + size,
        dtype=value.dtype,
        device=value.device,
    )


def _plate_depth(recorded: dict[str, Any]) -> int:
    depths = [-frame.dim for frame in recorded["frames"] if frame.dim is not None]
    return max([len(recorded["fn"].batch_shape), *depths])


def _batch_shape(recorded: dict[str, Any]) -> torch.Size:
    fn, value = recorded["fn"], recorded["value"]
    return common_shape(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])


def _feasible_value(name: str, fn: Any) -> Tensor:
    """A value inside the support: the image of U(-1, 1) unconstrained coordinates."""
    try:
        transform = biject_to(fn.support)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"Latent site `{name}` is discrete or has no bijection to real space (support "
            f"{fn.support}). Sum it out of the model, or observe it."
        ) from error
    try:
        like = fn.sample()
        # `inverse_shape` is slow the first time, see `common_shape`.
        shape = transform.inv(like).shape
    except (NotImplementedError, RuntimeError, ValueError):
        like = torch.empty(())  # an improper site has nothing to sample
        shape = transform.inverse_shape(torch.Size(fn.batch_shape + fn.event_shape))
    return transform(2 * torch.rand(shape, dtype=like.dtype, device=like.device) - 1)


def _check_plate(msg: dict[str, Any]) -> None:
    name, size = msg["name"], msg["fn"].size
    taken = msg["fn"].subsample_size if msg["value"] is None else len(msg["value"])
    if size == 0 or taken == 0:
        raise ValueError(f"Plate `{name}` must have at least one item; got size {size}.")
    if taken is not None and taken != size:
        raise ValueError(
            f"Plate `{name}` must not be subsampled; got {taken} of {size} items. Pass the full "
            "data, or use a plate-aware guide with stochastic optimisation."
        )


def _check_observed(name: str, site: dict[str, Any]) -> None:
    fn, value, mask = site["fn"], site["value"], site["mask"]
    if site["infer"].get("_deterministic") or not isinstance(value, Tensor) or not value.numel():
        return
    counted = _rows_that_count(fn, mask, value)
    bad = ~torch.isfinite(value)
    bad = bad.reshape(*counted.shape, -1).any(-1) & counted
    if bad.any():
        raise ValueError(
            f"Observed site `{name}` must have finite data; got {int(bad.sum())} non-finite of "
            f"{bad.numel()} observations."
        )
    try:
        outside = ~fn.support.check(value).expand(counted.shape) & counted
    except (NotImplementedError, RuntimeError):
        return  # a support that cannot be checked here
    if outside.any():
        raise ValueError(
            f"Observed site `{name}` must lie in its support {fn.support}; got "
            f"{int(outside.sum())} of {outside.numel()} observations outside."
        )


def _rows_that_count(fn: Any, mask: Any, value: Tensor) -> Tensor:
    """Boolean over the batch of ``value``: False where the model masks the observation out."""
    event_dim = getattr(fn, "event_dim", 0)
    rows = torch.ones(value.shape[: value.dim() - event_dim], dtype=torch.bool)
    for part in (mask, getattr(fn, "_mask", None)):
        if isinstance(part, Tensor):
            rows = rows & part.to(rows.device).expand(rows.shape)
        elif part is False:
            rows = torch.zeros_like(rows)
    return rows.to(value.device)


def _check_same_sites(first: dict[str, dict], second: dict[str, dict]) -> None:
    changed = sorted(set(first) ^ set(second))
    common = [name for name in first if name in second]
    changed += [n for n in common if first[n]["value"].shape != second[n]["value"].shape]
    if changed:
        raise ValueError(
            f"`model` must have the same latent sites in every run; got a change in {changed}."
        )
    for name, site in first.items():
        try:
            u = biject_to(site["fn"].support).inv(site["value"])
            moved = biject_to(second[name]["fn"].support)(u)
        except (NotImplementedError, RuntimeError, ValueError):
            continue
        if not torch.allclose(moved, site["value"], rtol=1e-3, atol=1e-5):
            raise NotImplementedError(
                f"The support of latent site `{name}` depends on other latent sites. Sample a "
                "site with a fixed support (a fraction in the unit interval, say) and compute "
                f"`{name}` from it."
            )
