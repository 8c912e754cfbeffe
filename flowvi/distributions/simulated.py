"""Simulated posterior and prior paths, with the likelihood ratio of one to the other."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import constraints

from flowvi.distributions._process_law import ProcessLaw, check_grid
from flowvi.distributions._scoring import require_finite
from flowvi.distributions.path_draw import PathTerms
from flowvi.distributions.simulated_draw import SimulatedDraw, SimulatedLayout
from flowvi.paths.sde import SDE
from flowvi.transforms.base import common_shape

__all__ = ["LogRatio", "SimulatedPosterior", "SimulatedPrior"]

# Called as simulator(sde, start, times); gives an object with states, drift, diffusion and
# increments, as flowvi.samplers.Trajectory.
Simulator = Callable[[SDE, Tensor, Tensor], Any]


class LogRatio(enum.Enum):
    r"""What of :math:`\log dq/dp` along a path is scored, with :math:`u = (g - f) / b`.

    ``KL`` is :math:`\int \tfrac12 |u|^2 dt`. Its mean is the divergence; it varies little, but it
    is an estimate of the log-ratio only, and bounds that exponentiate log-weights refuse it.
    ``PATHWISE`` is :math:`\int u\,dW + \int \tfrac12 |u|^2 dt`, the log-ratio itself, valid in
    every bound. Both are sums over the steps, evaluated at their starts.
    """

    KL = enum.auto()
    PATHWISE = enum.auto()


class _SimulatedLaw(ProcessLaw):
    """What both laws share: start, grid, layout of a draw."""

    support = constraints.real_vector

    def __init__(
        self,
        sde: SDE,
        start: Distribution,
        times: Tensor,
        simulator: Simulator,
        log_ratio: LogRatio,
        validate_args: bool | None,
    ) -> None:
        _check(sde, start, times, simulator, log_ratio)
        self.sde = sde
        self.start = start
        self.times = times
        self.simulator = simulator
        self.log_ratio = log_ratio
        self.has_rsample = start.has_rsample
        increments = log_ratio is LogRatio.PATHWISE
        steps = times.shape[-1] - 1
        noisy = not sde.is_deterministic
        self.layout = SimulatedLayout(start.event_shape[0], steps, noisy, noisy and increments)
        batch_shape = common_shape(start.batch_shape, times.shape[:-1])
        super().__init__(batch_shape, torch.Size([self.layout.size]), validate_args=validate_args)
        if self._validate_args:
            _check_order(times)

    @property
    def is_log_ratio_estimate(self) -> bool:
        """Whether a score may only be used as it is, not in an exponential."""
        return self.log_ratio is LogRatio.KL and not self.sde.is_deterministic

    def unpack(self, value: Tensor) -> SimulatedDraw:
        """The named parts of a drawn value: states, drift, diffusion, increments."""
        return self.layout.unpack(value)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        start, _ = self._draw_start(sample_shape)
        times = self.times.to(start).movedim(-1, 0)
        path = self.simulator(self.sde, start, times)
        if self._validate_args:
            require_finite(path.states, "drift", "states along the simulated path")
        return self.layout.pack(path.states, path.drift, path.diffusion, path.increments)


class SimulatedPosterior(_SimulatedLaw):
    r"""Posterior process q that is simulated; it has the prior's diffusion by construction.

    .. math:: x_0 \sim q(x_0 \mid y), \qquad dx = g(x, t)\,dt + b(x, t)\,dW

    One draw is one tensor with the states at all times of the grid, the drift g and the diffusion
    b at the start of every step and, for ``LogRatio.PATHWISE``, the Brownian increments;
    ``unpack`` names them. Its score is :math:`\log q(x_0 \mid y)`, the density of the start
    relative to the law of this very process given its start. The score of a
    :class:`SimulatedPrior` at the same site is the prior's density relative to the same
    reference, so that the difference of the two is minus the log-ratio of posterior to prior, and
    stock ``SVI`` with ``Trace_ELBO`` maximises the evidence lower bound.

    Drift, diffusion and increments in a draw depend on the posterior's parameters at a fixed
    path, so of the estimators that reweight the gradient of a draw (DReG) none is valid; IWAE is,
    and :class:`SDEPath` allows all of them.

    Args:
        process: the prior's process, from which the diffusion comes.
        drift: g; a function ``g(x, t)`` or a :class:`~flowvi.paths.Drift`. ``None`` for a process
            without noise, whose drift is the prior's.
        start: law :math:`q(x_0 \mid y)` of the state at the first time, event shape ``(dim,)``.
        times: grid, not decreasing, ``(num_steps + 1,)`` or ``(*batch, num_steps + 1)`` for a
            grid of each item. Steps of length zero (padding) change nothing and score nothing.
        simulator: ``simulator(sde, start, times)``, such as :func:`flowvi.samplers.simulate` or
            a partial of it with a solver or segments.
        log_ratio: which log-ratio the draws are for; the prior's must be the same.

    Shape:
        value: ``(*sample, *batch, size)``; log_prob: ``(*sample, *batch)``, in nats.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes do not match, or (with validation on) times are not sorted or a path
            leaves the finite numbers.

    References:
        Li, Wong, Chen and Duvenaud (2020), Scalable gradients for stochastic differential
        equations, arXiv:2001.01328, section 5; Archambeau et al. (2007), Gaussian process
        approximations of stochastic differential equations, equation 8.

    Example:
        >>> from pyro.distributions import Normal
        >>> from flowvi.samplers import simulate
        >>> prior, ts = SDE(lambda x, t: -x, 0.5), torch.linspace(0, 1, 21)
        >>> start = Normal(torch.zeros(4, 2), 1.0).to_event(1)
        >>> q = SimulatedPosterior(prior, lambda x, t: 1 - x, start, ts, simulator=simulate,
        ...                        log_ratio=LogRatio.KL)
        >>> q.unpack(q.rsample()).states.shape
        torch.Size([4, 21, 2])
    """

    # Estimators that reweight the gradient of a draw look for this.
    draws_hold_parameters = True

    def __init__(
        self,
        process: SDE,
        drift: Callable[[Tensor, Tensor], Tensor] | None,
        start: Distribution,
        times: Tensor,
        *,
        simulator: Simulator,
        log_ratio: LogRatio,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(process, SDE) and process.is_deterministic != (drift is None):
            raise ValueError(
                "`drift` must be given exactly where `process` has a diffusion, since without "
                "noise a path of another drift has no density under the prior; got "
                f"{'none' if drift is None else 'one'}."
            )
        sde = process if drift is None else process.with_drift(drift)
        super().__init__(sde, start, times, simulator, log_ratio, validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        log_q = self.start.log_prob(self.unpack(value).start)
        return log_q.expand(common_shape(log_q.shape, self.batch_shape))


class SimulatedPrior(_SimulatedLaw):
    r"""Prior process p, which scores draws of a :class:`SimulatedPosterior`, and simulates.

    .. math:: \log p_0(x_0) - \sum_k \big( u_k \cdot \Delta W_k + \tfrac12 |u_k|^2 \Delta t_k
        \big), \qquad u_k = (g_k - f(x_k, t_k)) / b_k

    for ``LogRatio.PATHWISE``; ``LogRatio.KL`` leaves the first term of the sum out. With
    Euler-Maruyama steps the pathwise sum is exactly the log-ratio of the two discretised
    processes, so bounds hold at any step size. ``log_prob_terms`` gives start and path apart. A
    draw of its own simulates the prior, so ``Predictive(model)`` generates.

    Args:
        process: the prior's process.
        start: law :math:`p_0` of the state at the first time, event shape ``(dim,)``.
        times: grid, as for the posterior.
        simulator: as for the posterior.
        log_ratio: which log-ratio is scored; the posterior's must be the same.
        num_pieces: pieces of the path in which the prior's drift is evaluated; more than one:
            nothing of them is kept for the backward pass, which makes them again.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes do not match, or (with validation on) times are not sorted, the
            draw comes from a process with another diffusion, or drifts are not finite.

    References:
        Girsanov's theorem, as in Li, Wong, Chen and Duvenaud (2020), arXiv:2001.01328, equation
        10 (for the divergence); Tzen and Raginsky (2019), arXiv:1905.09883, section 4.

    Example:
        >>> from pyro.distributions import Normal
        >>> from flowvi.samplers import simulate
        >>> start = Normal(torch.zeros(2), 1.0).to_event(1)
        >>> p = SimulatedPrior(SDE(lambda x, t: -x, 0.5), start, torch.linspace(0, 1, 21),
        ...                    simulator=simulate, log_ratio=LogRatio.PATHWISE)
        >>> p.log_prob(p.sample((3,))).shape
        torch.Size([3])
    """

    def __init__(
        self,
        process: SDE,
        start: Distribution,
        times: Tensor,
        *,
        simulator: Simulator,
        log_ratio: LogRatio,
        num_pieces: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(process, start, times, simulator, log_ratio, validate_args)
        self.num_pieces = num_pieces

    def log_prob(self, value: Tensor) -> Tensor:
        terms = self.log_prob_terms(value)
        return terms.start + terms.path

    def log_prob_terms(self, value: Tensor) -> PathTerms:
        """The score in two parts, for separate log lines: start, and minus the log-ratio."""
        draw = self.unpack(value)
        start = self.start.log_prob(draw.start)
        path = torch.zeros_like(start) if draw.diffusion is None else self._path_term(draw)
        shape = common_shape(start.shape, path.shape, self.batch_shape)
        return PathTerms(start.expand(shape), path.expand(shape))

    def _path_term(self, draw: SimulatedDraw) -> Tensor:
        x, g, b = (part.movedim(-2, 0) for part in (draw.states, draw.drift, draw.diffusion))
        x, t = x[:-1], self._times_along(x)
        if self._validate_args:
            self._check_diffusion(x, t[:-1], b)
        f = self.sde.drift_along(x, t[:-1], num_pieces=self.num_pieces)
        if self._validate_args:
            require_finite(f, "drift", "values")
        u, dt = (g - f) / b, t.diff(dim=0)
        weight = 0.5 * u * dt
        if draw.increments is not None:
            weight = weight + draw.increments.movedim(-2, 0)
        return -(u * weight).sum((0, -1))

    def _times_along(self, x: Tensor) -> Tensor:
        """The grid as ``(num_steps + 1, *batch or ones, 1)``."""
        times = self.times.to(x).movedim(-1, 0)
        return times.reshape(len(times), *(1,) * (x.dim() - 1 - times.dim()), *times.shape[1:], 1)

    def _check_diffusion(self, x: Tensor, t: Tensor, b: Tensor) -> None:
        if x.is_meta or torch.compiler.is_compiling():
            return
        with torch.no_grad():
            own = self.sde.diffusion_given(x, self.sde.embed_diffusion(t)).expand_as(b)
            tolerance = 1e3 * torch.finfo(own.dtype).eps
            if bool(own.isfinite().all()) and not torch.allclose(own, b, rtol=tolerance):
                worst = int(((own - b).abs() / own.abs()).argmax())
                raise ValueError(
                    "`process` must be that of the posterior, with the same diffusion, since the "
                    "divergence of the two processes is infinite otherwise; got "
                    f"{float(own.flatten()[worst]):.6g} here and "
                    f"{float(b.flatten()[worst]):.6g} there."
                )


def _check(
    sde: SDE, start: Distribution, times: Tensor, simulator: Simulator, log_ratio: LogRatio
) -> None:
    if not isinstance(sde, SDE):
        raise TypeError(f"`process` must be an SDE; got {type(sde).__name__}.")
    if not isinstance(log_ratio, LogRatio):
        raise TypeError(f"`log_ratio` must be a LogRatio; got {log_ratio!r}.")
    if not callable(simulator):
        raise TypeError(
            "`simulator` must be callable, such as flowvi.samplers.simulate; got "
            f"{type(simulator).__name__}."
        )
    check_grid(times, start)


def _check_order(times: Tensor) -> None:
    if times.is_meta or torch.compiler.is_compiling():
        return
    steps = times.diff(dim=-1)
    if not bool(((steps >= 0) & steps.isfinite()).all()):
        worst = float(steps.nan_to_num(nan=-torch.inf).min())
        raise ValueError(
            f"`times` must be finite and not decrease along the last dim; got a step of {worst:g}."
        )
