"""What all flow guides share: building, names, copies, shapes of calls, sites and their Deltas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn.module import _Context, _is_module_local_param_enabled
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from flowvi.guides._prototype import (
    check_log_density,
    check_supports,
    latent_trace,
    run_model,
    signature,
    unconstrained_shapes,
    with_initial_values,
)
from flowvi.nn._store import claim_name

__all__ = ["FlowGuide"]


class FlowGuide(AutoGuide):
    """Base of flow guides: what they do the same way, whatever their law is.

    A subclass writes ``_build(loc)``, which creates its modules once the model has been seen,
    ``forward``, ``log_q`` and ``_constrained_draws``.

    Args:
        model: a Pyro model with continuous latent sites.
        init_loc_fn: strategy for the initial point, as for Pyro's automatic guides.
        init_scale: initial standard deviation of each unconstrained coordinate.
        create_plates: function of the model's arguments returning the plates to use.

    Raises:
        TypeError: if ``model`` is not callable.
        ValueError: if ``init_scale`` is not positive.
    """

    num_quantile_draws = 10_000
    _depends_on_arguments = False

    def __init__(
        self,
        model: Callable,
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be callable; got {type(model).__name__}.")
        if not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"`init_scale` must be positive; got {init_scale!r}.")
        AutoGuide.__init__(
            self, with_initial_values(model, init_loc_fn), create_plates=create_plates
        )
        self._init_scale = float(init_scale)
        self._seen: set[tuple] = set()
        self._supports: dict[str, constraints.Constraint] = {}

    # Building.

    def initialize(self, *args: Any, **kwargs: Any) -> FlowGuide:
        """Run the model once on its arguments and create every parameter; returns the guide.

        A guide that has been built is left as it is, and only checked against the arguments.

        Raises:
            ValueError: if the model has no latent site, an empty plate, or a log-density that
                is not finite at the initial point.
            NotImplementedError: if a latent site is discrete or otherwise not covered.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            with poutine.block():
                root = self if self.master is None else self.master()
                root._create_plates(*args, **kwargs)
                self._create_plates(*args, **kwargs)
        else:
            self._check_call(args, kwargs)
        self._claim()
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        master = None if self.master is None else self.master()
        if master is not None and master.prototype_trace is None:
            master._setup_prototype(*args, **kwargs)
        trace = run_model(self.model, args, kwargs)
        latent = latent_trace(trace, type(self).__name__)
        self._check_plates(latent, trace)
        check_log_density(trace)
        check_supports(latent, self.model, args, kwargs)
        if master is not None:
            master._check_prototype(latent)
        self._unconstrained_shapes = unconstrained_shapes(latent)
        self._cond_indep_stacks = {n: s["cond_indep_stack"] for n, s in latent.nodes.items()}
        self._prototype_frames = {
            frame.name: frame for stack in self._cond_indep_stacks.values() for frame in stack
        }
        self._supports = {n: s["fn"].support for n, s in latent.nodes.items()}
        self.prototype_trace = latent
        try:
            self._build(self._initial_vectors())
        except BaseException:
            self.prototype_trace = None
            raise
        self._seen = {signature(args, kwargs)}

    def _check_plates(self, latent: poutine.Trace, trace: poutine.Trace) -> None:
        """Refuse the plates that this guide does not cover."""

    def _build(self, initial: dict[str, Tensor]) -> None:
        """Create the modules, given the unconstrained initial value of every site."""
        raise NotImplementedError

    def _initial_vectors(self) -> dict[str, Tensor]:
        return {
            name: biject_to(self._supports[name]).inv(site["value"]).detach()
            for name, site in self.prototype_trace.nodes.items()
        }

    @property
    def model(self) -> Callable:
        if self._model is None:
            raise RuntimeError(
                "The guide has no model: a pickled guide leaves it behind. "
                "It can sample and score, but not look at new arguments."
            )
        return self._model[0]

    # Calls.

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        else:
            self._check_call(args, kwargs)
        self._claim()
        return super().__call__(*args, **kwargs)

    def _ready(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self._require_built()
        self._check_call(args, kwargs)
        self._claim()

    def _claim(self) -> None:
        if not _is_module_local_param_enabled():
            claim_name(self)

    def _check_call(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Arguments of new shapes must leave the latent sites' shapes as they were.

        Guide and model would otherwise be broadcast against each other where one has size 1.
        """
        called = signature(args, kwargs)
        first = next(iter(self._seen), ())
        if called in self._seen or self._model is None:
            return
        same_arguments = [key for key, _ in called] == [key for key, _ in first]
        if not (same_arguments or self._depends_on_arguments):
            return
        self._check_devices(args, kwargs)
        trace = run_model(self.model, args, kwargs)
        for name, site in self.prototype_trace.nodes.items():
            if name in trace.nodes:
                self._check_shape(name, site, trace.nodes[name])
        self._see_call(called, trace)
        self._seen.add(called)

    def _see_call(self, called: tuple, trace: poutine.Trace) -> None:
        """Take note of how the model looks for arguments of a new shape."""

    def _check_shape(self, name: str, site: dict[str, Any], new: dict[str, Any]) -> None:
        if new["value"].shape != site["value"].shape:
            raise ValueError(
                f"Latent site `{name}` must keep the shape {tuple(site['value'].shape)} it had at "
                f"initialize; got {tuple(new['value'].shape)}. For minibatches of local latents "
                "use AutoPlateFlow with a subsampled pyro.plate."
            )

    def _check_devices(self, args: tuple, kwargs: dict[str, Any]) -> None:
        device = next((p.device for p in nn.Module.parameters(self)), None)
        for key, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor) and value.is_floating_point() and value.device != device:
                raise ValueError(
                    f"Argument `{key}` must be on {device}, where the guide's parameters are; "
                    f"got {value.device}. Move one of them with .to(device)."
                )

    # Sites.

    @property
    def latent_name(self) -> str:
        """Name of the auxiliary site that carries the joint latent."""
        return f"_{self._pyro_name}_latent"

    def _constrain(self, name: str, unconstrained: Tensor) -> tuple[Tensor, Tensor | float]:
        """Value of a site and the log-density of its bijection there."""
        transform = biject_to(self._supports[name])
        value = transform(unconstrained)
        if poutine.get_mask() is False:
            return value, 0.0
        event_dim = self.prototype_trace.nodes[name]["fn"].event_dim
        return value, -_log_abs_det(transform, unconstrained, value, event_dim)

    def _sample_site(self, name: str, value: Tensor, log_density: Tensor | float) -> Tensor:
        """The named site: a Delta inside its plates."""
        event_dim = self.prototype_trace.nodes[name]["fn"].event_dim
        delta = Delta(value, log_density, event_dim=event_dim, validate_args=False)
        with ExitStack() as stack:
            for frame in self._cond_indep_stacks[name]:
                stack.enter_context(self.plates[frame.name])
            return pyro.sample(name, delta)

    def _unconstrain(self, name: str, value: Tensor) -> tuple[Tensor, Tensor]:
        """Unconstrained value and log-density of the bijection, -inf outside the support."""
        site, support = self.prototype_trace.nodes[name], self._supports[name]
        valid = support.check(value)
        event_dim = site["fn"].event_dim
        inside = valid.reshape(valid.shape + (1,) * (value.dim() - valid.dim()))
        # Any feasible event will do where the value is outside: its density is dropped below.
        feasible = site["value"].reshape(-1, *value.shape[value.dim() - event_dim :])[0]
        value = torch.where(inside, value, feasible.to(value))
        transform = biject_to(support)
        unconstrained = transform.inv(value)
        log_density = -_log_abs_det(transform, unconstrained, value, event_dim)
        while valid.dim() > log_density.dim():
            valid = valid.all(-1)
        outside = torch.full_like(log_density, -torch.inf)
        return unconstrained, torch.where(valid, log_density, outside)

    def _check_values(self, values: Mapping[str, Tensor]) -> None:
        names = list(self.prototype_trace.nodes)
        if not isinstance(values, Mapping) or set(values) != set(names):
            got = list(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"`values` must hold exactly the latent sites {names}; got {got}.")

    def _check_value(self, name: str, value: Tensor, shape: torch.Size) -> None:
        if value.dim() < len(shape) or value.shape[value.dim() - len(shape) :] != shape:
            raise ValueError(
                f"`values['{name}']` must end with shape {tuple(shape)}; got {tuple(value.shape)}."
            )

    def _unconstrained_dim(self, name: str) -> int:
        site, shape = self.prototype_trace.nodes[name], self._unconstrained_shapes[name]
        return site["fn"].event_dim + len(shape) - site["value"].dim()

    # Summaries.

    def _constrained_draws(self, num_draws: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Values of every site with a leading dimension of draws."""
        raise NotImplementedError

    @torch.no_grad()
    def quantiles(
        self, quantiles: Tensor | list[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of each latent variable in constrained space, from draws of the guide.

        Args:
            quantiles: levels in [0, 1], shape ``(Q,)``.
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.

        Returns:
            Site name to tensor ``(Q, *site shape)``.
        """
        self._ready(args, kwargs)
        levels = torch.as_tensor(quantiles)
        if bool(((levels < 0) | (levels > 1)).any()):
            raise ValueError(f"`quantiles` must be in [0, 1]; got {levels.tolist()}.")
        draws = self._constrained_draws(self._num_draws(), *args, **kwargs)
        return {name: _quantile(value, levels) for name, value in draws.items()}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each latent variable in constrained space, from draws of the guide."""
        return {n: v[0] for n, v in self.quantiles([0.5], *args, **kwargs).items()}

    def _num_draws(self) -> int:
        size = sum(site["value"].numel() for site in self.prototype_trace.nodes.values())
        return self._limit_draws(size)

    def _limit_draws(self, size: int) -> int:
        return max(1000, min(self.num_quantile_draws, 20_000_000 // size))

    # Module protocol: nothing may be silently empty or ignored before initialize.

    def _require_built(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters yet. "
                "Call guide.initialize(*args) before building the optimizer."
            )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._require_built()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._require_built()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._require_built()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> FlowGuide:
        self._require_built()
        self._supports = {n: _moved(c, fn) for n, c in self._supports.items()}
        return super()._apply(fn, recurse)

    def _check_module_local_param_usage(self) -> None:
        if self.prototype_trace is not None:
            super()._check_module_local_param_usage()

    # Copies share the model and leave the live guide as it is.

    def __getstate__(self) -> dict[str, Any]:
        # Weak references that the parameter store leaves on what it hands out cannot be pickled.
        for parameter in nn.Module.parameters(self) if self.prototype_trace else ():
            parameter.__dict__.pop("unconstrained", None)
        state = self.__dict__.copy()
        state["_model"] = None
        state["master"] = None
        state.pop("plates", None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowGuide:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        shared = {"_model", "create_plates", "prototype_trace", "_prototype_frames", "plates"}
        for key, value in self.__dict__.items():
            if key == "master":
                new.__dict__[key] = None
            elif key == "_pyro_context":
                new.__dict__[key] = memo.setdefault(id(value), _Context())
            else:
                new.__dict__[key] = value if key in shared else copy.deepcopy(value, memo)
        return new


def _log_abs_det(transform: Transform, x: Tensor, y: Tensor, event_dim: int) -> Tensor:
    ladj = transform.log_abs_det_jacobian(x, y)
    return sum_rightmost(ladj, ladj.dim() - y.dim() + event_dim)


def _moved(constraint: constraints.Constraint, fn: Callable) -> constraints.Constraint:
    """A constraint whose bounds have been through ``fn``, as the parameters have."""

    def move(value: object) -> object:
        if isinstance(value, Tensor):
            return fn(value)
        if isinstance(value, constraints.Constraint):
            return _moved(value, fn)
        return [move(v) for v in value] if isinstance(value, list) else value

    changes = {k: move(v) for k, v in vars(constraint).items()}
    if all(changes[k] is v for k, v in vars(constraint).items()):
        return constraint
    new = copy.copy(constraint)
    new.__dict__.update(changes)
    return new


def _quantile(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles along the first dimension, by linear interpolation of the order statistics."""
    ordered = draws.sort(0).values
    position = levels.to(device=draws.device, dtype=draws.dtype) * (len(draws) - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=len(draws) - 1)
    weight = (position - low).reshape(-1, *(1,) * (draws.dim() - 1))
    return torch.lerp(ordered[low], ordered[high], weight)
