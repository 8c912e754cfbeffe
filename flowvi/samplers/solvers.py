"""Solvers of stochastic differential equations on a fixed grid of times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowvi.paths.sde import SDE

__all__ = ["EulerMaruyama", "Milstein", "SDESolver", "StepTime", "StochasticHeun"]


class StepTime(NamedTuple):
    """Embedded times of one grid point, as :class:`flowvi.paths.SDE` gives them."""

    drift: Tensor
    diffusion: Tensor


class SDESolver(ABC):
    """Base of fixed-grid solvers for diagonal noise; a new one writes ``step``.

    Attributes:
        order: weak order of convergence, of expectations of smooth functions.
        strong_order: order of convergence of the paths themselves.
        is_stratonovich: whether the drift is read in Stratonovich's sense, not in Ito's.
        needs_end: whether a step looks at the time at its end.
    """

    order: float
    strong_order: float
    is_stratonovich: bool = False
    needs_end: bool = False

    def init(self, sde: SDE, x: Tensor) -> Any:
        """State that the solver carries from step to step; none by default."""
        return None

    @abstractmethod
    def step(
        self,
        sde: SDE,
        x: Tensor,
        start: StepTime,
        end: StepTime | None,
        dt: Tensor,
        dw: Tensor | None,
        state: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        """One step.

        Args:
            sde: the process.
            x: states ``(*batch, dim)``.
            start: embedded time at the start of the step.
            end: the same at its end, where ``needs_end``.
            dt: length of the step; broadcasts against ``x``.
            dw: Brownian increments ``(*batch, dim)``; ``None`` for an ODE.
            state: what ``init`` or the last step gave.

        Returns:
            New states; drift and diffusion at the start of the step; the new state.
        """


class EulerMaruyama(SDESolver):
    r"""Euler's step, for the Ito equation.

    .. math:: x_{k+1} = x_k + f\,\Delta t + b\,\Delta W

    Strong order 1/2, and 1 where b does not depend on the state.

    References:
        Kloeden and Platen (1992), Numerical solution of stochastic differential equations,
        equation 10.2.4.
    """

    order = 1.0
    strong_order = 0.5

    def step(
        self,
        sde: SDE,
        x: Tensor,
        start: StepTime,
        end: StepTime | None,
        dt: Tensor,
        dw: Tensor | None,
        state: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        f = sde.drift.given(x, start.drift)
        moved = torch.addcmul(x, f, dt)
        if dw is None:
            return moved, f, None, state
        b = sde.diffusion_given(x, start.diffusion)
        return torch.addcmul(moved, b, dw), f, b, state


class Milstein(SDESolver):
    r"""Milstein's step for diagonal noise, for the Ito equation.

    .. math:: x_{k+1} = x_k + f\,\Delta t + b\,\Delta W
        + \tfrac12\, b\,\partial_x b\,(\Delta W^2 - \Delta t)

    Each :math:`b_i` may depend on :math:`x_i` alone; the derivative is one forward-mode pass.

    References:
        Kloeden and Platen (1992), Numerical solution of stochastic differential equations,
        equation 10.3.1.
    """

    order = 1.0
    strong_order = 1.0

    def step(
        self,
        sde: SDE,
        x: Tensor,
        start: StepTime,
        end: StepTime | None,
        dt: Tensor,
        dw: Tensor | None,
        state: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        f = sde.drift.given(x, start.drift)
        moved = torch.addcmul(x, f, dt)
        if dw is None:
            return moved, f, None, state

        def diffusion(x: Tensor) -> Tensor:
            return sde.diffusion_given(x, start.diffusion).expand_as(x)

        b, slope = torch.func.jvp(diffusion, (x,), (torch.ones_like(x),))
        correction = 0.5 * b * slope * (dw.square() - dt)
        return torch.addcmul(moved, b, dw) + correction, f, b, state


class StochasticHeun(SDESolver):
    r"""Heun's step, which converges to the solution in **Stratonovich's** sense.

    .. math:: \tilde x = x_k + f(x_k)\,\Delta t + b(x_k)\,\Delta W, \qquad x_{k+1} = x_k
        + \tfrac12 (f(x_k) + f(\tilde x))\,\Delta t + \tfrac12 (b(x_k) + b(\tilde x))\,\Delta W

    Where b depends on the state this is another process than that of the Ito solvers with the
    same coefficients. Strong order 1 for diagonal noise; second order for an ODE.

    References:
        Rümelin (1982), Numerical treatment of stochastic differential equations, SIAM J. Numer.
        Anal. 19, 604-613, equation 3.
    """

    order = 1.0
    strong_order = 1.0
    is_stratonovich = True
    needs_end = True

    def step(
        self,
        sde: SDE,
        x: Tensor,
        start: StepTime,
        end: StepTime | None,
        dt: Tensor,
        dw: Tensor | None,
        state: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        f = sde.drift.given(x, start.drift)
        guess = torch.addcmul(x, f, dt)
        if dw is None:
            f_end = sde.drift.given(guess, end.drift)
            return torch.addcmul(x, f + f_end, dt, value=0.5), f, None, state
        b = sde.diffusion_given(x, start.diffusion)
        guess = torch.addcmul(guess, b, dw)
        f_end = sde.drift.given(guess, end.drift)
        b_end = sde.diffusion_given(guess, end.diffusion)
        moved = torch.addcmul(x, f + f_end, dt, value=0.5)
        return torch.addcmul(moved, b + b_end, dw, value=0.5), f, b, state
