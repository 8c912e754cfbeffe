"""What every model-and-guide pair over independent items is: two methods, the rest derived."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from torch import Tensor

from flowvi.models._stored import StoredModule
from flowvi.objectives._constants import leaf_of

__all__ = ["ELBOTerms", "LogLikelihood", "ModelGuidePair", "check_context"]

_ITEMS, _PARTICLES, _DATA = "items", "particles", "x"


@dataclass(frozen=True)
class ELBOTerms:
    """The parts of the evidence lower bound of each item, in nats, averaged over draws.

    Args:
        log_likelihood: expected log-density of the item given its latents, ``(B,)``.
        divergences: ``log q - log p`` of each latent site, ``(B,)``; for a site that others
            follow it is the mean of its conditional divergence.
    """

    log_likelihood: Tensor
    divergences: dict[str, Tensor]

    @property
    def elbo(self) -> Tensor:
        """Log-likelihood minus all divergences, ``(B,)``."""
        return self.log_likelihood - sum(self.divergences.values())


@dataclass(frozen=True)
class LogLikelihood:
    """Importance-weighted estimates of log p(x), in nats.

    Args:
        value: estimate of each item, ``(B,)``; in the mean it is a lower bound.
        se: standard error of each estimate, from the spread of its weights; ``(B,)``.
    """

    value: Tensor
    se: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over the items."""
        return self.value.mean()

    @property
    def mean_se(self) -> Tensor:
        """Standard error of the mean as an estimate for new items; the draws' own is in it."""
        return self.value.std() / math.sqrt(len(self.value))


class ModelGuidePair(StoredModule, ABC):
    r"""Base of models of independent items with latents, and of the guides for them.

    .. math:: x_i \sim p(x \mid z_i), \quad z_i \sim p(z), \qquad q(z_i \mid x_i)

    ``model`` and ``guide`` are a pair for stock ``SVI`` and for :func:`flowvi.infer.fit`; their
    plate is "items", the data site is "x". A subclass writes :meth:`generate` and :meth:`infer`,
    which run inside the plate and may be run with batch dimensions left of it, and
    :meth:`check`. Each instance has names of its own in Pyro's parameter store.

    Evaluation (:meth:`sample`, :meth:`reconstruct`, :meth:`log_likelihood`) is in evaluation
    mode and without a graph, whatever mode the module is in.

    Args:
        num_total: number of items in all, where ``x`` is a minibatch; their terms are scaled.

    Raises:
        ValueError: if ``num_total`` is not a positive integer.
    """

    def __init__(self, *, num_total: int | None = None) -> None:
        super().__init__()
        if num_total is not None and (not isinstance(num_total, int) or num_total < 1):
            raise ValueError(f"`num_total` must be a positive integer or None; got {num_total!r}.")
        self.num_total = num_total

    # What a new pair writes.

    @abstractmethod
    def generate(self, context: Tensor | None) -> Distribution:
        """Sample the latent sites from their prior and give the law of an item given them.

        Args:
            context: what items are conditioned on, ``(B, context_dim)``, or None.
        """

    @abstractmethod
    def infer(self, x: Tensor, context: Tensor | None) -> None:
        """Sample the latent sites from their posterior given the items ``(B, *event_shape)``."""

    @abstractmethod
    def check(self, x: Tensor | None, context: Tensor | None, *, values: bool) -> Tensor | None:
        """Refuse arguments of the wrong shape or dtype; give items as the data site takes them.

        Args:
            x: items, or None where they are to be generated.
            context: what they are conditioned on.
            values: whether to look at the values as well, which waits for the device.
        """

    # The pair.

    def model(
        self, x: Tensor | None = None, context: Tensor | None = None, *, num_items: int = 1
    ) -> Tensor:
        """The generative model; without data it generates.

        Args:
            x: items ``(B, *event_shape)``, or None.
            context: what they are conditioned on, ``(B, context_dim)``.
            num_items: items to generate where neither data nor context say how many.
        """
        self._register()
        return self._run_model(self._checked(x, context), context, num_items)[1]

    def guide(self, x: Tensor, context: Tensor | None = None, *, num_items: int = 1) -> None:
        """The posterior over the latents of given items."""
        if x is None:
            raise ValueError("`x` must be given to the guide, which encodes it; got None.")
        self._register()
        self._run_guide(self._checked(x, context), context)

    # What they are used for.

    @torch.no_grad()
    def sample(self, num_items: int = 1, context: Tensor | None = None) -> Tensor:
        """Draws of the model: ``(num_items, *event_shape)``, or one for each row of context."""
        with self._evaluating():
            return self._run_model(self._checked(None, context), context, num_items)[1]

    @torch.no_grad()
    def sample_mean(self, num_items: int = 1, context: Tensor | None = None) -> Tensor:
        """Means of the law of an item at drawn latents: pictures without pixel noise."""
        with self._evaluating():
            return self._run_model(self._checked(None, context), context, num_items)[0].mean

    @torch.no_grad()
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Means of the law of an item at latents drawn from its posterior, shaped like ``x``."""
        with self._evaluating():
            _, model_trace = self._traces(self._checked(x, context), context, 1)
        return model_trace.nodes[_DATA]["fn"].mean.squeeze(0)

    def terms(
        self, x: Tensor, context: Tensor | None = None, *, num_particles: int = 1
    ) -> ELBOTerms:
        """Data term and divergence of each latent site, apart, in the module's own mode.

        Args:
            x: items.
            context: what they are conditioned on.
            num_particles: draws to average over.
        """
        scores = self._scores(self._checked(x, context), context, num_particles)
        data = scores.pop(_DATA).mean(0)
        return ELBOTerms(data, {name: -score.mean(0) for name, score in scores.items()})

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_particles: int = 100,
        context: Tensor | None = None,
        *,
        max_rows: int = 4096,
    ) -> LogLikelihood:
        r"""Importance-weighted estimate of log p(x) of each item, with its standard error.

        .. math:: \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad z_k \sim q

        The mean of the weights is unbiased for p(x), so the estimate is a lower bound in the
        mean. Weights are summed as they come, so memory does not grow with ``num_particles``.

        Args:
            x: items ``(B, *event_shape)``.
            num_particles: draws per item K, at least 1.
            context: what they are conditioned on.
            max_rows: items times particles in one pass.

        Raises:
            NotImplementedError: if a latent site only estimates the log-ratio.

        References:
            Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders,
            arXiv:1509.00519, section 5, with one more line for the standard error.
        """
        if num_particles < 1:
            raise ValueError(f"`num_particles` must be at least 1; got {num_particles}.")
        x = self._checked(x, context)
        with self._evaluating():
            parts = [
                self._log_mean_weight(
                    x[rows], None if context is None else context[rows], num_particles, max_rows
                )
                for rows in torch.arange(len(x), device=x.device).split(max_rows)
            ]
        return LogLikelihood(*(torch.cat(part) for part in zip(*parts, strict=True)))

    # The latents' laws, for diagnostics.

    @torch.no_grad()
    def posterior_trace(
        self, x: Tensor, context: Tensor | None = None, num_particles: int = 1
    ) -> dict[str, dict]:
        """Latent sites of the guide, by name, with draws ``(num_particles, B, *event)``."""
        with self._evaluating():
            trace, _ = self._traces(self._checked(x, context), context, num_particles)
        return _random_sites(trace)

    @torch.no_grad()
    def posterior_log_prob(
        self, values: dict[str, Tensor], x: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Log-density of the latents under the posterior of every item, nats.

        Args:
            values: of all latent sites, ``(num_values, 1, *event)``.
            x: items ``(B, *event_shape)``.
            context: what they are conditioned on.

        Shape:
            result: ``(num_values, B)``.
        """
        guide = poutine.condition(self._run_guide, data=values)
        return self._log_prob_of(guide, values, self._checked(x, context), context)

    @torch.no_grad()
    def prior_log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log-density of latents ``(num_values, 1, *event)`` under the prior, one column."""
        model = poutine.condition(self._run_model, data=values)
        return self._log_prob_of(model, values, None, None, 1)

    # How.

    def _log_prob_of(self, program: Callable, values: dict[str, Tensor], *args: object) -> Tensor:
        num_values = len(next(iter(values.values())))
        with self._evaluating(), pyro.plate(_PARTICLES, num_values, dim=-2):
            nodes = poutine.trace(program).get_trace(*args).nodes
        return sum(nodes[name]["fn"].log_prob(value) for name, value in values.items())

    def _log_mean_weight(
        self, x: Tensor, context: Tensor | None, num_particles: int, max_rows: int
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, max_rows // max(len(x), 1))
        first = second = None
        for start in range(0, num_particles, chunk):
            size = min(chunk, num_particles - start)
            log_w = sum(self._scores(x, context, size, as_weights=True).values())
            sums = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
            first = sums[0] if first is None else first.logaddexp(sums[0])
            second = sums[1] if second is None else second.logaddexp(sums[1])
        value = first - math.log(num_particles)
        # Delta method: relative variance of the mean of the weights.
        spread = (second - 2 * first + math.log(num_particles)).expm1().clamp(min=0)
        return value, (spread / (num_particles - 1 or math.nan)).sqrt()

    def _scores(
        self, x: Tensor, context: Tensor | None, num_particles: int, *, as_weights: bool = False
    ) -> dict[str, Tensor]:
        """Log-density of the data and ``log p - log q`` of each latent site, ``(K, B)``."""
        guide_trace, model_trace = self._traces(x, context, num_particles)
        scores = {}
        for name, site in _random_sites(model_trace).items():
            score = site["fn"].log_prob(site["value"])
            if name != _DATA:
                drawn = guide_trace.nodes[name]
                if as_weights and getattr(leaf_of(drawn["fn"]), "is_log_ratio_estimate", False):
                    raise NotImplementedError(
                        f"Importance weights exponentiate log-weights, but site `{name}` only "
                        "estimates the log-ratio. Use terms for a bound."
                    )
                score = score - drawn["fn"].log_prob(drawn["value"])
            scores[name] = score
        return scores

    def _traces(
        self, x: Tensor, context: Tensor | None, num_particles: int
    ) -> tuple[Trace, Trace]:
        """Guide and model with a batch of particles left of the items."""
        plate = pyro.plate(_PARTICLES, num_particles, dim=-2)
        with plate:
            guide_trace = poutine.trace(self._run_guide).get_trace(x, context)
        with plate:
            replayed = poutine.replay(self._run_model, trace=guide_trace)
            return guide_trace, poutine.trace(replayed).get_trace(x, context, 1)

    def _run_model(
        self, x: Tensor | None, context: Tensor | None, num_items: int
    ) -> tuple[Distribution, Tensor]:
        known = x if x is not None else context
        with self._plate(num_items if known is None else len(known)):
            law = self.generate(context)
            return law, pyro.sample(_DATA, law, obs=x)

    def _run_guide(self, x: Tensor, context: Tensor | None) -> None:
        with self._plate(len(x)):
            self.infer(x, context)

    def _plate(self, size: int) -> pyro.plate:
        if self.num_total is None:
            return pyro.plate(_ITEMS, size, dim=-1)
        index = torch.arange(size, device=next(self.parameters()).device)
        return pyro.plate(_ITEMS, self.num_total, subsample=index, dim=-1)

    def _checked(self, x: Tensor | None, context: Tensor | None) -> Tensor | None:
        looks = is_validation_enabled() and not torch.compiler.is_compiling()
        return self.check(x, context, values=looks and not (x is None or x.is_meta))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self.modules() if module.training]
        try:
            self.eval()
            yield
        finally:
            for module in training:
                module.training = True


def check_context(context: Tensor | None, context_dim: int, rows: int | None) -> None:
    """Refuse a context that is missing, not asked for, or of the wrong shape.

    Args:
        context: what items are conditioned on.
        context_dim: its length; 0 for none.
        rows: number of items, if known.
    """
    shape = None if context is None else tuple(context.shape)
    if context_dim == 0:
        if context is not None:
            raise ValueError(f"`context` must be None without a context_dim; got shape {shape}.")
        return
    fits = shape is not None and len(shape) == 2 and shape[1] == context_dim
    if not fits or rows not in (None, shape[0]):
        count = "B" if rows is None else rows
        raise ValueError(f"`context` must have shape ({count}, {context_dim}); got {shape}.")


def _random_sites(trace: Trace) -> dict[str, dict]:
    """Sample sites by name: of a guide its latents, of a model the data as well."""
    plates = (_ITEMS, _PARTICLES)
    nodes = trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] == "sample" and n not in plates}
