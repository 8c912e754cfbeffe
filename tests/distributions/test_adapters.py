from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import AffineTransform, ExpTransform

from flowvi.distributions import Flow, adapt
from flowvi.transforms import Compose, FlowTransform, NumericalInverse, TriangularAffine

EXACT = {
    "affine_coupling": lambda: T.affine_coupling(3, [8]),
    "inverted coupling": lambda: T.affine_coupling(3, [8]).inv,
    "affine_autoregressive": lambda: T.affine_autoregressive(3, [8]),
    "inverted autoregressive": lambda: T.affine_autoregressive(3, [8]).inv,
    "spline": lambda: T.spline(3),
    "spline_coupling": lambda: T.spline_coupling(3, hidden_dims=[8]),
    "spline_autoregressive": lambda: T.spline_autoregressive(3, [8]),
    "householder": lambda: T.householder(3, 2),
    "matrix_exponential": lambda: T.matrix_exponential(3),
    "permute": lambda: T.permute(3, torch.tensor([2, 0, 1])),
    "elementwise": lambda: AffineTransform(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])),
    "list": lambda: [T.affine_coupling(3, [8]), T.permute(3), T.affine_coupling(3, [8]).inv],
    "module": lambda: T.ComposeTransformModule(
        [T.affine_coupling(3, [8]).inv, T.affine_autoregressive(3, [8])]
    ),
    "inverted composition": lambda: (
        T.ComposeTransformModule([T.affine_coupling(3, [8]), T.affine_autoregressive(3, [8])]).inv
    ),
}
FORWARD_ONLY = {
    "planar": lambda: T.planar(3),
    "radial": lambda: T.radial(3),
    "polynomial": lambda: T.polynomial(3, [8]),
    "block_autoregressive": lambda: T.block_autoregressive(3),
    "neural_autoregressive": lambda: T.neural_autoregressive(3, [8]),
}
CONDITIONAL = {
    "coupling": lambda: T.conditional_affine_coupling(3, 2, [8]),
    "inverted coupling": lambda: T.conditional_affine_coupling(3, 2, [8]).inv,
    "spline": lambda: T.conditional_spline(3, 2, [8]),
    "list": lambda: [T.conditional_affine_coupling(3, 2, [8]), T.affine_coupling(3, [8])],
    "inverted composition": lambda: (
        dist.conditional.ConditionalComposeTransformModule(
            [T.conditional_spline(3, 2, [8]), T.permute(3), T.affine_coupling(3, [8])]
        ).inv
    ),
    "composition": lambda: dist.conditional.ConditionalComposeTransformModule(
        [T.conditional_spline(3, 2, [8]), T.permute(3), T.affine_coupling(3, [8])]
    ),
}


def adapted(make, context_dim: int = 0) -> tuple[object, FlowTransform]:
    foreign = make()
    transform = adapt(foreign, 3, context_dim)
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return foreign, transform


def check_forward(transform: FlowTransform, context=None) -> None:
    x = torch.randn(5, 3)
    y, ladj = transform.call_and_ladj(x, context)
    assert ladj.shape == (5,)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda v, i=i: transform(v, context_row(context, i)), x[i]
            )
            for i in range(5)
        ]
    )
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-6)


def context_row(context, i):
    return None if context is None else context[i]


def check_round_trip(transform: FlowTransform, context=None) -> None:
    x = torch.randn(5, 3)
    y, ladj = transform.call_and_ladj(x, context)
    back, inverse_ladj = transform.inverse_and_ladj(y, context)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*EXACT, *FORWARD_ONLY])
def test_forward_of_pyro_transforms(name):
    _, transform = adapted({**EXACT, **FORWARD_ONLY}[name])
    check_forward(transform)


@pytest.mark.parametrize("name", EXACT)
def test_values_are_those_of_pyro(name):
    foreign, transform = adapted(EXACT[name])
    x = torch.randn(5, 3)
    y = x
    for part in foreign if isinstance(foreign, list) else [foreign]:
        y = part(y)
    torch.testing.assert_close(transform(x), y)


@pytest.mark.parametrize("name", EXACT)
def test_inverse_of_pyro_transforms(name):
    _, transform = adapted(EXACT[name])
    check_round_trip(transform)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_pyro_transforms(name):
    foreign, transform = adapted(CONDITIONAL[name], context_dim=2)
    context = torch.randn(5, 2)
    check_forward(transform, context)
    check_round_trip(transform, context)
    x = torch.randn(5, 3)
    y = x
    for part in foreign if isinstance(foreign, list) else [foreign]:
        conditional = hasattr(part, "condition")
        y = (part.condition(context) if conditional else part)(y)
    torch.testing.assert_close(transform(x, context), y)
    q = Flow(transform)(context)
    assert q.batch_shape == (5,)
    assert q.expand((4, 5)).rsample().shape == (4, 5, 3)


@pytest.mark.parametrize("name", ["inverted coupling", "list", "module", "inverted composition"])
def test_inverted_transforms_keep_their_parameters(name):
    """In Pyro they do not: an inverted transform is no module."""
    foreign, transform = adapted(EXACT[name])
    count = 2 if name != "inverted coupling" else 1
    networks = [m for m in transform.modules() if hasattr(m, "foreign")]
    assert sum(isinstance(m.foreign, nn.Module) for m in networks) == count
    flow = Flow(transform)
    flow().rsample().sum().backward()
    assert len(list(flow.parameters())) >= 4 * count
    stock = foreign if isinstance(foreign, list) else [foreign]
    stock = sum(len(list(t.parameters())) for t in stock if isinstance(t, nn.Module))
    assert stock < len(list(flow.parameters()))


def test_agrees_with_pyro_on_the_density():
    foreign, transform = adapted(EXACT["list"])
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    stock = dist.TransformedDistribution(base, foreign)
    z = stock.sample((6,))
    for t in foreign:
        t.clear_cache() if hasattr(t, "clear_cache") else None
    torch.testing.assert_close(Flow(transform)().log_prob(z), stock.log_prob(z.clone()))


def test_nothing_stale_and_copies_work():
    _, transform = adapted(EXACT["affine_coupling"])
    x = torch.randn(4, 3)
    before = transform(x)
    transform(x).sum().backward()
    with torch.no_grad():
        next(transform.parameters()).add_(1.0)
    assert not torch.equal(transform(x), before)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        torch.testing.assert_close(other(x), transform(x))


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_forward_only_transforms_say_so(name):
    _, transform = adapted(FORWARD_ONLY[name])
    assert not transform.has_inverse
    with pytest.raises(NotImplementedError, match="has no inverse.*Wrap it in NumericalInverse"):
        transform.inverse_and_ladj(torch.zeros(3))


def test_numerical_inverse_of_a_pyro_transform():
    _, transform = adapted(FORWARD_ONLY["planar"])
    check_round_trip(NumericalInverse(transform))


def test_trains_as_a_guide_with_stock_svi():
    flow = Flow(adapt([T.affine_coupling(2, [8]).inv, TriangularAffine(2)], 2))

    def model():
        pyro.sample("z", dist.Normal(torch.tensor([3.0, -1.0]), 0.5).to_event(1))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    optim = pyro.optim.Adam({"lr": 0.05})
    svi = SVI(model, guide, optim, Trace_ELBO(16, vectorize_particles=True))
    losses = [svi.step() for _ in range(150)]
    assert sum(losses[-20:]) / 20 < 0.2 < losses[0]


def test_own_objects_pass_through():
    flow = Flow(TriangularAffine(2))
    assert adapt(flow) is flow
    assert adapt(flow.transform) is flow.transform
    assert isinstance(adapt([flow.transform, T.planar(2)], 2), Compose)


def test_bad_arguments_are_named():
    with pytest.raises(NotImplementedError, match="Sylvester has a wrong log-det.*OrthogonalSyl"):
        adapt(T.sylvester(3), 3)
    with pytest.raises(NotImplementedError, match="Sylvester has a wrong log-determinant"):
        adapt(T.ComposeTransformModule([T.planar(3), T.sylvester(3)]), 3)
    with pytest.raises(NotImplementedError, match="BatchNorm is no bijection.*ActNorm"):
        adapt(T.batchnorm(3), 3)
    with pytest.raises(NotImplementedError, match="ExpTransform does not map real vectors to"):
        adapt(ExpTransform(), 3)
    with pytest.raises(NotImplementedError, match="does not map real vectors to real vectors"):
        adapt(T.generalized_channel_permute(), 3)
    with pytest.raises(NotImplementedError, match="has no inverse"):
        adapt(T.planar(3).inv, 3)
    with pytest.raises(ValueError, match="`input_dim` must be given for a transform; got None"):
        adapt(T.planar(3))
    with pytest.raises(ValueError, match="`foreign` must hold at least one transform; got none"):
        adapt([], 3)
    with pytest.raises(
        ValueError, match="`context_dim` must be at least 1 for Conditional.*; got 0"
    ):
        adapt(T.conditional_planar(3, 2), 3)
    with pytest.raises(
        ValueError, match="`context_dim` must be 0 for transforms without.*; got 2"
    ):
        adapt(T.planar(3), 3, 2)
    with pytest.raises(TypeError, match="`foreign` must be a flow or transform .*; got Linear"):
        adapt(nn.Linear(2, 2), 2)


# zuko, an optional extra. It is imported in processes of their own, since importing it switches
# validation off for good.

ZUKO = """
import warnings
warnings.simplefilter("error")
import torch, pyro.distributions as dist
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
from flowvi.distributions import Flow, adapt, import_zuko

def validates():
    try:
        dist.Normal(0.0, -1.0)
        return False
    except ValueError:
        return True
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", ZUKO + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


needs_zuko = pytest.mark.skipif(
    importlib.util.find_spec("zuko") is None, reason="zuko is not installed"
)


@needs_zuko
def test_zuko_flows_and_validation_is_kept():
    out = run("""
assert validates()
zuko = import_zuko()
assert validates()
for make in (zuko.flows.NSF, zuko.flows.MAF, zuko.flows.RealNVP, zuko.flows.NAF):
    for context_dim in (0, 2):
        foreign = make(3, context_dim, hidden_features=(8, 8))
        flow = adapt(foreign, context_dim=context_dim)
        assert isinstance(flow, Flow) and flow.input_dim == 3
        assert {id(p) for p in flow.parameters()} == {id(p) for p in foreign.parameters()}
        context = torch.randn(4, context_dim) if context_dim else None
        z, log_q = flow(context).expand((5, 4)).rsample_and_log_prob()
        stock = foreign(context).log_prob(z)
        tolerance = 1e-4 if make is zuko.flows.NAF else 1e-8
        torch.testing.assert_close(log_q, stock, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(flow(context).log_prob(z.clone()), stock, rtol=1e-8, atol=1e-8)
        log_q.sum().backward()
        assert foreign(context).sample((2,)).shape[0] == 2
assert validates()
lazy = foreign.transform
transform = adapt(lazy, 3, 2)
torch.testing.assert_close(transform(z, context), lazy(context)(z))
print("done")
""")
    assert out == "done"


@needs_zuko
def test_nothing_changes_where_the_user_has_imported_zuko():
    out = run("""
import zuko
assert not validates()
before = dict(vars(torch.distributions.Distribution))
assert import_zuko() is zuko
flow = adapt(zuko.flows.NSF(2))
flow().rsample()
assert dict(vars(torch.distributions.Distribution)) == before
try:
    adapt(zuko.flows.NSF(2), input_dim=3)
except ValueError as error:
    print(error)
""")
    assert out == "`input_dim` must be 2 for this flow; got 3."


@pytest.mark.skipif("zuko" in sys.modules, reason="zuko is imported already")
def test_adapt_does_not_import_zuko():
    adapt(T.planar(2), 2)
    assert "zuko" not in sys.modules
