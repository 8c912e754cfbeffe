"""Chi upper bound."""

from __future__ import annotations

import math
from numbers import Real

from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives.base import check_several_particles
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.weights import log_mean_exp, with_gradient_of

__all__ = ["CUBO"]


class CUBO(MultiSample):
    r"""Chi upper bound on log p, to be made small.

    .. math:: \mathrm{CUBO}_n = \frac{1}{n} \log E_q\Big[\Big(\frac{p(x, z)}{q(z)}\Big)^n\Big]
        \;\ge\; \log p(x)

    The loss is the bound itself, in nats, estimated per item (see :func:`item_log_weights`) from K
    draws. The logarithm of a mean of draws is too small on average, so the reported value is an
    upper bound only as K grows; heavy-tailed weights need very many.

    The gradient is that of :math:`\exp(n\,\mathrm{CUBO}_n) / n`, whose estimate is unbiased and
    which has the same minimum. Its size is hopeless (:math:`p(x)^n`), so each item's is divided
    by :math:`\max_k w_k^n`:

    .. math:: \frac{1}{K} \sum_k \Big(\frac{w_k}{\max_j w_j}\Big)^n \nabla \log w_k

    That divisor is a positive number which changes from step to step and item to item, and it
    belongs to the same draws: with few draws it biases the direction, and with one the weights
    would be gone altogether and the gradient lead away from p. Take hundreds of draws.

    Args:
        num_particles: K, at least 2.
        order: n, above 1; 2 is the chi-square divergence.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, if a guide site is not reparameterised, or if
            sites differ in scale (a global latent with a subsampled plate).

    References:
        Dieng, Tran, Ranganath, Paisley and Blei (2017), Variational inference via chi upper bound
        minimization, arXiv:1611.00328, section 2 and algorithm 1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = CUBO(num_particles=8)(model, AutoNormal(model))()
        >>> loss.shape
        torch.Size([])
    """

    is_upper_bound = True

    def __init__(
        self,
        num_particles: int = 100,
        *,
        order: float = 2.0,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        check_several_particles(num_particles, "CUBO")
        if not isinstance(order, Real) or not 1 < order < math.inf:
            raise ValueError(f"`order` must be a finite number above 1; got {order!r}.")
        self.order = float(order)

    def _bound(self, log_w: Tensor) -> Tensor:
        powers = self.order * log_w
        value = log_mean_exp(powers) / self.order
        moment = (powers - powers.detach().amax(0)).exp().mean(0) / self.order
        return with_gradient_of(value, moment)

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        # What is maximised is minus the bound.
        return -super()._combine(traces, num_particles)
