"""Bits per dimension, the unit in which densities of images are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["bits_per_dim"]


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int]) -> Tensor:
    r"""Bits per dimension of images with whole levels.

    .. math:: -\frac{\log P(x)}{D \log 2}

    Args:
        log_prob: log-probabilities of images, or means or lower bounds of them, in nats.
        event_shape: shape of an image; its size is D.

    Example:
        >>> import torch
        >>> bits_per_dim(torch.tensor(-64 * math.log(256.0)), (1, 8, 8))
        tensor(8.)
    """
    return -log_prob / (math.prod(event_shape) * math.log(2))
