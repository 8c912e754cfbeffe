"""Path gradients for guides whose sites depend on each other.

Where the law of one draw is computed from another draw, holding that law's parameters constant
would also cut off the other draw. Here the guide is run a second time at the draws of the first
run; the slope of log q in all draws jointly, with the guide's parameters fixed, is then one
backward pass.
"""

from __future__ import annotations

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowvi.objectives._draws import check_path_site, random_sites
from flowvi.objectives.weights import GuideTerm, attached, with_gradient_of

__all__ = ["GivenDraws", "draws_depend", "given_term"]

_MARK = "_given_draw"


def draws_depend(trace: Trace) -> bool:
    """Whether the law of one random site is computed from the draw of another.

    Args:
        trace: of the guide, with its graph.
    """
    nodes = [s["value"].grad_fn for s in random_sites(trace) if s["value"].grad_fn is not None]
    return len(nodes) > 1 and any(_reaches(node, set(nodes)) for node in nodes)


def _reaches(start: object, goals: set[object]) -> bool:
    seen, stack = {start}, [start]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None or node in seen:
                continue
            if node in goals:
                return True
            seen.add(node)
            stack.append(node)
    return False


class GivenDraws(Messenger):
    """Give a guide the draws and the minibatch of an earlier run of it.

    The draws are passed on as aliases, so that what is done to a gradient at the alias is not
    done again where one draw leads to another.

    Args:
        trace: of the earlier run, with its graph.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._draws = {s["name"]: s["value"] for s in random_sites(trace)}
        sites = (s for s in trace.nodes.values() if s["type"] == "sample")
        self._indices = {s["name"]: s["value"] for s in sites if site_is_subsample(s)}

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if name in self._indices:
            msg["value"] = self._indices[name]
        elif name in self._draws:
            msg["value"] = self._draws[name].view_as(self._draws[name])
            msg["infer"] = {**msg["infer"], _MARK: True}


def given_term(trace: Trace, bound: str) -> GuideTerm | None:
    """Guide term with path gradients, for a trace made under :class:`GivenDraws`.

    Returns:
        A function of a site, or None for any other trace.
    """
    sites = [s for s in random_sites(trace) if s["infer"].get(_MARK)]
    if not sites:
        return None
    for site in sites:
        check_path_site(site, bound)
    log_q = {s["name"]: attached(s) for s in sites}
    total = sum(scale_and_mask(log_q[s["name"]], 1.0, s["mask"]).sum() for s in sites)
    live = [s for s in sites if s["value"].requires_grad]
    draws = [s["value"] for s in live]
    slopes = torch.autograd.grad(total, draws, retain_graph=True, allow_unused=True)
    carriers = {
        s["name"]: sum_rightmost(slope * (z - z.detach()), s["fn"].event_dim)
        for s, z, slope in zip(live, draws, slopes, strict=True)
        if slope is not None
    }

    def term(site: dict) -> Tensor:
        name = site["name"]
        if name not in log_q:
            return attached(site)
        return with_gradient_of(log_q[name], carriers.get(name, 0.0))

    return term
