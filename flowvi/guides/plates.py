"""AutoPlateFlow: a joint flow for the global latents, one flow per plate for its items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.flows import realnvp
from flowvi.guides._grouped import GroupedGuide, Law
from flowvi.guides._local import LocalFlow, SiteGroup, full_size
from flowvi.guides._prototype import find_subsampled
from flowvi.guides._recipes import check_whitening, make_flow

__all__ = ["AutoPlateFlow"]


class AutoPlateFlow(GroupedGuide):
    r"""Automatic guide that knows plates, so that minibatches of local latents are weighed right.

    .. math:: q(g, z) = q(g) \prod_i q(z_i \mid g), \qquad z_i = m_i + A_i g + L_i T(x \mid g, e_i)

    Global latents are one joint flow. The latents of a plate's items are drawn inside the plate,
    from a flow that sees the globals and a learned row of numbers per item, so the factor N/B of a
    subsampled plate applies to model and guide alike. Plates may be nested: inner items also see
    the latents of the outer ones. Each item costs of the order of ``dim * (dim + parents)``
    parameters, where ``dim`` is the length of one item's latent.

    A model that chooses its own subsample (``pyro.plate(..., subsample=index)``) needs
    ``create_plates`` returning a plate with the same indices.

    Args:
        model: a Pyro model with continuous latent sites.
        recipe: function of the number of global dimensions that makes a flow.
        local_recipe: function of ``(dim, context_dim)`` that makes a conditional flow.
        embedding_dim: length of the learned vector of each item that its flow sees, at least 1.
        init_loc_fn: strategy for the initial point, as for Pyro's automatic guides.
        init_scale: initial standard deviation of each unconstrained coordinate.
        create_plates: function of the model's arguments returning the plates to use.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("items", 50, subsample_size=5):
        ...         pyro.sample("z", dist.Normal(mu, 1.0))
        >>> guide = AutoPlateFlow(model).initialize()
        >>> guide()["z"].shape, guide.median()["z"].shape
        (torch.Size([5]), torch.Size([50]))
    """

    def __init__(
        self,
        model: Callable,
        recipe: Callable[[int], Flow] = realnvp,
        local_recipe: Callable[[int, int], Flow] = partial(realnvp, num_layers=2),  # noqa: B008
        *,
        embedding_dim: int = 4,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(
            model, init_loc_fn=init_loc_fn, init_scale=init_scale, create_plates=create_plates
        )
        for name, value in (("recipe", recipe), ("local_recipe", local_recipe)):
            if not callable(value):
                raise TypeError(f"`{name}` must be a function that makes a Flow; got {value!r}.")
        if not isinstance(embedding_dim, int) or embedding_dim < 1:
            raise ValueError(
                f"`embedding_dim` must be an integer of at least 1; got {embedding_dim!r}."
            )
        self._embedding_dim = embedding_dim
        self._recipe: tuple | None = (recipe, local_recipe)

    def _build_local(self, group: SiteGroup, loc: Tensor) -> LocalFlow:
        for frame in group.frames:
            loc = periodic_repeat(loc, full_size(frame), frame.dim - 1).contiguous()
        parents = self._parent_dim(group)
        flow = make_flow(self._recipe[1], group.dim, parents + self._embedding_dim)
        return LocalFlow(group, flow, parents, loc, self._init_scale)

    def _local_law(
        self,
        module: LocalFlow,
        group: SiteGroup,
        parents: Tensor | None,
        indices: Mapping[str, Tensor] | None,
        inputs: Any,
    ) -> Law:
        context = module.context(parents, indices)
        return module(context), lambda z: module.map.standardize(z, context)

    def _check_plate_sizes(self, plates: Mapping[str, pyro.plate], inputs: Any) -> None:
        for name, frame in self._prototype_frames.items():
            if plates[name].size != full_size(frame):
                raise ValueError(
                    f"Plate `{name}` must have {full_size(frame)} items, as it had at initialize; "
                    f"got {plates[name].size}."
                )

    def _check_plates(self, latent: poutine.Trace, trace: poutine.Trace) -> None:
        if self.create_plates is not None or self.master is not None:
            return
        for name, site in latent.nodes.items():
            for frame in site["cond_indep_stack"]:
                if trace.nodes[frame.name]["infer"].get("explicit_subsample"):
                    raise NotImplementedError(
                        f"Plate `{frame.name}`, which holds site `{name}`, is given its subsample "
                        "by the model, and the guide would draw another one. Pass create_plates "
                        "with a function that returns the same plate."
                    )

    def _check_shape(self, name: str, site: dict[str, Any], new: dict[str, Any]) -> None:
        if self.create_plates is None:
            super()._check_shape(name, site, new)

    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Start at a Gaussian over all latents: exactly it, as far as items are independent.

        Args:
            loc: unconstrained location of all sites in order of appearance, ``(latent_dim,)``.
            scale_tril: lower-triangular scale, ``(latent_dim, latent_dim)``.

        Raises:
            NotImplementedError: if a plate is subsampled, as no joint vector exists then.
        """
        self._require_built()
        for name, plate in find_subsampled(self.prototype_trace):
            raise NotImplementedError(
                f"Plate `{plate}` of site `{name}` is subsampled, so there is no joint location "
                "and scale to start from. Pass init_loc_fn instead."
            )
        check_whitening(loc, scale_tril, self.latent_dim)
        covariance, index = scale_tril @ scale_tril.mT, self._coordinates()
        for group, flow in zip(self._groups, self._flows(), strict=True):
            own = index[group.label]
            if not group.frames:
                block = covariance[own[:, None], own]
                self.whitening.set_(loc[own], torch.linalg.cholesky(block))
                continue
            above = [index[self._groups[i].label] for i in self._parents(group)]
            shape = own.shape[:-1]
            joint = torch.cat([part.expand(*shape, -1) for part in (*above, own)], -1)
            factor = torch.linalg.cholesky(covariance[joint[..., :, None], joint[..., None, :]])
            rows = factor[..., -group.dim :, :]
            slope, own_scale = rows.split([flow.parent_dim, group.dim], -1)
            flow.set_affine(loc[own], slope, own_scale)

    @property
    def latent_dim(self) -> int:
        """Number of unconstrained coordinates, all items counted."""
        self._require_built()
        return sum(g.dim * g.batch_shape(full=True).numel() for g in self._groups)

    def _coordinates(self) -> dict[str, Tensor]:
        """Positions ``(*items, dim)`` of each group's coordinates in the joint vector."""
        start, positions = 0, {}
        for name, shape in self._unconstrained_shapes.items():
            positions[name] = torch.arange(start, start + shape.numel()).reshape(shape)
            start += shape.numel()
        return {group.label: group.join(positions) for group in self._groups}

    def _num_draws(self) -> int:
        return self._limit_draws(self.latent_dim)
