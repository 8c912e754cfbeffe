"""A Pyro model as a log-density over flat unconstrained vectors, for many draws at once."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from flowvi.infer._sites import Site, inspect_model

__all__ = ["Evaluation", "Target"]

_EVALUATION_ERRORS = (RuntimeError, ValueError, ArithmeticError)


class Evaluation(enum.Enum):
    """How a batch of draws goes through the model."""

    BROADCAST = enum.auto()
    VMAP = enum.auto()
    LOOP = enum.auto()


class _Density(Messenger):
    """Put values into the latent sites of a model and collect the log-density of every site."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], _Subsample) or msg["infer"].get("_deterministic"):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.log_probs[msg["name"]] = scale_and_mask(log_prob, msg["scale"], msg["mask"])


class Target:
    r"""Log joint density of a Pyro model over unconstrained vectors.

    .. math:: \log \tilde p(z) = \log p(\mathrm{data}, x(z)) + \log |\det \partial x/\partial z|

    with :math:`x(z)` the constrained values. The coordinates of ``z`` are those of Pyro's
    ``AutoContinuous``. A batch of draws goes through the model in one run, with the draws on a
    dimension to the left of the model's plates; where the model does not broadcast, through
    ``torch.vmap``; where that fails too, one by one, after one warning. The choice is verified at
    construction against one-by-one evaluation. Pyro's validation is off inside.

    Args:
        model: a Pyro model with continuous latent sites and no subsampled plate.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        max_plate_nesting: number of plate dimensions of the model; None finds it by a run.

    Shape:
        z: ``(num_draws, dim)``; log-densities: ``(num_draws,)``, in nats.

    Raises:
        ValueError: if the model has no latent site, a subsampled or an empty plate, non-finite
            observed data, or a log joint that is random.
        NotImplementedError: if a latent site is discrete, or has a support that depends on
            other latent sites.

    Example:
        >>> import pyro.distributions as dist
        >>> target = Target(lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1).to_event(1)))
        >>> target.labels, target.log_prob(torch.zeros(3, 2)).shape
        (['x[0]', 'x[1]'], torch.Size([3]))
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        max_plate_nesting: int | None = None,
    ) -> None:
        self.model = model
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        prototype = inspect_model(model, self.args, self.kwargs)
        self.sites: dict[str, Site] = prototype.sites
        self.observed: dict[str, Tensor] = prototype.observed
        self._observed_batch = prototype.observed_batch
        if max_plate_nesting is not None and max_plate_nesting < prototype.max_plate_nesting:
            raise ValueError(
                f"`max_plate_nesting` must be at least {prototype.max_plate_nesting}, the depth "
                f"of the model; got {max_plate_nesting}."
            )
        self.max_plate_nesting = (
            prototype.max_plate_nesting if max_plate_nesting is None else max_plate_nesting
        )
        first = next(iter(self.sites.values()))
        self.dtype, self.device = first.dtype, first.device
        self.dim = max(site.stop for site in self.sites.values())
        self.labels = [label for site in self.sites.values() for label in site.labels]
        self.last_error: str | None = None
        self.evaluation = self._choose_evaluation()

    @property
    def vectorized(self) -> bool:
        """Whether a batch of draws takes one run of the model."""
        return self.evaluation is not Evaluation.LOOP

    def log_prob(self, z: Tensor) -> Tensor:
        """Log joint density, including the log-determinant of the constraint; differentiable.

        Raises:
            ValueError: if ``z`` has the wrong shape.
        """
        self._check(z)
        return self._log_prob(z, self.evaluation)

    def log_prob_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint density and its gradient, guarded: never NaN and never an exception.

        A batch on which the model raises is halved until the raising rows are found. Rows that
        raise, or have a non-finite value or gradient, get log-density ``-inf`` and gradient 0.

        Shape:
            z: ``(num_draws, dim)``; returns ``(num_draws,)`` and ``(num_draws, dim)``, detached.
        """
        self._check(z)
        log_p, grad = self._guard(self._value_and_grad, z.detach())
        bad = ~(torch.isfinite(log_p) & torch.isfinite(grad.sum(-1)))
        return log_p.masked_fill(bad, -torch.inf), grad.masked_fill(bad[:, None], 0.0)

    @torch.no_grad()
    def guarded_log_prob(self, z: Tensor) -> Tensor:
        """Log joint density without a graph; ``-inf`` where it raises or is not finite."""
        self._check(z)
        log_p, *_ = self._guard(lambda part: (self._log_prob(part, self.evaluation),), z)
        return log_p.masked_fill(~torch.isfinite(log_p), -torch.inf)

    def _value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            log_p = self._log_prob(leaf, self.evaluation)
            (grad,) = torch.autograd.grad(log_p.sum(), leaf)
        return log_p.detach(), grad

    def _guard(self, function: Callable[[Tensor], tuple], z: Tensor) -> tuple[Tensor, ...]:
        """Results of ``function``; a batch that raises is halved down to the raising rows."""
        try:
            return function(z)
        except _EVALUATION_ERRORS as error:
            self.last_error = f"{type(error).__name__}: {error}"
        if len(z) <= 1:
            return z.new_full((len(z),), torch.nan), torch.full_like(z, torch.nan)
        halves = [self._guard(function, half) for half in z.tensor_split(2)]
        return tuple(torch.cat(parts) for parts in zip(*halves, strict=False))

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites, each ``(num_draws, *site shape)``."""
        self._check(z)
        return self._constrain(z)[0]

    def log_abs_det(self, z: Tensor) -> Tensor:
        """Log-determinant of ``constrain``, ``(num_draws,)``, in nats."""
        self._check(z)
        return self._constrain(z)[1]

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """Inverse of :meth:`constrain`: ``(num_draws, dim)``.

        Raises:
            ValueError: if a latent site is missing or has the wrong shape.
        """
        parts = []
        for name, site in self.sites.items():
            if name not in values:
                raise ValueError(f"`values` must have every latent site; got no `{name}`.")
            value = values[name]
            if value.shape[1:] != site.shape:
                raise ValueError(
                    f"`values[{name!r}]` must have shape (num_draws, *{tuple(site.shape)}); got "
                    f"{tuple(value.shape)}."
                )
            parts.append(site.transform.inv(value).reshape(len(value), -1))
        return torch.cat(parts, -1)

    def log_likelihood(self, z: Tensor) -> dict[str, Tensor]:
        """Log-density of each observed site, ``(num_draws, *batch shape of the site)``.

        ``pyro.factor`` terms are not observed data and are left out.
        """
        self._check(z)
        with pyro.validation_enabled(False):
            if self.evaluation is Evaluation.BROADCAST:
                log_probs = self._sites_broadcast(z)
                kept = {name: log_probs[name] for name in self.observed}
                return {name: self._drop_padding(v, len(z), name) for name, v in kept.items()}

            def one(row: Tensor) -> dict[str, Tensor]:
                log_probs = self._run(self._single(row))
                return {name: log_probs[name] for name in self.observed}

            if self.evaluation is Evaluation.VMAP:
                return torch.vmap(one)(z)
            rows = [one(row) for row in z]
            return {name: torch.stack([row[name] for row in rows]) for name in self.observed}

    # Evaluation.

    def _check(self, z: Tensor) -> None:
        if z.dim() != 2 or z.shape[-1] != self.dim:
            raise ValueError(f"`z` must have shape (num_draws, {self.dim}); got {tuple(z.shape)}.")

    def _constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, ladj = {}, z.new_zeros(len(z))
        for name, site in self.sites.items():
            u = z[:, site.start : site.stop].reshape(len(z), *site.unconstrained_shape)
            if site.is_identity:
                values[name] = u
                continue
            values[name] = x = site.transform(u)
            ladj = ladj + site.transform.log_abs_det_jacobian(u, x).reshape(len(z), -1).sum(-1)
        return values, ladj

    def _single(self, row: Tensor) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self._constrain(row[None])[0].items()}

    def _run(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        with _Density(values) as density:
            self.model(*self.args, **self.kwargs)
        return density.log_probs

    def _pad(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the draws to the left of every plate dimension."""
        padded = {}
        for name, value in values.items():
            site = self.sites[name]
            missing = self.max_plate_nesting - (len(site.shape) - site.event_dim)
            padded[name] = value.reshape(len(value), *(1,) * missing, *site.shape)
        return padded

    def _sites_broadcast(self, z: Tensor) -> dict[str, Tensor]:
        return self._run(self._pad(self._constrain(z)[0]))

    def _drop_padding(self, log_prob: Tensor, num_draws: int, name: str) -> Tensor:
        """Bring ``(num_draws, 1, ..., *batch)`` to ``(num_draws, *batch)``, constants expanded."""
        plates = self._observed_batch[name]
        missing = self.max_plate_nesting - len(plates)
        shape = (num_draws, *(1,) * missing, *plates)
        return log_prob.expand(shape).reshape(num_draws, *plates)

    def _log_prob(self, z: Tensor, evaluation: Evaluation) -> Tensor:
        with pyro.validation_enabled(False):
            if evaluation is Evaluation.BROADCAST:
                values, total = self._constrain(z)
                for name, log_prob in self._run(self._pad(values)).items():
                    total = total + self._sum_plates(log_prob, name)
                return total.expand(len(z))
            if evaluation is Evaluation.VMAP:
                return torch.vmap(self._log_prob_one)(z)
            if not len(z):
                return z.new_zeros(0)
            return torch.stack([self._log_prob_one(row) for row in z])

    def _log_prob_one(self, row: Tensor) -> Tensor:
        values, ladj = self._constrain(row[None])
        log_probs = self._run({name: value[0] for name, value in values.items()})
        return ladj[0] + sum(log_prob.sum() for log_prob in log_probs.values())

    def _sum_plates(self, log_prob: Tensor, name: str) -> Tensor:
        depth = self.max_plate_nesting
        if log_prob.dim() > depth + 1:
            raise RuntimeError(f"Site `{name}` has more batch dimensions than the model's plates.")
        if log_prob.dim() <= depth:
            return log_prob.sum()
        return log_prob.sum(tuple(range(1, depth + 1))) if depth else log_prob

    # Choice of the evaluation.

    def _choose_evaluation(self) -> Evaluation:
        z, expected = self._one_by_one(self._probes())
        again = self._one_by_one(z[:1])[1]
        if not _agree(again, expected[:1]):
            raise ValueError(
                "`model` must have a log joint without randomness of its own; got two values at "
                "one point. Set modules to eval mode and draw nothing outside pyro.sample."
            )
        for evaluation in (Evaluation.BROADCAST, Evaluation.VMAP):
            try:
                with torch.no_grad():
                    found = self._log_prob(z, evaluation)
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {error}"
                continue
            if found.shape == expected.shape and _agree(found, expected):
                return evaluation
        warnings.warn(
            "The model does not broadcast over draws, so draws are evaluated one by one, which "
            "is slow. Write it so that latent values may have extra dimensions on the left.",
            stacklevel=4,
        )
        return Evaluation.LOOP

    def _probes(self) -> Tensor:
        """Five points, near the origin and further out; drawn without touching global state."""
        generator = torch.Generator().manual_seed(0)
        z = torch.rand(5, self.dim, generator=generator, dtype=torch.float64) * 2 - 1
        radius = torch.tensor([0.1, 0.3, 0.6, 1.0, 2.0], dtype=torch.float64)
        return (radius[:, None] * z).to(self.device, self.dtype)

    def _one_by_one(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The rows on which the model does not raise, and their log-densities."""
        rows, values, raised = [], [], None
        with torch.no_grad():
            for row in z:
                try:
                    values.append(self._log_prob(row[None], Evaluation.LOOP)[0])
                    rows.append(row)
                except _EVALUATION_ERRORS as error:
                    raised = error
        if not rows and raised is not None:
            raise raised
        return torch.stack(rows), torch.stack(values)


def _agree(found: Tensor, expected: Tensor) -> bool:
    rtol = 1e-8 if found.dtype == torch.float64 else 2e-3
    return torch.allclose(found, expected, rtol=rtol, atol=rtol, equal_nan=True)
