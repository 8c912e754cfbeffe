"""Handler that gives several runs of a step the same minibatch."""

from __future__ import annotations

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["SameMinibatch"]


class SameMinibatch(Messenger):
    """Keep the indices that subsampled plates draw in the first run, and reuse them.

    Particles that are drawn one after the other would otherwise see different data, and bounds
    that combine their weights per item would combine different items.
    """

    def __init__(self) -> None:
        super().__init__()
        self._indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if site_is_subsample(msg) and msg["value"] is None:
            msg["value"] = self._indices.get(msg["name"])

    def _pyro_post_sample(self, msg: dict) -> None:
        if site_is_subsample(msg):
            self._indices.setdefault(msg["name"], msg["value"])
