"""Rectified flow with any coupling of noise and data, learned ones included."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import torch
from pyro.distributions import Delta, Distribution
from torch import Tensor, nn

from flowvi.distributions import Flow, PathPosterior, PathPrior, StandardNormal
from flowvi.models.couplings import IndependentCoupling, PairedCoupling, StartCoupling
from flowvi.models.ode_likelihood import ODELikelihood, flow_likelihood
from flowvi.models.pair import ModelGuidePair, check_context
from flowvi.models.rectified_terms import RectifiedTerms
from flowvi.models.transport import TransportCost
from flowvi.nn import VectorField
from flowvi.paths import Diffusion, LateTimes, Path, StochasticInterpolant, TimeLaw
from flowvi.samplers import DriftProcess, ProbabilityFlow, Sampler, sample_path
from flowvi.transforms import Continuous, Divergence, Midpoint, Solver

__all__ = ["RectifiedFlow"]


class RectifiedFlow(ModelGuidePair):
    r"""Vector field that carries noise to data, trained along paths between coupled ends.

    .. math:: z_0 \sim q(z_0 \mid z_1), \qquad
        \mathcal L = KL[q(z_0 \mid z_1) \,\|\, p_0]
        + \int_0^1 E\,\frac{|f(z_t, t) - g(z_t, t)|^2}{2 \sigma^2}\,dt

    ``path`` decides what the loss is:

    - :class:`~flowvi.paths.BrownianBridge` of noise :math:`\sigma`: a lower bound on the
      log-density, tight at the Schroedinger bridge; the trained process has that noise.
    - :class:`~flowvi.paths.StochasticInterpolant` without gamma: rectified flow, the bound with
      its noise set to 0 inside the expectation; the trained process is a flow. ``diffusion`` is
      the :math:`\sigma` that weighs straight paths against the divergence of the coupling. As
      that falls, a coupling learnt by this loss gets straight but draws the starts in (for normal
      data to half the variance of :math:`p_0`), so the flow misses the law of the data. Learn the
      coupling by the bound, and a flow under it: :meth:`straighten`.
    - :func:`~flowvi.paths.matched` of any path: flow matching, stochastic interpolants.

    The latent site is "path"; the data are the last state of the path, which its score accounts
    for. Log-weights are estimates of the log-ratio, so bounds that exponentiate them refuse this
    model.

    Args:
        field: f, on times from 0 (noise) to 1 (data).
        path: between start and item, or given the item alone.
        coupling: law of the start, of paths that take one; independent if left out.
        start: its call gives :math:`p_0`, event shape ``(dim,)``; standard normal if left out.
        times: law of the random times; :class:`~flowvi.paths.LateTimes` for a Brownian bridge,
            otherwise uniform, if left out.
        num_times: random times for each item.
        num_steps: steps of the simulation that ``model`` and ``sample`` draw with.
        num_total: number of items in all, where ``x`` is a minibatch.

    Shape:
        x: ``(B, dim)``, or ``(B, 2 * dim)``, start and then end, with a
        :class:`~flowvi.models.PairedCoupling`; context: ``(B, field.context_dim)``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if sizes do not fit, or a coupling is given to a path that takes no start; for
            items of the wrong shape or dtype, and with Pyro's validation on not finite.

    References:
        Liu, Gong and Liu (2023), Flow straight and fast, arXiv:2209.03003; Shi, De Bortoli,
        Campbell and Doucet (2023), Diffusion Schroedinger bridge matching, arXiv:2303.16852;
        Girsanov's theorem for the bound.

    Example:
        >>> from flowvi.flows import nsf
        >>> from flowvi.models import LearnedCoupling
        >>> from flowvi.nn import MLPField
        >>> from flowvi.paths import BrownianBridge
        >>> flow = RectifiedFlow(MLPField(2), BrownianBridge(2, 0.5), LearnedCoupling(nsf(2, 2)))
        >>> flow.terms(torch.zeros(5, 2)).elbo.shape
        torch.Size([5])
    """

    def __init__(
        self,
        field: VectorField,
        path: Path,
        coupling: StartCoupling | None = None,
        *,
        start: nn.Module | None = None,
        times: TimeLaw | None = None,
        num_times: int = 1,
        num_steps: int = 50,
        num_total: int | None = None,
    ) -> None:
        super().__init__(num_total=num_total)
        if coupling is None and getattr(path, "takes_start", False):
            coupling = IndependentCoupling()
        _check_parts(field, path, coupling)
        self.field = field
        self.path = path
        self.coupling = coupling
        self.start = StandardNormal(path.dim) if start is None else start
        self.times = LateTimes() if times is None and path.is_reference_bridge else times
        self.num_times = num_times
        self.num_steps = num_steps

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return self.path.dim

    @property
    def is_deterministic(self) -> bool:
        """Whether the trained process is a flow, without noise."""
        return self.path.generating_diffusion is None

    @property
    def has_bound(self) -> bool:
        """Whether the loss bounds the log-density of the data."""
        return self.path.is_reference_bridge and self.coupling.has_density

    # The pair.

    def prior(self, context: Tensor | None = None) -> PathPrior:
        """Law of a path before an item is seen."""
        options = {"num_steps": self.num_steps, "times": self.times, "num_times": self.num_times}
        if self.is_deterministic:
            options["solver"] = _follow
        return PathPrior(self.path, self._drift(context), self.start(), **options)

    def posterior(self, x: Tensor, context: Tensor | None = None) -> PathPosterior:
        """Law of the path to each item, batch ``(B,)``."""
        options = {"times": self.times, "num_times": self.num_times}
        if self.coupling is None:
            return PathPosterior(self.path, x, **options)
        start = self.coupling(x, self.start(), context)
        return PathPosterior(self.path, self.coupling.ends(x), start=start, **options)

    def generate(self, context: Tensor | None) -> Distribution:
        prior = self.prior(context)
        end = prior.unpack(pyro.sample("path", prior)).end
        return Delta(end, event_dim=1, validate_args=False)

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        pyro.sample("path", self.posterior(x, context))

    def check(self, x: Tensor | None, context: Tensor | None, *, values: bool) -> Tensor | None:
        check_context(context, self.field.context_dim, None if x is None else len(x))
        if x is None:
            return None
        size = 2 * self.dim if getattr(self.coupling, "takes_pairs", False) else self.dim
        if x.dim() != 2 or x.shape[1] != size or not x.is_floating_point():
            raise ValueError(
                f"`x` must have shape (B, {size}) and a floating dtype; got {tuple(x.shape)}, "
                f"{x.dtype}."
            )
        if values and not bool(x.isfinite().all()):
            raise ValueError(f"`x` must be finite; got {int((~x.isfinite()).sum())} not finite.")
        return x.to(next(self.parameters()).dtype)

    def terms(
        self, x: Tensor, context: Tensor | None = None, *, num_particles: int = 1
    ) -> RectifiedTerms:
        x = self._checked(x, context)
        posterior, prior = self.posterior(x, context), self.prior(context)
        draw = posterior.rsample if posterior.has_rsample else posterior.sample
        value = draw((num_particles,))
        scores = prior.log_prob_terms(value)
        coupling = posterior.log_prob(value) - scores.start
        reference = torch.zeros_like(scores.path)
        if self.path.is_reference_bridge:
            ends = posterior.unpack(value)
            reference = self.path.reference_log_prob(ends.start, ends.end)
        parts = (coupling, reference, reference - scores.path)
        return RectifiedTerms(*(part.mean(0) for part in parts), self.has_bound)

    # The trained process.

    def process(self, context: Tensor | None = None) -> DriftProcess:
        """What samplers move: a flow, or a process with the noise of the bridge."""
        return DriftProcess(
            self._drift(context),
            self.path.generating_diffusion,
            self.start(),
            name=f"a RectifiedFlow on {type(self.path).__name__}",
        )

    def density(self, divergence: Divergence | None = None, solver: Solver | None = None) -> Flow:
        """The trained flow as a :class:`~flowvi.distributions.Flow` with the same parameters.

        Args:
            divergence: exact where that is affordable, if left out.
            solver: ten Dormand-Prince steps if left out.

        Raises:
            NotImplementedError: if the trained process has noise.
        """
        if not self.is_deterministic:
            raise NotImplementedError(
                "The drift of a process with noise is not the velocity of a flow, so there is no "
                "density by an ODE. Use terms for a bound, or train without noise."
            )
        return Flow(Continuous(self.field, divergence, solver, name="RectifiedFlow"), self.start)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of each item by the probability-flow ODE, ``(B,)``, with a graph."""
        return self.density()(context).log_prob(self._checked(x, context))

    def log_likelihood(
        self,
        x: Tensor,
        num_particles: int = 1,
        context: Tensor | None = None,
        *,
        max_rows: int = 4096,
        divergence: Divergence | None = None,
        solver: Solver | None = None,
    ) -> ODELikelihood:
        """Log-density of each item by the probability-flow ODE, with its errors.

        Args:
            x: items ``(B, dim)``.
            num_particles: noises of an estimated divergence to average over, in one solve.
            context: what they are conditioned on.
            max_rows: items in one solve.
            divergence: exact where that is affordable, if left out.
            solver: ten Dormand-Prince steps if left out.

        Raises:
            NotImplementedError: if the trained process has noise.
        """
        x = self._checked(x, context)
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(max_rows):
            given = None if context is None else context[rows]
            parts.append(
                flow_likelihood(self.density, x[rows], given, num_particles, divergence, solver)
            )
        columns = ([getattr(part, name) for part in parts] for name in vars(parts[0]))
        return ODELikelihood(*(torch.cat(column) for column in columns))

    @torch.no_grad()
    def transport(
        self,
        num_items: int = 1000,
        context: Tensor | None = None,
        *,
        solver: Solver | None = None,
    ) -> TransportCost:
        """Energy and straightness of the paths of the trained flow.

        Args:
            num_items: number of paths where there is no context.
            context: what they are conditioned on, a path for each row.
            solver: ten Dormand-Prince steps if left out.

        Raises:
            NotImplementedError: if the trained process has noise.
        """
        flow = self.density(solver=solver).transform
        shape = (num_items,) if context is None else (len(context),)
        start = self.start().sample(shape)
        end, _, (energy,) = flow.call_with_integrals(start, [_speed], context)
        moved = (end - start).square().sum(-1)
        return TransportCost(energy, moved, flow.last_solve.num_evaluations)

    # Further rounds.

    def pairs(
        self,
        num_items: int,
        context: Tensor | None = None,
        *,
        sampler: Sampler | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Starts and the ends that the trained flow takes them to, ``(num_items, 2 * dim)``.

        Args:
            num_items: number of pairs.
            context: one row for each.
            sampler: moves the starts; midpoint steps of the flow if left out.
            num_steps: steps of the sampler.
        """
        sampler = ProbabilityFlow(Midpoint) if sampler is None else sampler
        steps = self.num_steps if num_steps is None else num_steps
        states = sample_path(self.process(context), sampler, (num_items,), steps).states
        return torch.cat([states[0], states[-1]], -1)

    def reflow(self) -> RectifiedFlow:
        """The next round: a copy to be trained on :meth:`pairs` of this flow.

        Raises:
            NotImplementedError: if the trained process has noise.
        """
        self.density()
        new = copy.deepcopy(self)
        new.coupling = PairedCoupling()
        return new

    def straighten(
        self,
        field: VectorField | None = None,
        *,
        diffusion: float | Callable | Diffusion = 1.0,
        times: TimeLaw | None = None,
    ) -> RectifiedFlow:
        """A flow along straight lines between the ends that this coupling joins.

        The coupling is copied as it is now and no longer trained, so ``diffusion`` and ``times``
        only say which times count how much. Under a nearly deterministic coupling the velocity
        jumps between neighbouring starts and is smooth soon after, so that early times deserve
        more than their share.

        Args:
            field: velocity of the new flow; a copy of this field if left out.
            diffusion: b, whose inverse square weighs the times.
            times: law of the random times; uniform if left out.

        Raises:
            NotImplementedError: if the path takes no coupling.
        """
        if self.coupling is None:
            raise NotImplementedError(
                f"{type(self.path).__name__} takes no coupling, so there is nothing to keep. Use "
                "reflow."
            )
        field = copy.deepcopy(self.field) if field is None else field
        coupling = copy.deepcopy(self.coupling).requires_grad_(False)
        path = StochasticInterpolant(self.dim, None, diffusion)
        options = {"times": times, "num_steps": self.num_steps, "num_total": self.num_total}
        return RectifiedFlow(field, path, coupling, start=self.start, **options)

    def _drift(self, context: Tensor | None) -> object:
        return lambda x, t: self.field(t.squeeze(-1), x, context)

    def _run_model(
        self, x: Tensor | None, context: Tensor | None, num_items: int
    ) -> tuple[Distribution, Tensor]:
        if x is None:
            return super()._run_model(x, context, num_items)
        with self._plate(len(x)):
            pyro.sample("path", self.prior(context))
            # Seen items are the ends of their paths, whose score has accounted for them.
            law = Delta(x, event_dim=1, validate_args=False)
            return law, pyro.sample("x", law, obs=x)


def _check_parts(field: VectorField, path: Path, coupling: StartCoupling | None) -> None:
    kinds = {"field": (field, VectorField), "path": (path, Path)}
    if coupling is not None:
        kinds["coupling"] = (coupling, StartCoupling)
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` must be a {kind.__name__}; got {type(value).__name__}.")
    if field.input_dim != path.dim:
        raise ValueError(
            f"`field` must have input_dim {path.dim} (dim of the path); got {field.input_dim}."
        )
    if path.has_target:
        raise ValueError(
            "`path` must not be a DiffusionPath, whose loss compares predictions; got one. Give "
            "matched(path)."
        )
    if coupling is not None and not path.takes_start:
        raise ValueError(
            f"`coupling` must be None for {type(path).__name__}, whose start is its own; got "
            f"{type(coupling).__name__}."
        )


def _follow(drift: object, diffusion: object, start: Tensor, times: Tensor) -> Tensor:
    """States of the flow at the given times; the diffusion is only a weight."""
    law = StandardNormal(start.shape[-1])()
    process = DriftProcess(drift, None, law)
    return ProbabilityFlow(Midpoint).run(process, start, times, lambda done: None)


def _speed(stage: object) -> Tensor:
    return stage.velocity.square().sum(-1)
