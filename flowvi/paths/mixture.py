"""Mixtures of paths: marginals with several modes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from flowvi.paths.base import Path, PathPoint

__all__ = ["MixturePath"]


class MixturePath(Path):
    r"""Marginals that are a mixture of the marginals of other paths, with constant weights.

    .. math:: q = \sum_k w_k q_k, \qquad v = \sum_k r_k v_k, \qquad s = \sum_k r_k s_k, \qquad
        r_k = w_k q_k / q

    At each state the velocities and scores are averaged by the posterior probabilities of the
    components. The component of a draw comes from one more coordinate of the noise. Every step
    costs a pass of each component at each state.

    Args:
        paths: at least one path, of equal ``dim``, each with a log-density and an inverse; the
            diffusion of the first serves all.
        weights: positive numbers, one for each path; they are normalised. They are constants: a
            draw of the component carries no gradient.

    Shape:
        y: what all paths understand; t: ``(*batch, 1)``; eps: ``(*batch, dim + 1)``.

    Raises:
        ValueError: if there is no path, sizes disagree or weights are not positive.
        NotImplementedError: if the weights require a gradient.

    References:
        Bartosh, Vetrov and Naesseth (2024), Neural flow diffusion models, arXiv:2404.12940,
        for learned marginals; the averages follow from the continuity equation.

    Example:
        >>> from flowvi.paths import GaussianPath
        >>> paths = [GaussianPath(1, lambda y, t, m=m: m * t, lambda y, t: 1.2 - t, 1.0)
        ...          for m in (-2.0, 2.0)]
        >>> MixturePath(paths).sample(torch.full((4, 1), 0.5)).shape
        torch.Size([4, 1])
    """

    def __init__(self, paths: Iterable[Path], weights: Sequence[float] | Tensor = ()) -> None:
        paths = list(paths)
        if not paths:
            raise ValueError("`paths` must hold at least one path; got none.")
        dims = [p.dim for p in paths]
        if len(set(dims)) > 1:
            raise ValueError(f"`paths` must agree in dim; got {dims}.")
        if any(p.takes_start for p in paths):
            raise ValueError("`paths` must not need a start of their own; got an interpolant.")
        super().__init__(dims[0], paths[0].diffusion)
        self.paths = nn.ModuleList(paths)
        self.register_buffer("log_weights", _log_weights(weights, len(paths)))

    @property
    def noise_dim(self) -> int:
        return max(p.noise_dim for p in self.paths) + 1

    def transform(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        # The normal distribution function makes a uniform number of the last coordinate.
        uniform = torch.special.ndtr(eps[..., -1:])
        edges = self.log_weights.exp().cumsum(0)[:-1].to(eps)
        index = (uniform >= edges).sum(-1, keepdim=True)
        states = (p.transform(eps[..., : p.noise_dim], t, y) for p in self.paths)
        state = next(states)
        for k, other in enumerate(states, 1):
            state = torch.where(index == k, other, state)
        return state

    def point(self, eps: Tensor, t: Tensor, y: Tensor | None = None) -> PathPoint:
        state = self.transform(eps, t, y)
        velocity, score = self.velocity_and_score(state, t, y)
        return self._complete(state, t, velocity, score)

    def velocity_and_score(
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.field_and_log_prob(x, t, y)[:2]

    def field_and_log_prob(
        self, x: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = [p.field_and_log_prob(x, t, y) for p in self.paths]
        joint = torch.stack([log_q for _, _, log_q in parts], -1) + self.log_weights.to(x)
        shares = joint.softmax(-1).unsqueeze(-2).unbind(-1)
        velocity = sum(share * v for share, (v, _, _) in zip(shares, parts, strict=True))
        score = sum(share * s for share, (_, s, _) in zip(shares, parts, strict=True))
        return velocity, score, joint.logsumexp(-1)

    def log_prob(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        parts = torch.stack([p.log_prob(x, t, y) for p in self.paths], -1)
        return (parts + self.log_weights.to(x)).logsumexp(-1)


def _log_weights(weights: Sequence[float] | Tensor, number: int) -> Tensor:
    if torch.is_tensor(weights) and weights.requires_grad:
        raise NotImplementedError(
            "The weights of a MixturePath are constants, since a draw of the component carries no "
            "gradient. Detach them, or train a FlowPath with several modes."
        )
    given = torch.as_tensor(
        weights if len(weights) else [1.0] * number, dtype=torch.get_default_dtype()
    )
    if given.shape != (number,) or not bool((given > 0).all()):
        raise ValueError(
            f"`weights` must be {number} positive numbers, one for each path; got {weights}."
        )
    return (given / given.sum()).log()
