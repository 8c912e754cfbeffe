"""Labels as inputs of networks."""

from __future__ import annotations

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

__all__ = ["one_hot"]


def one_hot(labels: Tensor, num_classes: int, like: Tensor | None = None) -> Tensor:
    """Unit vectors of labels; unlike torch's they come in a floating dtype and are checked.

    With Pyro's validation off nothing looks at the values.

    Args:
        labels: whole numbers from 0 to ``num_classes - 1``, shape ``(*batch,)``.
        num_classes: number of classes, at least 1.
        like: tensor of the wanted dtype; the default dtype if left out.

    Shape:
        result: ``(*batch, num_classes)``.

    Raises:
        ValueError: if a label is out of range or has a floating dtype.

    Example:
        >>> one_hot(torch.tensor([2, 0]), 3)
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must have an integer dtype; got {labels.dtype}.")
    looks = is_validation_enabled() and not torch.compiler.is_compiling()
    if looks and not labels.is_meta and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"`labels` must be from 0 to {num_classes - 1}; got values from {low} to {high}."
            )
    classes = torch.arange(num_classes, device=labels.device)
    dtype = torch.get_default_dtype() if like is None else like.dtype
    return (labels.unsqueeze(-1) == classes).to(dtype)
