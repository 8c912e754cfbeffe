"""Invertible maps with log-determinants, base to target."""

from flowvi.transforms.base import Compose, Direction, FlowTransform, Inverse, compose
from flowvi.transforms.linear import Householder, LULinear, TriangularAffine, Whitening
from flowvi.transforms.permutation import Permutation

__all__ = [
    "Compose",
    "Direction",
    "FlowTransform",
    "Householder",
    "Inverse",
    "LULinear",
    "Permutation",
    "TriangularAffine",
    "Whitening",
    "compose",
]
