"""Finding the site at which a step became non-finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from pyro.poutine import Trace
from torch import Tensor

from flowvi.objectives import Objective

__all__ = ["find_non_finite"]


def find_non_finite(
    objective: Objective, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> str:
    """Run one step's traces and say in words where the first non-finite number arises.

    Call it with the random state that the bad step started from and with its parameters. Looked
    at in order: values and log-densities of guide and model, then the gradient of each site's
    log-density.
    """
    try:
        traces, _ = objective._runs(model, guide, args, kwargs)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for model_trace, guide_trace in traces:
        found = _in_sites("guide", guide_trace) or _in_sites("model", model_trace)
        if found:
            return found
    for model_trace, guide_trace in traces:
        found = _in_gradients(model_trace, guide_trace)
        if found:
            return found
    return "the sum over sites"


def _in_sites(owner: str, trace: Trace) -> str | None:
    for name, site in _sites(trace):
        for what, tensor in (("value", site["value"]), ("log-density", _log_prob(site))):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                bad = int((~tensor.isfinite()).sum())
                if bad:
                    return f"{what} of {owner} site `{name}` ({bad} of {tensor.numel()})"
    return None


def _in_gradients(model_trace: Trace, guide_trace: Trace) -> str | None:
    latents = [s["value"] for _, s in _sites(guide_trace) if s["value"].requires_grad]
    for owner, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in _sites(trace):
            log_prob = _log_prob(site)
            if not latents or not torch.is_tensor(log_prob) or not log_prob.requires_grad:
                continue
            grads = torch.autograd.grad(
                log_prob.sum(), latents, retain_graph=True, allow_unused=True
            )
            if any(g is not None and not g.isfinite().all() for g in grads):
                return f"gradient of {owner} site `{name}`"
    return None


def _sites(trace: Trace) -> Iterable[tuple[str, dict]]:
    return ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample")


def _log_prob(site: dict) -> Tensor | None:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
