"""Cases for the property tests: one line each, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from flowvi import flows
from flowvi.guides import (
    AmortizedFlow,
    AutoAugmentedFlow,
    AutoFlow,
    AutoMixtureFlow,
    AutoPlateFlow,
)
from flowvi.models import (
    FVAE,
    VAE,
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContinuousBernoulliLikelihood,
    ConvDecoder,
    ConvEncoder,
    DiagonalPosterior,
    DiscretisedLogisticLikelihood,
    HierarchicalVAE,
    ImageFlowLikelihood,
    LadderVAE,
    Likelihood,
    MLPDecoder,
    MLPEncoder,
    NormalLikelihood,
    ResidualVAE,
    TopDownVAE,
    VampPrior,
    cnf_posterior,
    full_posterior,
    householder_sylvester_posterior,
    iaf_posterior,
    orthogonal_sylvester_posterior,
    planar_posterior,
    realnvp_posterior,
    spline_posterior,
    triangular_sylvester_posterior,
)
from flowvi.nn import ConcatSquashField, GatedField, MLPField, PotentialField, VectorField
from flowvi.objectives import (
    CUBO,
    ELBO,
    EUBO,
    IWAE,
    STL,
    STLIWAE,
    TVO,
    VIMCO,
    BetaELBO,
    DReG,
    ForwardKL,
    FreeBits,
    GeometricSchedule,
    LinearSchedule,
    Regularized,
    Renyi,
    ReweightedWakeSleep,
    Tempered,
    VRMax,
)
from flowvi.paths import (
    AlphaSigma,
    BrownianBridge,
    ChainPath,
    DiffusionPath,
    FadedFlowPath,
    FlowPath,
    GaussianPath,
    LearnedMonotone,
    Linear,
    LinearLogSNR,
    MixturePath,
    ScheduleDiffusion,
    StateDiffusion,
    StochasticInterpolant,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    VariancePreservingCosine,
    VarianceTrained,
    with_time,
)
from flowvi.samplers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    EulerMaruyama,
    ExponentialIntegrator,
    Milstein,
    Parallel,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseSDE,
    StochasticHeun,
)
from flowvi.transforms import (
    RK4,
    ActNorm,
    Adaptive,
    Additive,
    Affine,
    Autoregressive,
    Compose,
    Continuous,
    Coupling,
    DormandPrince,
    ElementwiseTransform,
    Euler,
    ExactDivergence,
    FlowTransform,
    Householder,
    HouseholderSylvester,
    Inverse,
    KineticEnergy,
    LULinear,
    Midpoint,
    NumericalInverse,
    OnChannels,
    OrthogonalSylvester,
    Permutation,
    Pixelwise,
    Planar,
    Radial,
    RationalQuadratic,
    Squeezed,
    ToInterval,
    TriangularAffine,
    TriangularSylvester,
    Whitening,
    checkerboard,
)

__all__ = [
    "CHAINS",
    "FLOWS",
    "GUIDES",
    "IMAGE_FLOWS",
    "LIKELIHOODS",
    "OBJECTIVES",
    "PAIRS",
    "PATHS",
    "POSTERIORS",
    "SAMPLERS",
    "SAMPLERS_OF_MODELS",
    "SCHEDULES",
    "TRANSFORMS",
    "Case",
]


@dataclass(frozen=True)
class Case:
    """One thing under test.

    Args:
        make: builds it anew.
        input_dim: number of dimensions.
        shape: event shape, where it is not a vector.
        context_dim: length of the context vector; 0 for none.
        jacobian: for maps with a declared zero pattern, one string per row of the Jacobian:
            "0" is exactly zero, "1" is not.
        no_gradient: names of parameters that are without effect by construction.
        float32: whether the float32 round trip is promised (spline and affine maps).
        bound: whether a guide's log_q is a bound, not the log-density of its draws.
        scale: standard deviation of drawn parameters; below 1 where errors of a fixed number of
            steps would be above the tests' tolerances (test_continuous.py takes more steps for 1).
    """

    make: Callable[[], Any]
    input_dim: int = 1
    context_dim: int = 0
    jacobian: tuple[str, ...] = ()
    no_gradient: tuple[str, ...] = ()
    float32: bool = False
    bound: bool = False
    scale: float = 1.0
    shape: tuple[int, ...] = ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shape or (self.input_dim,)


SMALL = {"hidden_dims": (8, 8)}
KEPT_FIRST = ("1000", "0100", "1110", "1101")
LOWER = ("1000", "1100", "1110", "1111")
ORDERED = ("1011", "1111", "0010", "0011")


def _whitening(input_dim: int) -> Whitening:
    whitening = Whitening(input_dim)
    scale_tril = torch.full((input_dim, input_dim), 0.5).tril(-1) + 2 * torch.eye(input_dim)
    whitening.set_(torch.arange(1.0, input_dim + 1), scale_tril)
    return whitening


def _masked(elementwise: object) -> FlowTransform:
    return Coupling(4, elementwise, mask=(True, False, False, True), **SMALL)


def _composed(context_dim: int = 0) -> Compose:
    return Compose(
        [
            Coupling(3, RationalQuadratic(4), context_dim=context_dim, **SMALL),
            Permutation([2, 0, 1]),
            TriangularAffine(3),
        ]
    )


def _user_map(context_dim: int = 0) -> Compose:
    return Compose([Planar(2, context_dim), LULinear(2)])


def _continuous(field: VectorField, **options: object) -> Continuous:
    return Continuous(field, solver=DormandPrince(20), **options)


TRANSFORMS: dict[str, Case] = {
    # Affine maps.
    "whitening": Case(lambda: _whitening(3), 3, float32=True),
    "whitening, 1-D": Case(lambda: _whitening(1), 1, float32=True),
    "triangular": Case(lambda: TriangularAffine(4), 4, 0, LOWER, float32=True),
    "triangular, 1-D": Case(lambda: TriangularAffine(1), 1, float32=True),
    "triangular, context": Case(lambda: TriangularAffine(3, 2), 3, 2, float32=True),
    "triangular, context, deep": Case(lambda: TriangularAffine(2, 2, hidden_dims=(8,)), 2, 2),
    "lu": Case(lambda: LULinear(3), 3, float32=True),
    "lu, 1-D": Case(lambda: LULinear(1), 1, float32=True),
    "lu, permuted": Case(lambda: LULinear(3, permutation=(2, 0, 1)), 3, float32=True),
    "lu, context": Case(lambda: LULinear(3, 2), 3, 2, float32=True),
    "householder": Case(lambda: Householder(4, 3), 4, float32=True),
    "householder, 1-D": Case(
        lambda: Householder(1), 1, no_gradient=("raw.vectors",), float32=True
    ),
    "householder, context": Case(lambda: Householder(3, 2, 2), 3, 2, float32=True),
    "permutation": Case(lambda: Permutation.random(4, seed=1), 4, float32=True),
    "permutation, reversal": Case(lambda: Permutation.reverse(3), 3, 0, ("001", "010", "100")),
    "actnorm": Case(lambda: ActNorm(3), 3, 0, ("100", "010", "001"), float32=True),
    "actnorm, 1-D": Case(lambda: ActNorm(1), 1, float32=True),
    # Elementwise maps.
    "elementwise, affine": Case(lambda: ElementwiseTransform(3, Affine()), 3, float32=True),
    "elementwise, spline": Case(
        lambda: ElementwiseTransform(3, RationalQuadratic()),
        3,
        0,
        ("100", "010", "001"),
        float32=True,
    ),
    "elementwise, spline, 1-D": Case(
        lambda: ElementwiseTransform(1, RationalQuadratic(4)), 1, float32=True
    ),
    "elementwise, spline, context": Case(
        lambda: ElementwiseTransform(2, RationalQuadratic(4), 2, **SMALL), 2, 2, float32=True
    ),
    # Couplings.
    "coupling, additive": Case(
        lambda: Coupling(4, Additive(), **SMALL), 4, 0, KEPT_FIRST, float32=True
    ),
    "coupling, affine": Case(
        lambda: Coupling(4, Affine(), **SMALL), 4, 0, KEPT_FIRST, float32=True
    ),
    "coupling, affine, mask": Case(
        lambda: _masked(Affine()), 4, 0, ("1110", "0100", "0010", "0111"), float32=True
    ),
    "coupling, affine, 1-D": Case(lambda: Coupling(1, Affine()), 1, float32=True),
    "coupling, affine, 2-D": Case(lambda: Coupling(2, Affine(), **SMALL), 2, float32=True),
    "coupling, affine, context": Case(
        lambda: Coupling(3, Affine(), context_dim=2, **SMALL), 3, 2, float32=True
    ),
    "coupling, affine, 1-D, context": Case(
        lambda: Coupling(1, Affine(), context_dim=2, **SMALL), 1, 2, float32=True
    ),
    "coupling, spline": Case(
        lambda: Coupling(4, RationalQuadratic(), **SMALL), 4, 0, KEPT_FIRST, float32=True
    ),
    "coupling, spline, 2-D": Case(
        lambda: Coupling(2, RationalQuadratic(4), **SMALL), 2, float32=True
    ),
    "coupling, spline, context": Case(
        lambda: Coupling(3, RationalQuadratic(4), context_dim=2, **SMALL), 3, 2, float32=True
    ),
    # Autoregressive maps, both directions.
    "autoregressive, additive": Case(
        lambda: Autoregressive(4, Additive(), **SMALL), 4, 0, LOWER, float32=True
    ),
    "autoregressive, affine": Case(
        lambda: Autoregressive(4, Affine(), **SMALL), 4, 0, LOWER, float32=True
    ),
    "autoregressive, affine, inverse": Case(
        lambda: Autoregressive(4, Affine(), **SMALL).inv, 4, 0, LOWER, float32=True
    ),
    "autoregressive, affine, order": Case(
        lambda: Autoregressive(4, Affine(), order=(2, 3, 0, 1), **SMALL),
        4,
        0,
        ORDERED,
        float32=True,
    ),
    "autoregressive, affine, 1-D": Case(lambda: Autoregressive(1, Affine()), 1, float32=True),
    "autoregressive, affine, 2-D": Case(
        lambda: Autoregressive(2, Affine(), **SMALL), 2, float32=True
    ),
    "autoregressive, affine, context": Case(
        lambda: Autoregressive(3, Affine(), context_dim=2, **SMALL), 3, 2, float32=True
    ),
    "autoregressive, affine, inverse, context": Case(
        lambda: Inverse(Autoregressive(3, Affine(), context_dim=2, **SMALL)), 3, 2, float32=True
    ),
    "autoregressive, spline": Case(
        lambda: Autoregressive(4, RationalQuadratic(), **SMALL), 4, 0, LOWER, float32=True
    ),
    "autoregressive, spline, inverse": Case(
        lambda: Autoregressive(3, RationalQuadratic(4), **SMALL).inv, 3, float32=True
    ),
    "autoregressive, spline, context": Case(
        lambda: Autoregressive(3, RationalQuadratic(4), context_dim=2, **SMALL), 3, 2, float32=True
    ),
    # Maps that bend space.
    "planar": Case(lambda: Planar(3), 3),
    "planar, 1-D": Case(lambda: Planar(1), 1),
    "planar, 2-D": Case(lambda: Planar(2), 2),
    "planar, context": Case(lambda: Planar(3, 2), 3, 2),
    "planar, inverse": Case(lambda: Planar(2).inv, 2),
    "radial": Case(lambda: Radial(3), 3),
    "radial, 1-D": Case(lambda: Radial(1), 1),
    "radial, 2-D": Case(lambda: Radial(2), 2),
    "radial, context": Case(lambda: Radial(3, 2), 3, 2),
    "sylvester, orthogonal": Case(lambda: OrthogonalSylvester(4, 2), 4),
    "sylvester, orthogonal, 1-D": Case(
        lambda: OrthogonalSylvester(1, 1), 1, no_gradient=("raw.basis",)
    ),
    "sylvester, orthogonal, 2-D": Case(lambda: OrthogonalSylvester(2, 1), 2),
    "sylvester, orthogonal, context": Case(lambda: OrthogonalSylvester(3, 2, 2), 3, 2),
    "sylvester, householder": Case(lambda: HouseholderSylvester(3), 3),
    "sylvester, householder, 1-D": Case(
        lambda: HouseholderSylvester(1), 1, no_gradient=("raw.vectors",)
    ),
    "sylvester, householder, context": Case(lambda: HouseholderSylvester(3, 2, 2), 3, 2),
    "sylvester, triangular": Case(lambda: TriangularSylvester(3), 3, 0, ("111", "011", "001")),
    "sylvester, triangular, reversed": Case(
        lambda: TriangularSylvester(3, reverse=True), 3, 0, ("100", "110", "111")
    ),
    "sylvester, triangular, context": Case(lambda: TriangularSylvester(2, 2), 2, 2),
    "numerical inverse": Case(lambda: NumericalInverse(_user_map()), 2),
    "numerical inverse, 1-D": Case(lambda: NumericalInverse(Radial(1)), 1),
    "numerical inverse, context": Case(lambda: NumericalInverse(_user_map(2)), 2, 2),
    # Continuous flows.
    "continuous": Case(lambda: _continuous(MLPField(3, (4, 4))), 3, scale=0.2),
    "continuous, 1-D": Case(
        lambda: _continuous(MLPField(1, (4,)), divergence=ExactDivergence()), 1, scale=0.2
    ),
    "continuous, potential": Case(lambda: _continuous(PotentialField(3, 4)), 3, scale=0.2),
    "continuous, context": Case(
        lambda: Continuous(ConcatSquashField(3, (4,), 2), solver=RK4(40, checkpointed=True)),
        3,
        2,
        scale=0.2,
    ),
    "continuous, context, low rank": Case(
        lambda: _continuous(GatedField(3, (4,), 2, low_rank=1, hyper_dims=(4,))), 3, 2, scale=0.2
    ),
    # Images.
    "actnorm, image": Case(lambda: Pixelwise(ActNorm(2), 2, 2), 8, shape=(2, 2, 2), float32=True),
    "convolution, 1 x 1": Case(
        lambda: Pixelwise(LULinear(3, permutation=(2, 0, 1)), 1, 2),
        6,
        shape=(3, 1, 2),
        float32=True,
    ),
    "convolution, 1 x 1, context": Case(
        lambda: Pixelwise(LULinear(2, 2), 1, 2), 4, 2, shape=(2, 1, 2), float32=True
    ),
    "elementwise, image, context": Case(
        lambda: ElementwiseTransform((2, 1, 2), Affine(), 2, **SMALL), 4, 2, shape=(2, 1, 2)
    ),
    "coupling, image": Case(
        lambda: Coupling((3, 1, 2), Affine(), **SMALL),
        6,
        0,
        ("100000", "010000", "111000", "110100", "110010", "110001"),
        float32=True,
        shape=(3, 1, 2),
    ),
    "coupling, image, spline, context": Case(
        lambda: Coupling((2, 1, 2), RationalQuadratic(4), context_dim=2, **SMALL),
        4,
        2,
        float32=True,
        shape=(2, 1, 2),
    ),
    "coupling, image, mask": Case(
        lambda: Coupling((3, 1, 2), Additive(), mask=(True, False, True), **SMALL),
        6,
        shape=(3, 1, 2),
    ),
    "coupling, image, checkerboard": Case(
        lambda: Coupling((1, 2, 2), Affine(), mask=checkerboard(2, 2), **SMALL),
        4,
        0,
        ("1000", "1101", "1011", "0001"),
        float32=True,
        shape=(1, 2, 2),
    ),
    "coupling, image, checkerboard, spline, context": Case(
        lambda: Coupling(
            (2, 1, 2), RationalQuadratic(4), mask=~checkerboard(1, 2), context_dim=2, **SMALL
        ),
        4,
        2,
        float32=True,
        shape=(2, 1, 2),
    ),
    "squeezed": Case(
        lambda: Squeezed(Coupling((4, 1, 1), Affine(), **SMALL)),
        4,
        0,
        ("1000", "0100", "1110", "1101"),
        shape=(1, 2, 2),
    ),
    "on channels, context": Case(
        lambda: OnChannels(ElementwiseTransform((1, 1, 2), Affine(), 2, **SMALL), 2),
        4,
        2,
        shape=(2, 1, 2),
    ),
    "interval": Case(lambda: ToInterval(3, -60.0, 60.0), 3, 0, ("100", "010", "001")),
    "interval, margin": Case(
        lambda: ToInterval((1, 2, 2), -9.0, 9.0, margin=0.1), 4, shape=(1, 2, 2)
    ),
    # Built from others.
    "compose": Case(lambda: _composed(), 3, float32=True),
    "compose, context": Case(lambda: _composed(2), 3, 2, float32=True),
    "inverse": Case(lambda: Inverse(_composed()), 3, float32=True),
}

# Tests of laws compare to 1e-6, which takes more steps than training does.
OPTIONS = {"cnf": {"hidden_dims": (8, 8), "solver": DormandPrince(20)}}

FLOWS: dict[str, Case] = {
    f"{recipe}, {dim}-D{', context' if context_dim else ''}": Case(
        partial(getattr(flows, recipe), dim, context_dim, **OPTIONS.get(recipe, {})),
        dim,
        context_dim,
    )
    for recipe in flows.__all__
    if not recipe.endswith("_image")
    for dim, context_dim in ((1, 0), (1, 2), (2, 0), (4, 0), (4, 2))
}
_image = {"num_layers": 2, "hidden_dims": (4,)}
IMAGE_FLOWS: dict[str, Case] = {
    "glow_image": Case(partial(flows.glow_image, (1, 4, 4), **_image), 16, shape=(1, 4, 4)),
    "glow_image, context": Case(
        partial(flows.glow_image, (1, 4, 4), 2, **_image), 16, 2, shape=(1, 4, 4)
    ),
    "glow_image, context image": Case(
        partial(flows.glow_image, (1, 4, 4), 16, context_shape=(1, 4, 4), **_image),
        16,
        16,
        shape=(1, 4, 4),
    ),
    "glow_image, spline": Case(
        partial(
            flows.glow_image, (2, 2, 2), elementwise=RationalQuadratic(4), num_levels=1, **_image
        ),
        8,
        shape=(2, 2, 2),
    ),
    "realnvp_image": Case(partial(flows.realnvp_image, (1, 4, 4), **_image), 16, shape=(1, 4, 4)),
    "realnvp_image, context": Case(
        partial(flows.realnvp_image, (2, 2, 4), 2, num_levels=1, **_image),
        16,
        2,
        shape=(2, 2, 4),
    ),
}
_narrow = partial(flows.realnvp, num_layers=2, hidden_dims=(8,))


def _encoder() -> nn.Module:
    """Contexts of length 4 for scalar observations ``(items,)``."""
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4))


GUIDES: dict[str, Case] = {
    "amortised": Case(lambda model: AmortizedFlow(model, _encoder(), _narrow, _narrow)),
    "augmented": Case(partial(AutoAugmentedFlow, recipe=_narrow, num_extra=2), bound=True),
    "joint": Case(partial(AutoFlow, recipe=_narrow)),
    "joint, spline": Case(partial(AutoFlow, recipe=partial(flows.nsf, num_layers=2))),
    "mixture": Case(partial(AutoMixtureFlow, recipe=_narrow)),
    "plates": Case(partial(AutoPlateFlow, recipe=_narrow, local_recipe=_narrow)),
}
OBJECTIVES: dict[str, Case] = {
    "cubo": Case(CUBO),
    "dreg": Case(DReG),
    "dreg, loop": Case(partial(DReG, vectorize_particles=False)),
    "elbo": Case(ELBO),
    "elbo, loop": Case(partial(ELBO, vectorize_particles=False)),
    "iwae": Case(IWAE),
    "iwae, loop": Case(partial(IWAE, vectorize_particles=False)),
    "iwae, stl": Case(STLIWAE),
    "renyi": Case(partial(Renyi, 0.5)),
    "renyi, max": Case(VRMax),
    "tvo": Case(TVO),
    "tvo, reparameterised": Case(partial(TVO, reparameterised=True)),
    "tvo, upper": Case(partial(TVO, upper=True)),
    "vimco": Case(VIMCO),
    "regularized": Case(
        lambda *args, **kwargs: Regularized(ELBO(*args, **kwargs), KineticEnergy())
    ),
    "stl": Case(STL),
    "stl, antithetic": Case(partial(STL, antithetic=True)),
    "stl, clipped": Case(partial(STL, clip_factor=50.0)),
    "stl, loop": Case(partial(STL, vectorize_particles=False)),
    "beta": Case(partial(BetaELBO, beta=0.5)),
    "beta, free bits": Case(partial(BetaELBO, free_bits=FreeBits(0.1))),
    "beta, schedule": Case(partial(BetaELBO, beta=LinearSchedule(100), path_gradient=True)),
    "eubo": Case(EUBO),
    "forward kl": Case(ForwardKL),
    "forward kl, loop": Case(partial(ForwardKL, vectorize_particles=False)),
    "wake": Case(ReweightedWakeSleep),
    "wake and sleep": Case(partial(ReweightedWakeSleep, insomnia=0.5)),
    "wake, loop": Case(partial(ReweightedWakeSleep, vectorize_particles=False)),
    "tempered": Case(partial(Tempered, beta=GeometricSchedule(100))),
    "tempered, joint": Case(partial(Tempered, beta=GeometricSchedule(100), joint=True)),
    "tempered, path": Case(partial(Tempered, beta=GeometricSchedule(100), path_gradient=True)),
}


def _mean(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return t * y + (3 * t).sin()


def _scale(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 1.3 - t + 0.1 * y.cos()


def _encoder_of_time() -> nn.Module:
    """Learned F(y, t) in two dimensions."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return y + (1 - t) * self.net(with_time(y, t))

    return Encoder()


_state_diffusion = partial(StateDiffusion, lambda x, t: 0.5 + 0.2 * x.cos(), elementwise=True)


def _flow_path(recipe: Callable = flows.realnvp) -> FlowPath:
    return FlowPath(recipe(2, 3, num_layers=2, hidden_dims=(8,)).transform, lambda t: 1 - t / 2)


def _mixture_path() -> MixturePath:
    parts = [GaussianPath(2, lambda y, t, m=m: m + t * y, _scale, 0.7) for m in (-1.0, 2.0)]
    return MixturePath([*parts, _flow_path()], (0.2, 0.5, 0.3))


SCHEDULES: dict[str, Case] = {
    "alpha and sigma": Case(partial(AlphaSigma, lambda t: t.sin(), lambda t: 1.1 - t**2)),
    "cosine": Case(VariancePreservingCosine),
    "learned": Case(LearnedMonotone),
    "learned, ends": Case(partial(LearnedMonotone, 4, -3.0, 5.0, learn_ends=True)),
    "linear": Case(Linear),
    "linear log-snr": Case(partial(LinearLogSNR, -6.0, 6.0)),
    "sub-variance preserving": Case(SubVariancePreserving),
    "variance exploding": Case(VarianceExploding),
    "variance preserving": Case(VariancePreserving),
    "variance trained": Case(partial(VarianceTrained, 4, -3.0, 5.0)),
}
SAMPLERS: dict[str, Case] = {
    "euler": Case(EulerMaruyama),
    "heun": Case(StochasticHeun),
    "milstein": Case(Milstein),
}
SAMPLERS_OF_MODELS: dict[str, Case] = {
    "ancestral": Case(Ancestral),
    "annealed langevin": Case(partial(AnnealedLangevin, 5, 0.2)),
    "ddim": Case(DDIM),
    "ddim, noise": Case(partial(DDIM, 0.5)),
    "dpm-solver, 1": Case(partial(DPMSolver, 1)),
    "dpm-solver, 2": Case(DPMSolver),
    "dpm-solver, 3": Case(partial(DPMSolver, 3)),
    "exponential, 1": Case(partial(ExponentialIntegrator, 1)),
    "exponential, 2": Case(ExponentialIntegrator),
    "exponential, 3": Case(partial(ExponentialIntegrator, 3)),
    "flow, adaptive": Case(lambda: ProbabilityFlow(Adaptive())),
    "flow, dormand-prince": Case(partial(ProbabilityFlow, DormandPrince)),
    "flow, euler": Case(partial(ProbabilityFlow, Euler)),
    "flow, midpoint": Case(partial(ProbabilityFlow, Midpoint)),
    "flow, rk4": Case(ProbabilityFlow),
    "parallel": Case(lambda: Parallel(DDIM(0.3))),
    "predictor-corrector": Case(lambda: PredictorCorrector(DDIM(), 2)),
    "predictor-corrector, sde": Case(
        lambda: PredictorCorrector(ReverseSDE(StochasticHeun()), 1, 2.0)
    ),
    "sde": Case(ReverseSDE),
    "sde, heun": Case(lambda: ReverseSDE(StochasticHeun())),
    "sde, level": Case(partial(ReverseSDE, level=0.5)),
}
# Their drift is that of a step, not of a process with their marginals.
CHAINS: dict[str, Case] = {
    "chain": Case(lambda: ChainPath(2, LinearLogSNR(-3.0, 4.0), 5), 2, 2),
    "chain, encoder": Case(
        lambda: ChainPath(2, LinearLogSNR(-3.0, 4.0), 5, _encoder_of_time()), 2, 2
    ),
}
PATHS: dict[str, Case] = {
    "bridge": Case(lambda: BrownianBridge(2, 0.7), 2, 4),
    "diffusion": Case(lambda: DiffusionPath(2, LinearLogSNR(-3.0, 4.0)), 2, 2),
    "diffusion, encoder": Case(
        lambda: DiffusionPath(2, VariancePreserving(), _encoder_of_time()), 2, 2
    ),
    "diffusion, linear, encoder, other noise": Case(
        lambda: DiffusionPath(
            2, Linear(), _encoder_of_time(), ScheduleDiffusion(Linear(), lambda t: 2 - t)
        ),
        2,
        2,
    ),
    "flow": Case(_flow_path, 2, 2),
    "flow, faded": Case(
        lambda: FadedFlowPath(
            flows.realnvp(2, 3, num_layers=2, hidden_dims=(8,)).transform, LinearLogSNR(-3.0, 4.0)
        ),
        2,
        2,
    ),
    "flow, cheap forward only": Case(lambda: _flow_path(flows.iaf), 2, 2),
    "gaussian": Case(lambda: GaussianPath(2, _mean, _scale, 0.5), 2, 2),
    "gaussian, state": Case(lambda: GaussianPath(2, _mean, _scale, _state_diffusion()), 2, 2),
    "interpolant": Case(
        lambda: StochasticInterpolant(2, lambda t: 0.1 + t * (1 - t), lambda t: 1 + t), 2, 4
    ),
    "interpolant, schedule": Case(
        lambda: StochasticInterpolant(2, lambda t: t.cos(), 0.5, VariancePreserving()), 2, 4
    ),
    "mixture": Case(_mixture_path, 2, 2),
}


# Models of images, all of shape (1, 4, 4). ``input_dim`` is the length of the latent vector.
IMAGE = (1, 4, 4)
LIKELIHOODS: dict[str, Case] = {
    "bernoulli": Case(partial(BernoulliLikelihood, IMAGE)),
    "categorical": Case(partial(CategoricalLikelihood, IMAGE, 5)),
    "continuous bernoulli": Case(partial(ContinuousBernoulliLikelihood, IMAGE)),
    "discretised logistic": Case(partial(DiscretisedLogisticLikelihood, IMAGE, 7)),
    "normal": Case(partial(NormalLikelihood, IMAGE, 0.5, learn_scale=True)),
}
POSTERIORS: dict[str, Case] = {
    "continuous": Case(
        partial(cnf_posterior, 5, 3, hidden_dims=(4,), low_rank=1, solver=DormandPrince(8)),
        3,
        5,
        scale=0.3,
    ),
    "full": Case(partial(full_posterior, 5, 3), 3, 5),
    "iaf": Case(partial(iaf_posterior, 5, 3, hidden_dims=(8,)), 3, 5),
    "planar": Case(partial(planar_posterior, 5, 3, num_layers=3), 3, 5),
    "realnvp": Case(partial(realnvp_posterior, 5, 3, hidden_dims=(8,)), 3, 5),
    "spline": Case(partial(spline_posterior, 5, 3, hidden_dims=(8,)), 3, 5),
    "sylvester, householder": Case(partial(householder_sylvester_posterior, 5, 3), 3, 5),
    "sylvester, orthogonal": Case(
        partial(orthogonal_sylvester_posterior, 5, 3, bottleneck_dim=2), 3, 5
    ),
    "sylvester, triangular": Case(partial(triangular_sylvester_posterior, 5, 3), 3, 5),
}


def _vae(
    likelihood: Likelihood,
    posterior: Callable = DiagonalPosterior,
    *,
    prior: nn.Module | None = None,
    context_dim: int = 0,
    pseudo_inputs: int = 0,
) -> VAE:
    encoder, made = MLPEncoder(IMAGE, (8,)), posterior(8 + context_dim, 3)
    if pseudo_inputs:
        prior = VampPrior(encoder, made, torch.rand(pseudo_inputs, *IMAGE))
    decoder = MLPDecoder(3 + context_dim, (8,), likelihood.output_shape)
    return VAE(encoder, decoder, likelihood, made, prior, context_dim=context_dim)


def _convolutional_vae() -> VAE:
    likelihood = CategoricalLikelihood(IMAGE, 5)
    decoder = ConvDecoder(3, (2, 3), likelihood.output_shape)
    return VAE(ConvEncoder(IMAGE, (2, 3), 8), decoder, likelihood, DiagonalPosterior(8, 3))


def _top_down() -> TopDownVAE:
    likelihood = _black_white()
    parts = ResidualVAE(likelihood, (2,), width=4, latent_channels=2)
    return TopDownVAE(
        parts.encoder, parts.stages, parts.decoder, likelihood, start=torch.randn(4, 4, 4)
    )


def _f_vae() -> FVAE:
    flow = flows.glow_image(IMAGE, 3, num_layers=1, hidden_dims=(4,))
    likelihood = ImageFlowLikelihood(flow, 17)
    return FVAE(
        MLPEncoder(IMAGE, (8,)), MLPDecoder(2, (4,), (3,)), likelihood, DiagonalPosterior(8, 2)
    )


_black_white = partial(BernoulliLikelihood, IMAGE)
PAIRS: dict[str, Case] = {
    "f-vae": Case(_f_vae),
    "hierarchical": Case(lambda: HierarchicalVAE(_black_white(), (3, 2, 2), (6, 5, 4))),
    "hierarchical, batch norm": Case(
        lambda: HierarchicalVAE(_black_white(), (3, 2), (6, 5), batch_norm=True)
    ),
    "ladder": Case(lambda: LadderVAE(_black_white(), (3, 2, 2), (6, 5, 4))),
    "residual": Case(lambda: ResidualVAE(_black_white(), (1, 2), width=4, latent_channels=2)),
    "top down": Case(_top_down),
    "vae": Case(lambda: _vae(_black_white())),
    "vae, context": Case(lambda: _vae(_black_white(), context_dim=2), context_dim=2),
    "vae, context, flow prior": Case(
        lambda: _vae(_black_white(), prior=_narrow(3, 2), context_dim=2), context_dim=2
    ),
    "vae, convolutional": Case(_convolutional_vae),
    "vae, flow prior": Case(lambda: _vae(_black_white(), iaf_posterior, prior=_narrow(3))),
    "vae, logistic": Case(lambda: _vae(DiscretisedLogisticLikelihood(IMAGE, 7))),
    "vae, vamp prior": Case(lambda: _vae(_black_white(), pseudo_inputs=4)),
    "vae, vamp prior, flow": Case(lambda: _vae(_black_white(), full_posterior, pseudo_inputs=4)),
}
