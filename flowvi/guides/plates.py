"""AutoPlateFlow: a joint flow for the global latents, one flow per plate for its items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor, nn
from torch.distributions import biject_to

from flowvi.distributions import Flow, FlowDistribution
from flowvi.flows import realnvp
from flowvi.guides._local import LocalFlow, SiteGroup, full_size
from flowvi.guides._prototype import find_subsampled
from flowvi.guides._recipes import check_whitening, make_flow
from flowvi.guides._replay import Supply, supplied_values
from flowvi.guides.base import FlowGuide
from flowvi.transforms import Whitening

__all__ = ["AutoPlateFlow"]


class AutoPlateFlow(FlowGuide):
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

    # Building.

    def _build(self, initial: dict[str, Tensor]) -> None:
        self._groups = self._find_groups()
        first = next(iter(initial.values()))
        recipe, local_recipe = self._recipe
        locals_, self.flow, self.whitening = [], None, None
        for group in self._groups:
            loc = self._initial_loc(group, initial)
            if not group.frames:
                self.flow = make_flow(recipe, group.dim).to(first)
                self.whitening = Whitening(group.dim).to(first)
                self.whitening.set_(loc, self._init_scale * torch.diag(torch.ones_like(loc)))
                continue
            parents = self._parent_dim(group)
            flow = make_flow(local_recipe, group.dim, parents + self._embedding_dim)
            locals_.append(LocalFlow(group, flow, parents, loc, self._init_scale).to(first))
        self.local_flows = nn.ModuleList(locals_)
        self._recipe = None

    def _find_groups(self) -> list[SiteGroup]:
        frames, sites = {}, {}
        for name, site in self.prototype_trace.nodes.items():
            stack = site["cond_indep_stack"]
            key = frozenset(frame.name for frame in stack)
            event_dim = self._unconstrained_dim(name)
            shape = self._unconstrained_shapes[name]
            batch, event = shape[: len(shape) - event_dim], shape[len(shape) - event_dim :]
            dims = {frame.dim for frame in stack}
            outside = [
                d - len(batch)
                for d, n in enumerate(batch)
                if n != 1 and d - len(batch) not in dims
            ]
            if outside:
                raise NotImplementedError(
                    f"Site `{name}` has batch dimension {outside[0]} outside every plate. "
                    "Put it into a pyro.plate, or declare it with .to_event()."
                )
            frames[key] = stack
            sites.setdefault(key, {})[name] = event
        return [
            SiteGroup(frames[key], sites[key])
            for key in sorted(sites, key=lambda k: (len(k), sorted(k)))
        ]

    def _parents(self, group: SiteGroup) -> list[int]:
        return [i for i, other in enumerate(self._groups) if other.plates < group.plates]

    def _parent_dim(self, group: SiteGroup) -> int:
        return sum(self._groups[i].dim for i in self._parents(group))

    def _initial_loc(self, group: SiteGroup, initial: dict[str, Tensor]) -> Tensor:
        batch = group.batch_shape(full=False)
        values = {n: initial[n].expand(batch + shape) for n, shape in group.sites.items()}
        loc = group.join(values)
        for frame in group.frames:
            loc = periodic_repeat(loc, full_size(frame), frame.dim - 1).contiguous()
        return loc

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

    # Calls.

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site; each group of plates has an auxiliary site inside them."""
        plates = self._create_plates(*args, **kwargs)
        for name, frame in self._prototype_frames.items():
            if plates[name].size != full_size(frame):
                raise ValueError(
                    f"Plate `{name}` must have {full_size(frame)} items, as it had at initialize; "
                    f"got {plates[name].size}."
                )
        auxiliary = [self._latent_name(group) for group in self._groups]
        supplied = supplied_values(self.prototype_trace.nodes, auxiliary)
        known = {n: self._unconstrain(n, v) for n, v in (supplied or {}).items()}
        modules, standard, result = self._flows(), [], {}
        for group, name in zip(self._groups, auxiliary, strict=True):
            with ExitStack() as stack:
                indices = {f.name: stack.enter_context(plates[f.name]) for f in group.frames}
                law, standardize = self._law(group, modules, standard, indices)
                if supplied is not None:
                    value = group.join({n: known[n][0] for n in group.sites})
                    stack.enter_context(Supply({name: value}))
                latent = pyro.sample(name, law, infer={"is_auxiliary": True})
            standard.append(standardize(latent))
            for site, unconstrained in group.split(latent).items():
                if supplied is None:
                    value, log_density = self._constrain(site, unconstrained)
                else:
                    value, log_density = supplied[site], known[site][1]
                result[site] = self._sample_site(site, value, log_density)
        return {name: result[name] for name in self.prototype_trace.nodes}

    def log_q(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log-density (nats) of the guide at constrained values of all its latent sites.

        Args:
            values: site name to value ``(*batch, *site shape)``, where a plate has all its items,
                not a subsample of them; ``batch`` is common to all sites.
            *args: the model's arguments, which this guide does not depend on.
            **kwargs: the model's keyword arguments, likewise.

        Returns:
            Tensor ``(*batch,)``; ``-inf`` outside the support.

        Raises:
            ValueError: if a site is missing, unknown, or of the wrong shape.
        """
        self._require_built()
        self._check_values(values)
        self._claim()
        rank, total, standard, modules = self._rank(), 0.0, [], self._flows()
        for group in self._groups:
            unconstrained = {}
            for name in group.sites:
                lead = values[name].dim() - len(self._full_shape(name))
                self._check_value(name, values[name], self._full_shape(name))
                value, density = self._unconstrain(name, values[name])
                unconstrained[name] = _insert(value, lead, rank - group.rank)
                total = total + density.reshape(*density.shape[:lead], -1).sum(-1)
            latent = group.join(unconstrained)
            law, standardize = self._law(group, modules, standard, None)
            log_prob = law.log_prob(latent)
            total = total + log_prob.reshape(*log_prob.shape[: log_prob.dim() - rank], -1).sum(-1)
            standard.append(standardize(latent))
        return total

    def _constrained_draws(self, num_draws: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        rank, standard, modules, draws = self._rank(), [], self._flows(), {}
        for group in self._groups:
            law, standardize = self._law(group, modules, standard, None)
            items = group.batch_shape(full=True)
            batch = (num_draws, *(1,) * (rank - group.rank), *items)
            latent = law.expand(torch.Size(batch)).sample()
            standard.append(standardize(latent))
            for name, value in group.split(latent).items():
                constrained = biject_to(self._supports[name])(value)
                draws[name] = constrained.reshape(num_draws, *self._full_shape(name))
        return {name: draws[name] for name in self.prototype_trace.nodes}

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

    # Parts.

    def _law(
        self,
        group: SiteGroup,
        modules: list[nn.Module],
        standard: list[Tensor],
        indices: dict[str, Tensor] | None,
    ) -> tuple[FlowDistribution, Callable[[Tensor], Tensor]]:
        """Law of a group given the groups before it, and the map to its own units."""
        module = modules[self._groups.index(group)]
        if not group.frames:
            law = module.then(self.whitening)()
            return law, lambda z: self.whitening.inverse_and_ladj(z)[0]
        above = [standard[i] for i in self._parents(group)]
        parents = None
        if above:
            batch = torch.broadcast_shapes(*(part.shape[:-1] for part in above))
            parents = torch.cat([part.expand(*batch, -1) for part in above], -1)
        context = module.context(parents, indices)
        return module(context), lambda z: module.map.standardize(z, context)

    def _flows(self) -> list[nn.Module]:
        flows = [] if self.flow is None else [self.flow]
        return [*flows, *self.local_flows]

    def _latent_name(self, group: SiteGroup) -> str:
        return f"_{self._pyro_name}_{group.label}_latent" if group.frames else self.latent_name

    def _rank(self) -> int:
        return max(group.rank for group in self._groups)

    def _full_shape(self, name: str) -> torch.Size:
        site = self.prototype_trace.nodes[name]
        shape, event_dim = list(site["value"].shape), site["fn"].event_dim
        for frame in site["cond_indep_stack"]:
            shape[frame.dim - event_dim] = full_size(frame)
        return torch.Size(shape)

    def _num_draws(self) -> int:
        size = sum(self._full_shape(name).numel() for name in self.prototype_trace.nodes)
        return self._limit_draws(size)


def _insert(value: Tensor, position: int, count: int) -> Tensor:
    """Insert ``count`` dimensions of size 1 at ``position``."""
    return value.reshape(*value.shape[:position], *(1,) * count, *value.shape[position:])
