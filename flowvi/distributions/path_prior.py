"""Prior process: scores draws of a posterior process, and simulates its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import Distribution
from torch import Tensor

from flowvi.distributions._path_law import PathLaw
from flowvi.distributions._scoring import require_finite
from flowvi.distributions._simulate import euler_maruyama
from flowvi.distributions.path_draw import PathDraw, PathTerms
from flowvi.paths.base import Path
from flowvi.paths.prediction import PredictedDrift
from flowvi.paths.times import TimeLaw
from flowvi.transforms.base import common_shape

__all__ = ["PathPrior"]

Drift = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[[Drift, Drift, Tensor, Tensor], Tensor]


class PathPrior(PathLaw):
    r"""Prior process p, which scores draws of a :class:`PathPosterior` and simulates its own.

    .. math:: x_0 \sim p_0, \qquad dx = f(x, t)\,dt + b\,dW

    The score of a posterior's draw is :math:`\log p_0(x_0)` minus the estimated path integral
    (see :class:`PathPosterior`); ``log_prob_terms`` gives the two apart. A draw of its own
    simulates the process to the last observation time, so ``Predictive(model)`` generates.

    With a :class:`~flowvi.paths.BrownianBridge`, whose end is the data itself, the bound is
    formed against the untied Brownian motion,

    .. math:: \log p_0(x_0) + \log N(x_1; x_0, \sigma^2 I)
        - \frac{|f|^2 - 2 f \cdot g}{2 \sigma^2 \rho(t)},

    which with :math:`-\log q(x_0 \mid x_1)` bounds :math:`\log p(x_1)`; the model then needs no
    site for the data.

    Args:
        path: the very path of the posterior; gives b.
        drift: f, called with states ``(*batch, dim)`` and times ``(*batch, 1)`` where a leading
            dim of several times is part of the batch; or a :class:`~flowvi.paths.PredictedDrift`,
            whose difference to the posterior's drift float32 resolves better.
        start: law :math:`p_0` of the start, event shape ``(dim,)``.
        at: observation times, as for the posterior.
        times: law of the random times, as for the posterior; gives the ends of the process.
        num_times: random times for each item, as for the posterior.
        num_steps: equal steps of a simulation from the first to the last time; observation times
            and random times are added as further steps.
        solver: simulates, ``solver(drift, diffusion, start, times) -> states``, with times
            ``(num, *batch, 1)`` in increasing order along the first dim (equal ones occur), start
            ``(*batch, dim)`` and states ``(num, *batch, dim)`` at these times; Euler-Maruyama if
            left out. One of :mod:`flowvi.samplers` is given as
            ``lambda f, b, x, t: simulate(SDE(f, b), x, t.squeeze(-1), solver=...).states``.

    Shape:
        value: ``(*sample, *batch, size)``; log_prob: ``(*sample, *batch)``, in nats.

    Raises:
        TypeError: if ``path`` is no path.
        ValueError: if sizes or observation times do not fit, if a drift belongs to another path,
            or (with validation on) if a draw comes from a process with another diffusion or if
            drifts are not finite.

    References:
        Bartosh, Vetrov and Naesseth (2025), SDE matching, arXiv:2502.02472, equation 18; for the
        integral, Girsanov's theorem.

    Example:
        >>> from pyro.distributions import Normal
        >>> from flowvi.distributions import PathPosterior
        >>> from flowvi.paths import GaussianPath
        >>> path = GaussianPath(2, lambda y, t: t * y, lambda y, t: 1.1 - t, diffusion=0.5)
        >>> q = PathPosterior(path, torch.zeros(5, 2))
        >>> p = PathPrior(path, lambda x, t: -x, Normal(torch.zeros(2), 1.0).to_event(1))
        >>> (p.log_prob(q.rsample()) - q.log_prob(q.rsample())).shape
        torch.Size([5])
        >>> p.unpack(p.sample((3,))).end.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        path: Path,
        drift: Drift,
        start: Distribution,
        *,
        at: Sequence[float] | Tensor | None = None,
        times: TimeLaw | None = None,
        num_times: int = 1,
        num_steps: int = 100,
        solver: Solver = euler_maruyama,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(path, start.batch_shape, at, times, num_times, validate_args)
        if start.event_shape != (path.dim,):
            raise ValueError(
                f"`start` must have event shape ({path.dim},); got {tuple(start.event_shape)}."
            )
        if isinstance(drift, PredictedDrift) and drift.path is not path:
            raise ValueError("`drift` must be made for this `path`; got one of another path.")
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"`num_steps` must be an integer of at least 1; got {num_steps!r}.")
        self.drift = drift
        self.start = start
        self.num_steps = num_steps
        self.solver = solver
        self.has_rsample = start.has_rsample

    def log_prob(self, value: Tensor) -> Tensor:
        terms = self.log_prob_terms(value)
        return terms.start + terms.path

    def log_prob_terms(self, value: Tensor) -> PathTerms:
        """The score in two parts, for separate log lines: start, and path."""
        draw = self.unpack(value)
        # Times lead, so that what a drift closes over broadcasts against the items.
        draw = PathDraw(draw.start, *(_times_first(p) for p in list(vars(draw).values())[1:]))
        if self._validate_args:
            self._check_diffusion(draw)
        half = self._half_square(draw) / draw.diffusion.square()
        path = -(draw.weight * half).sum(-1).sum(0)
        if self.path.is_reference_bridge:
            path = path + self.path.reference_log_prob(draw.start, draw.observed[-1])
        start = self.start.log_prob(draw.start)
        shape = common_shape(start.shape, path.shape, self.batch_shape)
        return PathTerms(start.expand(shape), path.expand(shape))

    def _half_square(self, draw: PathDraw) -> Tensor:
        """Half of |f - g|^2 by coordinate; relative to drift zero for a bridge."""
        if isinstance(self.drift, PredictedDrift):
            gap = self.drift.difference(
                draw.state, draw.time, draw.data, draw.noise, draw.diffusion
            )
        else:
            f = self.drift(draw.state, draw.time)
            if self.path.is_reference_bridge:
                self._require_finite(f)
                return f * (f / 2 - draw.drift)
            gap = f - draw.drift
        self._require_finite(gap)
        return gap.square() / 2

    def _require_finite(self, drift: Tensor) -> None:
        if self._validate_args:
            require_finite(drift, "drift", "values")

    def _check_diffusion(self, draw: PathDraw) -> None:
        if draw.state.is_meta:
            return
        with torch.no_grad():
            own = self.path.diffusion(draw.state, draw.time).expand_as(draw.state)
            tolerance = 100 * torch.finfo(own.dtype).eps
            if not torch.allclose(own, draw.diffusion, rtol=tolerance, atol=0.0):
                worst = int(((own - draw.diffusion).abs() / own.abs()).argmax())
                raise ValueError(
                    "`path` must be the path of the posterior, with the same diffusion, since the "
                    "divergence of the two processes is infinite otherwise; got "
                    f"{float(own.flatten()[worst]):.6g} here and "
                    f"{float(draw.diffusion.flatten()[worst]):.6g} there."
                )

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        start, _ = self._draw_start(sample_shape)
        shape = start.shape[:-1]
        t, weight = self._random_times(shape, start)
        states = self._simulate(start, torch.cat([self._observation_times(shape, start), t]))
        observed, state = states.split((self.at.shape[-1], self.num_times))
        drift = self.drift(state, t)
        b = self.path.diffusion(state, t).expand_as(state)
        target = ()
        if self.path.has_target:
            target = self.path.target_of_drift(state, drift, t)
        parts = [p.movedim(0, -2) for p in (t, weight, state, drift, b, observed, *target)]
        value = self.layout.pack(PathDraw(start, *parts))
        if self._validate_args:
            require_finite(value, "drift", "states along the simulated path")
        return value

    def _simulate(self, start: Tensor, wanted: Tensor) -> Tensor:
        """States at the wanted times, which become steps of the grid."""
        grid = torch.linspace(
            self.times.low, self.times.high, self.num_steps + 1,
            dtype=start.dtype, device=start.device,
        )  # fmt: skip
        grid = grid.reshape(-1, *(1,) * start.dim()).expand(-1, *start.shape[:-1], 1)
        times, order = torch.cat([wanted, grid]).sort(dim=0, stable=True)
        states = self.solver(self.drift, self.path.diffusion, start, times)
        rank = order.argsort(0)[: len(wanted)]
        return torch.take_along_dim(states, rank, 0)


def _times_first(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.movedim(-2, 0)
