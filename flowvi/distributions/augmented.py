"""Flows with extra dimensions that are integrated out by a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pyro.distributions import Distribution, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from flowvi.distributions.flow import Flow, FlowDistribution, Memory, check_expand
from flowvi.transforms.base import require_vectors
from flowvi.transforms.linear import TriangularAffine

__all__ = ["AugmentedFlow", "AugmentedFlowDistribution"]

_SEED = 7


class AugmentedFlow(nn.Module):
    r"""A flow over values and extra dimensions; a call gives the law of the values alone.

    .. math:: q(x) = \int q(x, a)\, da, \qquad
        \log q(x) \ge E_{r(a \mid x)}[\log q(x, a) - \log r(a \mid x)]

    Paths of a continuous flow cannot cross; with extra dimensions they pass each other, so that
    the flow represents maps that keep no order, by simpler fields. The density of the values is
    known as a bound only, tight where the auxiliary law ``r`` is that of the extra dimensions
    given the values. Train both together: every objective does that by itself.

    Args:
        flow: over ``input_dim`` values followed by the extra dimensions.
        num_extra: number of extra dimensions, at least 1 and below ``flow.input_dim``.
        auxiliary: flow of ``num_extra`` dimensions whose context is the value followed by the
            context of ``flow``; a Gaussian whose mean and covariance a network gives, if left
            out.
        num_draws: draws of ``r`` for each value that is scored; more make the bound tighter.

    Raises:
        TypeError: if a flow is none.
        ValueError: if sizes disagree.

    References:
        Dupont, Doucet and Teh (2019), Augmented neural ODEs, arXiv:1904.01681, section 4; the
        bound is that of Huang, Dinh and Courville (2020), Augmented normalizing flows,
        arXiv:2002.07101, section 3.

    Example:
        >>> from flowvi.flows import realnvp
        >>> law = AugmentedFlow(realnvp(3), num_extra=2)()
        >>> law.event_shape, law.log_prob(torch.zeros(5, 1)).shape
        (torch.Size([1]), torch.Size([5]))
    """

    def __init__(
        self, flow: Flow, num_extra: int, auxiliary: Flow | None = None, *, num_draws: int = 1
    ) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"`flow` must be a Flow; got {type(flow).__name__}.")
        require_vectors("flow", flow.transform.event_shape)
        if not isinstance(num_extra, int) or not 1 <= num_extra < flow.input_dim:
            raise ValueError(
                f"`num_extra` must be an integer from 1 to {flow.input_dim - 1} (below input_dim "
                f"of `flow`); got {num_extra!r}."
            )
        if not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"`num_draws` must be an integer of at least 1; got {num_draws!r}.")
        self.input_dim = flow.input_dim - num_extra
        self.num_extra = num_extra
        self.num_draws = num_draws
        self.flow = flow
        wanted = (num_extra, self.input_dim + flow.context_dim)
        self.auxiliary = gaussian_auxiliary(*wanted) if auxiliary is None else auxiliary
        check_auxiliary(self.auxiliary, *wanted)

    @property
    def context_dim(self) -> int:
        """Length of the context vector; 0 for an unconditional flow."""
        return self.flow.context_dim

    def forward(self, context: Tensor | None = None) -> AugmentedFlowDistribution:
        return AugmentedFlowDistribution(
            self.flow(context), self.auxiliary, num_draws=self.num_draws
        )


class AugmentedFlowDistribution(TorchDistribution):
    r"""Law of the leading dimensions of a flow distribution.

    A draw is scored with the extra dimensions that it was drawn with,
    :math:`\log q(x, a) - \log r(a \mid x)`: in the mean an upper bound on :math:`\log q(x)`, so a
    guide's ELBO stays a lower bound, and its importance weights stay unbiased. Any other value is
    scored with :math:`a \sim r(a \mid x)`, by a different random number in each call whose mean
    is a lower bound and whose exponential is unbiased: right for observed values and priors.

    Args:
        joint: flow distribution of values and extra dimensions.
        auxiliary: flow of the extra dimensions given the values.
        num_draws: draws of ``r`` for each value that is scored.
        common: use the same noise for all values of a call and for all calls; smooth in the
            value.
        given: what the auxiliary law sees of a value; the value itself if left out.

    Shape:
        value: ``(*sample, *batch, input_dim)``; log_prob: ``(*sample, *batch)``, in nats.
    """

    arg_constraints: dict = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(
        self,
        joint: FlowDistribution,
        auxiliary: Flow,
        *,
        num_draws: int = 1,
        common: bool = False,
        given: Callable[[Tensor], Tensor] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.joint = joint.unchecked()
        self.auxiliary = auxiliary
        self.num_draws = num_draws
        self._common = common
        self._see = given
        self._memory: Memory | None = None
        event = joint.event_shape[0] - auxiliary.input_dim
        super().__init__(joint.batch_shape, torch.Size((event,)), validate_args=validate_args)

    def expand(
        self, batch_shape: Sequence[int], _instance: Distribution | None = None
    ) -> AugmentedFlowDistribution:
        check_expand(self.batch_shape, batch_shape)
        return self._with_joint(self.joint.expand(torch.Size(batch_shape)))

    def path_derivative(self, *, antithetic: bool = False) -> AugmentedFlowDistribution:
        """The same law; the flow's parameters get gradients through draws alone.

        The auxiliary law keeps its whole gradient, as if it belonged to the model.

        Args:
            antithetic: draw the leading dimension in pairs of opposite base noise.
        """
        return self._with_joint(self.joint.path_derivative(antithetic=antithetic))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw values and the estimate of their log-density (nats) that goes with them."""
        both, log_joint = self.joint.rsample_and_log_prob(sample_shape)
        value, extra = both.split([self.event_shape[0], self.auxiliary.input_dim], -1)
        log_q = log_joint - self.log_auxiliary(value, extra)
        tensors = [*self.joint.tensors(), *self.auxiliary.parameters()]
        self._memory = Memory(tensors)
        self._memory.remember(value, log_q)
        return value, log_q

    def log_prob(self, value: Tensor) -> Tensor:
        known = None if self._memory is None else self._memory.recall(value)
        if known is not None:
            return known
        if self._validate_args and not value.is_meta:
            self._validate_sample(value)
        return self.log_prob_bound(value, self.num_draws)

    def log_prob_bound(self, value: Tensor, num_draws: int) -> Tensor:
        r"""Estimate of a lower bound on the log-density, in nats.

        .. math:: \log \frac1K \sum_{k=1}^K \frac{q(x, a_k)}{r(a_k \mid x)}, \qquad
            a_k \sim r(a \mid x)

        Its mean rises with the number of draws to the log-density.

        Args:
            value: values to score.
            num_draws: number ``K`` of draws, at least 1.

        References:
            Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders,
            arXiv:1509.00519, equation 8.
        """
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(*batch, -1)
        law = self.auxiliary(self._given(value))
        if self._common:
            with torch.random.fork_rng([value.device] if value.is_cuda else []):
                torch.manual_seed(_SEED)
                noise = law.base.sample((num_draws, *(1 for _ in batch)))
            noise = noise.expand(num_draws, *batch, -1)
            extra, ladj = law.transform.call_and_ladj(noise, law.context)
            log_r = law.base.log_prob(noise) - ladj
        else:
            extra, log_r = law.rsample_and_log_prob((num_draws,))
        both = torch.cat([value.expand(num_draws, *batch, -1), extra], -1)
        log_w = self.joint.log_prob(both) - log_r
        return log_w[0] if num_draws == 1 else log_w.logsumexp(0) - math.log(num_draws)

    def draw_extra(self, value: Tensor) -> Tensor:
        """Extra dimensions from the auxiliary law given a value."""
        return self.auxiliary(self._given(value)).rsample()

    def log_auxiliary(self, value: Tensor, extra: Tensor) -> Tensor:
        """Log-density (nats) of the auxiliary law at extra dimensions, given a value."""
        return self.auxiliary(self._given(value)).log_prob(extra)

    def _given(self, value: Tensor) -> Tensor:
        """Context of the auxiliary law: the value, followed by the flow's context."""
        seen = value if self._see is None else self._see(value)
        context = self.joint.context
        if context is None:
            return seen
        return torch.cat([seen, context.expand(*value.shape[:-1], -1)], -1)

    def _with_joint(self, joint: FlowDistribution) -> AugmentedFlowDistribution:
        return AugmentedFlowDistribution(
            joint,
            self.auxiliary,
            num_draws=self.num_draws,
            common=self._common,
            given=self._see,
            validate_args=self._validate_args,
        )


def gaussian_auxiliary(num_extra: int, context_dim: int) -> Flow:
    """A Gaussian whose mean and covariance depend on the value through a network."""
    return Flow(TriangularAffine(num_extra, context_dim, hidden_dims=(32, 32)))


def check_auxiliary(auxiliary: Flow, num_extra: int, context_dim: int) -> None:
    """Refuse an auxiliary law of other sizes than the extra dimensions and their context."""
    if not isinstance(auxiliary, Flow):
        raise TypeError(f"`auxiliary` must be a Flow; got {type(auxiliary).__name__}.")
    for name, got, wanted in (
        ("input_dim", auxiliary.input_dim, num_extra),
        ("context_dim", auxiliary.context_dim, context_dim),
    ):
        if got != wanted:
            raise ValueError(f"`auxiliary` must have {name} {wanted}; got {got}.")
