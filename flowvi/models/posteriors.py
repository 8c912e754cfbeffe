"""Posterior families of a latent vector, amortised: laws made from an encoder's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pyro.distributions import Distribution
from torch import Tensor, nn

from flowvi.distributions import Flow
from flowvi.models.latent_posteriors import normal_of
from flowvi.nn import MLPField, VectorField
from flowvi.nn.mlp import MLP
from flowvi.transforms import (
    RK4,
    Affine,
    Autoregressive,
    Continuous,
    Coupling,
    ElementwiseMap,
    ElementwiseTransform,
    FlowTransform,
    HouseholderSylvester,
    OrthogonalSylvester,
    Planar,
    RationalQuadratic,
    Solver,
    TriangularAffine,
    TriangularSylvester,
    compose,
)

__all__ = [
    "DiagonalPosterior",
    "FlowPosterior",
    "cnf_posterior",
    "full_posterior",
    "householder_sylvester_posterior",
    "iaf_posterior",
    "orthogonal_sylvester_posterior",
    "planar_posterior",
    "realnvp_posterior",
    "spline_posterior",
    "triangular_sylvester_posterior",
]


class DiagonalPosterior(nn.Module):
    r"""Independent normal laws, with means and scales linear in the features before softplus.

    Args:
        feature_dim: number of features, that of a context included.
        latent_dim: length of the latent vector.

    Shape:
        features: ``(*batch, feature_dim)``; the law: batch ``(*batch)``, event ``(latent_dim,)``.

    Example:
        >>> import torch
        >>> DiagonalPosterior(4, 2)(torch.zeros(5, 4)).sample().shape
        torch.Size([5, 2])
    """

    def __init__(self, feature_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.latent_dim = latent_dim
        self.head = MLP(feature_dim, (), 2 * latent_dim)

    def forward(self, features: Tensor) -> Distribution:
        return normal_of(self.head(features))


class FlowPosterior(nn.Module):
    r"""Diagonal normal law followed by maps whose parameters depend on the features.

    .. math:: z_0 = \mu(h) + \sigma(h) \circ \epsilon, \qquad z = T_L \circ \dots \circ T_1(z_0)

    Maps with ``context_dim = feature_dim`` are amortised, the others are shared by all items.
    Starts at, or very near, the standard normal. Any map of flowvi will do; the functions of this
    module make the families of the literature.

    Args:
        feature_dim: number of features, that of a context included.
        layers: maps of the latent vector, the first nearest the diagonal law.

    Shape:
        features: ``(*batch, feature_dim)``; the law: batch ``(*batch)``, event ``(latent_dim,)``.

    Raises:
        ValueError: if there are no layers, or sizes disagree.

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows,
        arXiv:1505.05770, section 4.2.

    Example:
        >>> import torch
        >>> FlowPosterior(4, [Planar(2, 4)])(torch.zeros(5, 4)).sample().shape
        torch.Size([5, 2])
    """

    def __init__(self, feature_dim: int, layers: Sequence[FlowTransform]) -> None:
        super().__init__()
        if not layers:
            raise ValueError("`layers` must hold at least one transform; got none.")
        self.feature_dim = feature_dim
        self.latent_dim = layers[0].input_dim
        head = ElementwiseTransform(
            self.latent_dim, Affine(bound=7.0), feature_dim, hidden_dims=()
        )
        self.flow = Flow(compose(head, *layers))

    def forward(self, features: Tensor) -> Distribution:
        return self.flow(features)


def full_posterior(feature_dim: int, latent_dim: int) -> FlowPosterior:
    """Normal law with a full covariance; its triangular factor is linear in the features.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector D; the factor takes D(D + 1)/2 numbers per item.
    """
    return FlowPosterior(feature_dim, [TriangularAffine(latent_dim, feature_dim)])


def planar_posterior(feature_dim: int, latent_dim: int, *, num_layers: int = 16) -> FlowPosterior:
    """Planar maps, all of whose parameters are linear in the features.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of maps.

    References:
        Rezende and Mohamed (2015), arXiv:1505.05770, equation 10.
    """
    return _stack(partial(Planar, latent_dim, feature_dim), feature_dim, num_layers)


def orthogonal_sylvester_posterior(
    feature_dim: int, latent_dim: int, *, num_layers: int = 4, bottleneck_dim: int | None = None
) -> FlowPosterior:
    """Sylvester maps with orthonormal directions, all of their parameters linear in the features.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of maps.
        bottleneck_dim: directions bent by each map; the smaller of 16 and ``latent_dim`` if left
            out.

    References:
        van den Berg et al. (2018), Sylvester normalizing flows, arXiv:1803.05649, section 3.
    """
    width = min(16, latent_dim) if bottleneck_dim is None else bottleneck_dim
    make = partial(OrthogonalSylvester, latent_dim, width, feature_dim)
    return _stack(make, feature_dim, num_layers)


def householder_sylvester_posterior(
    feature_dim: int, latent_dim: int, *, num_layers: int = 4, num_reflections: int = 8
) -> FlowPosterior:
    """Sylvester maps rotated by reflections, all of their parameters linear in the features.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of maps.
        num_reflections: reflections of each map.

    References:
        van den Berg et al. (2018), Sylvester normalizing flows, arXiv:1803.05649, section 3.
    """
    make = partial(HouseholderSylvester, latent_dim, num_reflections, feature_dim)
    return _stack(make, feature_dim, num_layers)


def triangular_sylvester_posterior(
    feature_dim: int, latent_dim: int, *, num_layers: int = 4
) -> FlowPosterior:
    """Sylvester maps in the given and the reversed order by turns, linear in the features.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of maps.

    References:
        van den Berg et al. (2018), Sylvester normalizing flows, arXiv:1803.05649, section 3.
    """
    layers = [
        TriangularSylvester(latent_dim, feature_dim, reverse=bool(k % 2))
        for k in range(num_layers)
    ]
    return FlowPosterior(feature_dim, layers)


def iaf_posterior(
    feature_dim: int,
    latent_dim: int,
    *,
    num_layers: int = 2,
    hidden_dims: Sequence[int] = (320,),
    elementwise: ElementwiseMap | None = None,
) -> FlowPosterior:
    """Inverse autoregressive maps with the features as context, by turns in reversed order.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of maps.
        hidden_dims: widths of each masked network's hidden layers.
        elementwise: the map of one number; affine if left out.

    References:
        Kingma et al. (2016), arXiv:1606.04934, section 3.
    """
    natural = range(latent_dim)
    layers = [
        Autoregressive(
            latent_dim,
            elementwise,
            order=natural if layer % 2 else natural[::-1],
            context_dim=feature_dim,
            hidden_dims=hidden_dims,
        )
        for layer in range(num_layers)
    ]
    return FlowPosterior(feature_dim, layers)


def realnvp_posterior(
    feature_dim: int,
    latent_dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (128,),
    elementwise: ElementwiseMap | None = None,
) -> FlowPosterior:
    """Couplings of alternating dimensions with the features as context.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of couplings.
        hidden_dims: widths of each coupling network's hidden layers.
        elementwise: the map of one number; affine if left out.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), arXiv:1605.08803, section 3.
    """
    elementwise = Affine() if elementwise is None else elementwise
    layers = [
        Coupling(
            latent_dim,
            elementwise,
            mask=[(k + layer) % 2 == 0 for k in range(latent_dim)],
            context_dim=feature_dim,
            hidden_dims=hidden_dims,
        )
        for layer in range(num_layers)
    ]
    return FlowPosterior(feature_dim, layers)


def spline_posterior(
    feature_dim: int,
    latent_dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (128,),
    num_bins: int = 8,
) -> FlowPosterior:
    """Rational-quadratic spline couplings with the features as context.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of couplings.
        hidden_dims: widths of each coupling network's hidden layers.
        num_bins: number of bins of each spline.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), arXiv:1906.04032, section 3.
    """
    return realnvp_posterior(
        feature_dim,
        latent_dim,
        num_layers=num_layers,
        hidden_dims=hidden_dims,
        elementwise=RationalQuadratic(num_bins),
    )


def cnf_posterior(
    feature_dim: int,
    latent_dim: int,
    *,
    num_layers: int = 1,
    hidden_dims: Sequence[int] = (128, 128),
    low_rank: int = 8,
    field: Callable[..., VectorField] = MLPField,
    solver: Solver | None = None,
    eval_solver: Solver | None = None,
) -> FlowPosterior:
    """Continuous flow whose weights get low-rank updates that are linear in the features.

    Args:
        feature_dim: number of features.
        latent_dim: length of the latent vector.
        num_layers: number of fields followed one after another.
        hidden_dims: widths of each field's hidden layers.
        low_rank: rank of the updates; 0 for a shift of the first layer alone.
        field: makes a field from ``input_dim``, ``hidden_dims``, ``context_dim``.
        solver: how to solve; four Runge-Kutta steps of order 4 if left out.
        eval_solver: solver in evaluation mode; ``solver`` if left out.

    References:
        Grathwohl et al. (2019), FFJORD, arXiv:1810.01367, section 4.2.
    """
    layers = [
        Continuous(
            field(latent_dim, hidden_dims, feature_dim, low_rank=low_rank, hyper_dims=()),
            solver=RK4(4) if solver is None else solver,
            eval_solver=eval_solver,
        )
        for _ in range(num_layers)
    ]
    return FlowPosterior(feature_dim, layers)


def _stack(make: Callable[[], FlowTransform], feature_dim: int, num_layers: int) -> FlowPosterior:
    return FlowPosterior(feature_dim, [make() for _ in range(num_layers)])
