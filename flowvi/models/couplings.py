"""Couplings of noise and data: which start a rectified flow joins to which item."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pyro.distributions import Delta, Distribution, TorchDistribution
from torch import Tensor, nn

from flowvi.distributions.flow import check_expand
from flowvi.models.transport import assign, squared_distances
from flowvi.models.vae import append

__all__ = [
    "IndependentCoupling",
    "LearnedCoupling",
    "OptimalTransportCoupling",
    "PairedCoupling",
    "SinkhornCoupling",
    "StartCoupling",
]


class StartCoupling(nn.Module, ABC):
    r"""Law :math:`q(z_0 \mid z_1)` of the starts that are joined to the items of a batch.

    Attributes:
        has_density: whether its draws can be scored, so that there is a bound.
        takes_pairs: whether items come as start and end side by side.
    """

    has_density = True
    takes_pairs = False

    @abstractmethod
    def forward(self, x: Tensor, prior: Distribution, context: Tensor | None) -> Distribution:
        """Law of the starts, batch shape ``(B,)``.

        Args:
            x: items ``(B, dim)``, or pairs ``(B, 2 * dim)`` where those are taken.
            prior: law of a start before an item is seen.
            context: what items are conditioned on, ``(B, context_dim)``.
        """

    def ends(self, x: Tensor) -> Tensor:
        """What the paths lead to, ``(B, dim)``."""
        return x


class IndependentCoupling(StartCoupling):
    r"""Starts know nothing of the items: :math:`q(z_0 \mid z_1) = p_0(z_0)`.

    References:
        Liu, Gong and Liu (2023), Flow straight and fast, arXiv:2209.03003, first round.
    """

    def forward(self, x: Tensor, prior: Distribution, context: Tensor | None) -> Distribution:
        return prior.expand(x.shape[:-1])


class LearnedCoupling(StartCoupling):
    r"""Amortised posterior of the start: a conditional law of features of the item.

    .. math:: q_\phi(z_0 \mid z_1) = q(z_0 \mid e_\phi(z_1))

    Args:
        posterior: its call on features gives the law: a conditional flow of
            :mod:`flowvi.flows`, :class:`~flowvi.models.DiagonalPosterior`, or what
            :func:`~flowvi.models.full_posterior`, :func:`~flowvi.models.cnf_posterior` and
            their like make.
        encoder: makes the features; the item itself if left out. A context is appended to them.

    Example:
        >>> from flowvi.distributions import StandardNormal
        >>> from flowvi.flows import nsf
        >>> prior = StandardNormal(2)()
        >>> LearnedCoupling(nsf(2, 2))(torch.zeros(5, 2), prior, None).sample().shape
        torch.Size([5, 2])
    """

    def __init__(self, posterior: nn.Module, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.posterior = posterior
        self.encoder = nn.Identity() if encoder is None else encoder

    def forward(self, x: Tensor, prior: Distribution, context: Tensor | None) -> Distribution:
        return self.posterior(append(self.encoder(x), context))


class OptimalTransportCoupling(StartCoupling):
    r"""Starts of a batch, dealt out to its items so that squared distances are least.

    Given a batch the starts are one joint draw: all orders of the same B points but one are ruled
    out, so the joint density is :math:`B!` times that of the prior, and the bound of a batch
    pays exactly :math:`\log(B!) / B` nats per item. Only its own draws may be scored. Contexts
    do not matter to it.

    The assignment is exact and solved on the host, which waits for the device.

    References:
        Pooladian et al. (2023), Multisample flow matching, arXiv:2304.14772; Tong et al. (2024),
        arXiv:2302.00482, section 3.2. The value of its density is the counting argument above.
    """

    def forward(self, x: Tensor, prior: Distribution, context: Tensor | None) -> Distribution:
        return _DealtStarts(prior, x, assign, math.lgamma(len(x) + 1) / len(x))


class SinkhornCoupling(StartCoupling):
    r"""Starts of a batch, drawn for each item from the entropic plan; on the device.

    .. math:: \pi_{ij} \propto u_i v_j \exp(-|z_{1i} - z_{0j}|^2 / \epsilon)

    With :math:`\epsilon = 2 \sigma^2` and a :class:`~flowvi.paths.BrownianBridge` of the same
    noise it aims at the Schroedinger bridge. One start may serve several items, so its draws have
    no density and there is no bound.

    Args:
        epsilon: entropic regularisation, in units of squared distance; positive.
        num_iterations: of Sinkhorn's algorithm.

    Raises:
        ValueError: if ``epsilon`` is not positive.

    References:
        Cuturi (2013), Sinkhorn distances, arXiv:1306.0895; Tong et al. (2024), Simulation-free
        Schroedinger bridges via score and flow matching, arXiv:2307.03672, section 3.3.
    """

    has_density = False

    def __init__(self, epsilon: float, num_iterations: int = 100) -> None:
        super().__init__()
        if not 0 < epsilon < math.inf:
            raise ValueError(f"`epsilon` must be positive and finite; got {epsilon!r}.")
        self.epsilon = epsilon
        self.num_iterations = num_iterations

    def forward(self, x: Tensor, prior: Distribution, context: Tensor | None) -> Distribution:
        return _DealtStarts(prior, x, self._draw_partners, 0.0)

    def _draw_partners(self, cost: Tensor) -> Tensor:
        """A column for every row of ``(*batch, B, B)``, drawn from the plan."""
        kernel = -cost / self.epsilon
        column = torch.zeros_like(kernel[..., :1, :])
        for _ in range(self.num_iterations):
            row = (kernel - column).logsumexp(-1, keepdim=True)
            column = (kernel - row).logsumexp(-2, keepdim=True)
        # The largest of log-weights plus Gumbel noise is a draw.
        gumbel = -torch.empty_like(kernel).exponential_().log()
        return (kernel - column + gumbel).argmax(-1)


class PairedCoupling(StartCoupling):
    r"""Items that bring their starts along, side by side, as in a reflow round.

    The starts are given, so they are not scored and there is no bound.

    References:
        Liu, Gong and Liu (2023), Flow straight and fast, arXiv:2209.03003, section 2.2.
    """

    has_density = False
    takes_pairs = True

    def forward(self, x: Tensor, prior: Distribution, context: Tensor | None) -> Distribution:
        start = x.chunk(2, -1)[0]
        # The prior's own density: the two cancel in the loss.
        return Delta(start, prior.log_prob(start), event_dim=1, validate_args=False)

    def ends(self, x: Tensor) -> Tensor:
        return x.chunk(2, -1)[1]


class _DealtStarts(TorchDistribution):
    """Draws of the prior, dealt out to the items by a function of the squared distances.

    Args:
        prior: law of a start.
        x: items ``(B, dim)``.
        deal: maps costs ``(*batch, B, B)``, a row for each item, to indices of starts
            ``(*batch, B)``.
        surplus: log-density of a draw above that of the prior, nats per item.
    """

    arg_constraints: dict = {}

    def __init__(
        self,
        prior: Distribution,
        x: Tensor,
        deal: object,
        surplus: float,
        batch_shape: Sequence[int] | None = None,
    ) -> None:
        self.prior = prior
        self.x = x
        self.deal = deal
        self.surplus = surplus
        batch_shape = torch.Size([len(x)]) if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch_shape, prior.event_shape, validate_args=False)
        self.has_rsample = prior.has_rsample

    @property
    def support(self) -> object:
        return self.prior.support

    def expand(
        self, batch_shape: Sequence[int], _instance: Distribution | None = None
    ) -> _DealtStarts:
        check_expand(self.batch_shape, batch_shape)
        return _DealtStarts(self.prior, self.x, self.deal, self.surplus, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(
                "The law of the starts has no reparameterised draw. Use sample."
            )
        return self._deal_out(self.prior.expand(self.batch_shape).rsample(sample_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._deal_out(self.prior.expand(self.batch_shape).sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.prior.expand(self.batch_shape).log_prob(value) + self.surplus

    def _deal_out(self, starts: Tensor) -> Tensor:
        cost = squared_distances(self.x.detach(), starts.detach())
        return torch.take_along_dim(starts, self.deal(cost).unsqueeze(-1), -2)
