from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormalizingFlow
from registry import FLOWS

from flowvi.distributions import Flow
from flowvi.flows import iaf, realnvp
from flowvi.objectives import ELBO, STL
from flowvi.objectives._path import clip_rows

A, B = torch.tensor([0.3, -0.2]), torch.tensor([0.7, 1.9])
L = torch.tensor([[0.8, 0.0], [0.5, 1.1]])
LAWS = {
    "normal": lambda a, b: dist.Normal(a, b).to_event(1),
    "expanded, masked": lambda a, b: (
        dist.Normal(a[0], b[0]).expand((2,)).mask(torch.tensor([True, False])).to_event(1)
    ),
    "transformed": lambda a, b: dist.TransformedDistribution(
        dist.Normal(a, 1.0), [T.AffineTransform(0.5, b), T.ExpTransform()]
    ).to_event(1),
    "mvn": lambda a, b: dist.MultivariateNormal(a, scale_tril=b * L.to(b)),
    "low rank": lambda a, b: dist.LowRankMultivariateNormal(a, b[:, None], b),
    "gamma": lambda a, b: dist.Gamma(b + 3, b + 1).to_event(1),
    "student": lambda a, b: dist.StudentT(5.0, a, b).to_event(1),
    "lognormal": lambda a, b: dist.LogNormal(a, b).to_event(1),
}


@pytest.mark.parametrize("objective", [STL(4), STL(4, antithetic=True, clip_factor=10.0)])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_gradient_is_zero_where_guide_equals_model(law, objective):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()

    def model():
        pyro.sample("z", law(A, B))

    def guide():
        pyro.sample("z", law(a, b))

    objective = copy.copy(objective)
    loss = objective.differentiable_loss(model, guide)
    grads = torch.autograd.grad(loss, [a, b], allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-10 for g in grads)
    # The test has teeth: the ordinary estimator's gradient is not zero for the same draws.
    full = torch.autograd.grad(ELBO(4).differentiable_loss(model, guide), b)[0]
    assert full.abs().max() > 1e-4


def test_gradient_is_zero_for_a_full_rank_guide():
    cov_factor = torch.tensor([[1.2, 0.0, 0.0], [0.4, 0.6, 0.0], [-0.7, 0.2, 2.0]])

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.arange(3.0), scale_tril=cov_factor))

    guide = AutoMultivariateNormal(model)
    guide()
    scale = cov_factor.diagonal()
    guide.loc.data = torch.arange(3.0)
    guide.scale = scale
    guide.scale_tril = cov_factor / scale[:, None]
    for objective in (STL(6), STL(6, antithetic=True, clip_factor=10)):
        guide.zero_grad()
        objective.differentiable_loss(model, guide).backward()
        assert all(p.grad.abs().max() < 1e-10 for p in guide.parameters())


def test_gradient_is_zero_for_a_stock_flow():
    flow = T.affine_autoregressive(3, hidden_dims=[8])

    def law(transform):
        return dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), [transform]
        )

    frozen = copy.deepcopy(flow).requires_grad_(False)
    loss = STL(4).differentiable_loss(
        lambda: pyro.sample("z", law(frozen)), lambda: pyro.sample("z", law(flow))
    )
    grads = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-10 for g in grads)


def test_a_stock_flow_without_inverse_is_refused_rather_than_wrong():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoNormalizingFlow(model, T.planar)
    with pytest.raises((KeyError, NotImplementedError)):
        STL(4).differentiable_loss(model, guide).backward()


def test_delta_keeps_the_gradient_of_its_density():
    scale = torch.tensor(0.4, requires_grad=True)

    def model():
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    def guide():
        u = pyro.sample("u", dist.Normal(0.0, scale), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    grads = []
    for objective in (STL(4000), ELBO(4000)):
        pyro.set_rng_seed(0)
        loss = objective.differentiable_loss(model, guide)
        grads.append(torch.autograd.grad(loss, scale)[0])
    # KL(N(0, s^2) | N(0, 1)) has derivative s - 1/s.
    exact = 0.4 - 1 / 0.4
    assert grads[0] == pytest.approx(exact, abs=0.15)
    assert grads[1] == pytest.approx(exact, abs=0.15)


def test_antithetic_particles_cancel_odd_terms():
    loc = torch.tensor(0.5, requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(2.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(loc, 0.3))

    # The gradient for loc is linear in the noise, so pairs give it exactly.
    loss = STL(2, antithetic=True).differentiable_loss(model, guide)
    assert torch.autograd.grad(loss, loc)[0] == pytest.approx(0.5 - 2.0, abs=1e-12)


def test_discrete_site_is_refused_by_name():
    def program():
        pyro.sample("which", dist.Categorical(torch.ones(3) / 3))

    with pytest.raises(NotImplementedError, match="site `which` draws from Categorical.*Use ELBO"):
        STL(2).loss(program, program)


def test_clipping_bounds_rows_and_drops_non_finite_ones():
    grad = torch.ones(5, 2)
    grad[3] *= 1000
    grad[4, 0] = torch.nan
    clipped = clip_rows(grad, grad, 10.0, 1)
    torch.testing.assert_close(clipped[:3], grad[:3])
    torch.testing.assert_close(clipped[3], torch.full((2,), 10.0))
    torch.testing.assert_close(clipped[4], torch.zeros(2))


def test_one_wild_draw_does_not_spoil_the_gradient():
    loc = torch.zeros(2, requires_grad=True)

    def model(bad):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", torch.where(bad, torch.nan, 0.0) * z.sum(-1))

    def guide(bad):
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    bad = torch.arange(8) == 3
    objective = STL(8, clip_factor=10.0, max_plate_nesting=0)
    with pyro.validation_enabled(False):
        loss = objective.differentiable_loss(model, guide, bad)
        all_bad = objective.differentiable_loss(model, guide, torch.ones(8) > 0)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.grad(loss, loc)[0].isfinite().all()
    assert all_bad.isnan()


def test_flow_guide_gradient_is_zero_at_the_model():
    flow: Flow = realnvp(3)
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0, 0.3)
    frozen = copy.deepcopy(flow).requires_grad_(False)

    def model():
        pyro.sample("z", frozen())

    def guide():
        pyro.sample("z", flow())

    for objective in (STL(6), STL(6, antithetic=True, clip_factor=10.0)):
        flow.zero_grad()
        objective.differentiable_loss(model, guide).backward()
        assert max(p.grad.abs().max() for p in flow.parameters()) < 1e-10
    flow.zero_grad()
    ELBO(6).differentiable_loss(model, guide).backward()
    assert max(p.grad.abs().max() for p in flow.parameters()) > 1e-3


# A continuous flow is turned round only to its solver's tolerance.
@pytest.mark.parametrize("name", [n for n in FLOWS if not n.startswith("cnf")])
def test_recursion_and_inversion_give_the_same_gradient(name):
    case = FLOWS[name]
    flow = case.make()
    context = torch.randn(case.context_dim) if case.context_dim else None
    with torch.no_grad():
        for p in flow.parameters():
            # N(0, 1) in every parameter of all layers makes inverses that no float64 resolves;
            # the single maps are tested with it.
            p.add_(0.3 * torch.randn_like(p))
    assert flow.transform.has_score_recursion

    def model():
        with pyro.plate("row", 4):
            pyro.sample("z", dist.StudentT(3.0, torch.zeros(case.input_dim), 1.0).to_event(1))

    def guide():
        with pyro.plate("row", 4):
            pyro.sample("z", flow(context))

    grads = []
    for recursion in (True, False):
        parts = [flow.transform, *flow.transform.modules()]
        with pytest.MonkeyPatch.context() as patch:
            if not recursion:
                for kind in {type(m) for m in parts if hasattr(m, "has_score_recursion")}:
                    patch.setattr(kind, "has_score_recursion", False)
            pyro.set_rng_seed(1)
            loss = STL(8).differentiable_loss(model, guide)
            grads.append(torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True))
    for got, expected in zip(*grads, strict=True):
        if expected is None:
            assert got is None or not got.any()
        else:
            scale = expected.abs().max().clamp_min(1.0)
            torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-8)


@pytest.mark.parametrize("recipe", [iaf, realnvp])
def test_recursion_takes_no_inverse_pass(recipe, monkeypatch):
    flow = recipe(3)
    for part in flow.transform.parts:
        monkeypatch.setattr(type(part), "_inverse_and_ladj", None)

    def model():
        pyro.sample("z", dist.Normal(torch.ones(3), 1.0).to_event(1))

    STL(4).differentiable_loss(model, lambda: pyro.sample("z", flow())).backward()
    assert any(p.grad is not None and p.grad.any() for p in flow.parameters())
