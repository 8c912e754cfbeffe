"""Invertible maps with log-determinants, base to target."""

from flowvi.transforms.actnorm import ActNorm
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
from flowvi.transforms.numerical import NumericalInverse
from flowvi.transforms.permutation import Permutation
from flowvi.transforms.planar import Planar
from flowvi.transforms.radial import Radial
from flowvi.transforms.splines import RationalQuadratic
from flowvi.transforms.sylvester import (
    HouseholderSylvester,
    OrthogonalSylvester,
    TriangularSylvester,
)

__all__ = [
    "ActNorm",
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
    "HouseholderSylvester",
    "Inverse",
    "LULinear",
    "NumericalInverse",
    "OrthogonalSylvester",
    "Permutation",
    "Planar",
    "Radial",
    "RationalQuadratic",
    "TriangularAffine",
    "TriangularSylvester",
    "Whitening",
    "compose",
]
