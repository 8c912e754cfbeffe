"""Distributions whose parameters are constants, so that only the value carries a gradient."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import torch
from pyro.distributions import Delta, Distribution
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import nn
from torch.distributions import Independent, Transform

__all__ = [
    "check_reparameterised",
    "is_reparameterised",
    "leaf_of",
    "with_constant_parameters",
    "with_path_derivative",
]

_WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution)


def leaf_of(fn: Distribution) -> Distribution:
    """The distribution inside Independent, masked and expanded wrappers."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def with_path_derivative(fn: Distribution, antithetic: bool) -> Distribution:
    """Replace the leaf by its own ``path_derivative``, keeping the wrappers around it."""
    if not isinstance(fn, _WRAPPERS):
        return fn.path_derivative(antithetic=antithetic)
    outer = copy.copy(fn)
    outer.base_dist = with_path_derivative(fn.base_dist, antithetic)
    return outer


def is_reparameterised(fn: Distribution) -> bool:
    """Whether draws carry the whole gradient, so that no score function is needed."""
    plain_score = type(leaf_of(fn)).score_parts is PyroDistribution.score_parts
    return bool(getattr(fn, "has_rsample", False)) and plain_score


def check_reparameterised(fn: Distribution, name: str, bound: str, instead: str) -> None:
    """Refuse a guide site whose draws do not carry the whole gradient.

    Args:
        fn: distribution of the site.
        name: of the site.
        bound: name of the objective.
        instead: name of one that covers such sites.

    Raises:
        NotImplementedError: naming the site, its law and ``instead``.
    """
    if not is_reparameterised(fn):
        raise NotImplementedError(
            f"{bound} needs reparameterised guide sites; site `{name}` draws from "
            f"{type(leaf_of(fn)).__name__}, which is not. Use {instead} for this guide."
        )


def with_constant_parameters(
    fn: Distribution, name: str, bound: str = "STL", instead: str = "ELBO"
) -> Distribution:
    """Copy ``fn`` with every tensor inside it detached, at any depth.

    A ``Delta`` is left alone: its density is a function of the value it carries.

    Args:
        fn: distribution of a guide site.
        name: of the site, for the message.
        bound: name of the objective, for the message.
        instead: name of one that covers such sites, for the message.

    Raises:
        NotImplementedError: if the site's draws carry no gradient.
    """
    if isinstance(leaf_of(fn), Delta):
        return fn
    check_reparameterised(fn, name, bound, instead)
    return _constant(fn, {})


def _constant(value: object, memo: dict[int, object]) -> object:
    if torch.is_tensor(value):
        return value.detach()
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, dict):
        return type(value)((k, _constant(v, memo)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(_constant(v, memo) for v in value)
    if not isinstance(value, (torch.distributions.Distribution, Transform, nn.Module)):
        return value
    # Filled in after it is remembered: a transform and its inverse refer to each other.
    new = memo[id(value)] = value.__class__.__new__(value.__class__)
    new.__dict__.update((k, _constant(v, memo)) for k, v in _state(value))
    return new


def _state(value: object) -> Iterator[tuple[str, object]]:
    for key, item in value.__dict__.items():
        if key == "_cached_x_y":
            # The cached base-side value does not depend on the scored value in the graph.
            yield key, (None, None)
        elif isinstance(item, weakref.ref):
            # An older torch links a transform to its (live) inverse weakly; it is made anew.
            yield key, None
        else:
            yield key, item
