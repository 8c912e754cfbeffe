"""Networks that make the parameters of transforms."""

from flowvi.nn.made import MADE
from flowvi.nn.mlp import MLP

__all__ = ["MADE", "MLP"]
