"""Posterior process given by its marginals, as a Pyro distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import Distribution
from torch import Tensor

from flowvi.distributions._path_law import PathLaw
from flowvi.distributions._scoring import require_finite, with_value_gradient_only
from flowvi.distributions.path_draw import PathDraw
from flowvi.paths.base import Path
from flowvi.paths.times import TimeLaw
from flowvi.transforms.base import common_shape

__all__ = ["PathPosterior"]


class PathPosterior(PathLaw):
    r"""Posterior process q given by its marginals, never simulated.

    .. math:: x_0 \sim q(x_0 \mid y), \qquad dx = g(x, y, t)\,dt + b\,dW, \qquad
        x_t = F(\epsilon, t; y)

    One draw is one tensor with the start :math:`x_0`, a random time t, the state :math:`x_t`, the
    drift g and the diffusion b there, and the states at the observation times; ``unpack`` names
    them. Its score is :math:`\log q(x_0 \mid y)`. Together with the score of a
    :class:`PathPrior` at the same site,

    .. math:: \log p - \log q = \log p_0(x_0) - \log q(x_0 \mid y)
        - \frac{|f(x_t, t) - g|^2}{2 b^2 \rho(t)},

    it is an unbiased estimate of minus the divergence of the two processes, so stock ``SVI`` with
    ``Trace_ELBO`` maximises the evidence lower bound. The parts of one draw have the right
    marginals; they are not joint draws of one trajectory. It estimates the log-ratio, not the
    ratio: bounds that exponentiate weights refuse it (``is_log_ratio_estimate``). They can
    have a :class:`SDEPath`.

    Args:
        path: the marginals and b; the prior takes the same object.
        y: data that the path depends on, ``(*batch, *event)``, or None.
        start: for paths that need a start of their own (bridges, interpolants): its law
            :math:`q(x_0 \mid y)` with event shape ``(dim,)``; not to be given otherwise.
        at: observation times, ``(num_observed,)`` or ``(*batch, num_observed)``, in increasing
            order; the last time of ``times`` if left out.
        times: law of the random times; uniform on [0, 1], low-discrepancy, if left out.
        num_times: random times for each item; more lower the variance.
        y_event_dim: number of dims on the right of ``y`` that belong to one item.

    Shape:
        value: ``(*sample, *batch, size)``; log_prob: ``(*sample, *batch)``, in nats.

    Raises:
        TypeError: if ``path`` is no path.
        ValueError: if ``start`` is missing or superfluous, sizes or observation times do not fit.

    References:
        Bartosh, Vetrov and Naesseth (2025), SDE matching, arXiv:2502.02472, equations 13 to 18;
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        appendix I, for the times.

    Example:
        >>> from flowvi.paths import GaussianPath
        >>> path = GaussianPath(2, lambda y, t: t * y, lambda y, t: 1.1 - t, diffusion=0.5)
        >>> q = PathPosterior(path, torch.zeros(5, 2))
        >>> draw = q.unpack(q.rsample())
        >>> draw.start.shape, draw.state.shape, draw.end.shape
        (torch.Size([5, 2]), torch.Size([5, 1, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        path: Path,
        y: Tensor | None = None,
        *,
        start: Distribution | None = None,
        at: Sequence[float] | Tensor | None = None,
        times: TimeLaw | None = None,
        num_times: int = 1,
        y_event_dim: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        own = torch.Size() if y is None else y.shape[: y.dim() - y_event_dim]
        if start is not None:
            own = common_shape(own, start.batch_shape)
        super().__init__(path, own, at, times, num_times, validate_args)
        _check_start(path, y, start)
        self.y = y
        self.start = start
        self._path_gradient = False
        self.has_rsample = start is None or start.has_rsample

    def path_derivative(self, *, antithetic: bool = False) -> PathPosterior:
        """The same law whose score keeps only the gradient through the value.

        Args:
            antithetic: has no effect; times are spread evenly anyway.

        References:
            Roeder, Wu and Duvenaud (2017), Sticking the landing, arXiv:1703.09194, section 3.
        """
        return self._replace(_path_gradient=True)

    def log_prob(self, value: Tensor) -> Tensor:
        start, law = self.unpack(value).start, self.start
        if self._remembered is not None and self._remembered[0] is value:
            # A flow scores in one pass only the very tensor that this very object has drawn.
            _, start, law = self._remembered
        if self._path_gradient:
            log_q = with_value_gradient_only(lambda x: self._score(x, law), start, 1)
        else:
            log_q = self._score(start, law)
        return log_q.expand(common_shape(log_q.shape, self.batch_shape))

    def _score(self, start: Tensor, law: Distribution | None) -> Tensor:
        if law is not None:
            return law.log_prob(start)
        t = start.new_full((*start.shape[:-1], 1), self.times.low)
        return self.path.log_prob(start, t, self.y)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        shape = sample_shape + self.batch_shape
        start, law, y, observed = self._draw_fixed(sample_shape, shape)
        t, weight = self._random_times(shape, start)
        point = self.path.point(self.path.draw_noise(t.shape[:-1], start), t, y)
        over_times = (t, weight, point.state, point.drift, point.diffusion, observed)
        target = (point.data, point.noise) if self.path.has_target else ()
        parts = [p.movedim(0, -2) for p in (*over_times, *target)]
        value = self.layout.pack(PathDraw(start, *parts))
        if self._validate_args:
            require_finite(value, "path", "states and drifts")
        self._remembered = (value, start, law)
        return value

    def _draw_fixed(
        self, sample_shape: torch.Size, shape: torch.Size
    ) -> tuple[Tensor, Distribution | None, Tensor | None, Tensor]:
        """Start, its own law, what the path is conditioned on, and states at observations."""
        if self.start is None:
            like = self._kind()
            first = like.new_full((1, *shape, 1), self.times.low)
            times = torch.cat([first, self._observation_times(shape, like)])
            eps = self.path.draw_noise(times.shape[:-1], like)
            states = self.path.transform(eps, times, self.y)
            return states[0], None, self.y, states[1:]
        start, law = self._draw_start(sample_shape)
        ends = torch.cat([start, self.y.expand(start.shape)], -1)
        times = self._observation_times(shape, start)
        eps = self.path.draw_noise(times.shape[:-1], start)
        return start, law, ends, self.path.transform(eps, times, ends)

    def _kind(self) -> Tensor:
        """A tensor of the dtype and device of what is drawn."""
        own = self.path._like
        if self.y is None:
            return own
        return self.y if self.y.is_floating_point() else own.to(self.y.device)


def _check_start(path: Path, y: Tensor | None, start: Distribution | None) -> None:
    name = type(path).__name__
    if path.takes_start and start is None:
        raise ValueError(f"`start` must be given for {name}, which needs a law of x_0; got None.")
    if not path.takes_start and start is not None:
        raise ValueError(
            f"`start` must not be given for {name}, whose own marginal is the law of x_0."
        )
    if start is not None and start.event_shape != (path.dim,):
        raise ValueError(
            f"`start` must have event shape ({path.dim},); got {tuple(start.event_shape)}."
        )
    if path.takes_start and (y is None or y.shape[-1:] != (path.dim,)):
        got = None if y is None else f"shape {tuple(y.shape)}"
        raise ValueError(f"`y` must end with size {path.dim} (dim of the path); got {got}.")
