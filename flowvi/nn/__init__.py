"""Networks that make the parameters of transforms."""

from flowvi.nn.fields import FunctionField, VectorField
from flowvi.nn.layered_fields import ConcatSquashField, GatedField, MLPField
from flowvi.nn.made import MADE
from flowvi.nn.mlp import MLP
from flowvi.nn.potential import PotentialField
from flowvi.nn.time_embedding import FourierTime

__all__ = [
    "MADE",
    "MLP",
    "ConcatSquashField",
    "FourierTime",
    "FunctionField",
    "GatedField",
    "MLPField",
    "PotentialField",
    "VectorField",
]
