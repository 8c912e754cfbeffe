"""The stochastic process from noise to data, by solvers of stochastic differential equations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowvi.paths import SDE, TimeDiffusion
from flowvi.samplers.base import Sampler, Span
from flowvi.samplers.process import Ability, GenerativeProcess
from flowvi.samplers.solvers import EulerMaruyama, SDESolver, StepTime, StochasticHeun

__all__ = ["ReverseSDE"]


class ReverseSDE(Sampler):
    r"""The generative SDE, which the literature runs backwards in time.

    .. math:: dx = \big(v + k \tfrac{b^2}{2} s\big)\,dt + \sqrt{k}\,b\,dW

    With level k = 1 it is the model's own process. Other levels have the same marginals as far
    as the score is right, and need a score. Noise that does not depend on the state gives Heun's
    step second weak order.

    Args:
        solver: Euler-Maruyama if left out; :class:`StochasticHeun` takes two network calls a
            step.
        level: k, positive.

    Raises:
        TypeError: if ``solver`` is no :class:`SDESolver`.
        ValueError: if ``level`` is not positive.

    References:
        Song et al. (2021), Score-based generative modeling through stochastic differential
        equations, arXiv:2011.13456, equation 6; Karras et al. (2022), Elucidating the design
        space of diffusion-based generative models, arXiv:2206.00364, equation 6 (times
        mirrored).

    Example:
        >>> ReverseSDE(StochasticHeun()).order
        2.0
    """

    num_noises = 1

    def __init__(self, solver: SDESolver | None = None, *, level: float = 1.0) -> None:
        solver = EulerMaruyama() if solver is None else solver
        if not isinstance(solver, SDESolver):
            raise TypeError(f"`solver` must be an SDESolver; got {type(solver).__name__}.")
        if not level > 0:
            raise ValueError(
                f"`level` must be positive; got {level!r}. Without noise use ProbabilityFlow."
            )
        self.solver = solver
        self.level = level
        self.order = 2.0 if isinstance(solver, StochasticHeun) else solver.order

    @property
    def needs(self) -> frozenset[Ability]:
        own = self.level == 1.0
        return frozenset({Ability.NOISING} if own else {Ability.NOISING, Ability.SCORE})

    @property
    def way_out(self) -> str:
        return "Use ProbabilityFlow." if self.level == 1.0 else "Use level=1.0."

    def check(self, process: GenerativeProcess) -> None:
        super().check(process)
        if self.solver.is_stratonovich and not isinstance(process.diffusion, TimeDiffusion):
            raise NotImplementedError(
                f"{type(self.solver).__name__} reads a drift in Stratonovich's sense, which "
                "differs where the noise depends on the state. Use EulerMaruyama."
            )

    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        sde = SDE(lambda x, t: process.drift(x, t, self.level), process.diffusion)
        root = self.level**0.5
        start, end = (StepTime(t, sde.embed_diffusion(t)) for t in (span.start, span.end))
        dt = span.end - span.start
        dw = root * dt.sqrt() * span.noise[0]
        moved, *_ = self.solver.step(sde, x, start, end, dt, dw, self.solver.init(sde, x))
        return moved, state
