"""AmortizedFlow: an encoder of the data and a conditional flow for each item's latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from flowvi.distributions import Flow
from flowvi.flows import realnvp
from flowvi.guides._grouped import GroupedGuide, Law
from flowvi.guides._local import SiteGroup, full_size
from flowvi.guides._prototype import signature
from flowvi.guides._recipes import make_flow
from flowvi.transforms import Whitening

__all__ = ["AmortizedFlow"]


class AmortizedFlow(GroupedGuide):
    r"""Guide whose local law is a function of the data: an encoder and a conditional flow.

    .. math:: q(g, z \mid x) = q(g) \prod_i q(z_i \mid e(x)_i, g), \qquad
        z_i = m + s\,T(u \mid e(x)_i, g)

    The local latents live in one plate; all items share one flow, so new data need no training.
    Global latents, if there are any, are one joint flow. The encoder is called with the model's
    arguments and gives one context per item: of the whole plate, or of the batch in it.

    Args:
        model: a Pyro model whose local latents are in one vectorised ``pyro.plate``.
        encoder: module or function; ``encoder(*args, **kwargs)`` has shape
            ``(items, context_dim)``.
        recipe: function of ``(dim, context_dim)`` that makes the conditional flow of an item.
        global_recipe: function of the number of global dimensions that makes a flow.
        init_loc_fn: strategy for the initial point, as for Pyro's automatic guides.
        init_scale: initial standard deviation of each unconstrained coordinate.
        create_plates: function of the model's arguments returning the plates to use.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("items", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)
        >>> guide = AmortizedFlow(model, torch.nn.Linear(1, 4)).initialize(torch.zeros(10, 1))
        >>> guide(torch.zeros(3, 1))["z"].shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Callable,
        encoder: Callable[..., Tensor],
        recipe: Callable[[int, int], Flow] = partial(realnvp, num_layers=4),  # noqa: B008
        global_recipe: Callable[[int], Flow] = realnvp,
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(
            model, init_loc_fn=init_loc_fn, init_scale=init_scale, create_plates=create_plates
        )
        for name, value in (("encoder", encoder), ("recipe", recipe)):
            if not callable(value):
                raise TypeError(f"`{name}` must be callable; got {type(value).__name__}.")
        self.encoder = encoder
        self._recipe = (global_recipe, recipe)
        self._context_dim: int | None = None
        self._sizes: dict[tuple, tuple] = {}

    # Building.

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad(), poutine.block():
            self._context_shape = _shape_of(self.encoder(*args, **kwargs))
        super()._setup_prototype(*args, **kwargs)
        self._see_call(signature(args, kwargs), self.prototype_trace)

    def _build_local(self, group: SiteGroup, loc: Tensor) -> Flow:
        frame = group.frames[0]
        self._context_dim = self._context_shape[-1]
        self._check_context(self._context_shape, frame.size, full_size(frame))
        flow = make_flow(
            self._recipe[1], group.dim, self._parent_dim(group) + self._context_dim
        ).to(loc)
        whitening = Whitening(group.dim).to(loc)
        mean = loc.reshape(-1, group.dim).mean(0)
        whitening.set_(mean, self._init_scale * torch.diag(torch.ones_like(mean)))
        return flow.then(whitening)

    def _find_groups(self) -> list[SiteGroup]:
        groups = super()._find_groups()
        local = [group for group in groups if group.frames]
        if len(local) != 1 or len(local[0].frames) != 1:
            names = sorted({name for group in local for name in group.plates})
            raise NotImplementedError(
                f"AmortizedFlow covers local latents of exactly one plate; got plates {names}. "
                "Use AutoPlateFlow, or AutoFlow for a model without local latents."
            )
        return groups

    # Inputs: contexts of the items, and how many items the plate has in this call.

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        context = self.encoder(*args, **kwargs)
        self._check_context(_shape_of(context), *self._call_sizes(args, kwargs))
        return context

    def _check_context(self, shape: tuple[int, ...], size: int, full: int) -> None:
        if shape not in {(size, self._context_dim), (full, self._context_dim)}:
            items = str(full) if size == full else f"{size} or {full}"
            raise ValueError(
                f"`encoder` must give shape ({items}, {self._context_dim}) (items, context_dim); "
                f"got {shape}."
            )

    def _local_law(
        self,
        module: Flow,
        group: SiteGroup,
        parents: Tensor | None,
        indices: Mapping[str, Tensor] | None,
        inputs: Tensor,
    ) -> Law:
        frame, context = group.frames[0], inputs
        if indices is not None and len(context) != len(indices[frame.name]):
            context = context.index_select(0, indices[frame.name].to(context.device))
        context = context.reshape(-1, *(1,) * (group.rank - 1), context.shape[-1])
        if parents is not None:
            batch = torch.broadcast_shapes(parents.shape[:-1], context.shape[:-1])
            context = torch.cat([parents.expand(*batch, -1), context.expand(*batch, -1)], -1)
        return module(context), lambda z: z

    def _items(self, group: SiteGroup, inputs: Tensor) -> torch.Size:
        if not group.frames:
            return torch.Size(())
        return torch.Size((len(inputs), *(1,) * (group.rank - 1)))

    # The plate's size in a call is seen by running the model once on arguments of a new shape.

    _depends_on_arguments = True

    def _see_call(self, called: tuple, trace: poutine.Trace) -> None:
        name = self._local_frame().name
        frames = (f for s in trace.nodes.values() for f in s.get("cond_indep_stack", ()))
        frame = next(frame for frame in frames if frame.name == name)
        self._sizes[called] = frame.size, full_size(frame)

    def _call_sizes(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        """Number of items in the batch and in the whole plate, for these arguments."""
        called = signature(args, kwargs)
        if called not in self._sizes:
            raise RuntimeError(
                "A guide without its model cannot tell the plate's size for arguments of a new "
                "shape. Pickling drops the model: save state_dict() and build the guide anew."
            )
        return self._sizes[called]

    def _local_frame(self) -> Any:
        return next(group.frames[0] for group in self._groups if group.frames)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        size, full = self._call_sizes(args, kwargs)
        frame = self._local_frame()
        self._prototype_frames[frame.name] = frame._replace(size=size, full_size=full)
        return super()._create_plates(*args, **kwargs)

    def _check_shape(self, name: str, site: dict[str, Any], new: dict[str, Any]) -> None:
        """The plate's size may change from call to call; the shape of an item may not."""
        local = bool(site["cond_indep_stack"])
        first = site["value"].dim() - site["fn"].event_dim if local else 0
        if site["value"].shape[first:] != new["value"].shape[first:]:
            super()._check_shape(name, site, new)


def _shape_of(context: Tensor) -> tuple[int, ...]:
    if not isinstance(context, Tensor) or context.dim() != 2:
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"`encoder` must give shape (items, context_dim); got {got}.")
    return tuple(context.shape)
