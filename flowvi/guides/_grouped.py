"""Guides that draw the latents of each set of plates inside those plates, outer ones first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from flowvi.distributions import Flow, FlowDistribution
from flowvi.guides._local import SiteGroup
from flowvi.guides._recipes import make_flow
from flowvi.guides._replay import Supply, supplied_values
from flowvi.guides.base import FlowGuide
from flowvi.transforms import Whitening

__all__ = ["GroupedGuide", "Law"]

Law = tuple[FlowDistribution, Callable[[Tensor], Tensor]]


class GroupedGuide(FlowGuide):
    """Base of guides with one flow for the global latents and one per set of plates.

    A subclass writes ``_build_local(group, loc)``, which makes the module of a set of plates, and
    ``_local_law(module, group, parents, indices, inputs)``; ``_inputs`` if its laws depend on the
    model's arguments, and ``_items``, the number of items that scoring is about.
    """

    _recipe: tuple | None
    flow: Flow | None
    whitening: Whitening | None

    def _build(self, initial: dict[str, Tensor]) -> None:
        self._groups = self._find_groups()
        like = next(iter(initial.values()))
        self.flow, self.whitening, local_flows = None, None, []
        for group in self._groups:
            batch = group.batch_shape(full=False)
            values = {n: initial[n].expand(batch + shape) for n, shape in group.sites.items()}
            loc = group.join(values)
            if group.frames:
                local_flows.append(self._build_local(group, loc).to(like))
                continue
            self.flow = make_flow(self._recipe[0], group.dim).to(like)
            self.whitening = Whitening(group.dim).to(like)
            self.whitening.set_(loc, self._init_scale * torch.diag(torch.ones_like(loc)))
        self.local_flows = nn.ModuleList(local_flows)
        self._recipe = None

    def _find_groups(self) -> list[SiteGroup]:
        frames, sites = {}, {}
        for name, site in self.prototype_trace.nodes.items():
            stack = site["cond_indep_stack"]
            key = frozenset(frame.name for frame in stack)
            event_dim = self._unconstrained_dim(name)
            shape = self._unconstrained_shapes[name]
            batch = shape[: len(shape) - event_dim]
            in_plates = {frame.dim for frame in stack}
            for dim in range(-len(batch), 0):
                if batch[dim] != 1 and dim not in in_plates:
                    raise NotImplementedError(
                        f"Site `{name}` has batch dimension {dim} outside every plate. "
                        "Put it into a pyro.plate, or declare it with .to_event()."
                    )
            frames[key] = stack
            sites.setdefault(key, {})[name] = shape[len(batch) :]
        keys = sorted(sites, key=lambda key: (len(key), sorted(key)))
        return [SiteGroup(frames[key], sites[key]) for key in keys]

    # What a subclass writes.

    def _build_local(self, group: SiteGroup, loc: Tensor) -> nn.Module:
        raise NotImplementedError

    def _local_law(
        self,
        module: nn.Module,
        group: SiteGroup,
        parents: Tensor | None,
        indices: Mapping[str, Tensor] | None,
        inputs: Any,
    ) -> Law:
        """Law of a group, and the map of its values to standard units.

        Args:
            module: what ``_build_local`` made.
            group: the sites and their plates.
            parents: standardised latents outside the plates, ``(*batch, parent_dim)``.
            indices: plate name to indices of the items in the batch; None for all items.
            inputs: what ``_inputs`` made of the model's arguments.
        """
        raise NotImplementedError

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None

    def _items(self, group: SiteGroup, inputs: Any) -> torch.Size:
        """Batch shape of all items of a group."""
        return group.batch_shape(full=True)

    def _check_plate_sizes(self, plates: Mapping[str, pyro.plate], inputs: Any) -> None:
        """Refuse plates that do not fit the guide."""

    # Calls.

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site; each set of plates has an auxiliary site inside them."""
        inputs = self._inputs(args, kwargs)
        plates = self._create_plates(*args, **kwargs)
        self._check_plate_sizes(plates, inputs)
        auxiliary = [self._group_name(group) for group in self._groups]
        supplied = supplied_values(self.prototype_trace.nodes, auxiliary)
        known = {n: self._unconstrain(n, v) for n, v in (supplied or {}).items()}
        flows, standard, result = self._flows(), [], {}
        for group, name in zip(self._groups, auxiliary, strict=True):
            with ExitStack() as stack:
                indices = {f.name: stack.enter_context(plates[f.name]) for f in group.frames}
                law, standardize = self._law(group, flows, standard, indices, inputs)
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
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.

        Returns:
            Tensor ``(*batch,)``; ``-inf`` outside the support.

        Raises:
            ValueError: if a site is missing, unknown, or of the wrong shape.
        """
        self._ready(args, kwargs)
        self._check_values(values)
        inputs = self._inputs(args, kwargs)
        rank, total, standard, flows = self._rank(), 0.0, [], self._flows()
        for group in self._groups:
            unconstrained = {}
            for name in group.sites:
                shape = self._item_shape(name, group, inputs)
                self._check_value(name, values[name], shape)
                lead = values[name].dim() - len(shape)
                value, density = self._unconstrain(name, values[name])
                unconstrained[name] = _insert(value, lead, rank - group.rank)
                total = total + density.reshape(*density.shape[:lead], -1).sum(-1)
            latent = group.join(unconstrained)
            law, standardize = self._law(group, flows, standard, None, inputs)
            log_prob = law.log_prob(latent)
            total = total + log_prob.reshape(*log_prob.shape[: log_prob.dim() - rank], -1).sum(-1)
            standard.append(standardize(latent))
        return total

    def _constrained_draws(self, num_draws: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        inputs = self._inputs(args, kwargs)
        rank, standard, flows, draws = self._rank(), [], self._flows(), {}
        for group in self._groups:
            law, standardize = self._law(group, flows, standard, None, inputs)
            outer = (num_draws, *(1,) * (rank - group.rank))
            latent = law.expand(torch.Size(outer) + self._items(group, inputs)).sample()
            standard.append(standardize(latent))
            for name, value in group.split(latent).items():
                constrained = biject_to(self._supports[name])(value)
                shape = self._item_shape(name, group, inputs)
                draws[name] = constrained.reshape(num_draws, *shape)
        return {name: draws[name] for name in self.prototype_trace.nodes}

    # Parts.

    def _law(
        self,
        group: SiteGroup,
        flows: list[nn.Module],
        standard: list[Tensor],
        indices: Mapping[str, Tensor] | None,
        inputs: Any,
    ) -> Law:
        """Law of a group given the groups before it, and the map to its own units."""
        module = flows[self._groups.index(group)]
        if not group.frames:
            law = module.then(self.whitening)()
            return law, lambda z: self.whitening.inverse_and_ladj(z)[0]
        above = [standard[i] for i in self._parents(group)]
        parents = None
        if above:
            batch = torch.broadcast_shapes(*(part.shape[:-1] for part in above))
            parents = torch.cat([part.expand(*batch, -1) for part in above], -1)
        return self._local_law(module, group, parents, indices, inputs)

    def _flows(self) -> list[nn.Module]:
        flows = [] if self.flow is None else [self.flow]
        return [*flows, *self.local_flows]

    def _parents(self, group: SiteGroup) -> list[int]:
        return [i for i, other in enumerate(self._groups) if other.plates < group.plates]

    def _parent_dim(self, group: SiteGroup) -> int:
        return sum(self._groups[i].dim for i in self._parents(group))

    def _group_name(self, group: SiteGroup) -> str:
        return f"_{self._pyro_name}_{group.label}_latent" if group.frames else self.latent_name

    def _rank(self) -> int:
        return max(group.rank for group in self._groups)

    def _item_shape(self, name: str, group: SiteGroup, inputs: Any) -> torch.Size:
        """Shape of a site's constrained value with all items of its plates."""
        site = self.prototype_trace.nodes[name]
        shape = site["value"].shape
        return self._items(group, inputs) + shape[len(shape) - site["fn"].event_dim :]


def _insert(value: Tensor, position: int, count: int) -> Tensor:
    """Insert ``count`` dimensions of size 1 at ``position``."""
    return value.reshape(*value.shape[:position], *(1,) * count, *value.shape[position:])
