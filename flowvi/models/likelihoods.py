"""Likelihoods: laws of images from what a decoder makes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pyro.distributions import Bernoulli, Distribution, Normal
from torch import Tensor, nn

from flowvi.distributions.pixels import (
    CategoricalLevels,
    ContinuousBernoulli,
    DiscretisedLogistic,
    check_levels,
)

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "ContinuousBernoulliLikelihood",
    "DiscretisedLogisticLikelihood",
    "Likelihood",
    "NormalLikelihood",
]


class Likelihood(nn.Module, ABC):
    """Base of the likelihoods; a new one writes ``_law`` and ``_check_values``.

    It says what a decoder must give, turns that into a law with the event shape of an image, and
    turns images into numbers for an encoder.

    Args:
        event_shape: shape of an image, such as ``(1, 28, 28)``.

    Attributes:
        num_params: numbers per pixel that a decoder must give.
        output_shape: shape of what a decoder must give, ``(num_params, *event_shape)``.

    Shape:
        params: ``(*batch, num_params, *event_shape)``; x: ``(*batch, *event_shape)``.

    Raises:
        ValueError: if a size is below 1.
    """

    num_params = 1
    takes_integers = True

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = check_event_shape(event_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.num_params, *self.event_shape)

    @property
    def num_pixels(self) -> int:
        """Number of pixels (channels counted) of an image."""
        return math.prod(self.event_shape)

    def forward(self, params: Tensor) -> Distribution:
        """Law of an image.

        Raises:
            ValueError: if ``params`` has the wrong shape.
        """
        if params.shape[-len(self.output_shape) :] != self.output_shape:
            raise ValueError(
                f"`params` must end with shape {self.output_shape} (num_params, *event_shape); "
                f"got shape {tuple(params.shape)}. Make the decoder with output_shape="
                "likelihood.output_shape."
            )
        law = self._law(params.movedim(-len(self.output_shape), -1))
        return law.to_event(len(self.event_shape))

    def check(self, x: Tensor, *, values: bool) -> None:
        """Refuse images that this cannot be the likelihood of.

        Args:
            x: images ``(B, *event_shape)``.
            values: whether to look at the values as well, which waits for the device.

        Raises:
            ValueError: if shape, dtype or range is wrong.
        """
        if x.dim() != 1 + len(self.event_shape) or x.shape[1:] != self.event_shape:
            expected = ", ".join(["B", *map(str, self.event_shape)])
            raise ValueError(f"`x` must have shape ({expected}); got {tuple(x.shape)}.")
        if x.is_complex() or not (x.is_floating_point() or self.takes_integers):
            kind = "a real" if self.takes_integers else "a floating"
            raise ValueError(
                f"`x` must have {kind} dtype for {type(self).__name__}; got {x.dtype}."
            )
        if values and x.numel():
            self._check_values(x)

    def inputs(self, x: Tensor, like: Tensor) -> Tensor:
        """Images as an encoder takes them: the dtype of ``like``, pixels from 0 to 1."""
        return x.to(like.dtype)

    @abstractmethod
    def _law(self, params: Tensor) -> Distribution:
        """Law of a pixel from its numbers, ``(*batch, *event_shape, num_params)``."""

    @abstractmethod
    def _check_values(self, x: Tensor) -> None:
        """Refuse values out of range."""


class BernoulliLikelihood(Likelihood):
    """Black and white pixels; the decoder gives logits.

    Args:
        event_shape: shape of an image.

    Example:
        >>> law = BernoulliLikelihood((1, 2, 2))(torch.zeros(5, 1, 1, 2, 2))
        >>> law.batch_shape, law.event_shape
        (torch.Size([5]), torch.Size([1, 2, 2]))
    """

    def _law(self, params: Tensor) -> Distribution:
        return Bernoulli(logits=params.squeeze(-1), validate_args=False)

    def _check_values(self, x: Tensor) -> None:
        odd = (x != 0) & (x != 1)
        if bool(odd.any()):
            raise ValueError(
                f"`x` must hold only 0 and 1 for {type(self).__name__}; got "
                f"{float(x[odd].reshape(-1)[0]):g}. Binarise grey pixels, or use "
                "ContinuousBernoulliLikelihood."
            )


class ContinuousBernoulliLikelihood(Likelihood):
    """Grey pixels in [0, 1] with a density; the decoder gives logits.

    Args:
        event_shape: shape of an image.

    References:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli, arXiv:1907.06845.
    """

    takes_integers = False

    def _law(self, params: Tensor) -> Distribution:
        return ContinuousBernoulli(params.squeeze(-1), validate_args=False)

    def _check_values(self, x: Tensor) -> None:
        _check_range(x, 0.0, 1.0, type(self).__name__)


class _LevelLikelihood(Likelihood):
    """What likelihoods of whole levels share.

    Args:
        event_shape: shape of an image.
        num_levels: number of levels n, at least 2; images hold 0 to n - 1.
    """

    def __init__(self, event_shape: Sequence[int], num_levels: int = 256) -> None:
        super().__init__(event_shape)
        self.num_levels = check_levels(num_levels)

    def inputs(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype) / (self.num_levels - 1)

    def _check_values(self, x: Tensor) -> None:
        _check_range(x, 0, self.num_levels - 1, type(self).__name__)
        if x.is_floating_point() and bool((x != x.round()).any()):
            odd = float(x[x != x.round()].reshape(-1)[0])
            raise ValueError(f"`x` must hold whole levels for {type(self).__name__}; got {odd:g}.")


class DiscretisedLogisticLikelihood(_LevelLikelihood):
    """Whole levels by a logistic law cut into bins; the decoder gives centres and log-scales.

    Log-scales are softly bounded to 7 nats around -2, so that no bin loses all its mass.

    Args:
        event_shape: shape of an image.
        num_levels: number of levels n, at least 2; images hold 0 to n - 1.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow,
        arXiv:1606.04934.
    """

    num_params = 2

    def _law(self, params: Tensor) -> Distribution:
        loc, raw = params.unbind(-1)
        log_scale = 7 * torch.tanh(raw / 7) - 2
        return DiscretisedLogistic(loc, log_scale, self.num_levels, validate_args=False)


class CategoricalLikelihood(_LevelLikelihood):
    """Whole levels with a free probability for each; the decoder gives logits.

    Args:
        event_shape: shape of an image.
        num_levels: number of levels n, at least 2; images hold 0 to n - 1.
    """

    @property
    def num_params(self) -> int:
        return self.num_levels

    def _law(self, params: Tensor) -> Distribution:
        return CategoricalLevels(params, validate_args=False)


class NormalLikelihood(Likelihood):
    """Real numbers with a common standard deviation; the decoder gives means.

    Args:
        event_shape: shape of an item.
        scale: standard deviation, positive; the start of a learned one.
        learn_scale: learn it.
    """

    takes_integers = False

    def __init__(
        self, event_shape: Sequence[int], scale: float = 1.0, *, learn_scale: bool = False
    ) -> None:
        super().__init__(event_shape)
        if not scale > 0:
            raise ValueError(f"`scale` must be positive; got {scale!r}.")
        log_scale = torch.tensor(float(scale)).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def _law(self, params: Tensor) -> Distribution:
        return Normal(params.squeeze(-1), self.log_scale.exp(), validate_args=False)

    def _check_values(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            bad = int((~x.isfinite()).sum())
            raise ValueError(f"`x` must be finite; got {bad} values that are not.")


def check_event_shape(event_shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as a tuple; refuses sizes below 1."""
    shape = tuple(event_shape)
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"`event_shape` must hold positive integers; got {event_shape!r}.")
    return shape


def _check_range(x: Tensor, low: float, high: float, name: str) -> None:
    if x.dtype == torch.bool:
        return
    # NaN is in no range.
    if not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(
            f"`x` must be from {low:g} to {high:g} for {name}; got values from "
            f"{float(x.min()):g} to {float(x.max()):g}."
        )
