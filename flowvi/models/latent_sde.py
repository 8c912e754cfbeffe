"""Latent SDE: a stochastic process behind observed series, as a Pyro model and guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions import Distribution, Normal
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from flowvi.models._series import check_series, refine, settle_times
from flowvi.models._stored import StoredModule
from flowvi.models.latent_posteriors import LatentPosterior
from flowvi.models.marginals import scale_of
from flowvi.nn.mlp import MLP
from flowvi.paths.sde import SDE
from flowvi.samplers import EulerMaruyama, simulate

__all__ = ["GaussianDecoder", "LatentSDE", "LatentTerms", "NormalStart", "Prediction"]


class NormalStart(nn.Module):
    """Learned normal law of the state at the first time.

    Args:
        dim: number of dimensions.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))
        self.raw_scale = nn.Parameter(torch.zeros(dim))

    def forward(self) -> Distribution:
        return Normal(self.loc, scale_of(self.raw_scale)).to_event(1)


class GaussianDecoder(nn.Module):
    """Normal law of an observation with a network of the state as mean.

    Args:
        dim: number of dimensions of the state.
        data_dim: length of an observation.
        hidden_dims: hidden widths; empty for a linear map.
        scale: standard deviation; the start of a learned one if ``learn_scale``.
        learn_scale: learn one standard deviation for each coordinate.
        activation: makes the nonlinearity.
    """

    def __init__(
        self,
        dim: int,
        data_dim: int,
        hidden_dims: tuple[int, ...] = (),
        *,
        scale: float = 0.1,
        learn_scale: bool = False,
        activation: Callable[[], nn.Module] = nn.Softplus,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"`scale` must be positive; got {scale!r}.")
        self.data_dim = data_dim
        self.mean = MLP(dim, hidden_dims, data_dim, activation=activation, zero_last=False)
        log_scale = torch.full((data_dim,), float(scale)).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, states: Tensor) -> Distribution:
        return Normal(self.mean(states), self.log_scale.exp()).to_event(1)


@dataclass(frozen=True)
class LatentTerms:
    """The parts of the evidence lower bound of each series, in nats, averaged over draws.

    Args:
        data: expected log-likelihood of the observations, ``(B,)``.
        start: divergence of the start, ``log q(x_0) - log p(x_0)``, ``(B,)``.
        path: divergence of the path given its start, ``(B,)``.
    """

    data: Tensor
    start: Tensor
    path: Tensor

    @property
    def elbo(self) -> Tensor:
        """``data - start - path``, ``(B,)``."""
        return self.data - self.start - self.path


@dataclass(frozen=True)
class Prediction:
    """Draws at asked times.

    Args:
        states: latent states, ``(num_samples, B, num_times, dim)``.
        means: means of the observations given the states, ``(num_samples, B, num_times,
            data_dim)``.
    """

    states: Tensor
    means: Tensor


class LatentSDE(StoredModule):
    r"""Series that a latent process generates, with a guide over its paths.

    .. math:: x_0 \sim p_0, \qquad dx = f(x, t)\,dt + b(x, t)\,dW, \qquad
        y_i \sim p(y \mid x_{t_i})

    ``model`` and ``guide`` are a pair for stock ``SVI`` and for :func:`flowvi.infer.fit`; each
    instance has names of its own in Pyro's parameter store. The guide's posterior is simulated
    (:class:`SimulatedLatent`) or simulation-free (:class:`SimulationFreeLatent`), with the
    prior's diffusion by construction. The process without noise gives a latent ODE.

    Args:
        process: prior process, whose first time is that of the first observation.
        likelihood: maps states ``(*batch, T, dim)`` to a law with batch shape ``(*batch, T)`` and
            event shape ``(data_dim,)``; it says its ``data_dim``.
        posterior: representation of the posterior.
        start: its call gives the law :math:`p_0`, event shape ``(dim,)``.
        num_total: number of series in all, where ``data`` is a minibatch.

    Shape:
        data: ``(B, T, data_dim)``; times: ``(T,)``, or ``(B, T)`` for irregular series; mask:
        ``(B, T)``, true where there is an observation. Data at masked places do not matter, nor
        do times after the last observation of a series or before its first.

    Raises:
        ValueError: if shapes do not match; with Pyro's validation on also if times are not
            sorted or observed data are not finite.

    References:
        Li, Wong, Chen and Duvenaud (2020), Scalable gradients for stochastic differential
        equations, arXiv:2001.01328; Bartosh, Vetrov and Naesseth (2025), SDE matching,
        arXiv:2502.02472.

    Example:
        >>> from flowvi.models import DriftMLP, RecurrentEncoder, SimulatedLatent
        >>> posterior = SimulatedLatent(DriftMLP(2, (8,), 3), RecurrentEncoder(1, 3), 2)
        >>> latent = LatentSDE(
        ...     SDE(DriftMLP(2, (8,)), 0.5), GaussianDecoder(2, 1), posterior, NormalStart(2))
        >>> data, times = torch.zeros(4, 6, 1), torch.linspace(0, 1, 6)
        >>> latent.terms(data, times).elbo.shape
        torch.Size([4])
    """

    def __init__(
        self,
        process: SDE,
        likelihood: nn.Module,
        posterior: LatentPosterior,
        start: nn.Module,
        *,
        num_total: int | None = None,
    ) -> None:
        super().__init__()
        self.process = process
        self.likelihood = likelihood
        self.posterior = posterior
        self.start = start
        self.num_total = num_total

    def model(
        self,
        data: Tensor | None,
        times: Tensor,
        mask: Tensor | None = None,
        *,
        num_series: int = 1,
    ) -> Tensor:
        """The generative model; without data it simulates.

        Args:
            data: observations, or None.
            times: their times.
            mask: which of them are there.
            num_series: series to generate where neither data nor times say how many.

        Returns:
            States at the times, ``(*batch, T, dim)``.
        """
        times = self._settle(data, times, mask)
        self._register()
        with self._plate(data, times, mask, num_series):
            law = self.posterior.prior(self.process, self.start(), times)
            value = pyro.sample("path", law)
            states = self.posterior.observed(law, value)
            observed = self.likelihood(states)
            if mask is not None:
                observed = observed.mask(mask)
                data = None if data is None else torch.where(mask.unsqueeze(-1), data, 0.0)
            pyro.sample("data", observed.to_event(1), obs=data)
        return states

    def guide(
        self, data: Tensor, times: Tensor, mask: Tensor | None = None, *, num_series: int = 1
    ) -> Tensor:
        """The posterior over paths."""
        if data is None:
            raise ValueError("`data` must be given to the guide, which encodes it; got None.")
        times = self._settle(data, times, mask)
        self._register()
        with self._plate(data, times, mask, num_series):
            law = self.posterior.law(self.process, data, times, mask)
            return pyro.sample("path", law)

    def terms(
        self,
        data: Tensor,
        times: Tensor,
        mask: Tensor | None = None,
        *,
        num_samples: int = 1,
    ) -> LatentTerms:
        """Data term, divergence of the start and divergence of the path, apart.

        Args:
            data: observations.
            times: their times.
            mask: which of them are there.
            num_samples: draws to average over.
        """
        settled = self._settle(data, times, mask)
        posterior = self.posterior.law(self.process, data, settled, mask)
        prior = self.posterior.prior(self.process, self.start(), settled)
        value = posterior.rsample((num_samples,))
        scores = prior.log_prob_terms(value)
        observed = self.likelihood(self.posterior.observed(posterior, value))
        clean = data if mask is None else torch.where(mask.unsqueeze(-1), data, 0.0)
        fit = observed.log_prob(clean)
        fit = fit if mask is None else torch.where(mask, fit, torch.zeros_like(fit))
        start = posterior.log_prob(value) - scores.start
        return LatentTerms(fit.sum(-1).mean(0), start.mean(0), -scores.path.mean(0))

    @torch.no_grad()
    def interpolate(
        self,
        data: Tensor,
        times: Tensor,
        at: Tensor,
        mask: Tensor | None = None,
        *,
        num_samples: int = 1,
    ) -> Prediction:
        """Draws of the posterior at other times.

        After the last observation the posterior's own drift goes on, which is what an encoder
        with one context for all times is trained for; :meth:`forecast` goes on with the prior.

        Args:
            data: observations.
            times: their times.
            at: times to draw at, sorted, ``(num_times,)`` or ``(B, num_times)``.
            mask: which observations are there.
            num_samples: number of draws.
        """
        settled = self._settle(data, times, mask)
        self._check_at(at, settled[..., :1])
        states = self.posterior.draw(self.process, (data, settled, mask), at.to(data), num_samples)
        return Prediction(states, self.likelihood(states).mean)

    @torch.no_grad()
    def forecast(
        self,
        data: Tensor,
        times: Tensor,
        at: Tensor,
        mask: Tensor | None = None,
        *,
        num_samples: int = 1,
        steps_per_interval: int = 5,
    ) -> Prediction:
        """Draws after the last observation: the posterior's last state, moved on by the prior.

        Args:
            data: observations.
            times: their times.
            at: times to forecast, sorted, none before the last observation.
            mask: which observations are there.
            num_samples: number of draws.
            steps_per_interval: steps of the simulation between two of the times.
        """
        settled = self._settle(data, times, mask)
        self._check_at(at, settled[..., -1:])
        last = settled[..., -1:]
        end = self.posterior.draw(self.process, (data, settled, mask), last, num_samples)
        ahead = at.to(data)
        if ahead.dim() != last.dim():
            ahead, last = (t.expand(len(data), -1) for t in (ahead, last))
        grid = refine(torch.cat([last, ahead], -1), steps_per_interval).movedim(-1, 0)
        solver = getattr(self.posterior, "solver", EulerMaruyama())
        path = simulate(self.process, end.squeeze(-2), grid, solver=solver)
        states = path.states[steps_per_interval::steps_per_interval].movedim(0, -2)
        return Prediction(states, self.likelihood(states).mean)

    def _plate(
        self, data: Tensor | None, times: Tensor, mask: Tensor | None, num_series: int
    ) -> pyro.plate:
        known = [len(t) for t in (data, mask) if t is not None]
        known += [len(times)] if times.dim() == 2 else []
        size = known[0] if known else num_series
        if self.num_total is None:
            return pyro.plate("series", size)
        like = next(self.parameters())
        index = torch.arange(size, device=like.device)
        return pyro.plate("series", self.num_total, subsample=index)

    def _settle(self, data: Tensor | None, times: Tensor, mask: Tensor | None) -> Tensor:
        values = is_validation_enabled() and not torch.compiler.is_compiling()
        check_series(data, times, mask, self.likelihood.data_dim, values=values)
        like = next(self.parameters()) if data is None else data
        return settle_times(times, mask, like)

    def _check_at(self, at: Tensor, first: Tensor) -> None:
        if at.is_meta or not is_validation_enabled():
            return
        if bool((at.diff(dim=-1) < 0).any()) or bool((at[..., :1] < first.to(at)).any()):
            raise ValueError(
                "`at` must hold sorted times from the first (for a forecast: the last) "
                f"observation on; got {float(at.min()):g} first and steps down to "
                f"{float(at.diff(dim=-1).min()) if at.shape[-1] > 1 else 0.0:g}."
            )
