"""Laws of pixels: continuous Bernoulli, discretised logistic and categorical levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from flowvi.transforms.base import common_shape

__all__ = ["CategoricalLevels", "ContinuousBernoulli", "DiscretisedLogistic"]


class _PixelLaw(TorchDistribution):
    """Law of one number whose parameters are tensors, the first with batch dimensions only."""

    arg_constraints: dict = {}
    num_right = 0  # dimensions of the parameters right of the batch

    def __init__(self, *params: Tensor, validate_args: bool | None = None) -> None:
        self._params = torch.broadcast_tensors(*params)
        shape = self._params[0].shape
        batch = shape[: len(shape) - self.num_right]
        super().__init__(batch, torch.Size(), validate_args=validate_args)

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of the law, in the units of its values."""

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> TorchDistribution:
        right = self._params[0].shape[len(self.batch_shape) :]
        params = [p.expand(*batch_shape, *right) for p in self._params]
        return self._with(params)

    def _with(self, params: Sequence[Tensor]) -> TorchDistribution:
        return type(self)(*params, validate_args=self._validate_args)

    def _uniform(self, sample_shape: Sequence[int]) -> Tensor:
        """Uniform numbers inside (0, 1)."""
        like = self._params[0]
        shape = self._extended_shape(torch.Size(sample_shape))
        tiny = torch.finfo(like.dtype).tiny
        return torch.rand(shape, dtype=like.dtype, device=like.device).clamp(min=tiny)


class ContinuousBernoulli(_PixelLaw):
    r"""Law on [0, 1] with density proportional to :math:`e^{l x}`.

    .. math:: \log p(x) = l x - \tfrac{l}{2} - \log \frac{\sinh(l / 2)}{l / 2}

    with the logit l. Unlike torch's, density and mean are exact to rounding for every logit,
    around 0 as well.

    Args:
        logits: l, any shape.

    References:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli, arXiv:1907.06845.

    Example:
        >>> ContinuousBernoulli(torch.tensor(2.0)).log_prob(torch.tensor(1.0))
        tensor(0.8386)
    """

    support = constraints.unit_interval
    has_rsample = True

    @property
    def logits(self) -> Tensor:
        """The parameter l."""
        return self._params[0]

    @property
    def mean(self) -> Tensor:
        """Mean, the derivative of the log-normaliser; 1/2 for logit 0."""
        half = self.logits / 2
        small = half.abs() < 0.1
        safe = torch.where(small, torch.ones_like(half), half)
        # coth(u) - 1/u, by its series around 0.
        square = half.square()
        series = 1 / 3 - square * (1 / 45 - square * (2 / 945 - square * (1 / 4725)))
        return 0.5 + 0.5 * torch.where(small, half * series, 1 / safe.tanh() - 1 / safe)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) - _log_sinhc(self.logits / 2)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        u, logits = self._uniform(sample_shape), self.logits
        size = logits.abs()
        small = size < 0.03
        safe = torch.where(small, torch.ones_like(size), size)
        # The law of 1 - x has the opposite logit; the exponential is that of a negative number.
        low = -(torch.where(logits > 0, 1 - u, u) * torch.expm1(-safe)).log1p() / safe
        far = torch.where(logits > 0, 1 - low, low)
        # Around 0 the inverse of the distribution function by the cumulants of a coin.
        spread, skew = u * (1 - u), 1 - 2 * u
        terms = (1 / 2, skew / 6, (1 - 6 * spread) / 24, skew * (1 - 12 * spread) / 120)
        near = u + spread * sum(c * logits ** (k + 1) for k, c in enumerate(terms))
        return torch.where(small, near, far).clamp(0, 1)


def _log_sinhc(u: Tensor) -> Tensor:
    r""":math:`\log(\sinh(u) / u)`, smooth at 0 and finite far out."""
    size = u.abs()
    small = size < 0.3
    safe = torch.where(small, torch.ones_like(size), size)
    far = safe + torch.log(-torch.expm1(-2 * safe) / (2 * safe))
    square = u.square()
    terms = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775)
    series = sum(c * square ** (k + 1) for k, c in enumerate(terms))
    return torch.where(small, series, far)


class DiscretisedLogistic(_PixelLaw):
    r"""Law of whole levels 0 to n - 1: a logistic law cut into bins, the outer ones open.

    .. math:: p(k) = s\!\left(\frac{v_k + h - \mu}{\sigma}\right)
        - s\!\left(\frac{v_k - h - \mu}{\sigma}\right), \qquad v_k = \frac{2k}{n-1} - 1,
        \quad h = \frac{1}{n-1}

    with the logistic function s; the first bin reaches to minus and the last to plus infinity.
    The logarithm of the difference is taken without cancellation.

    Args:
        loc: centre :math:`\mu`, on a scale where the levels go from -1 to 1.
        log_scale: :math:`\log\sigma` on that scale.
        num_levels: number of levels n, at least 2.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow,
        arXiv:1606.04934; Salimans et al. (2017), PixelCNN++, arXiv:1701.05517,
        equation 2, for the open outer bins.

    Example:
        >>> law = DiscretisedLogistic(torch.zeros(()), torch.zeros(()), num_levels=4)
        >>> float(law.log_prob(torch.arange(4.0)).exp().sum())
        1.0
    """

    def __init__(
        self,
        loc: Tensor,
        log_scale: Tensor,
        num_levels: int = 256,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.num_levels = check_levels(num_levels)
        super().__init__(loc, log_scale, validate_args=validate_args)

    def _with(self, params: Sequence[Tensor]) -> TorchDistribution:
        return type(self)(*params, self.num_levels, validate_args=self._validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_levels - 1)

    @property
    def mean(self) -> Tensor:
        """Mean level: the sum over all edges of the probability to lie above."""
        loc, log_scale = self._params
        edges = torch.arange(1, self.num_levels, dtype=loc.dtype, device=loc.device)
        edges = (2 * edges - 1) / (self.num_levels - 1) - 1
        shifted = (loc.unsqueeze(-1) - edges) * (-log_scale).exp().unsqueeze(-1)
        return shifted.sigmoid().sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, log_scale = self._params
        last = self.num_levels - 1
        value = value.to(loc.dtype)
        rate = (-log_scale).exp()
        centre = (2 * value / last - 1 - loc) * rate
        half = rate / last
        above, below = F.logsigmoid(centre + half), F.logsigmoid(half - centre)
        # s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)); one factor is left for an open bin.
        inner = above + below + torch.log(-torch.expm1(-2 * half))
        return torch.where(value <= 0, above, torch.where(value >= last, below, inner))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            loc, log_scale = self._params
            u = self._uniform(sample_shape)
            drawn = loc + log_scale.exp() * (u.log() - torch.log1p(-u))
            last = self.num_levels - 1
            return ((drawn + 1) * (0.5 * last)).round().clamp(0, last)


class CategoricalLevels(_PixelLaw):
    """Law of whole levels 0 to n - 1 with a free probability for each, and with a mean.

    Args:
        logits: unnormalised log-probabilities ``(*batch, n)``.

    Example:
        >>> CategoricalLevels(torch.zeros(5, 4)).mean
        tensor([1.5000, 1.5000, 1.5000, 1.5000, 1.5000])
    """

    num_right = 1

    @property
    def logits(self) -> Tensor:
        """The unnormalised log-probabilities."""
        return self._params[0]

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    @property
    def mean(self) -> Tensor:
        """Mean level."""
        logits = self.logits
        levels = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return (logits.softmax(-1) * levels).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = common_shape(value.shape, self.logits.shape[:-1])
        logits = self.logits.expand(*shape, -1).reshape(-1, self.logits.shape[-1])
        index = value.expand(shape).reshape(-1).long()
        return -F.cross_entropy(logits, index, reduction="none").reshape(shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            noise = torch.rand(
                (*shape, self.logits.shape[-1]), dtype=self.logits.dtype, device=self.logits.device
            )
            tiny = torch.finfo(noise.dtype).tiny
            # The largest of logits plus Gumbel noise has the law.
            gumbel = -(-noise.clamp(min=tiny).log()).clamp(min=tiny).log()
            return (self.logits + gumbel).argmax(-1).to(self.logits.dtype)


def check_levels(num_levels: int) -> int:
    """Refuse a number of levels below 2."""
    if not isinstance(num_levels, int) or num_levels < 2:
        raise ValueError(f"`num_levels` must be an integer of at least 2; got {num_levels!r}.")
    return num_levels
