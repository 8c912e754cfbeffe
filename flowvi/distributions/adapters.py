"""Flows and transforms of other libraries, as flowvi's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from pyro.distributions import conditional, transforms
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from flowvi.distributions.flow import Flow
from flowvi.transforms.base import FlowTransform, common_shape, compose

__all__ = ["adapt", "import_zuko"]


def adapt(
    foreign: object, input_dim: int | None = None, context_dim: int = 0
) -> Flow | FlowTransform:
    """A flow or transform of zuko or Pyro as one of flowvi, sharing its parameters.

    A zuko ``Flow`` becomes a :class:`Flow`; its transforms run from data to base and are turned
    round. Anything else becomes a :class:`FlowTransform` in its own direction. Inverted Pyro
    transforms, which are no modules, keep their parameters. Pyro's caches are emptied after every
    pass, so nothing is stale and copies work.

    Args:
        foreign: a zuko ``Flow`` or ``LazyTransform``; a Pyro ``TransformModule``,
            ``ConditionalTransformModule`` or torch ``Transform`` of real vectors; or a list of
            transforms, the first one nearest the base.
        input_dim: number of dimensions; may be left out for a zuko flow.
        context_dim: length of the context vector; 0 for none.

    Raises:
        TypeError: if ``foreign`` is nothing of the above.
        ValueError: if ``input_dim`` is missing, or ``context_dim`` does not fit.
        NotImplementedError: for transforms that are known to be wrong or do not map real vectors
            to real vectors.

    Example:
        >>> from pyro.distributions.transforms import affine_coupling
        >>> flow = Flow(adapt([affine_coupling(3), affine_coupling(3).inv], 3))
        >>> flow().sample().shape
        torch.Size([3])
    """
    if isinstance(foreign, Flow | FlowTransform):
        return foreign
    # A foreign object of zuko exists only where zuko has been imported already.
    zuko = sys.modules.get("zuko")
    if zuko is not None and isinstance(foreign, zuko.lazy.Flow):
        return _adapt_zuko_flow(foreign, zuko, input_dim, context_dim)
    parts = list(foreign) if isinstance(foreign, list | tuple) else [foreign]
    if input_dim is None:
        raise ValueError("`input_dim` must be given for a transform; got None.")
    if not parts:
        raise ValueError("`foreign` must hold at least one transform; got none.")
    adapted = [t for part in parts for t in _adapt_part(part, zuko, input_dim, context_dim)]
    if context_dim and not any(t.context_dim for t in adapted):
        raise ValueError(
            f"`context_dim` must be 0 for transforms without a context; got {context_dim}."
        )
    return compose(*adapted)


def import_zuko() -> ModuleType:
    """Import zuko without its side effect on validation.

    By itself, importing zuko switches argument validation off for all distributions of torch and
    Pyro. Here that is confined to zuko's own classes. If zuko has been imported before, nothing is
    changed.

    Raises:
        ImportError: if zuko is not installed.
    """
    if "zuko" in sys.modules:
        return sys.modules["zuko"]
    base = torch.distributions.Distribution
    names = ("_validate_args", "arg_constraints")
    before = {name: vars(base)[name] for name in names}
    try:
        zuko = importlib.import_module("zuko")
        relaxed = {name: vars(base)[name] for name in names}
    finally:
        for name, value in before.items():
            setattr(base, name, value)
    for cls in vars(zuko.distributions).values():
        if isinstance(cls, type) and issubclass(cls, base) and cls.__module__.startswith("zuko"):
            for name, value in relaxed.items():
                if getattr(cls, name) is before[name]:
                    setattr(cls, name, value)
    return zuko


def _adapt_zuko_flow(
    foreign: Any, zuko: ModuleType, input_dim: int | None, context_dim: int
) -> Flow:
    if not isinstance(foreign.base, zuko.lazy.UnconditionalDistribution):
        raise NotImplementedError(
            f"The base {type(foreign.base).__name__} of a zuko flow may depend on the context, "
            "which the base of a Flow cannot. Use an UnconditionalDistribution."
        )
    size = foreign.base().event_shape[-1]
    if input_dim not in (None, size):
        raise ValueError(f"`input_dim` must be {size} for this flow; got {input_dim}.")
    return Flow(_ZukoTransform(foreign.transform, size, context_dim).inv, foreign.base)


def _adapt_part(
    part: object, zuko: ModuleType | None, input_dim: int, context_dim: int
) -> Iterator[FlowTransform]:
    if isinstance(part, FlowTransform):
        yield part
    elif zuko is not None and isinstance(part, zuko.lazy.LazyTransform):
        yield _ZukoTransform(part, input_dim, context_dim)
    elif isinstance(part, Transform | conditional.ConditionalTransform):
        for transform, inverted in _flatten(part, False):
            adapted = _PyroTransform(transform, input_dim, context_dim)
            yield adapted.inv if inverted else adapted
    else:
        raise TypeError(
            "`foreign` must be a flow or transform of zuko, Pyro or torch, or a list of "
            f"transforms; got {type(part).__name__}."
        )


def _flatten(part: Any, inverted: bool) -> Iterator[tuple[Any, bool]]:
    """The single transforms of a nested one, each with whether it is turned round."""
    if isinstance(part, conditional.ConstantConditionalTransform):
        yield from _flatten(part.transform, inverted)
    elif isinstance(part, torch.distributions.transforms._InverseTransform):
        yield from _flatten(part.inv, not inverted)
    elif isinstance(part, conditional._ConditionalInverseTransformModule):
        yield from _flatten(part.inv, not inverted)
    elif isinstance(part, torch.distributions.ComposeTransform):
        yield from _flatten_all(part.parts, inverted)
    elif isinstance(part, conditional.ConditionalComposeTransformModule):
        yield from _flatten_all(part.transforms, inverted)
    else:
        yield part, inverted


def _flatten_all(parts: Sequence[Any], inverted: bool) -> Iterator[tuple[Any, bool]]:
    for part in reversed(parts) if inverted else parts:
        yield from _flatten(part, inverted)


class _ZukoTransform(FlowTransform):
    """A lazy transform of zuko, in its own direction."""

    def __init__(self, lazy: nn.Module, input_dim: int, context_dim: int) -> None:
        super().__init__(input_dim, context_dim)
        self.lazy = lazy

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = _fill_batch(x, context)
        y, ladj = self.lazy(context).call_and_ladj(x)
        return y, _sum_event(ladj, x)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y = _fill_batch(y, context)
        transform = self.lazy(context)
        x = transform.inv(y)
        return x, -_sum_event(transform.call_and_ladj(x)[1], x)


_NO_INVERSE = (
    transforms.BlockAutoregressive,
    transforms.ConditionalNeuralAutoregressive,
    transforms.ConditionalPlanar,
    transforms.ConditionalRadial,
    transforms.NeuralAutoregressive,
    transforms.Planar,
    transforms.Polynomial,
    transforms.Radial,
)

_REFUSED = {
    transforms.Sylvester: (
        "has a wrong log-determinant away from its start. Use OrthogonalSylvester, "
        "HouseholderSylvester or TriangularSylvester of flowvi.transforms."
    ),
    transforms.BatchNorm: (
        "is no bijection in training, where its two directions use different moments. Use "
        "ActNorm of flowvi.transforms."
    ),
}


class _PyroTransform(FlowTransform):
    """One transform of Pyro or torch on real vectors, in its own direction."""

    def __init__(self, foreign: Any, input_dim: int, context_dim: int) -> None:
        name = type(foreign).__name__
        for refused, reason in _REFUSED.items():
            if isinstance(foreign, refused):
                raise NotImplementedError(f"Pyro's {refused.__name__} {reason}")
        conditioned = isinstance(foreign, conditional.ConditionalTransform)
        if conditioned and not context_dim:
            raise ValueError(f"`context_dim` must be at least 1 for {name}; got 0.")
        if not all(map(_is_real, (foreign.domain, foreign.codomain))):
            raise NotImplementedError(
                f"{name} does not map real vectors to real vectors, so it cannot be part of a "
                "flow. Use it in a TransformedDistribution on top of the flow."
            )
        super().__init__(input_dim, context_dim if conditioned else 0)
        self.foreign = foreign
        self.has_inverse = not isinstance(foreign, _NO_INVERSE)

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = _fill_batch(x, context)
        transform = self._conditioned(context)
        y = transform(x)
        ladj = transform.log_abs_det_jacobian(x, y)
        self._forget()
        return y, _sum_event(ladj, x)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.has_inverse:
            raise NotImplementedError(
                f"Pyro's {type(self.foreign).__name__} has no inverse, so it can only score "
                "values it has just sampled. Wrap it in NumericalInverse."
            )
        y = _fill_batch(y, context)
        transform = self._conditioned(context)
        x = transform.inv(y)
        ladj = transform.log_abs_det_jacobian(x, y)
        self._forget()
        return x, -_sum_event(ladj, y)

    def _conditioned(self, context: Tensor | None) -> Transform:
        return self.foreign.condition(context) if self.context_dim else self.foreign

    def _forget(self) -> None:
        """Empty the caches, which hold the last graph and the last values."""
        parts = self.foreign.modules() if isinstance(self.foreign, nn.Module) else [self.foreign]
        for part in parts:
            for name in [n for n in vars(part) if n.startswith("_cache") and n != "_cache_size"]:
                setattr(part, name, (None, None) if name == "_cached_x_y" else None)


def _is_real(space: constraints.Constraint) -> bool:
    if space.event_dim > 1:
        return False
    while isinstance(space, constraints.independent):
        space = space.base_constraint
    return space in (constraints.real, constraints.real_vector)


def _fill_batch(x: Tensor, context: Tensor | None) -> Tensor:
    if context is None:
        return x
    batch = common_shape(x.shape[:-1], context.shape[:-1])
    return x.expand(*batch, x.shape[-1])


def _sum_event(ladj: Tensor, x: Tensor) -> Tensor:
    """Sum an elementwise log-determinant over the event, and give it the batch of ``x``."""
    ladj = ladj.to(x)
    if ladj.dim() == x.dim():
        ladj = ladj.sum(-1)
    return ladj.expand(x.shape[:-1])
