"""Invertible maps with log-determinants, base to target."""

from flowvi.transforms.autoregressive import Autoregressive
from flowvi.transforms.base import Compose, Direction, FlowTransform, Inverse, compose
from flowvi.transforms.coupling import Coupling
from flowvi.transforms.elementwise import (
    Additive,
    Affine,
    Chain,
    ElementwiseMap,
    ElementwiseTransform,
)
from flowvi.transforms.linear import Householder, LULinear, TriangularAffine, Whitening
from flowvi.transforms.permutation import Permutation
from flowvi.transforms.splines import RationalQuadratic

__all__ = [
    "Additive",
    "Affine",
    "Autoregressive",
    "Chain",
    "Compose",
    "Coupling",
    "Direction",
    "ElementwiseMap",
    "ElementwiseTransform",
    "FlowTransform",
    "Householder",
    "Inverse",
    "LULinear",
    "Permutation",
    "RationalQuadratic",
    "TriangularAffine",
    "Whitening",
    "compose",
]
