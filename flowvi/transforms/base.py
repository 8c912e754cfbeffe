"""What every invertible map of flowvi is: two one-pass methods, everything else derived."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from flowvi.transforms._shapes import (
    common_shape,
    event_shape_of,
    flatten_batch,
    real_events,
    require_vectors,
)

__all__ = [
    "Compose",
    "Direction",
    "FlowTransform",
    "Inverse",
    "common_shape",
    "compose",
    "event_shape_of",
    "flatten_batch",
    "require_vectors",
]


class Direction(enum.Enum):
    """Which direction of a map costs one pass; the other one is slower or numerical."""

    BOTH = enum.auto()
    FORWARD = enum.auto()
    INVERSE = enum.auto()

    @property
    def inv(self) -> Direction:
        """The same statement about the inverse map."""
        swapped = {Direction.FORWARD: Direction.INVERSE, Direction.INVERSE: Direction.FORWARD}
        return swapped.get(self, self)


class FlowTransform(TransformModule, ConditionalTransform):
    r"""Invertible map :math:`y = T(x \mid context)` from the base to the target side.

    Subclasses write ``_call_and_ladj`` and, if ``has_inverse``, ``_inverse_and_ladj``: each gives
    the value and the log-determinant in one pass, without checks. The Pyro and torch protocols
    (``t(x)``, ``t.inv``, ``log_abs_det_jacobian``, ``condition``) are derived here once. Nothing
    is cached, so nothing is stale after a parameter update.

    Args:
        input_dim: number of dimensions of ``x`` and ``y``, at least 1; or their event shape, such
            as ``(channels, height, width)``.
        context_dim: length of the context vector; 0 makes the map unconditional.

    Shape:
        x, y: ``(*batch, *event_shape)``, for vectors ``(*batch, input_dim)``; context:
        ``(*batch, context_dim)``, broadcast against the batch of ``x``; ladj: ``(*batch,)``, in
        nats.
    """

    bijective = True
    has_inverse = True
    exact_inverse = True
    has_score_recursion = False
    cheap = Direction.BOTH

    def __init__(self, input_dim: int | Sequence[int], context_dim: int = 0) -> None:
        super().__init__()
        self.event_shape = event_shape_of(input_dim)
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ValueError(f"`context_dim` must be a non-negative integer; got {context_dim!r}.")
        self.input_dim = math.prod(self.event_shape)
        self.context_dim = context_dim

    @property
    def domain(self) -> constraints.Constraint:
        """Where the map may be taken."""
        return real_events(len(self.event_shape))

    @property
    def codomain(self) -> constraints.Constraint:
        """What the map reaches."""
        return real_events(len(self.event_shape))

    # The two methods a new transform writes.

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            f"{type(self).__name__} has no inverse, so it can only score values it has just "
            "sampled. Wrap it in NumericalInverse."
        )

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(
            f"{type(self).__name__} has no score recursion. Use the inverse to get the score."
        )

    # The public protocol.

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` to ``(y, ladj)`` in one pass.

        Raises:
            ValueError: if ``x`` or ``context`` has the wrong last size, or context is missing.
        """
        self._check("x", x, context)
        return self._call_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``y`` to ``(x, ladj of the inverse map)`` in one pass.

        Raises:
            ValueError: if ``y`` or ``context`` has the wrong last size, or context is missing.
            NotImplementedError: if the map has no inverse.
        """
        self._check("y", y, context)
        return self._inverse_and_ladj(y, context)

    def call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Map ``x`` to ``(y, ladj, score of y)``, pushing a score through the map.

        With :math:`s_x = \nabla_x \log q_X(x)` the pushed score is
        :math:`s_y = J^{-T} (s_x - \nabla_x \log|\det J|)`. It carries no graph.

        References:
            Vaitl, Nicoli, Nakajima and Kessel (2022), Gradients should stay on path,
            arXiv:2207.08219, proposition 4.2.
        """
        self._check("x", x, context)
        return self._call_ladj_and_score(x, score, context)

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.call_and_ladj(x, context)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        return self.call_and_ladj(x, context)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    @property
    def inv(self) -> FlowTransform:
        """The inverse map, a module with the same parameters, made anew at each access."""
        return Inverse(self)

    def condition(self, context: Tensor) -> Transform:
        """The map with its context fixed, as a plain torch transform."""
        if self.context_dim == 0:
            return self
        return _Conditioned(self, context)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return self

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def _batch_shape(self, value: Tensor) -> torch.Size:
        return value.shape[: value.dim() - len(self.event_shape)]

    def _check(self, name: str, value: Tensor, context: Tensor | None) -> None:
        event = self.event_shape
        if value.shape[-len(event) :] != event:
            wanted = f"size {event[0]} (input_dim)" if len(event) == 1 else f"shape {tuple(event)}"
            raise ValueError(f"`{name}` must end with {wanted}; got shape {tuple(value.shape)}.")
        if self.context_dim == 0:
            return
        if context is None:
            raise ValueError(
                f"`context` must be given and end with size {self.context_dim} (context_dim); "
                "got None."
            )
        if context.dim() < 1 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"`context` must end with size {self.context_dim} (context_dim); "
                f"got shape {tuple(context.shape)}."
            )
        try:
            common_shape(self._batch_shape(value), context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"`context` must have a batch shape that broadcasts with that of `{name}`, "
                f"{tuple(self._batch_shape(value))}; got {tuple(context.shape[:-1])}."
            ) from None


class Inverse(FlowTransform):
    """The inverse of a map, sharing its parameters.

    Args:
        transform: the map to turn round; it must have an inverse.

    Raises:
        NotImplementedError: if ``transform.has_inverse`` is false.
    """

    has_score_recursion = True

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.event_shape, transform.context_dim)
        if not transform.has_inverse:
            raise NotImplementedError(
                f"{type(transform).__name__} has no inverse, so it can only score values it has "
                "just sampled. Wrap it in NumericalInverse."
            )
        self.transform = transform

    @property
    def domain(self) -> constraints.Constraint:
        return self.transform.codomain

    @property
    def codomain(self) -> constraints.Constraint:
        return self.transform.domain

    @property
    def cheap(self) -> Direction:
        return self.transform.cheap.inv

    @property
    def exact_inverse(self) -> bool:
        return self.transform.exact_inverse

    @property
    def inv(self) -> FlowTransform:
        return self.transform

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._inverse_and_ladj(x, context)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._call_and_ladj(y, context)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self.transform._inverse_and_ladj(x, context)
        # With T the map turned round, s_y = J_T(y)^T s_x + grad log|det J_T(y)|: one pass of T.
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            back, ladj_back = self.transform._call_and_ladj(leaf, context)
            total = (score.detach() * back).sum() + ladj_back.sum()
            pushed = torch.autograd.grad(total, leaf)[0]
        return y, ladj, pushed


class Compose(FlowTransform):
    """Several maps, applied in the given order (first is nearest the base).

    Args:
        parts: at least one map; all have the same event shape, and those that take a context
            take one of the same length.

    Raises:
        ValueError: if there is no part, or sizes disagree.
    """

    def __init__(self, parts: Iterable[FlowTransform]) -> None:
        parts = list(parts)
        if not parts:
            raise ValueError("`parts` must hold at least one transform; got none.")
        if len({p.event_shape for p in parts}) > 1:
            raise ValueError(_disagreement(parts))
        contexts = sorted({p.context_dim for p in parts if p.context_dim})
        if len(contexts) > 1:
            raise ValueError(f"`parts` must agree in context_dim; got {contexts}.")
        super().__init__(parts[0].event_shape, contexts[0] if contexts else 0)
        self.parts = nn.ModuleList(parts)

    @property
    def domain(self) -> constraints.Constraint:
        return self.parts[0].domain

    @property
    def codomain(self) -> constraints.Constraint:
        return self.parts[-1].codomain

    @property
    def has_inverse(self) -> bool:
        return all(p.has_inverse for p in self.parts)

    @property
    def exact_inverse(self) -> bool:
        return all(p.exact_inverse for p in self.parts)

    @property
    def has_score_recursion(self) -> bool:
        return all(p.has_score_recursion for p in self.parts)

    @property
    def cheap(self) -> Direction:
        directions = {p.cheap for p in self.parts} - {Direction.BOTH}
        return directions.pop() if len(directions) == 1 else Direction.BOTH

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        total = None
        for part in self.parts:
            x, ladj = part._call_and_ladj(x, context if part.context_dim else None)
            total = ladj if total is None else total + ladj
        return x, total

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        total = None
        for part in reversed(self.parts):
            y, ladj = part._inverse_and_ladj(y, context if part.context_dim else None)
            total = ladj if total is None else total + ladj
        return y, total

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = None
        for part in self.parts:
            x, ladj, score = part._call_ladj_and_score(
                x, score, context if part.context_dim else None
            )
            total = ladj if total is None else total + ladj
        return x, total, score


def _disagreement(parts: Sequence[FlowTransform]) -> str:
    if all(len(p.event_shape) == 1 for p in parts):
        return f"`parts` must agree in input_dim; got {[p.input_dim for p in parts]}."
    return f"`parts` must agree in event shape; got {[tuple(p.event_shape) for p in parts]}."


def compose(*parts: FlowTransform) -> FlowTransform:
    """Chain maps, opening nested ones; a single map is returned as it is."""
    flat: list[FlowTransform] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Compose) else [part])
    return flat[0] if len(flat) == 1 else Compose(flat)


class _Conditioned(Transform):
    """A conditional map with its context fixed."""

    bijective = True

    def __init__(self, transform: FlowTransform, context: Tensor) -> None:
        super().__init__()
        self.transform = transform
        self.context = context
        self.domain, self.codomain = transform.domain, transform.codomain

    def _call(self, x: Tensor) -> Tensor:
        return self.transform.call_and_ladj(x, self.context)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform.inverse_and_ladj(y, self.context)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.transform.call_and_ladj(x, self.context)[1]
