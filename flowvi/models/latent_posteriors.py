"""Posterior processes of a latent SDE: simulated, or given by their marginals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import Distribution, Normal, TorchDistribution
from torch import Tensor, nn

from flowvi.distributions.path_posterior import PathPosterior
from flowvi.distributions.path_prior import PathPrior
from flowvi.distributions.simulated import LogRatio, SimulatedPosterior, SimulatedPrior
from flowvi.models._series import refine
from flowvi.models.drifts import DriftMLP, next_of, pick
from flowvi.models.encoders import SeriesEncoder
from flowvi.models.marginals import Marginals, MLPMarginals, scale_of
from flowvi.nn.mlp import MLP
from flowvi.paths.gaussian import GaussianPath
from flowvi.paths.sde import SDE
from flowvi.paths.times import UniformTimes
from flowvi.samplers import EulerMaruyama, SDESolver, TorchSDE, simulate

__all__ = ["LatentPosterior", "SimulatedLatent", "SimulationFreeLatent"]


class LatentPosterior(nn.Module, ABC):
    """How the posterior over latent paths is represented; a new one writes the four methods."""

    encoder: SeriesEncoder

    @abstractmethod
    def prior(self, process: SDE, start: Distribution, times: Tensor) -> TorchDistribution:
        """Law of the model's site, for times ``(T,)`` or ``(B, T)`` that are settled."""

    @abstractmethod
    def law(
        self, process: SDE, data: Tensor, times: Tensor, mask: Tensor | None
    ) -> TorchDistribution:
        """Law of the guide's site."""

    @abstractmethod
    def observed(self, law: Any, value: Tensor) -> Tensor:
        """States ``(*batch, T, dim)`` at the observation times, from a drawn value."""

    @abstractmethod
    def draw(
        self,
        process: SDE,
        series: tuple[Tensor, Tensor, Tensor | None],
        at: Tensor,
        num_samples: int,
    ) -> Tensor:
        """Posterior states at times ``at``, sorted: ``(num_samples, B, len(at), dim)``."""


class SimulatedLatent(LatentPosterior):
    r"""Posterior drift by a network of state, time and encoded data; paths are simulated.

    .. math:: q(x_0 \mid y) = N(\mu(c_0), \sigma(c_0)^2), \qquad
        dx = g(x, t, c(t))\,dt + b(x, t)\,dW

    The grid cuts the interval between any two observations of a series into equal steps, so it
    hits all times of each series, however irregular.

    Args:
        drift: g, a :class:`DriftMLP` with the encoder's ``context_dim``; ``None`` for a process
            without noise (latent ODE), whose only latent is the start.
        encoder: makes the contexts.
        dim: number of dimensions of the state.
        steps_per_interval: steps between two observations.
        log_ratio: the log-ratio that is scored; ``LogRatio.PATHWISE`` for bounds of several
            samples such as IWAE.
        solver: fixed-grid solver, or :class:`~flowvi.samplers.TorchSDE`; Euler-Maruyama if left
            out.
        num_segments: segments that the backward pass simulates again instead of keeping them;
            about the root of the number of steps saves most memory.
        start_dims: hidden widths of the network of the start's mean and scale.

    Raises:
        ValueError: if ``steps_per_interval`` is below 1 or the drift has another context.

    References:
        Li, Wong, Chen and Duvenaud (2020), Scalable gradients for stochastic differential
        equations, arXiv:2001.01328, section 5; Rubanova, Chen and Duvenaud (2019), Latent ODEs,
        arXiv:1907.03907, for the case without noise.
    """

    def __init__(
        self,
        drift: DriftMLP | None,
        encoder: SeriesEncoder,
        dim: int,
        *,
        steps_per_interval: int = 5,
        log_ratio: LogRatio = LogRatio.KL,
        solver: SDESolver | TorchSDE | None = None,
        num_segments: int = 1,
        start_dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not isinstance(steps_per_interval, int) or steps_per_interval < 1:
            raise ValueError(
                "`steps_per_interval` must be an integer of at least 1; got "
                f"{steps_per_interval!r}."
            )
        if drift is not None and drift.context_dim != encoder.context_dim:
            raise ValueError(
                f"`drift` must have the encoder's context_dim {encoder.context_dim}; got "
                f"{drift.context_dim}."
            )
        self.drift = drift
        self.encoder = encoder
        self.steps_per_interval = steps_per_interval
        self.log_ratio = log_ratio
        self.num_segments = num_segments
        self.solver = EulerMaruyama() if solver is None else solver
        self.start = MLP(encoder.context_dim, start_dims, 2 * dim, activation=nn.Softplus)

    @property
    def _simulator(self) -> Callable:
        return partial(simulate, solver=self.solver, num_segments=self.num_segments)

    def prior(self, process: SDE, start: Distribution, times: Tensor) -> SimulatedPrior:
        return SimulatedPrior(
            process,
            start,
            refine(times, self.steps_per_interval),
            simulator=self._simulator,
            log_ratio=self.log_ratio,
            num_pieces=self.num_segments,
        )

    def law(
        self, process: SDE, data: Tensor, times: Tensor, mask: Tensor | None
    ) -> SimulatedPosterior:
        start, drift = self._condition(data, times, mask)
        return SimulatedPosterior(
            process,
            drift,
            start,
            refine(times, self.steps_per_interval),
            simulator=self._simulator,
            log_ratio=self.log_ratio,
        )

    def observed(self, law: SimulatedPosterior | SimulatedPrior, value: Tensor) -> Tensor:
        return law.unpack(value).states[..., :: self.steps_per_interval, :]

    def draw(
        self,
        process: SDE,
        series: tuple[Tensor, Tensor, Tensor | None],
        at: Tensor,
        num_samples: int,
    ) -> Tensor:
        data, times, _ = series
        start, drift = self._condition(*series)
        sde = process if drift is None else process.with_drift(drift)
        # Both kinds of times become points of one grid; where two agree, a step has no length.
        if at.dim() != times.dim():
            at, times = (t.expand(len(data), -1) for t in (at, times))
        union, order = torch.cat([times, at], -1).sort(dim=-1, stable=True)
        rank = order.argsort(-1)[..., times.shape[-1] :] * self.steps_per_interval
        grid = refine(union, self.steps_per_interval).movedim(-1, 0)
        path = simulate(sde, start.sample((num_samples,)), grid, solver=self.solver)
        states = path.states.movedim(0, -2)
        rank = rank.expand(*states.shape[:-2], -1).unsqueeze(-1)
        return torch.take_along_dim(states, rank, -2)

    def _condition(
        self, data: Tensor, times: Tensor, mask: Tensor | None
    ) -> tuple[Distribution, Any]:
        """Law of the start and drift, given the data."""
        context = self.encoder(data, times, mask)
        static = self.encoder.is_static
        first = context if static else context[..., 0, :]
        start = normal_of(self.start(first))
        if self.drift is None:
            return start, None
        return start, self.drift.bind(context, None if static else times)


class SimulationFreeLatent(LatentPosterior):
    r"""Posterior given by Gaussian marginals with network mean and scale; nothing is simulated.

    .. math:: q(x_t \mid y) = N\big(\mu(c(t), t), \sigma(c(t), t)^2\big)

    The posterior's drift follows from the marginals (see :class:`~flowvi.paths.Path`), and the
    path integral is estimated at a few random times, so that the cost of a step does not depend
    on how finely the process would have to be simulated. The context is interpolated linearly
    between observations, which keeps the marginals continuous in time.

    Args:
        encoder: makes the contexts.
        dim: number of dimensions of the state.
        span: first and last time of the process; all observations lie within, and the divergence
            is that over the whole span.
        hidden_dims: hidden widths of the network of mean and scale, where it is left out.
        marginals: that network; :class:`MLPMarginals` if left out.
        num_times: random times for each series; more lower the variance.
        num_steps: steps of a simulation, when the prior is drawn from.

    Raises:
        ValueError: if ``marginals`` have other sizes.

    References:
        Bartosh, Vetrov and Naesseth (2025), SDE matching: scalable and simulation-free training
        of latent stochastic differential equations, arXiv:2502.02472, section 4.
    """

    def __init__(
        self,
        encoder: SeriesEncoder,
        dim: int,
        *,
        span: tuple[float, float] = (0.0, 1.0),
        hidden_dims: Sequence[int] = (64, 64),
        marginals: Marginals | None = None,
        num_times: int = 4,
        num_steps: int = 100,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim = dim
        self.num_times = num_times
        self.num_steps = num_steps
        self.times = UniformTimes(*span)
        sizes = encoder.context_dim, dim
        if marginals is not None and (marginals.context_dim, marginals.dim) != sizes:
            raise ValueError(
                f"`marginals` must have the encoder's context_dim and dim, {sizes}; got "
                f"{(marginals.context_dim, marginals.dim)}."
            )
        self.network = MLPMarginals(*sizes, hidden_dims) if marginals is None else marginals

    def prior(self, process: SDE, start: Distribution, times: Tensor) -> PathPrior:
        return PathPrior(
            self._path(process, None),
            process.drift,
            start,
            at=times,
            times=self.times,
            num_times=self.num_times,
            num_steps=self.num_steps,
        )

    def law(self, process: SDE, data: Tensor, times: Tensor, mask: Tensor | None) -> PathPosterior:
        context = self.encoder(data, times, mask)
        return PathPosterior(
            self._path(process, None if self.encoder.is_static else times),
            context,
            at=times,
            times=self.times,
            num_times=self.num_times,
            y_event_dim=1 if self.encoder.is_static else 2,
        )

    def observed(self, law: PathPosterior | PathPrior, value: Tensor) -> Tensor:
        return law.unpack(value).observed

    def draw(
        self,
        process: SDE,
        series: tuple[Tensor, Tensor, Tensor | None],
        at: Tensor,
        num_samples: int,
    ) -> Tensor:
        law = self.law(process, *series)
        t = at.expand(num_samples, *law.batch_shape, at.shape[-1]).movedim(-1, 0).unsqueeze(-1)
        return law.path.sample(t, law.y).movedim(0, -2)

    def _path(self, process: SDE, at: Tensor | None) -> _MarginalPath:
        if process.is_deterministic:
            raise ValueError(
                "`process` must have a diffusion for a simulation-free posterior; got none. Use "
                "SimulatedLatent for a latent ODE."
            )
        return _MarginalPath(self.dim, self.network, process.diffusion, at)


class _MarginalPath(GaussianPath):
    """Gaussian marginals whose mean and scale are one network of context and time."""

    def __init__(
        self, dim: int, network: Marginals, diffusion: nn.Module, at: Tensor | None
    ) -> None:
        super().__init__(dim, None, None, diffusion)
        self.network = network
        self.at = at

    def moments(self, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.network(y if self.at is None else between(self.at, y, t)[0], t)

    def moments_and_rates(
        self, t: Tensor, y: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        context = (y, None) if self.at is None else between(self.at, y, t)
        return self.network.with_rate(*context, t)


def between(at: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(*batch, num, size)``, given at times ``at``, interpolated linearly to times t.

    Args:
        at: increasing times, ``(num,)`` or ``(*batch, num)``; outside, the end rows are held.
        rows: one for each of them.
        t: times, ``(*times, *batch or ones, 1)``.

    Returns:
        Values, and their derivatives in time.
    """
    index, _ = next_of(at, t.detach())
    index = index.clamp(min=1)
    low, high = (pick(at.to(t).unsqueeze(-1), i) for i in (index - 1, index))
    # Intervals without length belong to padding; there the later row counts.
    width = high - low
    part = torch.where(width > 0, (t - low) / torch.where(width > 0, width, 1.0), 1.0)
    slope = torch.where((width > 0) & (part >= 0) & (part <= 1), 1 / width, 0.0)
    first, last = pick(rows, index - 1), pick(rows, index)
    return torch.lerp(first, last, part.clamp(0, 1)), (last - first) * slope


def normal_of(parameters: Tensor) -> Distribution:
    """Independent normal law with mean and raw scale side by side."""
    mean, raw = parameters.chunk(2, -1)
    return Normal(mean, scale_of(raw)).to_event(1)
