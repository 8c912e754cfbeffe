"""Elementwise monotone maps as pure functions, and the transform that applies one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowvi.nn import MLP
from flowvi.transforms.base import FlowTransform

__all__ = ["Additive", "Affine", "Chain", "ElementwiseMap", "ElementwiseTransform"]


class ElementwiseMap(abc.ABC):
    """Increasing map of one number, a pure function of the number and its raw parameters.

    It holds no tensors: coupling, autoregressive and elementwise transforms are generic over it.
    Raw parameters are unconstrained, and all zero they give the identity.

    ``is_affine`` maps are all the same in one dimension. A map that ``prefers_columns`` is faster
    on parameters stored parameter by parameter, each for the whole batch.

    Shape:
        x, y: ``(*batch, dims)``; params: ``(*batch, dims, num_params)``; ladj: like ``x``, in
        nats. Shapes broadcast.
    """

    is_affine = False
    prefers_columns = False

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """Number of raw parameters of one number."""

    @abc.abstractmethod
    def call_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` to ``(y, log dy/dx)``, both elementwise."""

    @abc.abstractmethod
    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``y`` to ``(x, log dx/dy)``, both elementwise."""

    def call_with_score(
        self, x: Tensor, params: Tensor, score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Map ``x`` and the score of its law; what a score recursion needs of one number.

        With :math:`y = f(x; \theta)` and :math:`\ell = \log \partial y/\partial x`,

        .. math:: s_y = (s - \partial_x \ell)\, e^{-\ell}, \qquad
            g = s_y\, \partial_\theta y + \partial_\theta \ell

        Returns:
            ``(y, ladj, score of y, g)``; the last two are detached, ``g`` has the shape of
            ``params``.
        """
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            params = params if params.requires_grad else params.detach().requires_grad_()
            # A view, so that its gradient leaves out any way through the network.
            direct = x.view_as(x)
            y, ladj = self.call_and_ladj(direct, params)
            slope = own_grads(ladj.sum(), (direct,))[0]
            score = (score.detach() - slope) * torch.exp(-ladj.detach())
            pulled = own_grads((score * y).sum() + ladj.sum(), (params,))[0]
        return y, ladj, score, pulled

    def call_with_derivatives(
        self, x: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        r"""Map ``x``, with the derivatives that a score recursion through all numbers needs.

        Returns:
            ``(y, ladj, (d ladj/dx, d ladj/d params, dy/d params))``; the derivatives carry no
            graph, and the first one broadcasts with ``x``.
        """
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            params = params if params.requires_grad else params.detach().requires_grad_()
            # A view, so that its gradient leaves out any way through the network.
            direct = x.view_as(x)
            y, ladj = self.call_and_ladj(direct, params)
            of_ladj = own_grads(ladj.sum(), (direct, params))
            of_y = own_grads(y.sum(), (params,))
        if not keep_graph:
            y, ladj = y.detach(), ladj.detach()
        return y, ladj, of_ladj + of_y

    def inverse(self, y: Tensor, params: Tensor) -> Tensor:
        """Map ``y`` to ``x``; cheaper than with the log-derivative where that matters."""
        return self.inverse_and_ladj(y, params)[0]


@dataclass(frozen=True)
class Additive(ElementwiseMap):
    """Shift: ``y = x + params[..., 0]``, volume-preserving.

    References:
        Dinh, Krueger and Bengio (2014), NICE, arXiv:1410.8516, section 3.2.
    """

    is_affine = True

    @property
    def num_params(self) -> int:
        return 1

    def call_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y = x + params[..., 0]
        return y, torch.zeros_like(y)

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = y - params[..., 0]
        return x, torch.zeros_like(x)

    def call_with_score(
        self, x: Tensor, params: Tensor, score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        score = score.detach()
        return *self.call_and_ladj(x, params), score, score.unsqueeze(-1)

    def pull_back(
        self, x: Tensor, ladj: Tensor, grad_y: Tensor, grad_ladj: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients for ``x`` and the raw parameters, given those for ``y`` and a row's ladj."""
        return grad_y, grad_y.unsqueeze(-1)


@dataclass(frozen=True)
class Affine(ElementwiseMap):
    r"""Shift and scale, with a soft-bounded log-scale.

    .. math:: y = x \exp(s) + t, \qquad t = params_0, \quad s = b \tanh(params_1 / b)

    Args:
        bound: bound ``b`` of the log-scale, positive; the slope stays within ``exp(+-b)``.

    Raises:
        ValueError: if ``bound`` is not positive.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), RealNVP, arXiv:1605.08803, equation 7.
    """

    bound: float = 4.0
    is_affine = True

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"`bound` must be positive; got {self.bound}.")

    @property
    def num_params(self) -> int:
        return 2

    def call_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._constrain(params)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, ladj = self._constrain(params, -1)
        return (y - shift) * ladj.exp(), ladj

    def call_with_score(
        self, x: Tensor, params: Tensor, score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shift, log_scale = self._constrain(params)
        scale = log_scale.exp()
        y = torch.addcmul(shift, x, scale)
        with torch.no_grad():
            # s_y x exp(s) = score x.
            bounded = self._slope(log_scale)
            pulled = torch.addcmul(bounded, bounded, score * x)
            score = score / scale
            return y, log_scale, score, _as_params(score, pulled)

    def call_with_derivatives(
        self, x: Tensor, params: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        shift, log_scale = self._constrain(params)
        scale = log_scale.exp()
        y = torch.addcmul(shift, x, scale)
        with torch.no_grad():
            bounded = self._slope(log_scale)
            none, one = torch.zeros_like(bounded), torch.ones_like(bounded)
            of_ladj = _as_params(none, bounded)
            return y, log_scale, (none, of_ladj, _as_params(one, bounded * (x * scale)))

    def pull_back(
        self, x: Tensor, ladj: Tensor, grad_y: Tensor, grad_ladj: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients for ``x`` and the raw parameters, given those for ``y`` and a row's ladj."""
        grad_x = grad_y * ladj.exp()
        of_scale = grad_x * x
        if grad_ladj is not None:
            of_scale += grad_ladj.unsqueeze(-1)
        return grad_x, _as_params(grad_y, of_scale.mul_(self._slope(ladj)))

    def _slope(self, log_scale: Tensor) -> Tensor:
        """Derivative of the log-scale in its raw parameter, 1 - (s / b)^2."""
        one = log_scale.new_ones(())
        return torch.addcmul(one, log_scale, log_scale, value=-(self.bound**-2))

    def inverse(self, y: Tensor, params: Tensor) -> Tensor:
        shift, ladj = self._constrain(params, -1)
        return (y - shift) * ladj.exp()

    def _constrain(self, params: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
        """Shift, and ``sign`` times the log-scale."""
        shift, raw = params.unbind(-1)
        # b tanh(r / b) = b - 2 b sigmoid(-2 r / b), and torch's sigmoid is several times faster.
        bounded = torch.sigmoid_(raw * (-2 * sign / self.bound))
        return shift, torch.rsub(bounded, self.bound, alpha=2 * self.bound)


class Chain(ElementwiseMap):
    """Several elementwise maps, one after the other, as one.

    Args:
        *maps: at least one map, first applied first.

    Raises:
        ValueError: if no map is given.
    """

    def __init__(self, *maps: ElementwiseMap) -> None:
        if not maps:
            raise ValueError("`maps` must hold at least one elementwise map; got none.")
        self.maps = maps

    @property
    def prefers_columns(self) -> bool:
        return any(m.prefers_columns for m in self.maps)

    @property
    def num_params(self) -> int:
        return sum(m.num_params for m in self.maps)

    def call_and_ladj(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        total = None
        for part, own in zip(self.maps, self._split(params), strict=True):
            x, ladj = part.call_and_ladj(x, own)
            total = ladj if total is None else total + ladj
        return x, total

    def inverse_and_ladj(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        total = None
        for part, own in zip(self.maps[::-1], self._split(params)[::-1], strict=True):
            y, ladj = part.inverse_and_ladj(y, own)
            total = ladj if total is None else total + ladj
        return y, total

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.maps))})"

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        return params.split([m.num_params for m in self.maps], dim=-1)


class ElementwiseTransform(FlowTransform):
    """The same kind of elementwise map on every dimension, each with its own parameters.

    The parameters are free, or a network makes them from the context. Starts at the identity.

    Args:
        input_dim: number of dimensions, at least 1; or an event shape.
        elementwise: the map of one number.
        context_dim: length of the context vector; 0 learns one set of parameters.
        hidden_dims: widths of the network that reads the context.
        activation: makes the network's nonlinearity.

    Shape:
        x: ``(*batch, *event_shape)``; context: ``(*batch, context_dim)``; ladj: ``(*batch,)``,
        nats.

    Example:
        >>> y, ladj = ElementwiseTransform(3, Affine()).call_and_ladj(torch.ones(2, 3))
        >>> ladj.tolist()
        [0.0, 0.0]
    """

    has_score_recursion = True

    def __init__(
        self,
        input_dim: int | Sequence[int],
        elementwise: ElementwiseMap,
        context_dim: int = 0,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(input_dim, context_dim)
        check_elementwise(elementwise)
        self.elementwise = elementwise
        size = elementwise.num_params * self.input_dim
        if context_dim:
            self.network = MLP(context_dim, hidden_dims, size, activation=activation)
        else:
            self.params = nn.Parameter(torch.zeros(size))

    def _call_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, ladj = self.elementwise.call_and_ladj(x, self._params(context))
        return y, self._total(ladj, y)

    def _inverse_and_ladj(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, ladj = self.elementwise.inverse_and_ladj(y, self._params(context))
        return x, self._total(ladj, x)

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            ladj = self.elementwise.call_and_ladj(leaf, self._params(context).detach())[1]
            pushed = (score - own_grads(ladj.sum(), (leaf,))[0]) * torch.exp(-ladj.detach())
        return *self._call_and_ladj(x, context), pushed

    def _params(self, context: Tensor | None) -> Tensor:
        raw = self.network(context) if self.context_dim else self.params
        by_param = raw.unflatten(-1, (-1, *self.event_shape))
        return by_param.movedim(-1 - len(self.event_shape), -1)

    def _total(self, ladj: Tensor, like: Tensor) -> Tensor:
        return ladj.flatten(-len(self.event_shape)).sum(-1).expand(self._batch_shape(like))


def check_elementwise(elementwise: ElementwiseMap) -> None:
    """Refuse anything but an elementwise map."""
    if not isinstance(elementwise, ElementwiseMap):
        raise TypeError(
            "`elementwise` must be an ElementwiseMap, such as Affine(); "
            f"got {type(elementwise).__name__}."
        )


def _as_params(*values: Tensor) -> Tensor:
    """Parameters of a map, stored parameter by parameter, as a conditioner's output is."""
    return torch.stack(values, -2).transpose(-1, -2)


def own_grads(output: Tensor, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients that are zero, not an error, where ``output`` does not depend on a source."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(s) for s in sources)
    return torch.autograd.grad(
        output, sources, retain_graph=True, allow_unused=True, materialize_grads=True
    )
