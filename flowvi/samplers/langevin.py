"""Samplers that correct a state by its score: annealed Langevin, predictor-corrector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.samplers.base import Sampler, Span
from flowvi.samplers.process import Ability, GenerativeProcess

__all__ = ["AnnealedLangevin", "PredictorCorrector"]


class AnnealedLangevin(Sampler):
    r"""Langevin steps at one noise level after another, without a move in between.

    .. math:: x \leftarrow x + \epsilon\,s(x, t) + \sqrt{2 \epsilon}\,z, \qquad
        \epsilon = \delta\,\sigma(t)^2

    No order is claimed: the law is that of the last level up to an error of the size of
    :math:`\delta`, after enough steps at each level.

    Args:
        num_corrections: Langevin steps at each level, at least 1.
        step_size: :math:`\delta`, positive.

    Raises:
        ValueError: if a number is too small.

    References:
        Song and Ermon (2019), Generative modeling by estimating gradients of the data
        distribution, arXiv:1907.05600, algorithm 1.

    Example:
        >>> AnnealedLangevin(num_corrections=3).num_noises
        3
    """

    order = None

    def __init__(self, num_corrections: int = 1, step_size: float = 0.1) -> None:
        if not isinstance(num_corrections, int) or num_corrections < 1:
            raise ValueError(
                f"`num_corrections` must be an integer of at least 1; got {num_corrections!r}."
            )
        if not step_size > 0:
            raise ValueError(f"`step_size` must be positive; got {step_size!r}.")
        self.num_corrections = num_corrections
        self.step_size = step_size
        self.num_noises = num_corrections

    @property
    def needs(self) -> frozenset[Ability]:
        return frozenset({Ability.SCORE, Ability.SCHEDULE})

    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        return self.correct(process, x, span, self.step_size), state

    def correct(
        self,
        process: GenerativeProcess,
        x: Tensor,
        span: Span,
        step_size: float | Tensor,
    ) -> Tensor:
        """States after one Langevin step for each noise, all at the end of the span."""
        size = step_size * process.schedule(span.end).sigma.square()
        for z in span.noise:
            x = x + size * process.score(x, span.end) + torch.sqrt(2 * size) * z
        return x


class PredictorCorrector(AnnealedLangevin):
    r"""Another sampler's step, followed by Langevin steps at the new time.

    The step of the corrector shrinks with that of the grid,
    :math:`\epsilon = \delta\,\sigma_s^2\,\Delta\lambda` with :math:`\lambda = \log(\alpha /
    \sigma)`, so that the whole converges; it has first order at most.

    Args:
        predictor: the sampler that moves; it must not have a memory, which corrections would
            make false.
        num_corrections: Langevin steps after each of its steps, at least 1.
        step_size: :math:`\delta`, positive.

    Raises:
        TypeError: if ``predictor`` is no :class:`Sampler`.
        NotImplementedError: if it has a memory.

    References:
        Song et al. (2021), Score-based generative modeling through stochastic differential
        equations, arXiv:2011.13456, algorithm 1; the size of the corrector's step is chosen
        there by norms over the batch, which ties draws to each other.

    Example:
        >>> from flowvi.samplers import DDIM
        >>> PredictorCorrector(DDIM(), num_corrections=2).num_noises
        2
    """

    order = 1.0

    def __init__(
        self, predictor: Sampler, num_corrections: int = 1, step_size: float = 0.1
    ) -> None:
        super().__init__(num_corrections, step_size)
        if not isinstance(predictor, Sampler):
            raise TypeError(f"`predictor` must be a Sampler; got {type(predictor).__name__}.")
        if predictor.has_memory:
            raise NotImplementedError(
                f"{type(predictor).__name__} remembers earlier states, which corrections would "
                "make false. Use DDIM, Ancestral, ReverseSDE or ProbabilityFlow."
            )
        self.predictor = predictor
        self.num_noises = predictor.num_noises + num_corrections

    @property
    def needs(self) -> frozenset[Ability]:
        return super().needs | self.predictor.needs

    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        ahead, corrections = span.noise.split([self.predictor.num_noises, self.num_corrections])
        moving = span._replace(noise=ahead if len(ahead) else None)
        x, _ = self.predictor.step(process, x, moving, None)
        before, after = (process.schedule(t).log_snr for t in (span.start, span.end))
        size = self.step_size * (after - before) / 2
        return self.correct(process, x, span._replace(noise=corrections), size), state
