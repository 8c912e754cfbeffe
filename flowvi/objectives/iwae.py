"""Importance-weighted bound and its estimators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives._draws import path_log_prob, reweight_draws
from flowvi.objectives._given import GivenDraws, draws_depend, given_term
from flowvi.objectives._path import PathMessenger
from flowvi.objectives.items import ItemLogWeights
from flowvi.objectives.multisample import MultiSample
from flowvi.objectives.weights import LogWeight, log_mean_exp, log_weights

__all__ = ["IWAE", "STLIWAE", "DReG"]


class IWAE(MultiSample):
    r"""Importance-weighted bound with its full reparameterised gradient.

    .. math:: \mathcal{L}_K = \sum_i E\Big[\log \frac{1}{K} \sum_{k=1}^K
        \frac{p(x_i, z_{ik})}{q(z_{ik})}\Big], \qquad
        \text{ELBO} = \mathcal{L}_1 \le \mathcal{L}_K \le \mathcal{L}_{K+1} \le \log p(x)

    Items :math:`i` are the plates that all sites share (see :func:`item_log_weights`), and the
    N/B of a subsampled plate stands outside the logarithm. As K grows the gradient for the guide
    drowns in noise; :class:`DReG` does not have that problem.

    Args:
        num_particles: K, at least 1.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, if a guide site is not reparameterised, or if
            sites differ in scale (a global latent with a subsampled plate).

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders,
        arXiv:1509.00519, section 3.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = IWAE(num_particles=8)(model, AutoNormal(model))()
        >>> loss.shape
        torch.Size([])
    """

    def _bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)


class STLIWAE(IWAE):
    r"""Importance-weighted bound whose guide gradient runs through the draws alone.

    .. math:: \sum_k \bar w_k\, \frac{\partial \log w_k}{\partial z_k}
        \frac{\partial z_k}{\partial \phi}, \qquad \bar w_k = w_k / \textstyle\sum_j w_j

    The part left out, :math:`\sum_k \bar w_k \nabla_\phi \log q(z_k)`, has mean zero for K = 1
    only. For K > 1 the guide's gradient is **biased** and need not point towards a better bound;
    :class:`DReG` is the unbiased estimator of the same cost. The value, and the gradient of the
    model's parameters, are those of :class:`IWAE`. At q = p the guide's gradient is zero.

    A guide in which the law of one site depends on the draw of another is run a second time in
    each step, at its own draws: it must do the same again, and its flows must be able to score
    given values.

    Args:
        num_particles: K, at least 1.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, as for :class:`IWAE`.

    References:
        Roeder, Wu and Duvenaud (2017), Sticking the landing, arXiv:1703.09194, section 5; Tucker,
        Lawson, Gu and Maddison (2019), Doubly reparameterized gradient estimators for Monte Carlo
        objectives, arXiv:1810.04152, section 3, for the bias.
    """

    def _guide_handler(self) -> AbstractContextManager:
        return PathMessenger(self._batch, self._particle_dim, False, None)

    def _guide_trace(self, guide: Callable, args: tuple, kwargs: dict) -> Trace:
        trace = super()._guide_trace(guide, args, kwargs)
        if not torch.is_grad_enabled() or not draws_depend(trace):
            return trace
        with GivenDraws(trace):
            return poutine.trace(guide).get_trace(*args, **kwargs)

    def _weights(self, model_trace: Trace, guide_trace: Trace) -> list[LogWeight]:
        bound = type(self).__name__
        term = given_term(guide_trace, bound) or (lambda site: path_log_prob(site, bound))
        return log_weights(model_trace, guide_trace, term, max_dim=self._max_dim)

    def _combine(self, traces: list[tuple[Trace, Trace]], num_particles: int) -> Tensor:
        items = self._items([self._weights(m, g) for m, g in traces], num_particles)
        self._reweight(items, [guide for _, guide in traces])
        return items.total(self._bound(items.value))

    def _reweight(self, items: ItemLogWeights, guides: list[Trace]) -> None:
        """Multiply the gradient that reaches each draw; nothing to do for this estimator."""


class DReG(STLIWAE):
    r"""Importance-weighted bound with the doubly reparameterised gradient.

    .. math:: \nabla_\phi \mathcal{L}_K = E\Big[\sum_k \bar w_k^2\,
        \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}\Big],
        \qquad \bar w_k = w_k / \textstyle\sum_j w_j

    Unbiased like :class:`IWAE`, at the same cost, but its signal-to-noise ratio for the guide's
    parameters grows with K, and it is zero at q = p. The value and the gradient of the model's
    parameters (weights :math:`\bar w_k`) are those of :class:`IWAE`. Guides whose sites depend
    on each other are run twice, as for :class:`STLIWAE`.

    Args:
        num_particles: K, at least 1.
        max_plate_nesting: number of nested plates of model and guide; guessed if left out.
        vectorize_particles: run all particles as one batch or one after the other.

    Raises:
        NotImplementedError: at the first step, as for :class:`IWAE`.

    References:
        Tucker, Lawson, Gu and Maddison (2019), Doubly reparameterized gradient estimators for
        Monte Carlo objectives, arXiv:1810.04152, section 3; Rainforth et al. (2018), Tighter
        variational bounds are not necessarily better, arXiv:1802.04537; Bauer and Mnih (2021),
        Generalized doubly reparameterized gradient estimators, arXiv:2101.11046, for guides of
        several layers.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> loss = DReG(num_particles=8)(model, AutoNormal(model))()
        >>> loss.shape
        torch.Size([])
    """

    def _reweight(self, items: ItemLogWeights, guides: list[Trace]) -> None:
        # The logarithm's gradient brings one factor of the normalised weights, this the second.
        weights = items.value.detach().softmax(0)
        reweight_draws(items, guides, weights, self._particle_dim)
