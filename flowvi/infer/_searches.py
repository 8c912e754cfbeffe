"""Searches of a log-density that share its evaluations."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import torch
from torch import Tensor

from flowvi.infer._gaussian import DensityAndGrad

__all__ = ["Search", "together"]

Result = TypeVar("Result")

Search = Generator[Tensor, tuple[Tensor, Tensor], Result]
"""A generator that yields points ``(num_points, dim)``, is sent their log-densities and gradients,
and returns what it has found."""


def together(density: DensityAndGrad, *searches: Search) -> list:
    """Run searches side by side: one evaluation for what all of them ask in a round.

    A model of many small steps costs the same for few points and for many, so a second search
    costs next to nothing.

    Args:
        density: guarded log-density and gradient of points ``(num_points, dim)``.
        *searches: the searches; they are advanced in this order in every round.

    Returns:
        What each search returned.
    """
    results: list = [None] * len(searches)
    asked: dict[int, Tensor] = {}

    def advance(k: int, answer: tuple[Tensor, Tensor] | None) -> None:
        try:
            asked[k] = searches[k].send(answer)
        except StopIteration as end:
            results[k] = end.value

    for k in range(len(searches)):
        advance(k, None)
    while asked:
        points, asked = asked, {}
        sizes = [len(z) for z in points.values()]
        log_prob, grad = density(torch.cat(list(points.values())))
        for k, *answer in zip(points, log_prob.split(sizes), grad.split(sizes), strict=True):
            advance(k, tuple(answer))
    return results
