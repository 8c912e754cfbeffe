from __future__ import annotations

import math

import objective_models as om
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_coupling, planar
from pyro.infer.autoguide import AutoDelta, AutoNormal, AutoNormalizingFlow

from flowvi.guides import AutoFlow, AutoPlateFlow
from flowvi.objectives import EUBO, ForwardKL


def exact_eubo(x, guide):
    """Posterior mean of log p(x, z) - log q(z), in closed form."""
    return om.tempered_mean(x, guide.loc, guide.log_scale, 1.0).sum()


def posterior_draws(x, number):
    variance = om.NOISE**2 / (1 + om.NOISE**2)
    loc = x / (1 + om.NOISE**2)
    return {"z": loc + variance**0.5 * torch.randn(number, len(x))}


def repeat(objective, guide, steps, *args):
    """Losses and gradients of many steps."""
    params, losses, grads = list(guide.parameters()), [], []
    for _ in range(steps):
        loss = objective.differentiable_loss(om.model, guide, *args)
        losses.append(loss.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    return torch.stack(losses), torch.stack(grads)


def check_mean(draws, truth, errors=4.0):
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth).abs() < errors * error + 1e-12).all()


def snis_mean(x, guide, particles):
    """Mean of the self-normalised estimate, by quadrature over the particles."""
    eps, weights = om.hermite(40, particles)
    a, b, c = om.quadratic(x, guide.loc, guide.log_scale)
    log_w = a + b * eps[..., None] + c * eps[..., None] ** 2
    value = (log_w.softmax(1) * log_w).sum(1)
    return (weights[:, None] * value).sum(0).sum()


@pytest.mark.parametrize("batch", [None, 5])
def test_posterior_draws_give_the_bound_and_its_gradient(batch):
    # 200 steps of 8 of 20000 draws; 4.5 standard errors.
    x = om.data(20)
    guide = om.Guide(x)
    exact = exact_eubo(x, guide)
    truth = torch.cat(torch.autograd.grad(exact, list(guide.parameters())))
    objective = EUBO(8, draws=posterior_draws(x, 20000))
    losses, grads = repeat(objective, guide, 200, x, batch)
    check_mean(losses, exact.detach(), 4.5)
    check_mean(grads, truth, 4.5)
    assert exact > om.log_evidence(x).sum() + 0.5


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("batch", [None, 5])
def test_self_normalised_mean_is_that_of_quadrature(particles, batch):
    # 300 steps; 4 standard errors. With B = 5 of N = 20 the mean is that of the full batch.
    x = om.data(20)
    guide = om.Guide(x)
    losses, _ = repeat(EUBO(particles), guide, 300, x, batch)
    mean = snis_mean(x, guide, particles).detach()
    check_mean(losses, mean)
    if particles == 1:
        elbo = om.tempered_mean(x, guide.loc, guide.log_scale, 0.0).sum()
        torch.testing.assert_close(mean, elbo.detach())


def test_estimate_rises_from_the_elbo_to_the_bound():
    # The bias of self-normalised weights: below the evidence for few particles, of order 1 / K.
    x = om.data(20)
    guide = om.Guide(x)
    exact, evidence = exact_eubo(x, guide).detach(), om.log_evidence(x).sum()
    means = [repeat(EUBO(k), guide, 100, x)[0].mean() for k in (1, 4, 16, 64, 1024)]
    assert all(a < b for a, b in zip(means, means[1:], strict=False))
    assert means[0] < evidence < means[-1]
    assert abs(means[-1] - exact) < 0.02
    assert 8 < (exact - means[2]) / (exact - means[-1]).abs()


@pytest.mark.parametrize("make", [EUBO, ForwardKL])
@pytest.mark.parametrize("vectorize", [True, False])
def test_value_and_gradient_for_the_draws_at_hand(make, vectorize):
    x, particles = om.data(4), 5
    guide = om.Guide(x)
    objective = make(particles, vectorize_particles=vectorize, max_plate_nesting=1 + vectorize)
    pyro.set_rng_seed(1)
    loss = objective.differentiable_loss(om.model, guide, x)
    grads = torch.autograd.grad(loss, list(guide.parameters()))
    pyro.set_rng_seed(1)
    traces, _ = objective._runs(om.model, guide, (x,), {})
    z = torch.cat([g.nodes["z"]["value"].reshape(-1, 4) for _, g in traces])
    log_w = om.log_weight(x, z, guide.loc, guide.log_scale).detach()
    share = log_w.softmax(0)
    value = (share * log_w).sum()
    if make is ForwardKL:
        value = value - (log_w.logsumexp(0) - math.log(particles)).sum()
        assert 0 < value < 4 * math.log(particles)
    log_q = dist.Normal(guide.loc, guide.log_scale.exp()).log_prob(z)
    expected = torch.autograd.grad(-(share * log_q).sum(), list(guide.parameters()))
    torch.testing.assert_close(loss.detach(), value)
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_forward_kl_tends_to_the_divergence():
    x = om.data(3)
    guide = om.Guide(x)
    exact = (exact_eubo(x, guide) - om.log_evidence(x).sum()).detach()
    losses, _ = repeat(ForwardKL(4000), guide, 20, x)
    assert abs(losses.mean() - exact) < 0.01


def test_nothing_is_lost_at_the_posterior():
    x = om.data(3)
    guide = om.Guide(x, shift=0.0, log_factor=0.0)
    evidence = float(om.log_evidence(x).sum())
    assert EUBO(4).loss(om.model, guide, x) == pytest.approx(evidence, abs=1e-12)
    assert ForwardKL(4).loss(om.model, guide, x) == pytest.approx(0, abs=1e-12)


def test_discrete_latents():
    prior, scores = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, -1.0, 0.4])

    def model():
        k = pyro.sample("k", dist.Categorical(prior))
        pyro.factor("likelihood", scores[k])

    logits = torch.tensor([0.3, -0.2, 0.0], requires_grad=True)

    def guide():
        pyro.sample("k", dist.Categorical(logits=logits))

    posterior = (prior.log() + scores).softmax(0)
    joint = prior.log() + scores
    exact = (posterior * (joint - logits.log_softmax(0))).sum()
    (truth,) = torch.autograd.grad(exact, logits)
    loss = EUBO(200_000).differentiable_loss(model, guide)
    assert abs(loss - exact) < 0.01
    assert (torch.autograd.grad(loss, logits)[0] - truth).abs().max() < 0.01


# Flow guides and those of Pyro.


def hierarchy(x, batch=None):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("items", len(x), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Gamma(2.0, mu.exp()))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])


@pytest.mark.parametrize("make", [AutoFlow, AutoPlateFlow])
@pytest.mark.parametrize("vectorize", [True, False])
def test_flow_guides_score_given_draws(make, vectorize):
    x = om.data(4).exp()
    guide = make(hierarchy).initialize(x)
    draws = {"mu": torch.full((1,), 0.3), "z": torch.tensor([[0.4, 1.0, 2.0, 0.1]])}
    objective = EUBO(3, draws=draws, vectorize_particles=vectorize)
    loss = objective.differentiable_loss(hierarchy, guide, x)
    joint = dist.Normal(0.0, 1.0).log_prob(draws["mu"])
    joint = joint + dist.Gamma(2.0, draws["mu"].exp()).log_prob(draws["z"]).sum()
    joint = joint + dist.Normal(draws["z"], 0.5).log_prob(x).sum()
    expected = joint - guide.log_q(draws, x)
    torch.testing.assert_close(loss, expected[0])
    grads = [
        torch.autograd.grad(v, list(guide.parameters()), allow_unused=True)
        for v in (loss, expected[0])
    ]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_subsampled_items_take_their_own_draws():
    x = om.data(6).exp()
    whole = AutoPlateFlow(hierarchy).initialize(x)
    draws = {"mu": torch.full((1,), 0.3), "z": torch.rand(1, 6) + 0.1}
    full = EUBO(2, draws=draws).loss(hierarchy, whole, x)
    part = AutoPlateFlow(hierarchy).initialize(x, 2)
    part.load_state_dict(whole.state_dict())
    losses = torch.tensor([EUBO(2, draws=draws).loss(hierarchy, part, x, 2) for _ in range(40)])
    check_mean(losses, full)


@pytest.mark.parametrize("make", [AutoFlow, AutoNormal, AutoPlateFlow])
def test_weights_of_other_guides_agree_with_their_draws(make):
    x = om.data(4).exp()
    guide = make(hierarchy)
    objective = EUBO(64, max_plate_nesting=2)
    objective.loss(hierarchy, guide, x)
    pyro.set_rng_seed(1)
    loss = objective.loss(hierarchy, guide, x)
    pyro.set_rng_seed(1)
    log_w = objective.log_weight_draws(hierarchy, guide, x)
    assert loss == pytest.approx(float((log_w.softmax(0) * log_w).sum()), rel=1e-10)


def test_cached_transforms_of_pyro_do_not_lose_the_gradient():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))

    guide = AutoNormalizingFlow(model, lambda dim: affine_coupling(dim, [8]))
    guide()
    objective = EUBO(6, max_plate_nesting=1)
    pyro.set_rng_seed(2)
    loss = objective.differentiable_loss(model, guide)
    params = [p for p in guide.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    pyro.set_rng_seed(2)
    ((model_trace, guide_trace),), _ = objective._runs(model, guide, (), {})
    z = guide_trace.nodes["z"]["value"].detach().clone()
    guide.transform.clear_cache()
    log_q = guide.get_posterior().log_prob(z).flatten()
    log_p = dist.Normal(torch.zeros(2), 2.0).log_prob(z).sum(-1).flatten()
    share = (log_p - log_q).detach().softmax(0)
    expected = torch.autograd.grad(-(share * log_q).sum(), params, allow_unused=True)
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert max(float(g.abs().max()) for g in grads if g is not None) > 1e-3


@pytest.mark.parametrize("options", [{}, {"draws": {"z": torch.zeros(2, 4)}}])
def test_meta_device(options):
    x = torch.zeros(4, device="meta")
    guide = om.Guide(om.data(4)).to("meta")
    if options:
        options = {"draws": {"z": options["draws"]["z"].to("meta")}}
    objective = EUBO(6, **options)
    with pyro.validation_enabled(False):
        loss = objective.differentiable_loss(om.model, guide, x)
        loss.backward()
    assert loss.device.type == "meta"
    assert guide.loc.grad.device.type == "meta"


# Refusals.


def one_latent():
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_points_are_refused_by_name():
    for objective in (EUBO(4), ForwardKL(4)):
        with pytest.raises(NotImplementedError, match="site `z` of AutoDelta is a point"):
            objective.loss(one_latent, AutoDelta(one_latent))


def test_flow_without_inverse_is_refused_by_name():
    guide = AutoNormalizingFlow(one_latent, planar)
    guide()
    with pytest.raises(NotImplementedError, match=r"`_AutoNormalizingFlow_latent` \(Planar\) can"):
        EUBO(4).differentiable_loss(one_latent, guide)


def test_guide_that_cannot_score_draws_is_refused_by_name():
    draws = {"z": torch.zeros(3, 2)}
    with pytest.raises(NotImplementedError, match="AutoNormal draws them through its own site"):
        EUBO(4, draws=draws).loss(one_latent, AutoNormal(one_latent))


def test_model_with_parameters_is_refused():
    scale = torch.tensor(1.0, requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(0.0, scale))

    def guide():
        pyro.sample("z", dist.Normal(0.1, 1.0))

    with pytest.raises(NotImplementedError, match="EUBO trains the guide only; the model has par"):
        EUBO(4).differentiable_loss(model, guide)


def test_global_latent_with_a_subsampled_plate_is_refused():
    x = om.data(4).exp()
    guide = AutoPlateFlow(hierarchy).initialize(x, 2)
    with pytest.raises(NotImplementedError, match="EUBO exponentiates log-weights"):
        EUBO(4).loss(hierarchy, guide, x, 2)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`num_particles` must be an integer of at least 1; go"):
        EUBO(0)
    with pytest.raises(ValueError, match="`num_particles` must be at least 2 for ForwardKL; go"):
        ForwardKL(1)
    with pytest.raises(ValueError, match="`draws` must be a mapping from site names to tensors"):
        EUBO(draws=torch.zeros(3))
    with pytest.raises(ValueError, match="`draws` must have one leading size, at least 1"):
        EUBO(draws={"a": torch.zeros(3), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"`draws\['z'\]` must have draws of shape \(2,\); got"):
        EUBO(2, draws={"z": torch.zeros(5, 3)}).loss(one_latent, AutoFlow(one_latent))
