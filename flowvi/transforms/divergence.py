"""Divergence of a vector field: in closed form, exact by forward mode, or estimated."""

from __future__ import annotations

import abc
import enum
import warnings
from typing import Any

import torch
from torch import Tensor

from flowvi.nn import VectorField

__all__ = [
    "ClosedFormDivergence",
    "Divergence",
    "ExactDivergence",
    "Hutchinson",
    "Probe",
    "cheapest_divergence",
    "checked_velocity",
]

EXACT_LIMIT = 64


class Divergence(abc.ABC):
    """How a solve gets velocity and divergence together.

    A new one writes :meth:`velocity_and_divergence`, and :meth:`draw` if it needs noise, which
    then stays the same during one solve.
    """

    def check(self, field: VectorField) -> None:  # noqa: B027 - most need nothing
        """Refuse a field that this cannot be used with."""

    def draw(self, x: Tensor) -> Tensor | None:
        """Noise of one solve that starts at ``x``; none if not written."""
        return None

    @abc.abstractmethod
    def velocity_and_divergence(
        self, field: VectorField, time: Tensor, x: Tensor, prepared: Any, probe: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Velocity ``(*batch, input_dim)`` and divergence ``(*batch,)``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ClosedFormDivergence(Divergence):
    """The field's own formula, through the weights of its layers; exact.

    For fields with up to two hidden layers it costs one matrix product more than the velocity,
    whatever the number of dimensions.
    """

    def check(self, field: VectorField) -> None:
        if not field.has_divergence:
            raise NotImplementedError(
                f"{type(field).__name__} has no divergence in closed form. Use ExactDivergence "
                "or Hutchinson."
            )

    def velocity_and_divergence(
        self, field: VectorField, time: Tensor, x: Tensor, prepared: Any, probe: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        velocity, divergence = field.velocity_and_divergence(time, x, prepared)
        check_velocity(field, velocity, x)
        return velocity, divergence


class ExactDivergence(Divergence):
    """Trace of the Jacobian by forward mode along every axis at once; exact for any field.

    Costs about ``2 * input_dim`` evaluations of the field in time and memory.
    """

    def velocity_and_divergence(
        self, field: VectorField, time: Tensor, x: Tensor, prepared: Any, probe: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        def along(axis: Tensor) -> tuple[Tensor, Tensor]:
            direction = axis.expand_as(x)
            value, change = torch.func.jvp(
                lambda x: checked_velocity(field, time, x, prepared), (x,), (direction,)
            )
            return value, (change * axis).sum(-1)

        if x.shape[-1] == 1:
            return along(torch.ones_like(x))
        axes = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        velocity, diagonal = torch.func.vmap(along, out_dims=(None, 0))(axes)
        return velocity, diagonal.sum(0)


class Probe(enum.Enum):
    """Noise with zero mean and unit covariance."""

    GAUSSIAN = enum.auto()
    RADEMACHER = enum.auto()

    def draw(self, like: Tensor) -> Tensor:
        """Noise of the shape, dtype and device of ``like``."""
        noise = torch.randn_like(like)
        return noise if self is Probe.GAUSSIAN else torch.ones_like(noise).copysign(noise)


class Hutchinson(Divergence):
    r"""Unbiased estimate :math:`\epsilon^T J \epsilon`, with one probe per row for a whole solve.

    Costs about two evaluations of the field whatever its dimension. The log-density of a flow
    that uses it is an unbiased estimate of the log-density, different in every call: bounds that
    exponentiate it (importance weights) are then biased.

    Args:
        probe: law of the noise; signs have the smaller variance.

    References:
        Hutchinson (1990), A stochastic estimator of the trace of the influence matrix; Grathwohl
        et al. (2019), FFJORD, arXiv:1810.01367, equation 8.
    """

    def __init__(self, probe: Probe = Probe.RADEMACHER) -> None:
        if not isinstance(probe, Probe):
            raise TypeError(f"`probe` must be a Probe; got {probe!r}.")
        self.probe = probe

    def draw(self, x: Tensor) -> Tensor:
        return self.probe.draw(x.detach())

    def velocity_and_divergence(
        self, field: VectorField, time: Tensor, x: Tensor, prepared: Any, probe: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        velocity, change = torch.func.jvp(
            lambda x: checked_velocity(field, time, x, prepared), (x,), (probe,)
        )
        return velocity, (change * probe).sum(-1)

    def __repr__(self) -> str:
        return f"Hutchinson({self.probe})"


def checked_velocity(field: VectorField, time: Tensor, x: Tensor, prepared: Any) -> Tensor:
    """The velocity, if it has the right shape."""
    velocity = field.velocity(time, x, prepared)
    check_velocity(field, velocity, x)
    return velocity


def check_velocity(field: VectorField, velocity: Tensor, x: Tensor) -> None:
    """Refuse a velocity of another shape than the state."""
    if velocity.shape != x.shape:
        raise ValueError(
            f"`field` must give velocities of the shape of its states, {tuple(x.shape)}; got "
            f"shape {tuple(velocity.shape)} from {type(field).__name__}."
        )


def cheapest_divergence(field: VectorField) -> Divergence:
    """An exact divergence where that is affordable: closed form, else forward mode.

    Above 64 dimensions without a closed form it is Hutchinson's estimate, with a warning.
    """
    if field.has_divergence:
        return ClosedFormDivergence()
    if field.input_dim <= EXACT_LIMIT:
        return ExactDivergence()
    warnings.warn(
        f"{type(field).__name__} has no divergence in closed form and {field.input_dim} "
        "dimensions, so log-densities are Hutchinson's unbiased estimates. Give "
        "`divergence=ExactDivergence()` for exact ones.",
        stacklevel=3,
    )
    return Hutchinson()
