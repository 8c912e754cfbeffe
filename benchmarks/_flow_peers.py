"""The flows of ``flows.py`` in other libraries, each imported where it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = [
    "BATCH",
    "BINS",
    "BOUND",
    "COLUMNS",
    "HIDDEN",
    "LAYERS",
    "PEERS",
    "Cases",
    "alternating",
    "cases",
]

LAYERS, HIDDEN, BATCH, BINS, BOUND = 5, (256, 256), 1024, 8, 5.0
COLUMNS = ("log_prob", "log_prob, backward", "sample", "sample and log_prob, backward")
# nflows and normflows: two hidden layers.
MADE = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}

Cases = dict[str, Callable[[], object]]


def cases(
    dim: int,
    parameters: Iterable[nn.Parameter],
    log_prob: Callable[[Tensor], Tensor],
    sample: Callable[[], Tensor],
    sample_and_log_prob: Callable[[], tuple[Tensor, Tensor]],
) -> Cases:
    """The four timed functions of a flow, from three of its methods."""
    parameters = [p for p in parameters if p.requires_grad]
    data = torch.randn(BATCH, dim)

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def score_backward() -> None:
        clear()
        log_prob(data).mean().backward()

    def sample_backward() -> None:
        clear()
        x, log_q = sample_and_log_prob()
        (log_q + 0.5 * x.square().sum(-1)).mean().backward()

    quiet = torch.no_grad()
    return dict(
        zip(
            COLUMNS,
            (quiet(lambda: log_prob(data)), score_backward, quiet(sample), sample_backward),
            strict=True,
        )
    )


def alternating(dim: int, layer: int) -> Tensor:
    return torch.arange(dim) % 2 == layer % 2


def zuko_cases(kind: str, dim: int) -> Cases:
    import zuko
    from zuko.flows import MAF, NSF, RealNVP
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.lazy import Flow

    common = {"transforms": LAYERS, "hidden_features": HIDDEN}
    if kind == "realnvp":
        flow = RealNVP(dim, **common)
    elif kind == "spline autoregressive":
        flow = NSF(dim, bins=BINS, **common)
    elif kind == "spline coupling":
        spline = {
            "univariate": zuko.transforms.MonotonicRQSTransform,
            "shapes": [(BINS,), (BINS,), (BINS - 1,)],
            "hidden_features": HIDDEN,
        }
        parts = [
            GeneralCouplingTransform(dim, mask=alternating(dim, i), **spline)
            for i in range(LAYERS)
        ]
        flow = Flow(parts, MAF(dim).base)
    else:
        flow = MAF(dim, **common)
        flow = Flow(flow.transform.inv, flow.base) if kind == "iaf" else flow
    return cases(
        dim,
        flow.parameters(),
        lambda x: flow().log_prob(x),
        lambda: flow().rsample((BATCH,)),
        lambda: flow().rsample_and_log_prob((BATCH,)),
    )


def nflows_cases(kind: str, dim: int) -> Cases:
    from nflows import transforms as T
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    made = {**MADE, "features": dim}
    layers = []
    for i in range(LAYERS):
        mask = alternating(dim, i).int()
        if kind == "realnvp":
            layers.append(T.AffineCouplingTransform(mask, _plain_network))
        elif kind == "spline coupling":
            layers.append(
                T.PiecewiseRationalQuadraticCouplingTransform(mask, _plain_network, **spline)
            )
        else:
            layers.append(T.ReversePermutation(dim))
            if kind == "spline autoregressive":
                layer = T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline)
            else:
                layer = T.MaskedAffineAutoregressiveTransform(**made)
            layers.append(layer)
    transform = T.CompositeTransform(layers)
    transform = T.InverseTransform(transform) if kind == "iaf" else transform
    flow = Flow(transform, StandardNormal([dim]))
    return cases(
        dim,
        flow.parameters(),
        flow.log_prob,
        lambda: flow.sample(BATCH),
        lambda: flow.sample_and_log_prob(BATCH),
    )


class _plain_network(nn.Sequential):  # noqa: N801 - a factory in the eyes of nflows
    def __init__(self, num_in: int, num_out: int) -> None:
        first, second = HIDDEN
        super().__init__(
            *(nn.Linear(num_in, first), nn.ReLU()),
            *(nn.Linear(first, second), nn.ReLU()),
            nn.Linear(second, num_out),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


def normflows_cases(kind: str, dim: int) -> Cases:
    import normflows as nf
    from normflows.flows.base import Reverse
    from normflows.flows.neural_spline import autoregressive, coupling

    made = {**MADE, "features": dim}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    layers = []
    for i in range(LAYERS):
        if kind == "realnvp":
            layers.append(nf.flows.AffineCouplingBlock(_plain_network(dim // 2, dim)))
        elif kind == "spline coupling":
            mask = alternating(dim, i).int()
            layers.append(
                Reverse(
                    coupling.PiecewiseRationalQuadraticCoupling(mask, _plain_network, **spline)
                )
            )
            continue
        elif kind == "spline autoregressive":
            layer = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(**made, **spline)
            layers.append(Reverse(layer))
        else:
            layer = nf.flows.MaskedAffineAutoregressive(**made)
            layers.append(layer if kind == "iaf" else Reverse(layer))
        layers.append(nf.flows.Permute(dim, mode="swap"))
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
    return cases(
        dim,
        flow.parameters(),
        flow.log_prob,
        lambda: flow.sample(BATCH)[0],
        lambda: flow.sample(BATCH),
    )


def pyro_cases(kind: str, dim: int) -> Cases:
    import pyro
    import pyro.distributions as dist
    from pyro.distributions import transforms as T
    from pyro.nn import AutoRegressiveNN, DenseNN

    pyro.enable_validation(False)
    half, hidden = dim // 2, list(HIDDEN)
    modules, layers = [], []
    for _ in range(LAYERS):
        if kind == "realnvp":
            layer = T.AffineCoupling(half, DenseNN(half, hidden, [dim - half, dim - half]))
        elif kind == "spline coupling":
            sizes = [(dim - half) * n for n in (BINS, BINS, BINS - 1)]
            network = DenseNN(half, hidden, sizes)
            layer = T.SplineCoupling(
                dim, half, network, BINS, BOUND, order="quadratic", identity=True
            )
        elif kind == "spline autoregressive":
            network = AutoRegressiveNN(dim, hidden, param_dims=[BINS, BINS, BINS - 1])
            layer = T.SplineAutoregressive(dim, network, BINS, BOUND, order="quadratic")
        else:
            layer = T.AffineAutoregressive(AutoRegressiveNN(dim, hidden))
        modules.append(layer)
        layers.append(layer.inv if kind in ("maf", "spline autoregressive") else layer)
        if kind in ("realnvp", "spline coupling"):
            layers.append(T.Permute(torch.arange(dim).flip(0)))
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1), layers
    )

    def sample_and_log_prob() -> tuple[Tensor, Tensor]:
        x = flow.rsample((BATCH,))
        return x, flow.log_prob(x)

    return cases(
        dim,
        (p for module in modules for p in module.parameters()),
        # A new tensor object: the transforms remember the last one.
        lambda x: flow.log_prob(x.clone()),
        lambda: flow.rsample((BATCH,)),
        sample_and_log_prob,
    )


def flowjax_cases(kind: str, dim: int) -> Cases:
    """Jitted, and compiled before they are timed."""
    # Before jax, which would use all processors.
    options = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", options)
    import equinox as eqx
    import jax
    import paramax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow, masked_autoregressive_flow
    from jax import numpy as jnp

    settings = {"flow_layers": LAYERS, "nn_width": HIDDEN[0], "nn_depth": len(HIDDEN)}
    if kind.startswith("spline"):
        # Inner knots: one less than bins.
        settings["transformer"] = RationalQuadraticSpline(knots=BINS - 1, interval=BOUND)
    couples = kind in ("realnvp", "spline coupling")
    make = coupling_flow if couples else masked_autoregressive_flow
    base = Normal(jnp.zeros(dim))
    flow = make(jax.random.key(0), base_dist=base, invert=kind != "iaf", **settings)
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    keys = iter(jax.random.split(jax.random.key(1), 100_000))
    data = jax.random.normal(next(keys), (BATCH, dim))

    def log_prob(params: object, x: object) -> object:
        return eqx.combine(params, static).log_prob(x)

    def sample(params: object, key: object) -> object:
        return eqx.combine(params, static).sample(key, (BATCH,))

    def reverse(params: object, key: object) -> object:
        x, log_q = eqx.combine(params, static).sample_and_log_prob(key, (BATCH,))
        return (log_q + 0.5 * jnp.square(x).sum(-1)).mean()

    score, draw = jax.jit(log_prob), jax.jit(sample)
    score_grad = jax.jit(jax.value_and_grad(lambda p, x: log_prob(p, x).mean()))
    draw_grad = jax.jit(jax.value_and_grad(reverse))
    wait = jax.block_until_ready
    functions = (
        lambda: wait(score(params, data)),
        lambda: wait(score_grad(params, data)),
        lambda: wait(draw(params, next(keys))),
        lambda: wait(draw_grad(params, next(keys))),
    )
    made = dict(zip(COLUMNS, functions, strict=True))
    if kind == "spline autoregressive" and dim > 16:
        # The gradient through as many passes as dimensions takes more than 20 GB.
        del made[COLUMNS[3]]
    for function in made.values():
        function()
    return made


PEERS = {
    "zuko": zuko_cases,
    "nflows": nflows_cases,
    "normflows": normflows_cases,
    "pyro": pyro_cases,
    "flowjax": flowjax_cases,
}
