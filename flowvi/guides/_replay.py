"""Values that handlers outside the guide give to its sites, and how they become one latent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

__all__ = ["Supply", "batch_rows", "pack_rows", "plated_rows", "supplied_values"]


class Supply(Messenger):
    """Give sites their values without marking them as observed."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def supplied_values(
    sites: Mapping[str, Mapping[str, Any]], auxiliary: Iterable[str]
) -> dict[str, Tensor] | None:
    """What the handlers above would put at the named sites; None if the guide is to draw.

    A guide trace that is replayed carries the auxiliary sites too; then nothing is left to do.

    Raises:
        NotImplementedError: if some of the named sites are supplied and some are not.
    """
    values = {name: _ask(name, site["fn"]) for name, site in sites.items()}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values) or any(_ask(name, None) is not None for name in auxiliary):
        return None
    if missing:
        given = [name for name in values if name not in missing]
        raise NotImplementedError(
            f"Sites {given} are replayed or conditioned and sites {missing} are not. A joint "
            "flow can score all of its sites or none: supply every one."
        )
    return values


def _ask(name: str, fn: Any) -> Tensor | None:
    # Only handlers that set values are asked, and block, which decides how far a site reaches:
    # sending a real message would leave marks in traces.
    msg: dict[str, Any] = {
        "type": "sample",
        "name": name,
        "fn": fn,
        "is_observed": False,
        "args": (),
        "kwargs": {},
        "value": None,
        "infer": {},
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": False,
        "stop": False,
        "continuation": None,
    }
    for frame in reversed(_PYRO_STACK):
        if isinstance(frame, (BlockMessenger, ReplayMessenger, ConditionMessenger)):
            frame._process_message(msg)
        if msg["stop"]:
            break
    return msg["value"]


def plated_rows(value: Tensor, shape: torch.Size, event_dim: int) -> Tensor:
    """Flatten a site inside plates: ``(*particles, *plates, *event)`` to ``(*batch, size)``.

    ``shape`` is the site's own shape without particles. Its plate dimensions become size 1 in
    the batch, as they are for a latent drawn outside the plates.
    """
    ndim = max(value.dim(), len(shape))
    own_shape = (1,) * (ndim - len(shape)) + tuple(shape)
    value = value.reshape((1,) * (ndim - value.dim()) + value.shape)
    full = [max(have, own) for have, own in zip(value.shape, own_shape, strict=True)]
    value = value.expand(full)
    batch = range(ndim - event_dim)
    own = [d for d in batch if own_shape[d] != 1]
    outer = [d for d in batch if own_shape[d] == 1]
    lead = [1 if d in own else value.shape[d] for d in batch]
    return value.permute((*outer, *own, *range(ndim - event_dim, ndim))).reshape(*lead, -1)


def batch_rows(value: Tensor, shape: torch.Size) -> Tensor:
    """Flatten a site's values ``(*lead, *shape)`` to ``(*lead, size)``."""
    lead = value.shape[: value.dim() - len(shape)]
    return value.reshape(*lead, -1)


def pack_rows(rows: Iterable[Tensor]) -> Tensor:
    """Join rows ``(*batch, size)`` along the last dimension; leading ones are dropped."""
    rows = list(rows)
    batch = torch.broadcast_shapes(*(r.shape[:-1] for r in rows))
    latent = torch.cat([r.expand(*batch, -1) for r in rows], -1)
    while latent.dim() > 1 and latent.shape[0] == 1:
        latent = latent[0]
    return latent
