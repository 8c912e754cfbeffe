"""Gradients by plain operations, for steps of autograd whose backward pass is by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowvi.nn._compiled import can_compile

__all__ = ["by_hand", "plain_gradients"]


def by_hand(*grads: Tensor) -> bool:
    """Whether gradients may be pulled back by hand.

    Not where second derivatives are asked for, where ``torch.func`` or a compiler looks on, and
    where autograd takes many gradients at once, as for a Jacobian.
    """
    return not torch.is_grad_enabled() and all(
        can_compile(grad) and not torch._C._functorch.is_legacy_batchedtensor(grad)
        for grad in grads
    )


def plain_gradients(
    function: Callable[..., tuple[Tensor, ...]],
    sources: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients for those of the sources that need one, with a graph if grad mode is on.

    Args:
        function: gives the outputs from the sources.
        sources: tensors of the graph, or None.
        needs: for every source, whether it needs a gradient.
        grads: gradients for the outputs.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one source may be made from another, whose gradient is not theirs.
        sources = [None if source is None else source.view_as(source) for source in sources]
        outputs = function(*sources)
    wanted = [source for source, need in zip(sources, needs, strict=True) if need]
    made = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    return [next(made) if need else None for need in needs]
