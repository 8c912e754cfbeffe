from __future__ import annotations

import math

import objective_models as om
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from flowvi.infer import fit
from flowvi.objectives import ELBO, STL, GeometricSchedule, LinearSchedule, Tempered


def exact(x, guide, beta, joint):
    """Tempered ELBO from expectations of quadratics."""
    loc, var = guide.loc, (2 * guide.log_scale).exp()
    log_2pi = math.log(2 * math.pi)
    likelihood = -0.5 * (((x - loc) ** 2 + var) / om.NOISE**2 + log_2pi) - math.log(om.NOISE)
    prior = -0.5 * (loc**2 + var + log_2pi)
    entropy = guide.log_scale + 0.5 * (log_2pi + 1)
    return (beta * likelihood + (beta if joint else 1.0) * prior + entropy).sum()


def check_mean(draws, truth, errors=4.5):
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth).abs() < errors * error + 1e-12).all()


@pytest.mark.parametrize("batch", [None, 5], ids=["full", "subsampled"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("path", [False, True])
def test_value_and_gradient_agree_with_the_closed_form(batch, joint, path):
    # N = 20, B = 5; 200 steps of 8 particles; 4.5 standard errors.
    x = om.data(20)
    guide = om.Guide(x)
    params = list(guide.parameters())
    objective = Tempered(8, beta=0.3, joint=joint, path_gradient=path)
    truth = exact(x, guide, 0.3, joint)
    values, grads, plain = [], [], []
    for _ in range(200):
        loss = objective.differentiable_loss(om.model, guide, x, batch)
        values.append(-loss.detach())
        grads.append(torch.cat(torch.autograd.grad(-loss, params)))
        plain.append(objective.report["elbo"])
    check_mean(torch.stack(values), truth.detach())
    check_mean(torch.stack(grads), torch.cat(torch.autograd.grad(truth, params)))
    elbo = om.tempered_mean(x, guide.loc, guide.log_scale, 0.0).sum()
    check_mean(torch.stack(plain), elbo.detach())
    assert elbo < om.log_evidence(x).sum()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("path", [False, True])
def test_power_of_one_is_the_elbo_to_rounding(joint, path, vectorize):
    x = om.data(4)
    guide = om.Guide(x)
    plain = STL(6, antithetic=True, vectorize_particles=vectorize)
    plain = plain if path else ELBO(6, vectorize_particles=vectorize)
    schedule = GeometricSchedule(10)
    options = {"joint": joint, "path_gradient": path, "vectorize_particles": vectorize}
    tempered = Tempered(6, beta=schedule, **options)
    tempered.step.fill_(10)
    results = []
    for objective in (plain, tempered):
        objective.loss(om.model, guide, x)
        pyro.set_rng_seed(3)
        loss = objective.differentiable_loss(om.model, guide, x)
        results.append([loss, *torch.autograd.grad(loss, list(guide.parameters()))])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    assert float(tempered.report["elbo"]) == pytest.approx(-results[0][0].item(), rel=1e-12)


def test_path_gradient_is_zero_at_the_tempered_posterior():
    x, beta = om.data(4), 0.2
    guide = om.Guide(x)
    precision = 1 + beta / om.NOISE**2
    with torch.no_grad():
        guide.loc.copy_(beta * x / om.NOISE**2 / precision)
        guide.log_scale.fill_(-0.5 * math.log(precision))
    objective = Tempered(4, beta=beta, path_gradient=True)
    loss = objective.differentiable_loss(om.model, guide, x)
    for grad in torch.autograd.grad(loss, list(guide.parameters())):
        assert grad.abs().max() < 1e-12


def test_discrete_site_has_an_unbiased_gradient():
    # 500 steps; 4.5 standard errors.
    values, prior = torch.tensor([0.0, 1.5, -0.7]), torch.tensor([0.2, 0.3, 0.5])
    x = torch.tensor(0.4)

    def model():
        k = pyro.sample("k", dist.Categorical(prior))
        pyro.sample("x", dist.Normal(values[k], 1.0), obs=x)

    logits = torch.tensor([0.1, -0.4, 0.3], requires_grad=True)

    def guide():
        pyro.sample("k", dist.Categorical(logits=logits))

    w = logits.softmax(-1)
    inner = 0.25 * dist.Normal(values, 1.0).log_prob(x) + prior.log() - w.log()
    (truth,) = torch.autograd.grad((w * inner).sum(), logits)
    objective = Tempered(6, beta=0.25)
    grads = [
        torch.autograd.grad(-objective.differentiable_loss(model, guide), logits)[0]
        for _ in range(500)
    ]
    check_mean(torch.stack(grads), truth)


def test_history_of_a_fit_has_the_schedule_and_the_plain_elbo(tmp_path):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.5), obs=x)

    schedule = LinearSchedule(20, start=0.1)
    objective = Tempered(4, beta=schedule, path_gradient=True, clip_factor=100.0)
    options = {"objective": objective, "num_steps": 24, "start": False, "progress_bar": False}
    x, path = torch.tensor(1.0), tmp_path / "run.pt"

    class Killed(Exception):
        pass

    def kill(step, loss):
        if step == 13:
            raise Killed

    whole = fit(model, AutoNormal(model), x, seed=0, **options)
    options |= {"checkpoint": path, "checkpoint_every": 8}
    with pytest.raises(Killed):
        fit(model, AutoNormal(model), x, seed=0, callback=kill, **options)
    resumed = fit(model, AutoNormal(model), x, seed=7, **options)
    assert torch.equal(whole.losses, resumed.losses)
    torch.testing.assert_close(resumed.history["beta"], schedule(torch.arange(24)))
    # Once the power is one, the loss is minus the plain ELBO.
    torch.testing.assert_close(resumed.history["elbo"][20:], -resumed.losses[20:])
    assert (resumed.history["elbo"][:20] != -resumed.losses[:20]).all()


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"path_gradient": True}])
def test_meta_device(options):
    x = torch.zeros(4, device="meta")
    guide = om.Guide(om.data(4)).to("meta")
    objective = Tempered(4, beta=GeometricSchedule(10), **options)
    with pyro.validation_enabled(False):
        for _ in range(2):
            loss = objective.differentiable_loss(om.model, guide, x)
            loss.backward()
    assert loss.device.type == "meta"
    assert guide.loc.grad.device.type == "meta"


def test_bad_arguments():
    rule = "must be a finite number of at least 0 or a function of the step"
    with pytest.raises(ValueError, match=f"`beta` {rule}; got -1"):
        Tempered(beta=-1)
    with pytest.raises(ValueError, match=f"`beta` {rule}; got 'warm'"):
        Tempered(beta="warm")
    with pytest.raises(ValueError, match="`num_particles` must be an integer of at least 1"):
        Tempered(0, beta=1.0)
    with pytest.raises(ValueError, match="`clip_factor` must be None without path gradients"):
        Tempered(beta=1.0, clip_factor=10.0)


def test_missing_sites_are_named():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"`guide` must draw every latent site of the model; got"):
        Tempered(beta=0.5).loss(model, lambda: None)
    with pytest.raises(ValueError, match="`model` must have at least one sample site; got none"):
        Tempered(beta=0.5).loss(lambda: None, lambda: None)
