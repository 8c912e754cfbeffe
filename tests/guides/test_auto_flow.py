from __future__ import annotations

import io
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import DATA, hierarchy, hierarchy_posterior, many_supports, shake, subsampled
from pyro import poutine
from pyro.infer import HMC, MCMC, SVI, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuideList
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from flowvi.flows import iaf, nsf, planar, realnvp
from flowvi.guides import AutoFlow, AutoPlateFlow
from flowvi.objectives import STL

small = partial(realnvp, num_layers=2, hidden_dims=(8,))


def two_sites() -> None:
    pyro.sample("a", dist.Gamma(2.0, 1.0))
    pyro.sample("b", dist.Uniform(-1.0, 2.0))


# Values and densities.


def test_draws_lie_in_every_support() -> None:
    guide = AutoFlow(many_supports, small, init_scale=1.0).initialize()
    shake(guide)
    trace = poutine.trace(guide).get_trace()
    model = poutine.trace(poutine.replay(many_supports, trace=trace)).get_trace()
    model.compute_log_prob()
    for name, site in model.nodes.items():
        if name in guide.prototype_trace.nodes:
            assert site["fn"].support.check(site["value"]).all()
    values = {n: trace.nodes[n]["value"] for n in guide.prototype_trace.nodes}
    torch.testing.assert_close(guide.log_q(values), trace.log_prob_sum())


def test_replay_in_every_support_and_with_vectorized_particles() -> None:
    guide = AutoFlow(many_supports, small, init_scale=1.0).initialize()
    shake(guide)
    with pyro.plate("particles", 5, dim=-3):
        trace = poutine.trace(many_supports).get_trace()
        replayed = poutine.trace(poutine.replay(guide, trace=trace)).get_trace()
    replayed.compute_log_prob()
    names = list(guide.prototype_trace.nodes)
    scored = [replayed.nodes[n]["log_prob"] for n in (*names, guide.latent_name)]
    total = sum(log_prob.reshape(5, -1).sum(-1) for log_prob in scored)
    rows = []
    for i in range(5):
        shapes = {n: guide.prototype_trace.nodes[n]["value"].shape for n in names}
        rows.append(guide.log_q({n: trace.nodes[n]["value"][i].reshape(shapes[n]) for n in names}))
    torch.testing.assert_close(total, torch.stack(rows))


@pytest.mark.parametrize("recipe", [small, partial(nsf, num_layers=2), partial(iaf, num_layers=2)])
def test_density_integrates_to_one_in_constrained_space(recipe: object) -> None:
    guide = AutoFlow(two_sites, recipe, init_scale=0.5).initialize()
    shake(guide, 0.1)
    # Both integrals by the midpoint rule in coordinates that resolve the ends of the supports.
    u = torch.linspace(-9, 9, 361)
    a, b = u.exp(), torch.sigmoid(u) * 3 - 1
    values = {"a": a[:, None].expand(361, 361), "b": b[None].expand(361, 361)}
    weight = (u.exp()[:, None]) * (3 * torch.sigmoid(u) * torch.sigmoid(-u))[None]
    step = u[1] - u[0]
    total = (guide.log_q(values).exp() * weight).sum() * step**2
    assert abs(float(total.detach()) - 1) < 2e-3


def test_outside_the_support_the_density_is_zero() -> None:
    guide = AutoFlow(two_sites, small).initialize()
    log_q = guide.log_q({"a": torch.tensor([1.0, -1.0, 1.0]), "b": torch.tensor([0.0, 0.0, 5.0])})
    assert log_q[0].isfinite()
    assert (log_q[1:] == -math.inf).all()
    log_q[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in guide.parameters())


# Starts.


def test_init_loc_and_scale_are_honoured() -> None:
    start = {"a": torch.tensor(3.0), "b": torch.tensor(0.5)}
    guide = AutoFlow(two_sites, init_loc_fn=init_to_value(values=start), init_scale=0.02)
    guide.initialize()
    median = guide.median()
    # The median of 10000 draws has standard error 0.0125 sd, here at most 0.08 in u.
    assert abs(float(median["a"]) / 3.0 - 1) < 0.002
    assert abs(float(median["b"]) - 0.5) < 0.002
    z = guide.get_posterior().sample((4000,))
    torch.testing.assert_close(z.std(0), torch.full((2,), 0.02), rtol=0.06, atol=0)


def test_whiten_sets_location_and_covariance() -> None:
    guide = AutoFlow(two_sites).initialize()
    loc, scale = torch.tensor([0.4, -1.0]), torch.tensor([[2.0, 0.0], [0.5, 0.3]])
    guide.whiten(loc, scale)
    z = torch.randn(5, 2)
    exact = dist.MultivariateNormal(loc, scale_tril=scale).log_prob(z)
    torch.testing.assert_close(guide.get_posterior().log_prob(z), exact)
    for args, message in (
        ((loc[:1], scale), r"`loc` must have shape \(2,\); got \(1,\)"),
        ((loc, scale[:1]), r"`scale_tril` must have shape \(2, 2\); got \(1, 2\)"),
        ((0.0, scale), r"`loc` must have shape \(2,\); got float"),
    ):
        with pytest.raises(ValueError, match=message):
            guide.whiten(*args)
    with pytest.raises(RuntimeError, match="no parameters yet"):
        AutoFlow(two_sites).whiten(loc, scale)


def test_quantiles_against_the_closed_form() -> None:
    guide = AutoFlow(two_sites, small).initialize()
    guide.whiten(torch.tensor([0.7, 0.2]), torch.diag(torch.tensor([0.5, 1.5])))
    levels = torch.tensor([0.1, 0.5, 0.9])
    u = dist.Normal(0.0, 1.0).icdf(levels)
    exact = {"a": (0.7 + 0.5 * u).exp(), "b": torch.sigmoid(0.2 + 1.5 * u) * 3 - 1}
    for name, value in guide.quantiles(levels).items():
        # Standard error of the level is at most 0.005; four of them, over the density.
        shifted = dist.Normal(0.0, 1.0).icdf((levels + 0.02).clamp(max=0.999))
        bound = (
            (0.7 + 0.5 * shifted).exp()
            if name == "a"
            else torch.sigmoid(0.2 + 1.5 * shifted) * 3 - 1
        ) - exact[name]
        assert ((value - exact[name]).abs() < bound.abs() * 1.5).all()


def test_posterior_of_a_conjugate_model_is_recovered() -> None:
    x = DATA[:2]
    mean, covariance = hierarchy_posterior(x)
    guide = AutoFlow(hierarchy, small, init_scale=0.5).initialize(x)
    svi = SVI(hierarchy, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.99}), STL(16))
    for _ in range(400):
        svi.step(x)
    with torch.no_grad():
        z = guide.get_posterior().rsample((40_000,))
    sd = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean).abs() / sd).max() < 0.05
    assert ((z.T.cov() - covariance) / sd / sd[:, None]).abs().max() < 0.08


# Pyro's contracts.


def test_part_of_an_auto_guide_list_with_a_discrete_part() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", len(x)):
            pyro.sample("x", dist.Normal(mu + k, 1.0), obs=x)

    weights = []
    for initialize in (False, True):
        guide = AutoGuideList(model)
        guide.append(AutoFlow(poutine.block(model, hide=["k"]), small))
        guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
        if initialize:
            guide[0].initialize(DATA)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
        svi.step(DATA)
        before = [p.clone() for p in guide[0].parameters()]
        svi.step(DATA)
        weights.append(before)
        moved = zip(before, guide[0].parameters(), strict=True)
        assert all(not torch.equal(p, q) for p, q in moved)
        assert set(guide(DATA)) == {"mu", "k"}
    assert guide[0]._pyro_name == "AutoGuideList.0_1"


def test_part_of_an_auto_guide_list_with_shared_plates() -> None:
    guide = AutoGuideList(hierarchy)
    guide.append(AutoDelta(poutine.block(hierarchy, expose=["mu"])))
    guide.append(AutoFlow(poutine.block(hierarchy, expose=["z"]), small))
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(DATA))
    assert guide.median(DATA)["z"].shape == (6,)


def test_neutra_leaves_the_posterior_in_place() -> None:
    mean, covariance = hierarchy_posterior(DATA)
    guide = AutoFlow(hierarchy, small).initialize(DATA)
    guide.whiten(mean, torch.linalg.cholesky(covariance))
    neutra = NeuTraReparam(guide)
    kernel = HMC(neutra.reparam(hierarchy), step_size=0.7, num_steps=3, adapt_step_size=False)
    mcmc = MCMC(kernel, num_samples=120, warmup_steps=10, disable_progbar=True)
    mcmc.run(DATA)
    (x,) = mcmc.get_samples().values()
    # In whitened coordinates the posterior is N(0, I); 120 nearly independent draws of 7 numbers.
    assert x.mean(0).abs().max() < 0.4
    assert 0.75 < x.std(0).mean() < 1.25
    values = neutra.transform_sample(x[:, None])
    assert values["z"].shape == (120, 6)


def test_create_plates() -> None:
    def create(x: Tensor) -> pyro.plate:
        return pyro.plate("items", len(x), dim=-1)

    guide = AutoFlow(hierarchy, small, create_plates=create).initialize(DATA)
    assert guide(DATA)["z"].shape == (6,)
    short = AutoFlow(hierarchy, small, create_plates=lambda x: pyro.plate("items", 3, dim=-1))
    with pytest.raises(ValueError, match="Plate `items` must hold 6 items.*got 3"):
        short(DATA)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_elbo_runs() -> None:
    guide = AutoFlow(hierarchy, small)
    loss = JitTrace_ELBO(ignore_jit_warnings=True)
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    assert math.isfinite(svi.step(DATA))


def test_a_ready_flow_and_a_flow_without_inverse() -> None:
    assert AutoFlow(two_sites, small(2)).initialize()()["a"] > 0
    guide = AutoFlow(hierarchy, partial(planar, num_layers=2))
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(DATA))


def test_a_recipe_that_cannot_be_pickled_is_no_obstacle() -> None:
    guide = AutoFlow(two_sites, lambda dim: small(dim)).initialize()
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    copy = torch.load(file, weights_only=False)
    values = guide()
    assert torch.equal(copy.log_q(values), guide.log_q(values))


# Refusals.


def discrete() -> None:
    pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def moving_support() -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    pyro.sample("u", dist.Uniform(0.0, scale))


def sequential() -> None:
    for i in pyro.plate("loop", 2):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def no_bijection() -> None:
    parts = dist.Normal(torch.zeros(2), 1.0)
    pyro.sample("m", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))


def impossible(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample(
        "x", dist.Normal(mu / 0.0, 1.0, validate_args=False).expand([6]).to_event(1), obs=x
    )


@pytest.mark.parametrize(
    ("model", "args", "error", "message"),
    [
        (lambda: None, (), ValueError, "at least one latent sample site; got none"),
        (discrete, (), NotImplementedError, "Site `k` is discrete.*config_enumerate"),
        (subsampled(2), (DATA,), NotImplementedError, "Plate `items` .* `z`.*AutoPlateFlow"),
        (
            hierarchy,
            (DATA[:0],),
            ValueError,
            "Plate `items` must hold at least one item; got size 0",
        ),
        (moving_support, (), NotImplementedError, "support of site `u` changes"),
        (no_bijection, (), NotImplementedError, "Site `m` has support .* no bijection"),
        (sequential, (), NotImplementedError, "`z_0` is inside a sequential pyro.plate"),
        (hierarchy, (DATA.where(DATA > 0, torch.nan),), ValueError, "site `x`; got 1 non-finite"),
        (impossible, (DATA,), ValueError, "finite log-density at the initial point; at site `x`"),
    ],
)
def test_models_that_are_refused(model: object, args: tuple, error: type, message: str) -> None:
    guide = AutoFlow(model, small)
    with pytest.raises(error, match=message):
        guide.initialize(*args)
    with pytest.raises(RuntimeError, match="no parameters yet"):
        list(guide.parameters())


def test_masked_missing_data_are_accepted() -> None:
    x = DATA.where(DATA > 0, torch.nan)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 6), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(mu, 1.0, validate_args=False), obs=x)

    assert AutoFlow(model, small).initialize().latent_dim == 1


def test_latents_that_change_shape_are_refused() -> None:
    guide = AutoFlow(hierarchy, small).initialize(DATA[:1])
    with pytest.raises(ValueError, match=r"`z` must keep the shape \(1,\).*got \(6,\)"):
        guide(DATA)
    assert guide()["z"].shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "`model` must be callable; got int"),
        ({"recipe": 3}, TypeError, "`recipe` must be a Flow or a function that makes one; got 3"),
        ({"init_scale": 0.0}, ValueError, "`init_scale` must be positive; got 0.0"),
        ({"init_scale": "1"}, ValueError, "`init_scale` must be positive; got '1'"),
    ],
)
def test_bad_arguments(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        AutoFlow(**{"model": two_sites, **arguments})


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (lambda dim: dim, TypeError, "`recipe` must make a Flow; got int"),
        (small(3), ValueError, "`recipe` must make a flow with input_dim 2; got 3"),
        (small(2, 1), ValueError, "`recipe` must make a flow with context_dim 0; got 1"),
    ],
)
def test_bad_recipes(recipe: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        AutoFlow(two_sites, recipe).initialize()


def test_store_of_another_shape_is_refused() -> None:
    guide = AutoFlow(two_sites, small).initialize()
    guide()
    state = pyro.get_param_store().get_state()
    name = next(iter(state["params"]))
    pyro.clear_param_store()
    # Copies, as a file would give; the very tensors of the live guide would be recognised.
    state["params"] = {n: p.detach().clone() for n, p in state["params"].items()}
    state["params"][name] = torch.zeros(99)
    pyro.get_param_store().set_state(state)
    with pytest.raises(ValueError, match=r"must hold `AutoFlow.* got \(99,\)"):
        AutoFlow(two_sites, small).initialize()


def test_bounds_of_supports_move_with_the_guide() -> None:
    def model() -> None:
        pyro.sample("u", dist.Uniform(torch.tensor(-1.0), torch.tensor(2.0)))

    guide = AutoFlow(model, small).initialize().float()
    assert guide()["u"].dtype == torch.float32
    assert AutoPlateFlow(model, small).initialize()()["u"].shape == ()
