"""What fit refuses before it starts, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from numbers import Real

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowvi.infer.svi import owning_module

__all__ = ["check_arguments", "check_numbers", "is_subsampled", "trace_programs"]


def check_numbers(integers: Mapping[str, object], positives: Mapping[str, object]) -> None:
    """Check counts (integers of at least 1) and positive numbers; ``None`` means a default."""
    for name, value in integers.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be an integer of at least 1; got {value!r}.")
    for name, value in positives.items():
        if value is not None and (not isinstance(value, Real) or not value > 0):
            raise ValueError(f"`{name}` must be a positive number; got {value!r}.")


def check_arguments(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> None:
    """Check callables, empty data and devices.

    Raises:
        TypeError: if model or guide is not callable.
        ValueError: if data is empty or lies on another device than the guide.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"`{name}` must be callable; got {type(program).__name__}.")
    home = {}
    for owner, program in (("guide", guide), ("model", model)):
        home.update({d: owner for d in _devices(program) if d not in home})
    for where, tensor in _tensors(args, kwargs):
        if tensor.numel() == 0:
            raise ValueError(f"`{where}` must not be empty; got shape {tuple(tensor.shape)}.")
        # Scalars on the CPU mix with any device.
        if home and tensor.device not in home and (tensor.dim() or tensor.device.type != "cpu"):
            (device, owner), *_ = home.items()
            raise ValueError(
                f"`{where}` must be on the device of the {owner}, {device}; got {tensor.device}. "
                f"Move the data, or the {owner} with {owner}.to({str(tensor.device)!r})."
            )


def trace_programs(
    model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> tuple[Trace, Trace]:
    """Run guide and model once, with checks, and give their traces.

    Raises:
        ValueError: if there is no latent site, guide and model disagree in their sites, a plate
            is empty, or data is not finite.
    """
    suspects = list(_non_finite(args, kwargs))
    try:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        _check_plates(model_trace)
        _check_observations(model_trace, suspects)
        model_trace.compute_log_prob()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        if suspects and "non-finite" not in str(error):
            raise ValueError(_say(suspects)) from error
        raise
    if suspects and not model_trace.log_prob_sum().isfinite():
        raise ValueError(_say(suspects))
    _check_match(model_trace, guide_trace)
    return model_trace, guide_trace


def is_subsampled(trace: Trace) -> bool:
    """Whether a plate of the trace takes a part of its items."""
    sites = (s for s in trace.nodes.values() if s["type"] == "sample" and site_is_subsample(s))
    return any(_is_partial(s) for s in sites)


def _devices(program: Callable) -> set[torch.device]:
    module = owning_module(program)
    if module is None:
        return set()
    try:
        return {t.device for t in (*module.parameters(), *module.buffers())}
    except RuntimeError:
        # An automatic guide that has no parameters yet takes the device of the model.
        return set()


def _is_partial(site: dict) -> bool:
    taken = site["fn"].subsample_size if site["value"] is None else len(site["value"])
    return taken is not None and taken < site["fn"].size


def _check_plates(trace: Trace) -> None:
    for name, site in trace.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if frame.size == 0:
                raise ValueError(
                    f"Plate `{frame.name}` must have at least one item; got size 0 at site "
                    f"`{name}`."
                )


def _check_observations(trace: Trace, suspects: list[str]) -> None:
    for name in trace.observation_nodes:
        site = trace.nodes[name]
        value, mask = site["value"], site["mask"]
        if site_is_subsample(site) or not torch.is_tensor(value) or mask is False:
            continue
        bad = ~value.isfinite()
        own = getattr(site["fn"], "_mask", None)
        event_dim = getattr(site["fn"], "event_dim", 0)
        for part in (mask, own):
            if torch.is_tensor(part):
                bad = bad & part.reshape(*part.shape, *(1,) * event_dim)
        if bad.any():
            raise ValueError(
                f"Observed site `{name}` must have finite data; got {int(bad.sum())} non-finite "
                f"of {bad.numel()} values" + (f" ({'; '.join(suspects)})." if suspects else ".")
            )


def _check_match(model_trace: Trace, guide_trace: Trace) -> None:
    latents = {n for n in model_trace.stochastic_nodes if _counts(model_trace.nodes[n])}
    proposed = {
        n
        for n in guide_trace.stochastic_nodes
        if _counts(guide_trace.nodes[n]) and not guide_trace.nodes[n]["infer"].get("is_auxiliary")
    }
    if not latents:
        raise ValueError(
            "`model` must have at least one latent sample site; got none. "
            "Check that not every site is observed or blocked."
        )
    if latents != proposed:
        message = (
            "`guide` must sample exactly the latent sites of the model; it lacks "
            f"{sorted(latents - proposed) or 'none'} and has "
            f"{sorted(proposed - latents) or 'none'} that the model lacks."
        )
        nodes = model_trace.nodes
        summed = sorted(n for n in latents - proposed if nodes[n]["infer"].get("enumerate"))
        if summed:
            message += (
                f" Site `{summed[0]}` is to be summed out: train with pyro.infer.SVI and "
                "TraceEnum_ELBO, or sum it out in the model (a pyro.distributions mixture)."
            )
        raise ValueError(message)
    for name in sorted(latents):
        shapes = [tuple(t.nodes[name]["value"].shape) for t in (model_trace, guide_trace)]
        try:
            event = [t.nodes[name]["fn"].event_shape for t in (model_trace, guide_trace)]
        except AttributeError:
            continue
        if event[0] != event[1]:
            raise ValueError(
                f"`guide` must agree with the model in event shapes; site `{name}` has "
                f"{tuple(event[1])} in the guide and {tuple(event[0])} in the model "
                f"(value of shape {shapes[1]})."
            )


def _counts(site: dict) -> bool:
    return not site_is_subsample(site) and not site["infer"].get("_deterministic")


def _say(suspects: list[str]) -> str:
    return f"Data must be finite; {'; '.join(suspects)}."


def _non_finite(args: tuple, kwargs: dict) -> Iterator[str]:
    for where, tensor in _tensors(args, kwargs):
        if tensor.device.type != "meta" and tensor.is_floating_point():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                yield f"`{where}` has {bad} non-finite of {tensor.numel()} values"


def _tensors(args: tuple, kwargs: dict) -> Iterator[tuple[str, Tensor]]:
    for i, value in enumerate(args):
        yield from _walk(f"args[{i}]", value)
    for name, value in kwargs.items():
        yield from _walk(name, value)


def _walk(where: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if torch.is_tensor(value):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(f"{where}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _walk(f"{where}[{i}]", item)
