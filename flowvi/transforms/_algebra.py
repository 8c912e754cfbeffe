"""Products and triangular solves for rows, with one matrix or one matrix per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "above_minus_one",
    "log_diagonal",
    "matvec",
    "reflect",
    "reflection_matrix",
    "solve",
    "triangular",
]

# A bending map may shrink lengths by this fraction at most, so that 1 + z stays above 0.001.
MOST = 0.999


def matvec(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix @ row`` for each row; ``(n, m)`` or ``(*batch, n, m)`` with ``(*batch, m)``."""
    if matrix.dim() == 2:
        return rows @ matrix.mT
    return (matrix @ rows.unsqueeze(-1)).squeeze(-1)


def solve(matrix: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
    """Solution ``v`` of ``matrix @ v = row`` for each row, with a triangular matrix."""
    if matrix.dim() == 2:
        # One matrix for all rows: a single solve instead of one per row.
        flat = rows.reshape(-1, rows.shape[-1])
        found = torch.linalg.solve_triangular(matrix.mT, flat, upper=not upper, left=False)
        return found.reshape(rows.shape)
    return torch.linalg.solve_triangular(matrix, rows.unsqueeze(-1), upper=upper).squeeze(-1)


def triangular(off_diagonal: Tensor, diagonal: Tensor, *, upper: bool) -> Tensor:
    """Triangular matrix from the strict triangle of one tensor and a separate diagonal."""
    strict = off_diagonal.triu(1) if upper else off_diagonal.tril(-1)
    return strict + torch.diag_embed(diagonal)


def log_diagonal(log_scale: Tensor, like: Tensor) -> Tensor:
    """Sum of log-scales, with the batch shape of ``like``."""
    return log_scale.sum(-1).expand(like.shape[:-1])


def reflect(vectors: Tensor, rows: Tensor, *, reverse: bool = False) -> Tensor:
    """Apply Householder reflections ``(*batch, k, n)`` to rows ``(*batch, n)``, first one first.

    A zero vector leaves the row unchanged.
    """
    if vectors.dim() == 2 and rows.numel() > rows.shape[-1] ** 2:
        # One set of vectors for many rows: reflecting the unit vectors once is less work.
        matrix = reflection_matrix(vectors)
        return rows @ (matrix if reverse else matrix.mT)
    tiny = torch.finfo(rows.dtype).tiny
    scaled = vectors * (2 / vectors.square().sum(-1, keepdim=True).clamp_min(tiny))
    order = range(vectors.shape[-2])
    for i in reversed(order) if reverse else order:
        along = (rows * vectors[..., i, :]).sum(-1, keepdim=True)
        rows = rows - along * scaled[..., i, :]
    return rows


def reflection_matrix(vectors: Tensor) -> Tensor:
    """The orthogonal matrix of :func:`reflect`, for vectors ``(k, n)``."""
    unit = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    return reflect(vectors, unit).mT


def above_minus_one(z: Tensor) -> Tensor:
    """Smooth increasing map of the line to ``z > -0.999``, the identity for ``z >= 0``.

    The margin keeps the slope of a map that multiplies by ``1 + z`` away from zero in float32.
    """
    return MOST * F.elu(z / MOST)
