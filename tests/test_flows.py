"""Recipes: what every flow does as a distribution, a prior, a likelihood and a guide."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from registry import FLOWS
from torch import Tensor, nn

from flowvi import flows
from flowvi.distributions import Flow
from flowvi.transforms import Coupling, FlowTransform

NAMES = sorted(FLOWS)
PLAIN = [n for n in NAMES if not FLOWS[n].context_dim]
CONDITIONAL = [n for n in NAMES if FLOWS[n].context_dim]
RECIPES = sorted({name.split(",")[0] for name in FLOWS})
every = pytest.mark.parametrize("name", NAMES)
recipes = pytest.mark.parametrize("recipe", RECIPES)


def make(name: str, std: float = 0.0) -> Flow:
    """A flow of the registry, as it starts or with its parameters moved at random."""
    flow = FLOWS[name].make()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(std * torch.randn_like(p))
    return flow


def context_of(name: str, *batch: int) -> Tensor | None:
    size = FLOWS[name].context_dim
    return torch.randn(*batch, size) if size else None


class Counted(FlowTransform):
    """Counts its passes."""

    def __init__(self, inner: FlowTransform) -> None:
        super().__init__(inner.input_dim, inner.context_dim)
        self.inner = inner
        self.passes = 0

    @property
    def has_score_recursion(self) -> bool:
        return self.inner.has_score_recursion

    def _call_and_ladj(self, x, context):
        self.passes += 1
        return self.inner._call_and_ladj(x, context)

    def _inverse_and_ladj(self, y, context):
        self.passes += 1
        return self.inner._inverse_and_ladj(y, context)

    def _call_ladj_and_score(self, x, score, context):
        self.passes += 1
        return self.inner._call_ladj_and_score(x, score, context)


# As a distribution.


@every
def test_starts_at_the_standard_normal(name):
    q = make(name)(context_of(name, 3))
    z, log_q = q.rsample_and_log_prob((200,))
    gap = log_q - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    exact = name.split(",")[0] not in ("planar", "radial", "sylvester")
    # Planar, radial and Sylvester maps start at small random values, to break their symmetry.
    assert gap.abs().max() < (1e-9 if exact else 0.6)


@every
def test_shapes_and_expand(name):
    flow, context = make(name), context_of(name, 3)
    q, dim = flow(context), FLOWS[name].input_dim
    batch = (3,) if FLOWS[name].context_dim else ()
    assert q.batch_shape == batch
    assert q.event_shape == (dim,)
    expanded = q.expand((5, 3))
    z, log_q = expanded.rsample_and_log_prob((2,))
    assert z.shape == (2, 5, 3, dim)
    assert log_q.shape == (2, 5, 3)
    assert flow.input_dim == dim


@every
def test_log_prob_of_a_copy_equals_that_of_the_draw(name):
    q = make(name, std=0.2)(context_of(name, 3))
    z, log_q = q.rsample_and_log_prob((20,))
    assert q.log_prob(z) is log_q
    torch.testing.assert_close(q.log_prob(z.clone()), log_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.log_prob_stopped(z), log_q, rtol=1e-6, atol=1e-6)


@every
def test_agrees_with_pyro_transformed_distribution(name):
    flow, dim = make(name, std=0.2), FLOWS[name].input_dim
    context = context_of(name)
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    stock = dist.TransformedDistribution(base, [flow.transform.condition(context)])
    z = stock.sample((10,))
    torch.testing.assert_close(flow(context).log_prob(z), stock.log_prob(z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in PLAIN if FLOWS[n].input_dim <= 2])
def test_density_integrates_to_one(name):
    dim = FLOWS[name].input_dim
    axis = torch.linspace(-9, 9, 3001 if dim == 1 else 180)
    grid = axis[:, None] if dim == 1 else torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = make(name, std=0.08)().log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** dim
    assert abs(total - 1) < 2e-3


@recipes
def test_one_dimension_is_not_affine(recipe):
    transform = make(f"{recipe}, 1-D", std=0.5).transform
    y = transform(torch.linspace(-2, 2, 9).unsqueeze(-1)).squeeze(-1)
    assert (y[2:] - 2 * y[1:-1] + y[:-2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONDITIONAL)
def test_batched_context_equals_a_loop_over_rows(name):
    flow, context = make(name, std=0.2), context_of(name, 4)
    z, log_q = flow(context).rsample_and_log_prob((6,))
    rows = torch.stack([flow(c).log_prob(z[:, i]) for i, c in enumerate(context)], -1)
    torch.testing.assert_close(log_q, rows, rtol=1e-6, atol=1e-6)
    # The context matters for location and scale as well as for the body.
    assert flow.transform.parts[-1].context_dim == 2


@every
@pytest.mark.parametrize("path", [False, True], ids=["plain", "path"])
def test_one_pass_for_draw_and_score(name, path):
    counted = Counted(make(name).transform)
    flow = Flow(counted)
    q = flow(context_of(name, 3)).expand((5, 3))
    q = q.path_derivative() if path else q
    z = q()
    q.log_prob(z)
    # Without the score recursion the path gradient needs the inverse pass.
    assert counted.passes == (2 if path and not counted.has_score_recursion else 1)


@every
def test_every_parameter_gets_a_gradient(name):
    flow = make(name, std=0.2)
    q = flow(context_of(name, 3))
    constant = "basis" if name == "sylvester, 1-D" else "nothing"
    for loss in (q.rsample((8,)).square().sum(), q.log_prob(torch.randn(8, *q.shape())).sum()):
        flow.zero_grad()
        loss.backward()
        for key, p in flow.named_parameters():
            assert p.grad is not None, key
            assert p.grad.isfinite().all()
            if constant not in key and "1-D, context" not in name:
                assert p.grad.abs().sum() > 0, key


@every
def test_log_prob_stopped_reaches_only_the_value(name):
    flow = make(name, std=0.2)
    q = flow(context_of(name, 3))
    value = q.sample((4,)).requires_grad_()
    grads = torch.autograd.grad(
        q.log_prob_stopped(value).sum(), [value, *flow.parameters()], allow_unused=True
    )
    assert grads[0].abs().sum() > 0
    assert all(g is None for g in grads[1:])


@every
def test_copies_and_state_dict(name):
    flow, context = make(name, std=0.2), context_of(name, 3)
    q = flow(context)
    z = q.rsample((4,))
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    loaded = make(name)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), loaded):
        torch.testing.assert_close(other(context).log_prob(z), q.log_prob(z), rtol=1e-6, atol=1e-6)


@every
def test_loss_and_backward_on_the_meta_device(name):
    flow, context = make(name).to("meta"), context_of(name, 3)
    q = flow(None if context is None else context.to("meta")).expand((4, 3))
    for law in (q, q.path_derivative(antithetic=True)):
        z, log_q = law.rsample_and_log_prob()
        loss = z.square().sum() + log_q.sum()
        # A numerical inverse cannot see there that it has converged, and takes all its steps.
        if flow.transform.exact_inverse:
            loss = loss + q.log_prob(z.clone()).sum()
        loss.backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_masks_ignore_the_global_generator_and_cover_every_dimension():
    first = flows.realnvp(6)
    before = torch.get_rng_state()
    pyro.set_rng_seed(99)
    second = flows.realnvp(6)
    masks = [t.partition.moved for t in first.transform.parts if isinstance(t, Coupling)]
    again = [t.partition.moved for t in second.transform.parts if isinstance(t, Coupling)]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    for one, other in zip(masks[::2], masks[1::2], strict=True):
        assert sorted([*one.tolist(), *other.tolist()]) == list(range(6))
    assert len({tuple(m.tolist()) for m in masks}) > 2
    torch.set_rng_state(before)


@pytest.mark.parametrize("recipe", ["realnvp", "iaf", "planar"])
def test_bad_arguments_are_named(recipe):
    build = getattr(flows, recipe)
    with pytest.raises(ValueError, match="`input_dim` must be an integer of at least 1; got 0"):
        build(0)
    with pytest.raises(ValueError, match="`input_dim` must be an integer of at least 1; got 2.0"):
        build(2.0)
    with pytest.raises(ValueError, match="`context_dim` must be an integer of at least 0; got -1"):
        build(2, -1)
    with pytest.raises(ValueError, match="`num_layers` must be an integer of at least 1; got 0"):
        build(2, num_layers=0)
    with pytest.raises(ValueError, match=r"`hidden_dims` must be .* integers; got \(8, 0\)"):
        build(2, hidden_dims=(8, 0))
    with pytest.raises(ValueError, match="`hidden_dims` must be a sequence .*; got 8"):
        build(2, hidden_dims=8)


def test_bad_recipe_options_are_named():
    with pytest.raises(ValueError, match="`num_bins`.*got 1"):
        flows.nsf(2, num_bins=1)
    with pytest.raises(ValueError, match="`bound` must be positive; got 0"):
        flows.realnvp(2, bound=0.0)
    with pytest.raises(ValueError, match="`bottleneck_dim` must be .* 1 to 2"):
        flows.sylvester(2, bottleneck_dim=3)


# As a prior, a likelihood and a guide, under stock inference.


@recipes
def test_as_a_prior(recipe):
    flow = make(f"{recipe}, 2-D")

    def model(data):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(data)):
            z = pyro.sample("z", flow())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=data)

    data = torch.randn(6, 2) + 1
    guide = AutoNormal(model)
    before = copy.deepcopy(flow.state_dict())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(3, vectorize_particles=True))
    losses = [svi.step(data) for _ in range(3)]
    assert torch.tensor(losses).isfinite().all()
    assert any(not torch.equal(before[k], v) for k, v in flow.state_dict().items())
    draws = Predictive(model, num_samples=4, parallel=True)(torch.empty(6, 2))
    assert draws["z"].shape == (4, 6, 2)


def two_crescents(num: int) -> Tensor:
    """Two interleaved arcs with noise: curved, and not one normal."""
    angle = torch.pi * torch.rand(num)
    side = (torch.arange(num) % 2).double()
    x = torch.stack([angle.cos(), angle.sin()], -1) * (1 - 2 * side)[:, None]
    return x + torch.stack([side, 0.5 * side], -1) + 0.1 * torch.randn(num, 2)


@pytest.mark.parametrize(
    ("recipe", "gain"), [("realnvp", 0.25), ("nsf", 0.25), ("maf", 0.2), ("glow", 0.25)]
)
def test_as_a_likelihood(recipe, gain):
    """Maximum likelihood by stock SVI beats the best normal on fresh data."""
    train, test = two_crescents(1000), two_crescents(1000)
    flow = getattr(flows, recipe)(2)

    def model(data):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(data)):
            pyro.sample("x", flow(), obs=data)

    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.985})
    svi = SVI(model, lambda data: None, optim, Trace_ELBO())
    for _ in range(150):
        svi.step(train)
    normal = dist.MultivariateNormal(train.mean(0), torch.cov(train.T))
    with torch.no_grad():
        assert flow().log_prob(test).mean() > normal.log_prob(test).mean() + gain


def ridge(z: Tensor) -> Tensor:
    """A bent ridge of width 0.5 along a parabola, normalised."""
    mean = torch.stack([torch.zeros_like(z[..., 0]), 0.7 * z[..., 0] ** 2], -1)
    return dist.Normal(mean, torch.tensor([1.0, 0.5])).log_prob(z).sum(-1)


def ridge_model():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    z = pyro.sample("z", base)
    pyro.factor("ridge", ridge(z) - base.log_prob(z))


@pytest.mark.parametrize(
    ("recipe", "elbo"), [("realnvp", Trace_ELBO), ("iaf", TraceMeanField_ELBO)]
)
def test_as_a_guide(recipe, elbo):
    flow = getattr(flows, recipe)(2)

    def guide():
        pyro.module("flow", flow)
        return pyro.sample("z", flow())

    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99})
    loss = elbo(32, vectorize_particles=True)
    svi = SVI(ridge_model, guide, optim, loss)
    for _ in range(300):
        svi.step()
    with torch.no_grad():
        z, log_q = flow().rsample_and_log_prob((2000,))
        # The evidence is 0; the best normal guide stays at -0.44.
        assert (ridge(z) - log_q).mean() > -0.2
    assert Predictive(guide, num_samples=7, parallel=True)()["z"].shape == (7, 2)


@recipes
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_one_pass_under_plates_and_vectorised_particles(recipe, elbo):
    inner = make(f"{recipe}, 4-D, context")
    counted = Counted(inner.transform)
    flow, context = Flow(counted), torch.randn(3, 2)

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("rows", 3):
            pyro.sample("z", flow(context))

    loss = elbo(5, vectorize_particles=True, max_plate_nesting=1)
    assert torch.tensor(loss.loss_and_grads(model, guide)).isfinite()
    assert counted.passes == 1


def test_location_and_scale_are_the_last_layer_of_every_recipe():
    for recipe in RECIPES:
        head = make(f"{recipe}, 4-D").transform.parts[-1]
        with torch.no_grad():
            head.raw.loc.add_(100.0)
        assert abs(make(f"{recipe}, 4-D").then(head)().sample((50,)).mean() - 100) < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n.split(",")[1].strip() == "4-D"])
def test_compiles_in_one_graph(name):
    flow, context = make(name, std=0.1), context_of(name, 3)
    value = flow(context).sample((5,))
    torch._dynamo.reset()

    def score(x: Tensor) -> tuple[Tensor, Tensor]:
        return flow.transform.call_and_ladj(x, context)

    compiled = torch.compile(score, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(value), score(value))


def test_modules_are_plain():
    flow = flows.realnvp(3)
    assert isinstance(flow, nn.Module)
    assert flow.double() is flow
    assert all(p.requires_grad for p in flow.parameters())
