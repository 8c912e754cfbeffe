"""Exponential multistep integrators of the probability-flow ODE, DPM-Solver++ among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowvi.paths import Prediction
from flowvi.samplers.base import Sampler, Span
from flowvi.samplers.process import Ability, GenerativeProcess

__all__ = ["DPMSolver", "ExponentialIntegrator"]


class Seen(NamedTuple):
    """A prediction and half the log signal-to-noise ratio at which it was made."""

    rate: Tensor
    value: Tensor


class ExponentialIntegrator(Sampler):
    r"""Exact in the linear part of the ODE; predictions are extrapolated by a polynomial.

    In terms of :math:`\lambda = \log(\alpha / \sigma)`, with data or with noise predictions,

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t
            + \sigma_s \int e^{\lambda} \hat d\,d\lambda, \qquad
        x_s = \frac{\alpha_s}{\alpha_t} x_t - \alpha_s \int e^{-\lambda} \hat n\,d\lambda.

    The polynomial through the last ``order`` predictions is integrated exactly. One network call
    a step; the first step of order 3 takes a second one, without which the start would cost an
    order. Order 1 is :class:`DDIM` without noise.

    Args:
        order: 1, 2 or 3.
        prediction: ``Prediction.NOISE`` or ``Prediction.DATA``.

    Raises:
        ValueError: if the order or the prediction is another.

    References:
        Zhang and Chen (2023), Fast sampling of diffusion models with exponential integrator,
        arXiv:2204.13902, section 3; Lu et al. (2022), DPM-Solver, arXiv:2206.00927,
        proposition 3.1 (times mirrored).

    Example:
        >>> ExponentialIntegrator(order=2).has_memory
        True
    """

    def __init__(self, order: int = 2, prediction: Prediction = Prediction.NOISE) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"`order` must be 1, 2 or 3; got {order!r}.")
        if prediction not in (Prediction.DATA, Prediction.NOISE):
            raise ValueError(f"`prediction` must be DATA or NOISE; got {prediction!r}.")
        self.order = float(order)
        self.prediction = prediction
        self.has_memory = order > 1

    @property
    def needs(self) -> frozenset[Ability]:
        return frozenset({Ability.FLOW, Ability.SCHEDULE})

    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: tuple[Seen, ...] | None
    ) -> tuple[Tensor, tuple[Seen, ...]]:
        now, then = process.schedule(span.start), process.schedule(span.end)
        rate, later = now.log_snr / 2, then.log_snr / 2
        seen = (Seen(rate, self._predict(process, x, span.start)), *(state or ()))
        if self.prediction is Prediction.DATA:
            linear, factor, sign = then.sigma / now.sigma * x, then.alpha, 1.0
        else:
            linear, factor, sign = then.alpha / now.alpha * x, -then.sigma, -1.0
        weights = _weights(later - rate, sign)

        def moved(points: Sequence[Seen]) -> Tensor:
            terms = zip(weights, _polynomial(points), strict=False)
            return linear + factor * sum(weight * term for weight, term in terms)

        end = moved(seen)
        if state is None and self.order == 3:
            ahead = Seen(later, self._predict(process, end, span.end))
            end = moved((seen[0], ahead))
        return end, seen[: int(self.order) - 1]

    def _predict(self, process: GenerativeProcess, x: Tensor, t: Tensor) -> Tensor:
        data, noise = process.predict(x, t)
        return data if self.prediction is Prediction.DATA else noise


class DPMSolver(ExponentialIntegrator):
    """Multistep DPM-Solver++, the exponential integrator of data predictions.

    Predictions of the data stay in the range of the data, which makes it the sturdier one with
    few steps and with guidance. Polynomials are integrated exactly; the reference rounds the
    integral of order 2, without a change of order.

    Args:
        order: 1, 2 or 3.

    Raises:
        ValueError: if the order is another.

    References:
        Lu et al. (2022), DPM-Solver++, arXiv:2211.01095, proposition 4.1 and algorithm 2 (time
        mirrored).

    Example:
        >>> DPMSolver(order=3).order
        3.0
    """

    def __init__(self, order: int = 2) -> None:
        super().__init__(order, Prediction.DATA)


def _polynomial(points: Sequence[Seen]) -> list[Tensor]:
    """Coefficients, of powers of the distance from the first point, through one to three."""
    first, *others = points
    coefficients = [first.value]
    if not others:
        return coefficients
    near = others[0].rate - first.rate
    slope = (others[0].value - first.value) / near
    if len(others) == 1:
        return [*coefficients, slope]
    far = others[1].rate - first.rate
    older = (others[1].value - others[0].value) / (far - near)
    bend = (older - slope) / far
    return [*coefficients, slope - bend * near, bend]


def _weights(h: Tensor, sign: float) -> list[Tensor]:
    r"""Integrals :math:`\int_0^h e^{\pm(\tau - h)} \tau^j d\tau` for j = 0, 1, 2, by parts."""
    weights = [-sign * torch.expm1(-sign * h)]
    for power in (1, 2):
        weights.append(sign * (h**power - power * weights[-1]))
    return weights
