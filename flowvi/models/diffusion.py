"""Diffusion models as model-and-guide pairs: one class, whatever the path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import torch
from pyro.distributions import Distribution, Normal
from torch import Tensor, nn
from torch.distributions import kl_divergence

from flowvi.distributions import Flow, PathPosterior, PathPrior, StandardNormal
from flowvi.models.data_ends import DataEnd, log_volume
from flowvi.models.ode_likelihood import ODELikelihood, flow_likelihood, standard_error
from flowvi.models.pair import ELBOTerms, ModelGuidePair, check_context
from flowvi.paths import Path, TimeLaw, UniformTimes
from flowvi.samplers import FlowField, GenerativeProcess, Sampler, sample_path, uniform_times
from flowvi.transforms import Continuous, Divergence, Solver

__all__ = ["DiffusionModel", "DiffusionTerms"]


@dataclass(frozen=True)
class DiffusionTerms(ELBOTerms):
    """The parts of the evidence lower bound of each item, in nats, averaged over draws.

    Args:
        log_likelihood: expected log-density of the item given its last state, ``(B,)``.
        divergences: "prior" (of the state at the noise end) and "diffusion" (of everything in
            between), ``(B,)`` each.
        num_pixels: numbers that make an item.
    """

    num_pixels: int = 1

    @property
    def reconstruction(self) -> Tensor:
        """Minus the expected log-likelihood, ``(B,)``."""
        return -self.log_likelihood

    @property
    def prior(self) -> Tensor:
        """Divergence of the state at the noise end, ``(B,)``."""
        return self.divergences["prior"]

    @property
    def diffusion(self) -> Tensor:
        """Divergence of the path given its start, ``(B,)``."""
        return self.divergences["diffusion"]

    def bits_per_dim(self) -> dict[str, Tensor]:
        """Means over the items of the parts and of minus the bound, in bits per number."""
        parts = {
            "prior": self.prior,
            "reconstruction": self.reconstruction,
            "diffusion": self.diffusion,
            "total": -self.elbo,
        }
        return {name: p.mean() / (self.num_pixels * math.log(2)) for name, p in parts.items()}


class DiffusionModel(ModelGuidePair):
    r"""Generative model whose latent is a path from noise to data.

    .. math:: z_0 \sim N(0, s^2), \quad dz = f(z, t)\,dt + b(t)\,dW, \quad x \sim p(x \mid z_1)

    The guide's posterior is a path that is never simulated (:class:`PathPosterior`); stock
    ``SVI`` raises the bound, one random time for each item and step. The latent site is "z".
    A subclass writes ``drift`` and ``process``; :class:`VDM`, :class:`DiffEnc` and
    :class:`NeuralFlowDiffusion` differ in the path they are given.

    Args:
        path: marginals of the posterior.
        network: predicts from states and times; a :class:`~flowvi.nn.Denoiser`, or any module
            ``network(x, t)`` with ``network(x, t, context)`` where its ``context_dim`` is not 0.
        end: law of an item given its last state.
        times: law of the random times, and the ends of the process; uniform on [0, 1] if left
            out.
        num_times: random times for each item and step.
        start_scale: standard deviation s of the first state under the model.
        drop_context: probability with which training sees a row of zeros in place of the
            context, as classifier-free guidance needs.
        num_total: number of items in all, where ``x`` is a minibatch.

    Shape:
        x: ``(B, *event_shape)``; context: ``(B, context_dim)``.

    Raises:
        ValueError: if sizes do not fit; with Pyro's validation on also if items are out of range.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630;
        Ho and Salimans (2022), Classifier-free diffusion guidance, arXiv:2207.12598.
    """

    def __init__(
        self,
        path: Path,
        network: nn.Module,
        end: DataEnd,
        *,
        times: TimeLaw | None = None,
        num_times: int = 1,
        start_scale: float = 1.0,
        drop_context: float = 0.1,
        num_total: int | None = None,
    ) -> None:
        super().__init__(num_total=num_total)
        if path.dim != end.num_pixels:
            raise ValueError(
                f"`path` must have dim {end.num_pixels}, the numbers that make an item; got "
                f"{path.dim}."
            )
        if not 0 <= drop_context <= 1:
            raise ValueError(f"`drop_context` must lie in [0, 1]; got {drop_context!r}.")
        self.path = path
        self.network = network
        self.end = end
        self.times = UniformTimes() if times is None else times
        self.num_times = num_times
        self.drop_context = drop_context
        self.context_dim = getattr(network, "context_dim", 0)
        self.start = StandardNormal(path.dim, temperature=start_scale)

    # What a new path model writes.

    def drift(self, context: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Prior drift given a context, as :class:`PathPrior` takes it."""
        raise NotImplementedError

    def trained_drift(self, context: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The drift as training takes it; differs where the integrand is weighted."""
        return self.drift(context)

    def process(
        self, context: Tensor | None = None, *, guidance: float = 0.0
    ) -> GenerativeProcess:
        r"""What samplers see of the model.

        Args:
            context: what items are conditioned on, ``(num_items, context_dim)``.
            guidance: w of :math:`(1 + w)\,f(x, t, c) - w\,f(x, t)`; 0 for none.
        """
        raise NotImplementedError

    # The pair.

    def posterior(self, x: Tensor, num_times: int | None = None) -> PathPosterior:
        """Law of the path of each item."""
        y = self.end.encode(x, self.start.loc)
        number = self.num_times if num_times is None else num_times
        return PathPosterior(self.path, y, times=self.times, num_times=number)

    def prior(self, context: Tensor | None = None, num_times: int | None = None) -> PathPrior:
        """Law of a path under the model."""
        return self._prior(self.drift(context), num_times)

    def generate(self, context: Tensor | None) -> Distribution:
        prior = self._prior(self.trained_drift(self._dropped(context)), None)
        value = pyro.sample("z", prior)
        return self.law_at_end(prior.unpack(value).end)

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        pyro.sample("z", self.posterior(x))

    def check(self, x: Tensor | None, context: Tensor | None, *, values: bool) -> Tensor | None:
        check_context(context, self.context_dim, None if x is None else len(x))
        if x is None:
            return None
        self.end.check(x, values=values)
        return x.to(self.start.loc.dtype)

    def law_at_end(self, state: Tensor) -> Distribution:
        """Law of an item given its last state ``(*batch, num_pixels)``."""
        values = self.path.schedule(state.new_full((1,), self.times.high))
        return self.end.at(state, values.alpha, values.sigma)

    # What it is used for.

    def terms(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        num_particles: int = 1,
        num_times: int | None = None,
    ) -> DiffusionTerms:
        """Prior, reconstruction and diffusion, apart, in the module's own mode.

        Args:
            x: items.
            context: what they are conditioned on.
            num_particles: draws to average over.
            num_times: random times for each draw. A chain takes every layer once if left out.
        """
        x = self._checked(x, context)
        number = (
            getattr(self.path, "num_layers", self.num_times) if num_times is None else num_times
        )
        posterior, prior = self.posterior(x, number), self.prior(context, number)
        value = posterior.rsample((num_particles,))
        scores = prior.log_prob_terms(value)
        data = self.law_at_end(posterior.unpack(value).end).log_prob(x)
        divergences = {
            "prior": self._divergence_of_start(posterior, value, scores.start),
            "diffusion": -scores.path.mean(0),
        }
        return DiffusionTerms(data.mean(0), divergences, self.end.num_pixels)

    @torch.no_grad()
    def sample(
        self,
        num_items: int = 1,
        context: Tensor | None = None,
        *,
        sampler: Sampler | None = None,
        num_steps: int | None = None,
        guidance: float = 0.0,
        grid: Callable = uniform_times,
        progress_bar: bool = False,
    ) -> Tensor:
        """Draws of the model: ``(num_items, *event_shape)``, or one for each row of context.

        Args:
            num_items: number of draws.
            context: what they are conditioned on, ``(num_items, context_dim)``.
            sampler: how states are moved; :meth:`default_sampler` if left out.
            num_steps: its steps; the layers of a chain, else 100, if left out.
            guidance: how much more than its share the context counts.
            grid: makes the times, as for :func:`flowvi.samplers.sample_path`.
            progress_bar: show how many steps are done.
        """
        self._checked(None, context)
        with self._evaluating():
            path = sample_path(
                self.process(context, guidance=guidance),
                self.default_sampler() if sampler is None else sampler,
                (num_items if context is None else len(context),),
                getattr(self.path, "num_layers", 100) if num_steps is None else num_steps,
                grid=grid,
                progress_bar=progress_bar,
            )
            return self.law_at_end(path.end).sample()

    def default_sampler(self) -> Sampler:
        """Sampler that fits the model best."""
        raise NotImplementedError

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_particles: int = 1,
        context: Tensor | None = None,
        *,
        divergence: Divergence | None = None,
        solver: Solver | None = None,
    ) -> ODELikelihood:
        r"""Log-density of items under the probability-flow ODE, with its errors.

        The last state is :math:`\alpha_1 y`. Whole levels get uniform noise within their cell,
        so theirs is a lower bound in the mean. The ODE has the law of the model only where the
        network is a true score; it is a measure of its own, not the bound.

        Args:
            x: items ``(B, *event_shape)``.
            num_particles: draws of that noise, or of Hutchinson's probe, to average over.
            context: what they are conditioned on.
            divergence: exact up to 64 dimensions, else Hutchinson's estimate, if left out.
            solver: of the ODE; ten Dormand-Prince steps if left out.

        Raises:
            NotImplementedError: if the model has no probability flow.

        References:
            Song et al. (2021), Score-based generative modeling through stochastic differential
            equations, arXiv:2011.13456, section 4.3.
        """
        if num_particles < 1:
            raise ValueError(f"`num_particles` must be at least 1; got {num_particles}.")
        x = self._checked(x, context)
        with self._evaluating():
            y = self.end.encode(x, self.start.loc)
            alpha = self.path.schedule(y.new_full((1,), self.times.high)).alpha
            shift = self.end.num_pixels * alpha.log() + log_volume(self.end)
            rest = (divergence, solver, shift)
            if not self.end.cell_size:
                return self._flow_likelihood(alpha * y, context, num_particles, *rest)
            noise = torch.rand(num_particles, *y.shape, dtype=y.dtype, device=y.device)
            drawn = y + self.end.cell_size * (noise - 0.5)
            found = self._flow_likelihood(alpha * drawn, context, 1, *rest)
        se = standard_error(found.value)
        return ODELikelihood(found.value.mean(0), se, found.solver_error.mean(0))

    # How.

    def _prior(
        self, drift: Callable[[Tensor, Tensor], Tensor], num_times: int | None
    ) -> PathPrior:
        number = self.num_times if num_times is None else num_times
        steps = getattr(self.path, "num_layers", 100)
        laws = {"times": self.times, "num_times": number, "num_steps": steps}
        return PathPrior(self.path, drift, self.start(), **laws)

    def _flow_likelihood(
        self,
        state: Tensor,
        context: Tensor | None,
        num_probes: int,
        divergence: Divergence | None,
        solver: Solver | None,
        shift: Tensor,
    ) -> ODELikelihood:
        """Log-density of last states, moved by what a state's unit volume is to an item's."""
        field = FlowField(self.process(context))

        def make(divergence: Divergence | None, solver: Solver | None) -> Flow:
            return Flow(
                Continuous(field, divergence, solver, name=type(self).__name__), self.start
            )

        found = flow_likelihood(make, state, None, num_probes, divergence, solver)
        return replace(found, value=found.value + shift)

    def _network(self, context: Tensor | None, guidance: float = 0.0) -> Callable:
        """The network as a function of states and times alone."""
        if context is None:
            # Unconditional use of a conditional network: the row of zeros that training saw.
            context = self.start.loc.new_zeros(self.context_dim) if self.context_dim else None
        if context is None:
            return self.network
        if not guidance:
            return lambda x, t: self.network(x, t, context)
        none = torch.zeros_like(context)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            return torch.lerp(self.network(x, t, none), self.network(x, t, context), 1 + guidance)

        return guided

    def _dropped(self, context: Tensor | None) -> Tensor | None:
        if context is None or not self.training or not self.drop_context:
            return context
        kept = torch.rand(len(context), 1, device=context.device) >= self.drop_context
        return context * kept

    def _divergence_of_start(
        self, posterior: PathPosterior, value: Tensor, score: Tensor
    ) -> Tensor:
        return (posterior.log_prob(value) - score).mean(0)


def normal_divergence(path: Path, y: Tensor, low: float, start: Distribution) -> Tensor:
    """Divergence of a path's normal marginal at the first time from the model's start."""
    mean, scale = path.moments(y.new_full((1,), low), y)
    marginal = Normal(mean, scale.expand_as(mean), validate_args=False)
    return kl_divergence(marginal, start.base_dist).sum(-1)


def require_sizes(network: nn.Module, dim: int) -> None:
    """Refuse a network that says another number of inputs.

    Raises:
        ValueError: if it does.
    """
    got = getattr(network, "input_dim", dim)
    if got != dim:
        raise ValueError(
            f"`network` must have input_dim {dim}, the numbers that make an item; got {got}."
        )
