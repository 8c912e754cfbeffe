"""Recipes of flows made of discrete layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from flowvi.distributions import Flow
from flowvi.flows._sizes import Sizes
from flowvi.transforms import (
    ActNorm,
    Additive,
    Affine,
    ElementwiseMap,
    FlowTransform,
    LULinear,
    OrthogonalSylvester,
    Planar,
    Radial,
    RationalQuadratic,
)

__all__ = [
    "glow",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "sylvester",
]


def nice(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (32, 32),
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> Flow:
    """Additive couplings: volume is kept, so only the last layer scales.

    One pass in both directions.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of couplings, at least 1.
        hidden_dims: widths of each coupling network's hidden layers.
        activation: makes the networks' nonlinearity.

    References:
        Dinh, Krueger and Bengio (2015), NICE: non-linear independent components estimation,
        arXiv:1410.8516, section 3.2.
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    return sizes.finish(sizes.couplings(Additive(), activation))


def realnvp(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 6,
    hidden_dims: Sequence[int] = (32, 32),
    bound: float = 4.0,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> Flow:
    """Affine couplings with random half masks, each pair of layers moving every dimension.

    One pass in both directions: the default flow for guides.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of couplings, at least 1.
        hidden_dims: widths of each coupling network's hidden layers.
        bound: soft bound of each layer's log-scale, positive.
        activation: makes the networks' nonlinearity.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, section 3.

    Example:
        >>> import torch
        >>> flow = realnvp(3, context_dim=2)
        >>> flow(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    return sizes.finish(sizes.couplings(Affine(bound), activation))


def glow(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (32, 32),
    bound: float = 4.0,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> Flow:
    """Steps of activation normalisation, LU-factored linear map and affine coupling, for vectors.

    The learned linear maps mix the dimensions between couplings. One pass in both directions.
    For density estimation give the normalisations their start with :meth:`ActNorm.initialize`.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none. The normalisation ignores it.
        num_layers: number of steps, at least 1.
        hidden_dims: widths of each coupling network's hidden layers.
        bound: soft bound of each coupling's log-scale, positive.
        activation: makes the networks' nonlinearity.

    References:
        Kingma and Dhariwal (2018), Glow: generative flow with invertible 1x1 convolutions,
        arXiv:1807.03039, section 3.
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    layers: list[FlowTransform] = []
    for coupling in sizes.couplings(Affine(bound), activation):
        layers += [ActNorm(input_dim), LULinear(input_dim, context_dim), coupling]
    return sizes.finish(layers)


def nsf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (32, 32),
    num_bins: int = 8,
    bound: float = 5.0,
    activation: Callable[[], nn.Module] = nn.Tanh,
    compiled: bool = False,
) -> Flow:
    """Rational-quadratic spline couplings with random half masks.

    One pass in both directions. Splines act within ``bound`` of 0 and are the identity outside.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of couplings, at least 1.
        hidden_dims: widths of each coupling network's hidden layers.
        num_bins: number of bins of each spline, at least 2.
        bound: half-width of the interval that the splines act on, positive.
        activation: makes the networks' nonlinearity.
        compiled: run the splines through ``torch.compile``, see
            :class:`flowvi.transforms.RationalQuadratic`.

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), Neural spline flows, arXiv:1906.04032,
        section 3, RQ-NSF (C).
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    spline = RationalQuadratic(num_bins, bound, compiled=compiled)
    return sizes.finish(sizes.couplings(spline, activation))


def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    elementwise: ElementwiseMap | None = None,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> Flow:
    """Inverse autoregressive flow: sampling is one pass, scoring other values is slow.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of autoregressive maps, at least 1; every other one runs backwards
            through the dimensions.
        hidden_dims: widths of each masked network's hidden layers.
        elementwise: the map of one number; affine if left out.
        activation: makes the networks' nonlinearity.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow,
        arXiv:1606.04934, section 3.
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    return sizes.finish(sizes.autoregressions(elementwise, activation))


def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 3,
    hidden_dims: Sequence[int] = (64, 64),
    elementwise: ElementwiseMap | None = None,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> Flow:
    """Masked autoregressive flow: scoring is one pass, sampling is slow.

    Its layers are the inverses of those of :func:`iaf`.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of autoregressive maps, at least 1; every other one runs backwards
            through the dimensions.
        hidden_dims: widths of each masked network's hidden layers.
        elementwise: the map of one number; affine if left out.
        activation: makes the networks' nonlinearity.

    References:
        Papamakarios, Pavlakou and Murray (2017), Masked autoregressive flow for density
        estimation, arXiv:1705.07057, section 3.
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    return sizes.finish([t.inv for t in sizes.autoregressions(elementwise, activation)])


def planar(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (32,),
) -> Flow:
    """Planar maps; sampling is one pass, other values are scored by a numerical inverse.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of planar maps, at least 1.
        hidden_dims: widths of the context networks' hidden layers; unused without a context.

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows,
        arXiv:1505.05770, section 4.1.
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    return sizes.finish(
        [Planar(input_dim, context_dim, hidden_dims=hidden_dims) for _ in range(num_layers)]
    )


def radial(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (32,),
) -> Flow:
    """Radial maps, which stretch or squeeze around learned centres.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of radial maps, at least 1.
        hidden_dims: widths of the context networks' hidden layers; unused without a context.

    References:
        Rezende and Mohamed (2015), Variational inference with normalizing flows,
        arXiv:1505.05770, section 4.1.
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    return sizes.finish(
        [Radial(input_dim, context_dim, hidden_dims=hidden_dims) for _ in range(num_layers)]
    )


def sylvester(
    input_dim: int,
    context_dim: int = 0,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (32,),
    bottleneck_dim: int | None = None,
) -> Flow:
    """Orthogonal Sylvester maps; other values than draws are scored by a numerical inverse.

    Args:
        input_dim: number of dimensions, at least 1.
        context_dim: length of the context vector; 0 for none.
        num_layers: number of Sylvester maps, at least 1.
        hidden_dims: widths of the context networks' hidden layers; unused without a context.
        bottleneck_dim: directions bent by each map, at most ``input_dim``; the smaller of 8 and
            ``input_dim`` if left out.

    References:
        van den Berg, Hasenclever, Tomczak and Welling (2018), Sylvester normalizing flows for
        variational inference, arXiv:1803.05649, section 3.
    """
    sizes = Sizes(input_dim, context_dim, num_layers, hidden_dims)
    width = min(8, input_dim) if bottleneck_dim is None else bottleneck_dim
    return sizes.finish(
        [
            OrthogonalSylvester(input_dim, width, context_dim, hidden_dims=hidden_dims)
            for _ in range(num_layers)
        ]
    )
