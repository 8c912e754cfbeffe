"""A flow (parameters) and the distribution it makes (short-lived, one pass)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from pyro.distributions import Distribution, Independent, Normal, TorchDistribution
from pyro.distributions.util import detach
from torch import Tensor, nn
from torch.distributions import constraints

from flowvi.transforms.base import Direction, FlowTransform, common_shape, compose

__all__ = ["Flow", "FlowDistribution", "StandardNormal"]


class StandardNormal(nn.Module):
    """Parameterless base: a call gives N(0, I) with event shape ``(input_dim,)``.

    It lives on a buffer, so it follows ``.to()`` and ``.double()``.

    Args:
        input_dim: number of dimensions, at least 1; or an event shape.
        temperature: standard deviation, positive.
    """

    def __init__(self, input_dim: int | Sequence[int], *, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive; got {temperature}.")
        self._is_unit = temperature == 1
        self.register_buffer("loc", torch.zeros(input_dim), persistent=False)
        scale = torch.full_like(self.loc, temperature)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self) -> TorchDistribution:
        law = Normal(self.loc, self.scale, validate_args=False)
        return (_UnitNormal if self._is_unit else Independent)(law, self.loc.dim(), False)


class _UnitNormal(Independent):
    """N(0, I) with its draw and its log-density in one pass each, no location and scale."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        like = self.base_dist.loc
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    def log_prob(self, value: Tensor) -> Tensor:
        event_dim = self.reinterpreted_batch_ndims
        value = value if event_dim == 1 else value.flatten(-event_dim)
        log_norm = 0.5 * math.log(2 * math.pi) * value.shape[-1]
        log_prob = -0.5 * torch.linalg.vecdot(value, value) - log_norm
        return log_prob.expand(common_shape(log_prob.shape, self.batch_shape))


class Flow(nn.Module):
    """Owner of a flow's parameters; ``flow(context)`` gives a :class:`FlowDistribution`.

    Args:
        transform: map from the base to the target side.
        base: module whose call gives the base distribution, with the event shape of the
            transform; a standard normal if left out.

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
        self.base = StandardNormal(transform.event_shape) if base is None else base

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

    def tempered(self, temperature: float) -> Flow:
        """The same flow from base noise of another standard deviation, sharing all parameters.

        Args:
            temperature: standard deviation of the base; below 1 draws come closer to the mode.

        Raises:
            ValueError: if the temperature is not positive.
            NotImplementedError: if the base is not a standard normal.

        References:
            Kingma and Dhariwal (2018), Glow, arXiv:1807.03039, section 6 (figure 8).
        """
        if not isinstance(self.base, StandardNormal):
            raise NotImplementedError(
                f"{type(self.base).__name__}, the base, has no temperature. Use a standard normal."
            )
        base = StandardNormal(self.transform.event_shape, temperature=temperature)
        return Flow(self.transform, base.to(self.base.loc))


class _Score(nn.Module):
    """Inverse pass as a module, so that its parameters can be replaced by constants."""

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, context)


class Memory:
    """One value and what was computed with it, until anything it rests on changes.

    What was computed without a graph is not given back where a graph is wanted: a value drawn
    by ``sample`` would otherwise be scored without any gradient for the parameters.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._slot: tuple | None = None

    def __getstate__(self) -> dict:
        return {"_tensors": (), "_slot": None}

    def remember(self, value: Tensor, result: object) -> None:
        state = None if torch.compiler.is_compiling() else self._state(value)
        self._slot = (value, result, torch.is_grad_enabled(), state)

    def recall(self, value: Tensor) -> object | None:
        """What was computed with exactly this value, or None."""
        if self._slot is None or self._slot[0] is not value:
            return None
        if torch.is_grad_enabled() and not self._slot[2]:
            return None
        if torch.compiler.is_compiling():
            return self._slot[1]
        return self._slot[1] if self._slot[3] == self._state(value) else None

    def _state(self, value: Tensor) -> list[int]:
        # Tensors made in inference mode keep no version.
        return [-1 if t.is_inference() else t._version for t in (value, *self._tensors)]


class FlowDistribution(TorchDistribution):
    """Law of ``T(x | context)`` with ``x`` from a base distribution.

    Sampling and scoring what was sampled is one pass; any other value is scored through the
    inverse. The one-slot memory holds only the pair it has just made, and only while neither the
    value nor any parameter changes, so nothing in it is ever stale.

    Args:
        base: distribution on the base side, with the event shape of the transform.
        transform: map from the base to the target side.
        context: context vectors ``(*batch, context_dim)``; their batch becomes the distribution's.

    Shape:
        value: ``(*sample, *batch, *event_shape)``; log_prob: ``(*sample, *batch)``, in nats.

    Raises:
        ValueError: if the context is missing or has the wrong size.
    """

    arg_constraints: dict = {}

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
        if base.event_shape != transform.event_shape:
            raise ValueError(
                f"`base` must have event shape {tuple(transform.event_shape)} (that of the "
                f"transform); got {tuple(base.event_shape)}."
            )
        self.base = base
        self.transform = transform
        self.context = context
        self._path = path_derivative
        self._antithetic = antithetic
        self._memory: Memory | None = None
        if batch_shape is None:
            own = () if context is None else context.shape[:-1]
            batch_shape = common_shape(base.batch_shape, own)
        super().__init__(torch.Size(batch_shape), base.event_shape, validate_args=validate_args)
        self.has_rsample = base.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        return self.transform.codomain

    def expand(
        self, batch_shape: Sequence[int], _instance: Distribution | None = None
    ) -> FlowDistribution:
        check_expand(self.batch_shape, batch_shape)
        return self._replace(batch_shape=torch.Size(batch_shape))

    def path_derivative(self, *, antithetic: bool = False) -> FlowDistribution:
        """The same law whose log-density keeps only the gradient through the value.

        Args:
            antithetic: draw the leading dimension in pairs of opposite base noise; it has no
                effect where that dimension is odd or the base is not a normal distribution.

        References:
            Roeder, Wu and Duvenaud (2017), Sticking the landing, arXiv:1703.09194, section 3.
        """
        return self._replace(path_derivative=True, antithetic=antithetic)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.base.has_rsample:
            raise NotImplementedError(
                f"{type(self.base).__name__}, the base, has no reparameterised draw. Use sample."
            )
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw values and their log-density (nats) in one pass."""
        x, log_q = self._draw_base(torch.Size(sample_shape))
        if self._path and self._recursion_pays():
            y, ladj, score = self.transform.call_ladj_and_score(
                x, self._base_score(x), self.context
            )
            along = (score * (y - y.detach())).flatten(-len(self.event_shape)).sum(-1)
            log_q = (log_q - ladj).detach() + along
        elif self._path:
            y = self.transform.call_and_ladj(x, self.context)[0]
            log_q = self.log_prob_stopped(y)
        else:
            y, ladj = self.transform.call_and_ladj(x, self.context)
            log_q = log_q - ladj
        self._memory = Memory(self.tensors())
        self._memory.remember(y, log_q)
        return y, log_q

    def log_prob(self, value: Tensor) -> Tensor:
        known = None if self._memory is None else self._memory.recall(value)
        if known is not None:
            return known
        # On the meta device there are no numbers to validate.
        if self._validate_args and not value.is_meta:
            self._validate_sample(value)
        if self._path:
            return self.log_prob_stopped(value)
        x, ladj = self.transform.inverse_and_ladj(value, self.context)
        return self._fill_batch(self.base.log_prob(x) + ladj)

    def log_prob_stopped(self, value: Tensor) -> Tensor:
        """Log-density with every parameter and the context held constant."""
        module = _Score(self.transform)
        frozen = {n: t.detach() for n, t in module.named_parameters()}
        context = None if self.context is None else self.context.detach()
        x, ladj = torch.func.functional_call(module, frozen, (value, context))
        return self._fill_batch(_log_prob_stopped(self.base, x) + ladj)

    def _recursion_pays(self) -> bool:
        """Whether the score comes cheaper with the draw than by an inverse pass afterwards."""
        return self.transform.has_score_recursion and self.transform.cheap != Direction.INVERSE

    def _replace(self, **changes: object) -> FlowDistribution:
        fields = {
            "batch_shape": self.batch_shape,
            "path_derivative": self._path,
            "antithetic": self._antithetic,
            "validate_args": self._validate_args,
            **changes,
        }
        new = FlowDistribution(self.base, self.transform, self.context, **fields)
        new.has_rsample = self.has_rsample
        return new

    def _draw_base(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        base = self.base.expand(self.batch_shape)
        draw = base.rsample if base.has_rsample else base.sample
        x = draw(sample_shape)
        lead = x.shape[0] if x.dim() > len(self.event_shape) else 1
        if self._antithetic and lead % 2 == 0 and _is_normal(self.base):
            half = x[: lead // 2]
            x = torch.cat([half, 2 * self.base.mean - half])
        return x, base.log_prob(x)

    def _base_score(self, x: Tensor) -> Tensor:
        if isinstance(self.base, _UnitNormal):
            return -x.detach()
        if _is_normal(self.base):
            return ((self.base.mean - x) / self.base.variance).detach()
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.base.log_prob(leaf).sum(), leaf)[0]

    def _fill_batch(self, log_prob: Tensor) -> Tensor:
        return log_prob.expand(common_shape(log_prob.shape, self.batch_shape))

    def unchecked(self) -> FlowDistribution:
        """The same law without validation of the values it scores."""
        return self._replace(validate_args=False)

    def tensors(self) -> list[Tensor]:
        """Everything of the transform and the context that a remembered value rests on."""
        context = [] if self.context is None else [self.context]
        modules = self.transform.modules()
        own = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
        return [*(t for t in own if t is not None), *context]


def check_expand(old: torch.Size, new: Sequence[int]) -> None:
    """Refuse an expansion that drops or changes a batch dimension."""
    new = tuple(new)
    pairs = zip(reversed(old), reversed(new), strict=False)
    if len(new) < len(old) or any(a not in (1, b) for a, b in pairs):
        raise ValueError(f"`batch_shape` must be one that {tuple(old)} broadcasts to; got {new}.")


def _is_normal(base: Distribution) -> bool:
    """Whether the base is one normal law for all rows, so that mirror images keep the law."""
    return (
        isinstance(base, torch.distributions.Independent)
        and isinstance(base.base_dist, torch.distributions.Normal)
        and base.batch_shape == ()
    )


def _log_prob_stopped(base: Distribution, x: Tensor) -> Tensor:
    if hasattr(base, "log_prob_stopped"):
        return base.log_prob_stopped(x)
    return (detach(base) if _has_graph(base) else base).log_prob(x)


def _has_graph(base: object) -> bool:
    if isinstance(base, Tensor):
        return base.requires_grad
    return isinstance(base, torch.distributions.Distribution) and any(
        map(_has_graph, vars(base).values())
    )
