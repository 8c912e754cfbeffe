"""Transport of mass: exact assignment, Wasserstein distance, path energy and straightness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TransportCost", "normalised_path_energy", "wasserstein_distance"]


@dataclass(frozen=True)
class TransportCost:
    r"""What a deterministic flow spends on the way from each start to its end.

    Args:
        energy: :math:`\int_0^1 |v(z_t, t)|^2 dt`, ``(num,)``.
        displacement: :math:`|z_1 - z_0|^2`, ``(num,)``.
        num_evaluations: calls of the field in the solve (NFE).

    References:
        Liu, Gong and Liu (2023), Flow straight and fast, arXiv:2209.03003, for the
        straightness.
    """

    energy: Tensor
    displacement: Tensor
    num_evaluations: int

    @property
    def straightness(self) -> Tensor:
        r""":math:`\int_0^1 |z_1 - z_0 - v(z_t, t)|^2 dt`, 0 for straight paths of even speed."""
        # The velocities of a path average to its displacement.
        return self.energy - self.displacement


def normalised_path_energy(energy: Tensor, squared_distance: Tensor) -> Tensor:
    r"""How far the mean energy of paths is from the least that would do.

    .. math:: \frac{\big|E \int |v|^2 dt - W_2^2\big|}{W_2^2}

    Args:
        energy: energy of each path, ``(num,)``.
        squared_distance: squared Wasserstein distance of the two ends, a scalar.

    References:
        Tong et al. (2024), Improving and generalizing flow-based generative models,
        arXiv:2302.00482, section 5.

    Example:
        >>> normalised_path_energy(torch.tensor([3.0, 5.0]), torch.tensor(2.0))
        tensor(1.)
    """
    return (energy.mean() - squared_distance).abs() / squared_distance


def wasserstein_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""2-Wasserstein distance of two samples of the same size, by exact assignment.

    .. math:: W_2 = \Big(\min_\pi \frac1n \sum_i |x_i - y_{\pi(i)}|^2\Big)^{1/2}

    Between two samples of one law it is not 0, but falls slowly with the size.

    Args:
        x: ``(n, dim)``.
        y: ``(n, dim)``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> wasserstein_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [1.0]]))
        tensor(1.)
    """
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(
            f"`x` and `y` must have the same shape (n, dim); got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    cost = squared_distances(x, y)
    return torch.take_along_dim(cost, assign(cost).unsqueeze(-1), -1).mean().sqrt()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances ``(*batch, n, m)`` of the rows of two tensors."""
    # The faster way by a matrix product rounds small distances.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def assign(cost: Tensor) -> Tensor:
    """A column for each row, each once, of least total cost; solved on the host.

    Shape:
        cost: ``(*batch, n, n)``; result: ``(*batch, n)``, integers.
    """
    if cost.is_meta:
        return torch.empty(cost.shape[:-1], dtype=torch.long, device=cost.device)
    # Imported here, as it changes the warning filters.
    from scipy.optimize import linear_sum_assignment

    tables = cost.detach().cpu().reshape(-1, *cost.shape[-2:]).numpy()
    columns = [torch.from_numpy(linear_sum_assignment(table)[1]) for table in tables]
    return torch.stack(columns).reshape(cost.shape[:-1]).to(cost.device)
