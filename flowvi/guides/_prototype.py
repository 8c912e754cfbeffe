"""One run of the model at its initial point: which sites it has, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from flowvi.guides._replay import Supply

__all__ = [
    "check_log_density",
    "check_supports",
    "find_subsampled",
    "latent_trace",
    "run_model",
    "signature",
    "tensors_of",
    "unconstrained_shapes",
    "with_initial_values",
]


class _Refuse(Messenger):
    """Stop at a plate without items and at a discrete latent site, by name."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            if fn.size == 0 or (msg["value"] is not None and len(msg["value"]) == 0):
                raise ValueError(f"Plate `{name}` must hold at least one item; got size 0.")
            # No outer handler has spoken yet, so a value here is the model's own.
            msg["infer"]["explicit_subsample"] = msg["value"] is not None
            return
        if msg["is_observed"] or msg["value"] is not None:
            return
        if getattr(getattr(fn, "support", None), "is_discrete", False):
            raise NotImplementedError(
                f"Site `{name}` is discrete, and this guide covers continuous latent sites only. "
                "Sum it out (pyro.infer.config_enumerate with TraceEnum_ELBO) and hide it from "
                f"the guide: pyro.poutine.block(model, hide=['{name}'])."
            )
        try:
            with helpful_support_errors(msg):
                biject_to(fn.support)
        except NotImplementedError:
            raise NotImplementedError(
                f"Site `{name}` has support {fn.support}, to which torch has no bijection. Use a "
                "distribution with another support, or pyro.factor for the density."
            ) from None


def with_initial_values(model: Callable, init_loc_fn: Callable) -> Callable:
    """The model with every latent site at its initial value, refusing what no guide covers."""
    return InitMessenger(init_loc_fn)(_Refuse()(model))


def run_model(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Trace:
    """Trace the model, hidden from all handlers outside."""
    return poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)


def latent_trace(trace: Trace, owner: str) -> Trace:
    """The latent sites of a full trace, detached, in order of appearance.

    Raises:
        ValueError: if there is none, one is empty, or they live on several devices.
        NotImplementedError: if a latent site is inside a sequential plate.
    """
    latent = Trace()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        if any(not frame.vectorized for frame in site["cond_indep_stack"]):
            raise NotImplementedError(
                f"Site `{name}` is inside a sequential pyro.plate, which {owner} does not cover. "
                "Use the plate as a context manager."
            )
        if site["value"].numel() == 0:
            raise ValueError(
                f"Latent site `{name}` must have at least one element; "
                f"got shape {tuple(site['value'].shape)}."
            )
        latent.add_node(name, **{**site, "value": site["value"].detach()})
    if not latent.nodes:
        raise ValueError(
            "`model` must have at least one latent sample site; got none. "
            "Check that not every site is observed or blocked."
        )
    devices = {name: str(site["value"].device) for name, site in latent.nodes.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"Latent sites must share one device; got {devices}.")
    return latent


def find_subsampled(latent: Trace) -> Iterator[tuple[str, str]]:
    """Pairs (site, plate) of latent sites inside a plate that shows a part of its items."""
    for name, site in latent.nodes.items():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size not in (-1, frame.size):
                yield name, frame.name


def check_log_density(trace: Trace) -> None:
    """Every site's log-density must be finite at the initial point.

    Raises:
        ValueError: naming the first site that is not, and the count of bad observed values.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or site["value"].is_meta:
            continue
        bad = int((~torch.isfinite(site["value"])).sum()) if site["is_observed"] else 0
        try:
            trace.compute_log_prob(site_filter=lambda n, _, name=name: n == name)
            log_prob = site["log_prob"]
            reason = f"got {int((~torch.isfinite(log_prob)).sum())} non-finite"
        except ValueError as error:
            log_prob, reason = None, f"it raised: {error}"
        if log_prob is not None and bool(torch.isfinite(log_prob).all()):
            continue
        if bad:
            raise ValueError(
                f"`data` must be finite at observed site `{name}`; got {bad} non-finite values."
            )
        raise ValueError(
            "`model` must have a finite log-density at the initial point; at site "
            f"`{name}` {reason}. Check the data, or pass another init_loc_fn."
        )


def check_supports(latent: Trace, model: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """The support of a latent site must not move with the other latent sites.

    The guide's bijections are those of the initial point, so a moving support would silently
    give values outside it. A second run, at slightly other values, shows such a site.

    Raises:
        NotImplementedError: naming the site.
    """
    if any(site["value"].is_meta for site in latent.nodes.values()):
        return
    moved = {name: _nudged(site) for name, site in latent.nodes.items()}
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False), torch.no_grad():
        other = run_model(Supply(moved)(model), args, kwargs)
    for name, site in latent.nodes.items():
        if name not in other.nodes:
            continue
        old, new = (list(tensors_of(s["fn"].support)) for s in (site, other.nodes[name]))
        same = len(old) == len(new) and all(
            a.shape == b.shape and bool((a == b).all()) for a, b in zip(old, new, strict=True)
        )
        if not same:
            raise NotImplementedError(
                f"The support of site `{name}` changes with other latent sites, which no "
                "automatic guide covers. Rescale a site with a fixed support in the model instead."
            )


def _nudged(site: dict[str, Any]) -> Tensor:
    with helpful_support_errors(site):
        transform = biject_to(site["fn"].support)
    return transform(transform.inv(site["value"]) + 0.01)


def tensors_of(constraint: Constraint) -> Iterator[Tensor]:
    """The bounds a constraint holds, numbers as tensors, nested constraints included."""
    for value in vars(constraint).values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Constraint):
                yield from tensors_of(item)
            elif isinstance(item, (int, float, Tensor)) and not isinstance(item, bool):
                yield torch.as_tensor(item)


def signature(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Shapes and devices of the tensors among the arguments; what else could change a shape."""
    return tuple((key, _describe(value)) for key, value in [*enumerate(args), *kwargs.items()])


def _describe(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.device, value.is_floating_point()
    if isinstance(value, dict):
        return tuple((key, _describe(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        # A long list is data; looking at each entry would cost more than a step.
        return len(value) if len(value) > 100 else tuple(_describe(item) for item in value)
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return type(value), tuple(getattr(value, "shape", ()))


def unconstrained_shapes(latent: Trace) -> dict[str, torch.Size]:
    """Shape of each site's unconstrained value; it differs from the site's for a simplex."""
    shapes = {}
    for name, site in latent.nodes.items():
        with helpful_support_errors(site):
            shapes[name] = biject_to(site["fn"].support).inv(site["value"]).shape
    return shapes
