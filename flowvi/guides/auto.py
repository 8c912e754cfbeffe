"""AutoFlow: one flow over all latent variables of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import biject_to

from flowvi.distributions import Flow, FlowDistribution
from flowvi.flows import realnvp
from flowvi.guides._prototype import find_subsampled
from flowvi.guides._recipes import check_whitening, make_flow
from flowvi.guides._replay import Supply, batch_rows, pack_rows, plated_rows, supplied_values
from flowvi.guides.base import FlowGuide
from flowvi.transforms import FlowTransform, Whitening, compose
from flowvi.transforms.base import common_shape

__all__ = ["AutoFlow"]


class AutoFlow(FlowGuide, AutoContinuous):
    r"""Automatic guide: one flow over the joint unconstrained latent, in whitened coordinates.

    .. math:: z = m + L\,T_\phi(x), \qquad x \sim \mathcal N(0, I)

    The whitening :math:`(m, L)` is fixed: the initial point and ``init_scale`` times the identity,
    or what :meth:`whiten` was given. The flow starts near the identity and ends in an affine layer
    of its own. A Pyro ``AutoContinuous``: it works with ``Predictive``, as a part of
    ``AutoGuideList`` and in ``NeuTraReparam``.

    It does not depend on the model's arguments. Local latents of a subsampled plate are refused:
    a joint law has no place for items that are not in the batch. Use :class:`AutoPlateFlow`.

    Args:
        model: a Pyro model with continuous latent sites.
        recipe: function of the latent dimension that makes a :class:`Flow`, such as those of
            :mod:`flowvi.flows`; or a flow of the right size.
        init_loc_fn: strategy for the initial point, as for Pyro's automatic guides.
        init_scale: initial standard deviation of each unconstrained coordinate.
        create_plates: function of the model's arguments returning the plates to use.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("scale", dist.Gamma(2.0, 1.0))
        >>> guide = AutoFlow(model).initialize()
        >>> guide.log_q({"scale": torch.ones(5)}).shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable,
        recipe: Callable[[int], Flow] | Flow = realnvp,
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ) -> None:
        FlowGuide.__init__(
            self,
            model,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            create_plates=create_plates,
        )
        if not callable(recipe):
            raise TypeError(
                f"`recipe` must be a Flow or a function that makes one; got {recipe!r}."
            )
        # In a tuple, because a flow would be registered as a submodule under a second name.
        self._recipe: tuple | None = (recipe,)

    def _check_plates(self, latent: poutine.Trace, trace: poutine.Trace) -> None:
        for site, plate in find_subsampled(latent):
            raise NotImplementedError(
                f"Plate `{plate}` is subsampled and holds the local latent site `{site}`, which a "
                "joint flow would weigh wrongly. Use AutoPlateFlow."
            )

    def _build(self, initial: dict[str, Tensor]) -> None:
        loc = torch.cat([value.reshape(-1) for value in initial.values()])
        self.latent_dim = len(loc)
        flow = make_flow(self._recipe[0], self.latent_dim)
        self.flow = flow.to(device=loc.device, dtype=loc.dtype)
        self.whitening = Whitening(self.latent_dim).to(device=loc.device, dtype=loc.dtype)
        self.whitening.set_(loc, self._init_scale * torch.diag(torch.ones_like(loc)))
        self._recipe = None

    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the whitening: the guide's location and scale while its flow is the identity.

        Args:
            loc: unconstrained location, shape ``(latent_dim,)``.
            scale_tril: lower-triangular scale, shape ``(latent_dim, latent_dim)``.
        """
        self._require_built()
        check_whitening(loc, scale_tril, self.latent_dim)
        self._whiten(loc, scale_tril)

    def _whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.whitening.set_(loc, scale_tril)

    # The AutoContinuous contract.

    def get_base_dist(self) -> TorchDistribution:
        """Law on the base side of the flow."""
        self._require_built()
        return self.flow.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """Map from the base to the joint unconstrained latent."""
        self._require_built()
        return compose(self.flow.transform, self.whitening)

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Law of the joint unconstrained latent."""
        self._require_built()
        flow = self.flow  # once: every access of a module is a statement to Pyro
        return FlowDistribution(flow.base(), compose(flow.transform, self.whitening))

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        start = 0
        for name, shape in self._unconstrained_shapes.items():
            batch = latent.shape[:-1] + (1,) * self._unconstrained_dim(name)
            value = latent[..., start : start + shape.numel()]
            start += shape.numel()
            yield self.prototype_trace.nodes[name], value.reshape(common_shape(shape, batch))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site; the joint latent is an auxiliary site outside all plates."""
        plates = self._create_plates(*args, **kwargs)
        for frame in self._prototype_frames.values():
            self._check_plate_size(plates[frame.name], frame)
        supplied = supplied_values(self.prototype_trace.nodes, [self.latent_name])
        if supplied is None:
            latent = self.sample_latent(*args, **kwargs)
            return {
                site["name"]: self._sample_site(
                    site["name"], *self._constrain(site["name"], value)
                )
                for site, value in self._unpack_latent(latent)
            }
        parts = {name: self._unconstrain(name, value) for name, value in supplied.items()}
        rows = [
            plated_rows(value, self._unconstrained_shapes[name], self._unconstrained_dim(name))
            for name, (value, _) in parts.items()
        ]
        with Supply({self.latent_name: pack_rows(rows)}):
            self.sample_latent(*args, **kwargs)
        return {
            name: self._sample_site(name, value, parts[name][1])
            for name, value in supplied.items()
        }

    def log_q(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log-density (nats) of the guide at constrained values of all its latent sites.

        Args:
            values: site name to value ``(*batch, *site shape)``; ``batch`` is common to all.
            *args: the model's arguments, which this guide does not depend on.
            **kwargs: the model's keyword arguments, likewise.

        Returns:
            Tensor ``(*batch,)``; ``-inf`` outside the support.

        Raises:
            ValueError: if a site is missing, unknown, or of the wrong shape.
        """
        self._ready(args, kwargs)
        self._check_values(values)
        rows, total = [], 0.0
        for name, site in self.prototype_trace.nodes.items():
            value, shape = values[name], site["value"].shape
            self._check_value(name, value, shape)
            unconstrained, log_density = self._unconstrain(name, value)
            rows.append(batch_rows(unconstrained, self._unconstrained_shapes[name]))
            batch_shape = shape[: len(shape) - site["fn"].event_dim]
            total = total + batch_rows(log_density, batch_shape).sum(-1)
        batch = common_shape(*(r.shape[:-1] for r in rows))
        latent = torch.cat([r.expand(*batch, -1) for r in rows], -1)
        return self.get_posterior(*args, **kwargs).log_prob(latent) + total

    def _check_plate_size(self, plate: pyro.plate, frame: CondIndepStackFrame) -> None:
        if plate.subsample_size != frame.size:
            raise ValueError(
                f"Plate `{frame.name}` must hold {frame.size} items, as it did at initialize; "
                f"got {plate.subsample_size}."
            )

    def _constrained_draws(self, num_draws: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        latent = self.get_posterior(*args, **kwargs).sample((num_draws,))
        draws, start = {}, 0
        for name, shape in self._unconstrained_shapes.items():
            value = latent[:, start : start + shape.numel()].reshape(num_draws, *shape)
            draws[name] = biject_to(self._supports[name])(value)
            start += shape.numel()
        return draws
