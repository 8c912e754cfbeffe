"""Recipe of a continuous flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowvi.distributions import Flow
from flowvi.flows._sizes import Sizes
from flowvi.nn import MLPField, VectorField
from flowvi.transforms import Continuous, Solver

__all__ = ["cnf"]


def cnf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 1,
    hidden_dims: Sequence[int] = (64, 64),
    field: Callable[[int, Sequence[int], int], VectorField] = MLPField,
    solver: Solver | None = None,
    eval_solver: Solver | None = None,
) -> Flow:
    """Continuous normalizing flow: moves along a learned vector field.

    Both directions cost one solve. By default that is ten Dormand-Prince steps, so the cost is
    fixed and no step waits for a device; how exact they are for a trained field is what
    :meth:`Continuous.report` says. The divergence is exact.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of fields followed one after another, at least 1.
        hidden_dims: widths of each field's hidden layers.
        field: makes a field from ``input_dim``, ``hidden_dims`` and ``context_dim``.
        solver: how to solve; ten Dormand-Prince steps if left out.
        eval_solver: solver in evaluation mode; ``solver`` if left out.

    References:
        Chen, Rubanova, Bettencourt and Duvenaud (2018), Neural ordinary differential equations,
        arXiv:1806.07366, section 4; Grathwohl et al. (2019), FFJORD, arXiv:1810.01367.

    Example:
        >>> import torch
        >>> from flowvi.nn import ConcatSquashField
        >>> flow = cnf(3, context_dim=2, field=ConcatSquashField)
        >>> flow(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    layers = [
        Continuous(
            field(input_dim, sizes.hidden_dims, context_dim),
            solver=solver,
            eval_solver=eval_solver,
            name=f"cnf({input_dim}), field {layer + 1} of {num_layers}",
        )
        for layer in range(num_layers)
    ]
    return sizes.finish(layers)
