"""Invertible maps with log-determinants, base to target."""

from flowvi.transforms._dynamics import Stage, Term
from flowvi.transforms.actnorm import ActNorm, initialize_norms
from flowvi.transforms.adaptive import Adaptive, AdaptiveMethod
from flowvi.transforms.autoregressive import Autoregressive
from flowvi.transforms.base import Compose, Direction, FlowTransform, Inverse, compose
from flowvi.transforms.continuous import Continuous, SolveReport, Trajectory
from flowvi.transforms.coupling import Coupling, checkerboard
from flowvi.transforms.divergence import (
    ClosedFormDivergence,
    Divergence,
    ExactDivergence,
    Hutchinson,
    Probe,
)
from flowvi.transforms.elementwise import (
    Additive,
    Affine,
    Chain,
    ElementwiseMap,
    ElementwiseTransform,
)
from flowvi.transforms.images import OnChannels, Pixelwise, Squeezed
from flowvi.transforms.interval import ToInterval
from flowvi.transforms.linear import Householder, LULinear, TriangularAffine, Whitening
from flowvi.transforms.numerical import NumericalInverse
from flowvi.transforms.ode_solvers import RK4, DormandPrince, Euler, FixedStep, Midpoint, Solver
from flowvi.transforms.permutation import Permutation
from flowvi.transforms.planar import Planar
from flowvi.transforms.radial import Radial
from flowvi.transforms.regularizers import (
    HJB,
    JKO,
    DivergenceRate,
    JacobianNorm,
    KineticEnergy,
    PathPenalty,
    Regularizer,
    collect_penalties,
)
from flowvi.transforms.splines import RationalQuadratic
from flowvi.transforms.sylvester import (
    HouseholderSylvester,
    OrthogonalSylvester,
    TriangularSylvester,
)

__all__ = [
    "HJB",
    "JKO",
    "RK4",
    "ActNorm",
    "Adaptive",
    "AdaptiveMethod",
    "Additive",
    "Affine",
    "Autoregressive",
    "Chain",
    "ClosedFormDivergence",
    "Compose",
    "Continuous",
    "Coupling",
    "Direction",
    "Divergence",
    "DivergenceRate",
    "DormandPrince",
    "ElementwiseMap",
    "ElementwiseTransform",
    "Euler",
    "ExactDivergence",
    "FixedStep",
    "FlowTransform",
    "Householder",
    "HouseholderSylvester",
    "Hutchinson",
    "Inverse",
    "JacobianNorm",
    "KineticEnergy",
    "LULinear",
    "Midpoint",
    "NumericalInverse",
    "OnChannels",
    "OrthogonalSylvester",
    "PathPenalty",
    "Permutation",
    "Pixelwise",
    "Planar",
    "Probe",
    "Radial",
    "RationalQuadratic",
    "Regularizer",
    "SolveReport",
    "Solver",
    "Squeezed",
    "Stage",
    "Term",
    "ToInterval",
    "Trajectory",
    "TriangularAffine",
    "TriangularSylvester",
    "Whitening",
    "checkerboard",
    "collect_penalties",
    "compose",
    "initialize_norms",
]
