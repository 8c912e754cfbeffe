"""Gaussians along quasi-Newton paths, and the choice among Gaussians by their ELBO."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowvi.infer._gaussian import Gaussian, robust_cholesky
from flowvi.infer.quasi_newton import Ascent, Snapshot

__all__ = ["choose", "elbos", "path_gaussians"]

_ROWS = 512  # draws per evaluation, which bounds the memory of models with much data


def path_gaussians(ascent: Ascent, *, num_paths: int = 2, num_points: int = 12) -> list[Gaussian]:
    r"""Gaussians at iterates of the best paths.

    The Gaussian of iterate :math:`z` with gradient :math:`g` and inverse Hessian estimate
    :math:`H` is :math:`N(z + H g, H)`: one Newton step ahead.

    Args:
        ascent: quasi-Newton paths.
        num_paths: number of paths, those that end highest.
        num_points: number of iterates per path, evenly spaced, the last included.

    References:
        Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder: parallel quasi-Newton
        variational inference, arXiv:2108.03782, section 2.
    """
    kept = []
    for row in ascent.log_prob.argsort(descending=True)[:num_paths].tolist():
        path = ascent.paths[row]
        count = min(num_points, len(path))
        places = torch.linspace(len(path) - 1, 0, count).round().long().tolist() if count else []
        kept += [_gaussian(path[place]) for place in places]
    return [gaussian for gaussian in kept if gaussian is not None and gaussian.is_finite]


def _gaussian(snapshot: Snapshot) -> Gaussian | None:
    try:
        scale_tril = robust_cholesky(snapshot.inverse_hessian)
    except RuntimeError:
        return None  # an eigenproblem that does not converge: non-finite entries
    return Gaussian(snapshot.loc + snapshot.inverse_hessian @ snapshot.grad, scale_tril)


def elbos(
    log_density: Callable[[Tensor], Tensor], gaussians: Sequence[Gaussian], eps: Tensor
) -> Tensor:
    """Log-weights of every Gaussian on common noise, ``(num_gaussians, num_draws)``, in nats."""
    draws = torch.cat([gaussian.at(eps) for gaussian in gaussians])
    log_p = torch.cat([log_density(chunk) for chunk in draws.split(_ROWS)])
    log_q = torch.stack([gaussian.log_prob_of_noise(eps) for gaussian in gaussians])
    return log_p.reshape(log_q.shape) - log_q


def choose(
    log_density: Callable[[Tensor], Tensor], gaussians: Sequence[Gaussian], eps: Tensor
) -> tuple[int, Tensor]:
    """Index of the Gaussian of highest ELBO on common noise, and its log-weights.

    A draw of density zero makes an ELBO infinite; for the choice, it costs 1,000 nats instead, so
    that Gaussians which all have such draws can still be told apart.
    """
    log_w = elbos(log_density, gaussians, eps)
    finite = torch.isfinite(log_w)
    score = torch.where(finite, log_w, 0.0).sum(-1) / finite.sum(-1).clamp(min=1)
    score = torch.where(finite.any(-1), score - 1e3 * (~finite).double().mean(-1), -torch.inf)
    best = int(score.argmax())
    return best, log_w[best]
