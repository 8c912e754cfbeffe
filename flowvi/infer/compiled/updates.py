"""Optimisers' updates as functions of flat buffers, for use inside a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "SGD",
    "Adam",
    "AdamFamily",
    "ClippedAdam",
    "GlobalAdam",
    "Gradients",
    "RMSprop",
    "Update",
]


@dataclass(frozen=True)
class Update(ABC):
    """One optimiser's step on a flat vector of parameters."""

    num_moments = 0

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the moments in the state of the eager optimiser."""
        return ()

    @abstractmethod
    def __call__(
        self, param: Tensor, moments: list[Tensor], grad: Tensor, count: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """New parameters and moments.

        Args:
            param: ``(numel,)``.
            moments: ``num_moments`` vectors of the same length.
            grad: gradient of the loss, ``(numel,)``.
            count: number of this update, from 1, as ``(1,)`` in float64.
            lr: learning rate, as ``(1,)`` in float64.
        """

    @property
    def guarded(self) -> bool:
        """Whether a step with a non-finite loss or gradient changes nothing."""
        return False


def coefficients(*values: Tensor, like: Tensor) -> list[Tensor]:
    """Numbers of a step, computed once and not again for every element.

    The stride is stated so that the compiler keeps them in memory.
    """
    packed = torch.cat(values).to(like.dtype)
    packed = torch.as_strided(packed, (len(values),), (1,))
    return list(packed.split(1))


@dataclass(frozen=True)
class AdamFamily(Update):
    """What the variants of Adam share.

    Args:
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: added to the gradient, times the parameter.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    num_moments = 2

    @property
    def state_keys(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _moments(self, moments: list[Tensor], grad: Tensor) -> list[Tensor]:
        (beta1, beta2), (first, second) = self.betas, moments
        first = first + (grad - first) * (1 - beta1)
        return [first, second * beta2 + grad * grad * (1 - beta2)]

    def _corrections(self, count: Tensor) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        return 1 - beta1**count, (1 - beta2**count).sqrt()


@dataclass(frozen=True)
class Adam(AdamFamily):
    """``torch.optim.Adam``, and AdamW if ``decoupled``.

    Args:
        decoupled: shrink the parameters by the weight decay, not the gradient.
        maximize: follow the gradient upwards.
    """

    decoupled: bool = False
    maximize: bool = False

    def __call__(
        self, param: Tensor, moments: list[Tensor], grad: Tensor, count: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        correction1, correction2 = self._corrections(count)
        values = (lr / correction1, correction2.reciprocal(), 1 - lr * self.weight_decay)
        size, inverse_root, keep = coefficients(*values, like=param)
        grad = -grad if self.maximize else grad
        if self.weight_decay and self.decoupled:
            param = param * keep
        elif self.weight_decay:
            grad = grad + self.weight_decay * param
        first, second = self._moments(moments, grad)
        step = first / (second.sqrt() * inverse_root + self.eps)
        return param - size * step, [first, second]


@dataclass(frozen=True)
class GlobalAdam(Adam):
    """The Adam of :class:`flowvi.infer.GlobalOptim`, guard included.

    Args:
        clip_norm: bound on the norm of the whole gradient.
    """

    clip_norm: float | None = None

    @property
    def guarded(self) -> bool:
        return True

    def __call__(
        self, param: Tensor, moments: list[Tensor], grad: Tensor, count: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        if self.clip_norm is not None:
            shrink = (grad.norm() / self.clip_norm).clamp(min=1.0).reciprocal()
            grad = grad * torch.as_strided(shrink, (1,), (1,))
        return super().__call__(param, moments, grad, count, lr)


@dataclass(frozen=True)
class ClippedAdam(AdamFamily):
    """``pyro.optim.ClippedAdam``; its decay of the learning rate is in ``lr`` already.

    Args:
        clip_norm: bound on each element of the gradient.
        centered_variance: second moment of the gradient's distance from the first.
    """

    clip_norm: float = 10.0
    centered_variance: bool = False

    def __call__(
        self, param: Tensor, moments: list[Tensor], grad: Tensor, count: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        correction1, correction2 = self._corrections(count)
        (size,) = coefficients(lr * correction2 / correction1, like=param)
        grad = grad.clamp(-self.clip_norm, self.clip_norm)
        if self.weight_decay:
            grad = grad + self.weight_decay * param
        (_, beta2), (_, before) = self.betas, moments
        first, second = self._moments(moments, grad)
        if self.centered_variance:
            second = before * beta2 + (grad - first).square() * (1 - beta2)
        return param - size * first / (second.sqrt() + self.eps), [first, second]


def _decayed(update: SGD | RMSprop, param: Tensor, grad: Tensor) -> Tensor:
    """The gradient to be followed down, with that of the weight decay."""
    grad = -grad if update.maximize else grad
    return grad + update.weight_decay * param if update.weight_decay else grad


@dataclass(frozen=True)
class SGD(Update):
    """``torch.optim.SGD``.

    Args:
        momentum: decay rate of the running sum; 0 keeps none.
        dampening: part of the gradient that does not enter the sum, from the second step on.
        weight_decay: added to the gradient, times the parameter.
        nesterov: look ahead along the sum.
        maximize: follow the gradient upwards.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    num_moments = 1

    @property
    def state_keys(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def __call__(
        self, param: Tensor, moments: list[Tensor], grad: Tensor, count: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        damped = torch.where(count == 1, 1.0, 1 - self.dampening)
        rate, share = coefficients(lr, damped, like=param)
        grad = _decayed(self, param, grad)
        if not self.momentum:
            return param - rate * grad, moments
        total = moments[0] * self.momentum + share * grad
        grad = grad + self.momentum * total if self.nesterov else total
        return param - rate * grad, [total]


@dataclass(frozen=True)
class RMSprop(Update):
    """``torch.optim.RMSprop`` without momentum.

    Args:
        alpha: decay rate of the moments.
        eps: added to the root of the second moment.
        weight_decay: added to the gradient, times the parameter.
        centered: second moment of the gradient's distance from its running mean.
        maximize: follow the gradient upwards.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    centered: bool = False
    maximize: bool = False

    num_moments = 2

    @property
    def state_keys(self) -> tuple[str, ...]:
        return ("square_avg", "grad_avg") if self.centered else ("square_avg",)

    def __call__(
        self, param: Tensor, moments: list[Tensor], grad: Tensor, count: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        (rate,) = coefficients(lr, like=param)
        grad = _decayed(self, param, grad)
        second, first = moments
        second = second * self.alpha + grad * grad * (1 - self.alpha)
        spread = second
        if self.centered:
            first = first + (grad - first) * (1 - self.alpha)
            spread = second - first * first
        return param - rate * grad / (spread.sqrt() + self.eps), [second, first]


@dataclass(frozen=True)
class Gradients(Update):
    """No update: the gradient is kept for an optimiser that is called from Python."""

    num_moments = 1

    def __call__(
        self, param: Tensor, moments: list[Tensor], grad: Tensor, count: Tensor, lr: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        return param, [grad]
