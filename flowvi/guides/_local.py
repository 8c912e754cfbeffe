"""The law of the latents of one plate's items, given what lies outside the plate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowvi.distributions import Flow, FlowDistribution
from flowvi.transforms import FlowTransform

__all__ = ["ItemMap", "LocalFlow", "SiteGroup"]


class SiteGroup:
    """Latent sites that share one set of plates; together they are one item's latent.

    Args:
        frames: the plates, as Pyro's frames; none for the global sites.
        sites: site name to shape of one item's unconstrained value.
    """

    def __init__(self, frames: Sequence[Any], sites: Mapping[str, torch.Size]) -> None:
        self.frames = tuple(frames)
        self.sites = dict(sites)
        self.dim = sum(shape.numel() for shape in sites.values())

    @property
    def plates(self) -> frozenset[str]:
        """Names of the plates."""
        return frozenset(frame.name for frame in self.frames)

    @property
    def label(self) -> str:
        """Names of the plates, outermost first, for the name of the auxiliary site."""
        return "_".join(f.name for f in sorted(self.frames, key=lambda f: f.dim))

    @property
    def rank(self) -> int:
        """Number of batch dimensions that the plates take up, counted from the right."""
        return max((-frame.dim for frame in self.frames), default=0)

    def batch_shape(self, *, full: bool) -> torch.Size:
        """Shape of all items, or of those in the batch at initialize."""
        shape = [1] * self.rank
        for frame in self.frames:
            shape[frame.dim] = full_size(frame) if full else frame.size
        return torch.Size(shape)

    def split(self, latent: Tensor) -> dict[str, Tensor]:
        """Cut ``(*batch, dim)`` into the unconstrained values of the sites."""
        pieces = latent.split([shape.numel() for shape in self.sites.values()], -1)
        return {
            name: piece.reshape(latent.shape[:-1] + shape)
            for piece, (name, shape) in zip(pieces, self.sites.items(), strict=True)
        }

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The reverse of :meth:`split`."""
        rows = []
        for name, shape in self.sites.items():
            value = values[name]
            rows.append(value.reshape(*value.shape[: value.dim() - len(shape)], -1))
        batch = torch.broadcast_shapes(*(row.shape[:-1] for row in rows))
        return torch.cat([row.expand(*batch, -1) for row in rows], -1)


def full_size(frame: Any) -> int:
    """Number of items of a plate, of which a batch may show only some."""
    return frame.size if frame.full_size in (None, -1) else frame.full_size


class ItemMap(FlowTransform):
    r"""A conditional map followed by an item's own affine map.

    .. math:: z = m_i + L_i\,T(x \mid c_i)

    The context holds :math:`(c_i, m_i, L_i)`: the part the inner map sees, the location, and the
    lower triangle of the scale row by row, with logarithms on its diagonal.

    Args:
        body: the inner map; its context may be empty.
    """

    def __init__(self, body: FlowTransform) -> None:
        dim = body.input_dim
        super().__init__(dim, body.context_dim + dim + dim * (dim + 1) // 2)
        self.body = body
        index = torch.zeros(dim, dim, dtype=torch.long)
        index[torch.tril_indices(dim, dim).unbind()] = torch.arange(dim * (dim + 1) // 2)
        self.register_buffer("index", index, persistent=False)

    @property
    def has_inverse(self) -> bool:
        return self.body.has_inverse

    @property
    def exact_inverse(self) -> bool:
        return self.body.exact_inverse

    @property
    def has_score_recursion(self) -> bool:
        return self.body.has_score_recursion

    @property
    def cheap(self) -> Any:
        return self.body.cheap

    def affine(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Location, lower-triangular scale and its log-determinant."""
        dim = self.input_dim
        loc, raw = context[..., self.body.context_dim :].split([dim, dim * (dim + 1) // 2], -1)
        lower = raw[..., self.index]
        log_diagonal = lower.diagonal(dim1=-2, dim2=-1)
        scale_tril = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
        return loc, scale_tril, log_diagonal.sum(-1)

    def _inner(self, context: Tensor) -> Tensor | None:
        return context[..., : self.body.context_dim] if self.body.context_dim else None

    def standardize(self, value: Tensor, context: Tensor) -> Tensor:
        """The value in the item's own units, before its affine map."""
        loc, scale_tril, _ = self.affine(context)
        return _solve(scale_tril, value - loc)

    def _call_and_ladj(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.body._call_and_ladj(x, self._inner(context))
        loc, scale_tril, log_det = self.affine(context)
        return loc + (scale_tril @ y.unsqueeze(-1)).squeeze(-1), ladj + log_det

    def _inverse_and_ladj(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale_tril, log_det = self.affine(context)
        x, ladj = self.body._inverse_and_ladj(_solve(scale_tril, y - loc), self._inner(context))
        return x, ladj - log_det

    def _call_ladj_and_score(
        self, x: Tensor, score: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj, score = self.body._call_ladj_and_score(x, score, self._inner(context))
        loc, scale_tril, log_det = self.affine(context)
        score = torch.linalg.solve_triangular(
            scale_tril.detach().mT, score.unsqueeze(-1), upper=True
        ).squeeze(-1)
        return loc + (scale_tril @ y.unsqueeze(-1)).squeeze(-1), ladj + log_det, score


def _solve(scale_tril: Tensor, value: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(scale_tril.shape[:-2], value.shape[:-1])
    value = value.expand(*batch, -1).unsqueeze(-1)
    return torch.linalg.solve_triangular(scale_tril, value, upper=False).squeeze(-1)


class LocalFlow(nn.Module):
    r"""Law of one plate's items given the standardised latents :math:`g` outside the plate.

    .. math:: z_i = m_i + A_i g + L_i\,T(x \mid g, e_i)

    The numbers :math:`(m_i, A_i, L_i, e_i)` of all items are the rows of one parameter. The
    location is linear in :math:`g`, so the joint law of a Gaussian hierarchical posterior is
    represented exactly while ``T`` is the identity.

    Args:
        group: the sites and their plates.
        flow: conditional flow with ``group.dim`` dimensions and a context of length
            ``parent_dim + embedding_dim``.
        parent_dim: length of ``g``.
        loc: initial unconstrained value of every item, ``(*items, group.dim)``.
        init_scale: initial standard deviation.
    """

    def __init__(
        self, group: SiteGroup, flow: Flow, parent_dim: int, loc: Tensor, init_scale: float
    ) -> None:
        super().__init__()
        self.group = group
        self.base = flow.base
        self.map = ItemMap(flow.transform)
        dim = group.dim
        self.parent_dim = parent_dim
        self.sizes = (dim, dim * parent_dim, dim * (dim + 1) // 2, flow.context_dim - parent_dim)
        rows = loc.new_zeros(*loc.shape[:-1], sum(self.sizes))
        rows[..., :dim] = loc
        self.items = nn.Parameter(rows)
        self.set_scale(init_scale * torch.eye(dim, dtype=loc.dtype, device=loc.device))

    def context(self, parents: Tensor | None, indices: Mapping[str, Tensor] | None) -> Tensor:
        """Contexts ``(*batch, *items, context_dim)`` of the items with the given indices."""
        rows = self.items
        if indices is not None:
            for frame in self.group.frames:
                index = indices[frame.name].to(rows.device)
                rows = rows.index_select(frame.dim - 1, index)
        loc, slope, raw, embedding = rows.split(self.sizes, -1)
        if parents is None:
            return torch.cat([embedding, loc, raw], -1)
        slope = slope.reshape(*slope.shape[:-1], self.group.dim, self.parent_dim)
        loc = loc + (slope @ parents.unsqueeze(-1)).squeeze(-1)
        batch = torch.broadcast_shapes(parents.shape[:-1], rows.shape[:-1])
        parts = (parents, embedding, loc, raw)
        return torch.cat([part.expand(*batch, -1) for part in parts], -1)

    def forward(self, context: Tensor) -> FlowDistribution:
        return FlowDistribution(self.base(), self.map, context)

    @torch.no_grad()
    def set_scale(self, scale_tril: Tensor) -> None:
        """Set the scale of every item from ``(*items, dim, dim)``."""
        log_diagonal = torch.diag_embed(scale_tril.diagonal(dim1=-2, dim2=-1).log())
        lower = scale_tril.tril(-1) + log_diagonal
        start, stop = sum(self.sizes[:2]), sum(self.sizes[:3])
        rows, columns = torch.tril_indices(self.group.dim, self.group.dim)
        self.items[..., start:stop] = lower[..., rows, columns]

    @torch.no_grad()
    def set_affine(self, loc: Tensor, slope: Tensor, scale_tril: Tensor) -> None:
        """Set location ``(*items, dim)``, slope ``(*items, dim, parent_dim)`` and scale."""
        self.items[..., : self.sizes[0]] = loc
        self.items[..., self.sizes[0] : sum(self.sizes[:2])] = slope.flatten(-2)
        self.set_scale(scale_tril)
