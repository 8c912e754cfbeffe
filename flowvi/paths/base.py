"""What every probability path is: a reparametrised family of marginals and a diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowvi.paths.diffusion import Diffusion, as_diffusion
from flowvi.paths.process import ProcessFamily

__all__ = ["Path", "PathPoint", "with_time"]


@dataclass(frozen=True)
class PathPoint:
    r"""Everything about one point of a path, made in one pass.

    Args:
        state: :math:`x_t = F(\epsilon, t; y)`.
        velocity: :math:`\partial F / \partial t` at fixed noise.
        score: :math:`\nabla_x \log q(x, t \mid y)` at the state; ``None`` where the path has no
            density (no noise).
        drift: of the process with the path's marginals and its diffusion b,
            velocity + grad(b^2/2) + (b^2/2) score.
        diffusion: b at the state.
        data: what a prediction of the data must equal for the prior's drift to equal ``drift``;
            ``None`` for paths without a schedule.
        noise: the same for a prediction of the noise.

    Shape:
        each: ``(*batch, dim)``.
    """

    state: Tensor
    velocity: Tensor
    score: Tensor | None
    drift: Tensor
    diffusion: Tensor
    data: Tensor | None = None
    noise: Tensor | None = None


class Path(nn.Module, ABC):
    r"""Marginals :math:`q(x, t \mid y)`, given by a map of standard normal noise, and a diffusion.

    .. math:: x_t = F(\epsilon, t; y), \qquad
        g = \partial_t F + \nabla \tfrac{b^2}{2} + \tfrac{b^2}{2} \nabla \log q(x, t \mid y)

    The process :math:`dx = g\,dt + b\,dW` that starts from the marginal at the first time has
    these marginals for every b. Time runs from 0 (prior, noise) to 1 (data).

    A subclass writes ``transform`` and ``point``, and where it can ``noise_of`` and ``log_prob``.
    Three class attributes say what a path law must do: ``takes_start`` (``y`` begins with a start
    that has a law of its own), ``has_target`` (points carry targets of predictions) and
    ``is_reference_bridge`` (the end is the data, and the path is a bridge of a reference process,
    whose transition density is ``reference_log_prob``).

    Args:
        dim: number of dimensions of the state, at least 1.
        diffusion: b; a positive number, a function of time, or a :class:`Diffusion`.

    Shape:
        eps: ``(*batch, noise_dim)``; t: ``(*batch, 1)``; x: ``(*batch, dim)``; y: one tensor whose
        batch is broadcast from the left, ``(*some_batch, *event)``, or None.
    """

    takes_start = False
    has_target = False
    is_reference_bridge = False

    def __init__(self, dim: int, diffusion: float | Tensor | Callable | Diffusion) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"`dim` must be an integer of at least 1; got {dim!r}.")
        self.dim = dim
        self.diffusion = as_diffusion(diffusion)
        # Says which dtype and device are wanted where neither data nor parameters do.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def noise_dim(self) -> int:
        """Number of standard normal numbers that make one state."""
        return self.dim

    @property
    def generating_diffusion(self) -> Diffusion | None:
        """Noise that a drift trained on this path generates with; None for a flow without."""
        return self.diffusion

    @abstractmethod
    def transform(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """State ``F(eps, t; y)``."""

    @abstractmethod
    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        """State, velocity, score and drift in one pass; everything carries a graph."""

    def noise_of(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Noise that ``transform`` maps to ``x``."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot turn a state back into noise, so it is known only at "
            "its own draws. Use point with the noise of the draw."
        )

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-density of the marginal, ``(*batch,)``, in nats."""
        raise NotImplementedError(
            f"{type(self).__name__} has no log-density of its marginals. Use a GaussianPath or a "
            "FlowPath."
        )

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Velocity of the marginals at any state."""
        return self.velocity_and_score(x, t, y)[0]

    def score(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Score of the marginal at any state."""
        return self.velocity_and_score(x, t, y)[1]

    def velocity_and_score(
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and score at any state in one pass."""
        point = self.point(self.noise_of(x, t, y), t, y)
        return point.velocity, point.score

    def field_and_log_prob(
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity, score and log-density at any state."""
        return *self.velocity_and_score(x, t, y), self.log_prob(x, t, y)

    def draw_noise(self, shape: torch.Size, like: Tensor | None = None) -> Tensor:
        """Standard normal noise ``(*shape, noise_dim)``, of dtype and device of ``like``."""
        like = self._like if like is None else like
        return torch.randn(*shape, self.noise_dim, dtype=like.dtype, device=like.device)

    def sample(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw one state for every time ``(*batch, 1)``; it carries the graph of F."""
        return self.transform(self.draw_noise(t.shape[:-1], t), t, y)

    def family(self, y: Tensor | None = None) -> ProcessFamily:
        """All processes with the marginals given ``y``."""
        return ProcessFamily(lambda x, t: self.velocity_and_score(x, t, y), self.diffusion)

    def _complete(
        self, state: Tensor, t: Tensor, velocity: Tensor, score: Tensor | None
    ) -> PathPoint:
        """Point with the diffusion and the drift that follow from velocity and score."""
        b = self.diffusion(state, t)
        drift = velocity
        if score is not None:
            drift = velocity + self.diffusion.divergence(state, t) + b.square() / 2 * score
        return PathPoint(state, velocity, score, drift, b.expand_as(state))


def with_time(y: Tensor, t: Tensor) -> Tensor:
    """Rows of ``y`` with the time appended, the input of a network of both.

    Shape:
        y: ``(*some_batch, size)``; t: ``(*batch, 1)``; result: ``(*batch, size + 1)``.

    Example:
        >>> with_time(torch.zeros(3, 2), torch.ones(5, 3, 1)).shape
        torch.Size([5, 3, 3])
    """
    batch = torch.broadcast_shapes(y.shape[:-1], t.shape[:-1])
    return torch.cat([y.expand(*batch, -1), t.expand(*batch, -1)], -1)
