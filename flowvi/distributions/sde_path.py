"""A whole path on a time grid, with its exact Euler-Maruyama log-probability."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import constraints

from flowvi.distributions._process_law import ProcessLaw, check_grid
from flowvi.distributions._scoring import require_finite, with_value_gradient_only
from flowvi.distributions._simulate import euler_maruyama
from flowvi.distributions.path_draw import PathTerms
from flowvi.paths.diffusion import Diffusion, as_diffusion
from flowvi.paths.gaussian import normal_log_prob
from flowvi.transforms.base import common_shape

__all__ = ["SDEPath"]


class SDEPath(ProcessLaw):
    r"""Path of an SDE at given times, with Euler-Maruyama transitions.

    .. math:: \log p(x) = \log p_0(x_{t_0}) + \sum_k
        \log N\big(x_{t_{k+1}};\; x_{t_k} + f \Delta_k,\; b^2 \Delta_k\big)

    A density like any other: reparameterised, valid in every bound (IWAE, Renyi, and the rest).
    It is that of the discretised process; a divergence between two such paths tends to that of
    the processes at order 1 in the step. Give posterior and prior one diffusion, with
    ``prior.with_drift(...)``: with two, the divergence grows without bound as the grid is refined.
    Drawing takes one drift call per step, scoring one in all.

    Args:
        times: grid, increasing, at least two times; ``(num_times,)``, or ``(*batch, num_times)``
            for a grid of each item.
        drift: f, called with states ``(num, *batch, dim)`` and times ``(num, *batch, 1)`` in
            scoring, and without the first dim in drawing.
        diffusion: b; a positive number, a function of time, or a
            :class:`~flowvi.paths.Diffusion`.
        start: law of the state at the first time, event shape ``(dim,)``.
        mask: which times of each item count, like ``times``; padding comes last. Padded states
            repeat the last one that counts and are not scored.

    Shape:
        value: ``(*sample, *batch, num_times, dim)``; log_prob: ``(*sample, *batch)``, in nats.

    Raises:
        ValueError: if times do not increase, shapes disagree, padding does not come last, or
            (with validation on) drifts or drawn states are not finite.

    References:
        Kloeden and Platen (1992), Numerical solution of stochastic differential equations,
        section 10.2; Elerian, Chib and Shephard (2001), Likelihood inference for discretely
        observed nonlinear diffusions, equation 5.

    Example:
        >>> from pyro.distributions import Normal
        >>> start = Normal(torch.zeros(2), 1.0).to_event(1)
        >>> prior = SDEPath(torch.linspace(0, 1, 11), lambda x, t: -x, 0.5, start)
        >>> posterior = prior.with_drift(lambda x, t: 1 - x)
        >>> x = posterior.rsample((3,))
        >>> x.shape, prior.log_prob(x).shape
        (torch.Size([3, 11, 2]), torch.Size([3]))
    """

    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        times: Tensor,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: float | Tensor | Callable | Diffusion,
        start: Distribution,
        *,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_grid(times, start)
        _check_mask(times, mask)
        self.times = times
        self.times_mask = mask
        self.drift = drift
        self.diffusion = as_diffusion(diffusion)
        self.start = start
        self.has_rsample = start.has_rsample
        self._path_gradient = False
        batch_shape = common_shape(start.batch_shape, times.shape[:-1])
        event_shape = torch.Size([times.shape[-1], *start.event_shape])
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if self._validate_args and not times.is_meta:
            _check_order(times, mask)

    def with_drift(
        self, drift: Callable[[Tensor, Tensor], Tensor], start: Distribution | None = None
    ) -> SDEPath:
        """Another process on the same grid with the same diffusion.

        Args:
            drift: its drift.
            start: law of its start; the same if left out.
        """
        return SDEPath(
            self.times,
            drift,
            self.diffusion,
            self.start if start is None else start,
            mask=self.times_mask,
            validate_args=self._validate_args,
        )

    def path_derivative(self, *, antithetic: bool = False) -> SDEPath:
        """The same law whose log-density keeps only the gradient through the value.

        Args:
            antithetic: has no effect.
        """
        return self._replace(_path_gradient=True)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._path_gradient:
            return with_value_gradient_only(lambda v: sum(self.log_prob_terms(v)), value, 2)
        terms = self.log_prob_terms(value)
        return terms.start + terms.path

    def log_prob_terms(self, value: Tensor) -> PathTerms:
        """The log-density in two parts: start, and transitions."""
        if self._validate_args and not value.is_meta:
            self._validate_sample(value)
        x = value.movedim(-2, 0)
        t, counted = self._grid(x.shape[1:-1], value)
        old, new, t_old = x[:-1], x[1:], t[:-1]
        dt = t.diff(dim=0)
        if counted is not None:
            dt = torch.where(counted, dt, torch.ones_like(dt))
        f = self.drift(old, t_old)
        if self._validate_args:
            require_finite(f, "drift", "values")
        path = normal_log_prob(new, old + f * dt, self.diffusion(old, t_old) * dt.sqrt())
        if counted is not None:
            path = torch.where(counted.squeeze(-1), path, torch.zeros_like(path))
        path, start = path.sum(0), self.start.log_prob(x[0])
        shape = common_shape(path.shape, start.shape, self.batch_shape)
        return PathTerms(start.expand(shape), path.expand(shape))

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        start, _ = self._draw_start(sample_shape)
        times, _ = self._grid(start.shape[:-1], start)
        value = euler_maruyama(self.drift, self.diffusion, start, times).movedim(0, -2)
        if self._validate_args:
            require_finite(value, "drift", "states along the simulated path")
        return value

    def _grid(self, shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Times ``(num_times, *shape, 1)``, and which steps count (None for all)."""
        times, counted = self.times.to(like), None
        if self.times_mask is not None:
            # A padded time repeats the last one, so a padded step has no length.
            padding = times.new_full((), -torch.inf)
            times = torch.where(self.times_mask, times, padding).cummax(-1).values
            counted = self.times_mask[..., 1:].expand(*shape, -1).movedim(-1, 0).unsqueeze(-1)
        return times.expand(*shape, -1).movedim(-1, 0).unsqueeze(-1), counted


def _check_mask(times: Tensor, mask: Tensor | None) -> None:
    if mask is not None and (mask.shape != times.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"`mask` must be boolean and shaped like `times`, {tuple(times.shape)}; got "
            f"{mask.dtype}, {tuple(mask.shape)}."
        )


def _check_order(times: Tensor, mask: Tensor | None) -> None:
    steps = times.diff(dim=-1)
    good = (steps > 0) & steps.isfinite()
    if mask is not None:
        if bool((mask[..., 1:] & ~mask[..., :-1]).any()) or not bool(mask[..., :1].all()):
            raise ValueError(
                "`mask` must be true first and then false, with the first time counted; got "
                "padding before a time that counts."
            )
        good |= ~mask[..., 1:]
    if not bool(good.all()):
        worst = steps.masked_fill(good, torch.inf).nan_to_num(nan=-torch.inf).min()
        raise ValueError(
            f"`times` must be finite and increase along the last dim; got a step of {worst:.6g}."
        )
