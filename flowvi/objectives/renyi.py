"""Renyi's family of bounds, from the smallest to the largest weight."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.weights import log_mean_exp

__all__ = ["Renyi", "VRMax"]

# Below this the powers of the weights differ from 1 by so little that their mean must be formed
# from the differences.
_NEARLY_ONE = 1e-3


class Renyi(MultiSample):
    r"""Variational Renyi bound with its full reparameterised gradient.

    .. math:: \mathcal{L}_\alpha = \frac{1}{1 - \alpha} \log E_q\Big[\Big(
        \frac{p(x, z)}{q(z)}\Big)^{1 - \alpha}\Big]

    with the mean over K draws in place of the expectation, per item (see
    :func:`item_log_weights`). It falls in :math:`\alpha`: 1 gives the ELBO, 0 gives IWAE, infinity
    the smallest and minus infinity the largest of the K log-weights. For :math:`\alpha \ge 0` its
    mean is a lower bound on log p for every K. For :math:`\alpha < 0` the exact quantity is an
    upper bound, but K draws estimate it from below, so it may lie on either side.

    Args:
        alpha: order, any number but nan; infinities allowed.
        num_particles: K, at least 1.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, if a guide site is not reparameterised, or if
            sites differ in scale (a global latent with a subsampled plate).

    References:
        Li and Turner (2016), Renyi divergence variational inference, arXiv:1602.02311,
        theorems 1 and 2.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = Renyi(0.5, num_particles=8)(model, AutoNormal(model))()
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        alpha: float,
        num_particles: int = 2,
        *,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or math.isnan(alpha):
            raise ValueError(f"`alpha` must be a number; got {alpha!r}.")
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.alpha = float(alpha)

    def _bound(self, log_w: Tensor) -> Tensor:
        power = 1 - self.alpha
        if power == 0:
            return log_w.mean(0)
        if math.isinf(power):
            return log_w.amax(0) if power > 0 else log_w.amin(0)
        if abs(power) < _NEARLY_ONE:
            top = log_w.detach().amax(0)
            return top + (power * (log_w - top)).expm1().mean(0).log1p() / power
        return log_mean_exp(power * log_w) / power


class VRMax(Renyi):
    r"""The largest of K log-weights: Renyi's bound of order minus infinity.

    .. math:: E\big[\max_k \log p(x, z_k) - \log q(z_k)\big]

    One draw per item carries the gradient. It lies above IWAE with the same K by at most log K,
    and is **not** a lower bound on log p.

    Args:
        num_particles: K, at least 1; 1 gives the ELBO.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, as for :class:`Renyi`.

    References:
        Li and Turner (2016), Renyi divergence variational inference, arXiv:1602.02311, section
        4.
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            -math.inf,
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
