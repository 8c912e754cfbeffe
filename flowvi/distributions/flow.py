"""A flow (parameters) and the distribution it makes (short-lived, one pass)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import Distribution, Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from flowvi.transforms.base import FlowTransform, compose

__all__ = ["Flow", "FlowDistribution", "StandardNormal"]


class StandardNormal(nn.Module):
    """Parameterless base: a call gives N(0, I) with event shape ``(input_dim,)``.

    It lives on a buffer, so it follows ``.to()`` and ``.double()``.

    Args:
        input_dim: number of dimensions, at least 1.
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(input_dim), persistent=False)
        self.register_buffer("scale", torch.ones(input_dim), persistent=False)

    def forward(self) -> TorchDistribution:
        return Normal(self.loc, self.scale, validate_args=False).to_event(1)


class Flow(nn.Module):
    """Owner of a flow's parameters; ``flow(context)`` gives a :class:`FlowDistribution`.

    Args:
        transform: map from the base to the target side.
        base: module whose call gives the base distribution, with event shape
            ``(input_dim,)``; a standard normal if left out.

    Example:
        >>> from flowvi.flows import realnvp
        >>> q = realnvp(3)()
        >>> z, log_q = q.rsample_and_log_prob((5,))
        >>> z.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, transform: FlowTransform, base: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(transform, FlowTransform):
            raise TypeError(
                f"`transform` must be a FlowTransform; got {type(transform).__name__}. "
                "Wrap a foreign transform with flowvi.distributions.adapt."
            )
        self.transform = transform
        self.base = StandardNormal(transform.input_dim) if base is None else base

    @property
    def input_dim(self) -> int:
        """Number of dimensions."""
        return self.transform.input_dim

    @property
    def context_dim(self) -> int:
        """Length of the context vector; 0 for an unconditional flow."""
        return self.transform.context_dim

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        return FlowDistribution(self.base(), self.transform, context)

    def then(self, *transforms: FlowTransform) -> Flow:
        """The same flow followed by more maps, sharing all parameters."""
        return Flow(compose(self.transform, *transforms), self.base)


class _Score(nn.Module):
    """Inverse pass as a module, so that its parameters can be replaced by constants."""

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, context)


class FlowDistribution(TorchDistribution):
    """Law of ``T(x | context)`` with ``x`` from a base distribution.

    Sampling and scoring what was sampled is one pass; any other value is scored through the
    inverse. The one-slot memory holds only the pair it has just made, and only while neither the
    value nor any parameter changes, so nothing in it is ever stale.

    Args:
        base: distribution on the base side, event shape ``(input_dim,)``.
        transform: map from the base to the target side.
        context: context vectors ``(*batch, context_dim)``; their batch becomes the distribution's.

    Shape:
        value: ``(*sample, *batch, input_dim)``; log_prob: ``(*sample, *batch)``, in nats.

    Raises:
        ValueError: if the context is missing or has the wrong size.
    """

    arg_constraints: dict = {}
    has_rsample = True

    def __init__(
        self,
        base: Distribution,
        transform: FlowTransform,
        context: Tensor | None = None,
        *,
        batch_shape: Sequence[int] | None = None,
        path_derivative: bool = False,
        antithetic: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if transform.context_dim == 0:
            context = None
        elif context is None or context.shape[-1:] != (transform.context_dim,):
            got = None if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(
                f"`context` must end with size {transform.context_dim} (context_dim); got {got}."
            )
        self.base = base
        self.transform = transform
        self.context = context
        self._path = path_derivative
        self._antithetic = antithetic
        self._slot: tuple | None = None
        if batch_shape is None:
            own = () if context is None else context.shape[:-1]
            batch_shape = torch.broadcast_shapes(base.batch_shape, own)
        super().__init__(torch.Size(batch_shape), base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.transform.codomain

    def expand(
        self, batch_shape: Sequence[int], _instance: Distribution | None = None
    ) -> FlowDistribution:
        return self._replace(batch_shape=torch.Size(batch_shape))

    def path_derivative(self, *, antithetic: bool = False) -> FlowDistribution:
        """The same law whose log-density keeps only the gradient through the value.

        Args:
            antithetic: draw the leading sample dimension in pairs of opposite base noise.

        References:
            Roeder, Wu and Duvenaud (2017), Sticking the landing, arXiv:1703.09194, section 3.
        """
        return self._replace(path_derivative=True, antithetic=antithetic)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw values and their log-density (nats) in one pass."""
        x = self._draw_base(torch.Size(sample_shape))
        log_q = self.base.log_prob(x)
        if self._path and self.transform.has_score_recursion:
            y, ladj, score = self.transform.call_ladj_and_score(
                x, self._base_score(x), self.context
            )
            log_q = (log_q - ladj).detach() + (score * (y - y.detach())).sum(-1)
        elif self._path:
            y = self.transform.call_and_ladj(x, self.context)[0]
            log_q = self.log_prob_stopped(y)
        else:
            y, ladj = self.transform.call_and_ladj(x, self.context)
            log_q = log_q - ladj
        self._remember(y, log_q)
        return y, log_q

    def log_prob(self, value: Tensor) -> Tensor:
        if self._remembers(value):
            return self._slot[1]
        if self._validate_args:
            self._validate_sample(value)
        if self._path:
            return self.log_prob_stopped(value)
        x, ladj = self.transform.inverse_and_ladj(value, self.context)
        return self.base.log_prob(x) + ladj

    def log_prob_stopped(self, value: Tensor) -> Tensor:
        """Log-density with every parameter and the context held constant."""
        module = _Score(self.transform)
        frozen = {n: t.detach() for n, t in module.named_parameters()}
        context = None if self.context is None else self.context.detach()
        x, ladj = torch.func.functional_call(module, frozen, (value, context))
        return self.base.log_prob(x) + ladj

    def _replace(self, **changes: object) -> FlowDistribution:
        fields = {
            "batch_shape": self.batch_shape,
            "path_derivative": self._path,
            "antithetic": self._antithetic,
            "validate_args": self._validate_args,
            **changes,
        }
        return FlowDistribution(self.base, self.transform, self.context, **fields)

    def _draw_base(self, sample_shape: torch.Size) -> Tensor:
        base = self.base.expand(self.batch_shape)
        lead = (*sample_shape, *self.batch_shape)
        if not self._antithetic or not lead or lead[0] < 2 or lead[0] % 2:
            return base.rsample(sample_shape)
        shape = torch.Size((lead[0] // 2, *lead[1:]))
        half = self.base.expand(shape[len(sample_shape) :]).rsample(shape[: len(sample_shape)])
        return torch.cat([half, -half])

    def _base_score(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.base.log_prob(leaf).sum(), leaf)[0]

    def _versions(self) -> int:
        return sum(p._version for p in self.transform.parameters())

    def _remember(self, value: Tensor, log_q: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._slot = (value, log_q, value._version, self._versions())
        else:
            self._slot = (value, log_q, 0, 0)

    def _remembers(self, value: Tensor) -> bool:
        if self._slot is None or self._slot[0] is not value:
            return False
        if torch.compiler.is_compiling():
            return True
        return self._slot[2:] == (value._version, self._versions())
