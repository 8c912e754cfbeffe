"""Mixtures of flows: several flows and trainable weights, one distribution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pyro.distributions import Distribution, TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import constraints

from flowvi.distributions.flow import Flow, FlowDistribution, Memory, check_expand
from flowvi.transforms.base import FlowTransform, common_shape, require_vectors

__all__ = ["MixtureFlow", "MixtureFlowDistribution"]

# Plates over which Pyro only ever averages, so draws along them may depend on each other.
_PARTICLE_PLATES = frozenset({"num_particles_vectorized", "_num_predictive_samples"})


class MixtureFlow(nn.Module):
    r"""Several flows with trainable weights; a call gives a :class:`MixtureFlowDistribution`.

    .. math:: q(y) = \sum_k w_k\, q_k(y), \qquad w = \operatorname{softmax}(\text{logits})

    It represents separated modes, which one flow joins by thin bridges. Drawing costs a forward
    pass of every component and scoring an inverse pass of every component.

    Args:
        flows: at least one flow; all have the same ``input_dim``, and those that take a context
            take one of the same length. Each must have an inverse.
        logits: unnormalised log-weights at the start, shape ``(len(flows),)``; equal weights if
            left out.

    Raises:
        TypeError: if an element of ``flows`` is not a :class:`Flow`.
        ValueError: if ``flows`` is empty, sizes disagree or ``logits`` has a wrong shape.
        NotImplementedError: if a flow has no inverse.

    Example:
        >>> from flowvi.flows import realnvp
        >>> mixture = MixtureFlow([realnvp(2), realnvp(2)])
        >>> mixture().rsample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(self, flows: Iterable[Flow], logits: Tensor | None = None) -> None:
        super().__init__()
        flows = list(flows)
        _check_flows(flows)
        if logits is None:
            like = next((p for p in flows[0].parameters()), torch.empty(0))
            logits = torch.zeros(len(flows), dtype=like.dtype, device=like.device)
        if logits.shape != (len(flows),):
            raise ValueError(
                f"`logits` must have shape ({len(flows)},) (one per flow); "
                f"got {tuple(logits.shape)}."
            )
        self.flows = nn.ModuleList(flows)
        self.logits = logits if isinstance(logits, nn.Parameter) else nn.Parameter(logits.clone())

    @property
    def input_dim(self) -> int:
        """Number of dimensions."""
        return self.flows[0].input_dim

    @property
    def context_dim(self) -> int:
        """Length of the context vector; 0 for an unconditional mixture."""
        return max(flow.context_dim for flow in self.flows)

    def forward(self, context: Tensor | None = None) -> MixtureFlowDistribution:
        return MixtureFlowDistribution([flow(context) for flow in self.flows], self.logits)

    def then(self, *transforms: FlowTransform) -> MixtureFlow:
        """The same mixture followed by more maps, sharing all parameters."""
        return MixtureFlow([flow.then(*transforms) for flow in self.flows], self.logits)


class MixtureFlowDistribution(TorchDistribution):
    r"""Law of a draw from a random one of several flow distributions.

    A draw is reparameterised within its component. The component is discrete, so the weights get
    a score-function gradient, through ``score_parts``: stock ``Trace_ELBO`` gives unbiased
    gradients for weights and components alike; ``TraceMeanField_ELBO`` and ``TraceGraph_ELBO``
    raise. For the same reason ``has_rsample`` is false: a wrapper such
    as ``to_event`` that does not know about the partial reparameterisation falls back on a
    detached draw with a pure score-function gradient, which is noisier but not wrong.

    Components are drawn by systematic sampling with a random order: along the leading sample
    dimension, or along the leading batch dimension where that is the plate of vectorised
    particles, component k appears within one of n times its weight. Every draw alone follows
    the mixture, and draws of two sites or of two rows stay independent; those along the
    stratified dimension do not. Along data plates draws are independent.

    Args:
        components: flow distributions with equal event shapes and reparameterised draws.
        logits: unnormalised log-weights ``(len(components),)``.

    Shape:
        value: ``(*sample, *batch, input_dim)``; log_prob: ``(*sample, *batch)``, in nats.

    References:
        Schulman, Heess, Weber and Abbeel (2015), Gradient estimation using stochastic
        computation graphs, arXiv:1506.05254, section 3, for the mixed estimator.
        Hol, Schon and Gustafsson (2006), On resampling algorithms for particle filters,
        section 3.3, for systematic sampling.
    """

    arg_constraints: dict = {}
    has_rsample = False
    support = constraints.real_vector

    def __init__(
        self,
        components: Sequence[FlowDistribution],
        logits: Tensor,
        *,
        batch_shape: Sequence[int] | None = None,
        path_derivative: bool = False,
        stratified: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        for c in components:
            if not c.has_rsample:
                raise NotImplementedError(
                    f"A component with base {type(c.base).__name__} has no reparameterised draw, "
                    "so a mixture would miss its gradient. Give it a normal base."
                )
        self.components = [c.unchecked() for c in components]
        self.logits = logits
        self._path = path_derivative
        self._stratified = stratified
        self._memory: Memory | None = None
        if batch_shape is None:
            batch_shape = common_shape(*(c.batch_shape for c in self.components))
        event_shape = self.components[0].event_shape
        super().__init__(torch.Size(batch_shape), event_shape, validate_args=validate_args)

    @property
    def weights(self) -> Tensor:
        """Probabilities of the components, ``(len(components),)``."""
        return self.logits.softmax(-1)

    def expand(
        self, batch_shape: Sequence[int], _instance: Distribution | None = None
    ) -> MixtureFlowDistribution:
        check_expand(self.batch_shape, batch_shape)
        return self._replace(batch_shape=torch.Size(batch_shape))

    def path_derivative(self, *, antithetic: bool = False) -> MixtureFlowDistribution:
        """The same law whose log-density keeps only the gradient through the value.

        The weights still get their score-function gradient.

        Args:
            antithetic: the leading dimension is only averaged over. Components are then
                stratified along it; base noise is not mirrored.
        """
        return self._replace(path_derivative=True, stratified=antithetic)

    def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.rsample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw values that carry the gradient of the component's parameters, not of the weights.

        By itself this misses the weights' gradient; ``score_parts`` supplies it.
        """
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw values and their log-density (nats)."""
        sample_shape = torch.Size(sample_shape)
        index = self._draw_index(sample_shape)
        value = self.logits.new_zeros(())
        for k, component in enumerate(self.components):
            draw = component.expand(self.batch_shape)(sample_shape)
            value = torch.where((index == k).unsqueeze(-1), draw, value)
        log_q = self._score(value)
        self._memory = Memory(self._tensors())
        self._memory.remember(value, (log_q, index))
        return value, log_q

    def log_prob(self, value: Tensor) -> Tensor:
        known = None if self._memory is None else self._memory.recall(value)
        if known is not None:
            return known[0]
        if self._validate_args and not value.is_meta:
            self._validate_sample(value)
        return self._score(value)

    def log_prob_stopped(self, value: Tensor) -> Tensor:
        """Log-density with every parameter and the context held constant."""
        scores = [c.log_prob_stopped(value) for c in self.components]
        return self._mix(scores, self.logits.detach())

    def score_parts(self, x: Tensor) -> ScoreParts:
        r"""Parts of the gradient of the ELBO for a draw of this very object.

        With component :math:`k` and reparameterised value, the gradient of
        :math:`E[f]` is :math:`E[\nabla f + f \nabla \log w_k]`. A value from elsewhere must be a
        constant and is scored like a draw without reparameterisation.

        Raises:
            RuntimeError: if ``x`` carries a graph but was not drawn here.
        """
        known = None if self._memory is None else self._memory.recall(x)
        if known is None or not torch.is_grad_enabled():
            if x.requires_grad:
                raise RuntimeError(
                    "`x` must be a draw of this very distribution object or a constant, since "
                    "the gradient of the weights needs the drawn component; got a value that "
                    "carries a graph from elsewhere. Detach it, and use Trace_ELBO in place of "
                    "TraceGraph_ELBO, which wraps the values."
                )
            log_q = self.log_prob(x)
            return ScoreParts(log_prob=log_q, score_function=log_q, entropy_term=0)
        log_q, index = known
        log_w = self.logits.log_softmax(-1)[index]
        return ScoreParts(
            log_prob=log_q, score_function=log_w - log_w.detach(), entropy_term=log_q
        )

    def _replace(self, **changes: object) -> MixtureFlowDistribution:
        fields = {
            "batch_shape": self.batch_shape,
            "path_derivative": self._path,
            "stratified": self._stratified,
            "validate_args": self._validate_args,
            **changes,
        }
        return MixtureFlowDistribution(self.components, self.logits, **fields)

    def _draw_index(self, sample_shape: torch.Size) -> Tensor:
        shape = (*sample_shape, *self.batch_shape)
        like = self.logits.detach()
        position = torch.rand(shape, dtype=like.dtype, device=like.device)
        if sample_shape or (shape and (self._stratified or self._leads_with_particles())):
            order = torch.rand_like(position).argsort(0)
            steps = torch.arange(shape[0], dtype=like.dtype, device=like.device)
            steps = steps.reshape(-1, *(1 for _ in shape[1:]))
            position = ((steps + position[:1]) / shape[0]).gather(0, order)
        edges = like.softmax(-1).cumsum(-1)[:-1]
        return (position.unsqueeze(-1) >= edges).sum(-1)

    def _leads_with_particles(self) -> bool:
        dim = -len(self.batch_shape)
        return any(f.name in _PARTICLE_PLATES and f.dim == dim for f in get_plates())

    def _score(self, value: Tensor) -> Tensor:
        if self._path:
            return self.log_prob_stopped(value)
        return self._mix([c.log_prob(value) for c in self.components], self.logits)

    def _mix(self, scores: list[Tensor], logits: Tensor) -> Tensor:
        scores = torch.broadcast_tensors(*scores)
        log_q = (torch.stack(scores, -1) + logits.log_softmax(-1)).logsumexp(-1)
        return log_q.expand(common_shape(log_q.shape, self.batch_shape))

    def _tensors(self) -> list[Tensor]:
        return [self.logits, *(t for c in self.components for t in c.tensors())]


def _check_flows(flows: list[Flow]) -> None:
    if not flows:
        raise ValueError("`flows` must hold at least one flow; got none.")
    for flow in flows:
        if not isinstance(flow, Flow):
            raise TypeError(f"`flows` must hold Flow objects; got {type(flow).__name__}.")
        if not flow.transform.has_inverse:
            raise NotImplementedError(
                f"{type(flow.transform).__name__} has no inverse, which a mixture needs to score "
                "a draw under all components. Wrap it in NumericalInverse."
            )
    for flow in flows:
        require_vectors("flows", flow.transform.event_shape)
    dims = [flow.input_dim for flow in flows]
    if len(set(dims)) > 1:
        raise ValueError(f"`flows` must agree in input_dim; got {dims}.")
    contexts = sorted({flow.context_dim for flow in flows if flow.context_dim})
    if len(contexts) > 1:
        raise ValueError(f"`flows` must agree in context_dim; got {contexts}.")
