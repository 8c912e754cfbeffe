from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from ladder_models import (
    LadderGuide,
    check_mean,
    ladder,
    ladder_terms,
    mean_loss_and_gradient,
    subsampled,
)
from pyro.infer.autoguide import AutoNormal

from flowvi.guides import AutoFlow, AutoPlateFlow
from flowvi.infer import fit
from flowvi.objectives import ELBO, STL, BetaELBO, CyclicalSchedule, FreeBits, LinearSchedule

VARIANTS = {
    "full": {},
    "path": {"path_gradient": True},
    "loop": {"vectorize_particles": False},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@variants
@pytest.mark.parametrize("seed", [0, 1])
def test_beta_of_one_is_the_elbo_to_rounding(options, seed):
    x, guide = torch.randn(4), LadderGuide(4)
    plain = STL(6, antithetic=True) if "path_gradient" in options else None
    plain = plain or ELBO(6, vectorize_particles=options.get("vectorize_particles", True))
    results = []
    for objective in (plain, BetaELBO(6, beta={"top": 1.0, "z": LinearSchedule(1)}, **options)):
        objective.loss(ladder, guide, x)
        if isinstance(objective, BetaELBO):
            objective.step.fill_(5)
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(ladder, guide, x)
        results.append([loss, *torch.autograd.grad(loss, list(guide.parameters()))])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


@variants
def test_value_and_gradient_agree_with_the_closed_form_by_group(options):
    # 200 steps (60 in a loop) of 8 particles; 4.5 standard errors.
    x, guide = torch.randn(4) + 1, LadderGuide(4)
    objective = BetaELBO(8, beta={"top": 0.3, "z": lambda step: 2.0}, **options)
    likelihood, kl_top, kl_z = ladder_terms(x, guide)
    exact = likelihood - 0.3 * kl_top - 2.0 * kl_z
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(exact, list(guide.parameters()))])
    steps = 60 if "vectorize_particles" in options else 200
    values, grads = mean_loss_and_gradient(objective, ladder, guide, x, steps)
    check_mean(values, exact.detach(), 4.5)
    check_mean(grads, truth, 4.5)


def test_report_has_the_plain_elbo_and_the_terms():
    x, guide = torch.randn(4) + 1, LadderGuide(4)
    objective = BetaELBO(16, beta={"top": 0.3, "z": 0.0})
    expected = [term.detach() for term in ladder_terms(x, guide)]
    seen = []
    for _ in range(150):
        loss = objective.loss(ladder, guide, x)
        report = objective.report
        terms = [report[k] for k in ("log_likelihood", "kl/top", "kl/z")]
        assert loss == pytest.approx(float(0.3 * terms[1] - terms[0]), rel=1e-10)
        assert float(report["elbo"]) == pytest.approx(float(terms[0] - terms[1] - terms[2]))
        assert (float(report["beta/top"]), float(report["beta/z"])) == (0.3, 0.0)
        seen.append(torch.stack(terms))
    check_mean(torch.stack(seen), torch.stack(expected), 4)


def test_subsampling_is_unbiased():
    # N = 20, B = 5; 250 steps of 16 particles; 4.5 standard errors.
    x, guide = torch.randn(20) + 1, LadderGuide(20, 5)
    objective = BetaELBO(16, beta={"top": 0.3, "z": 0.6})
    likelihood, kl_top, kl_z = ladder_terms(x, guide)
    exact = likelihood - 0.3 * kl_top - 0.6 * kl_z
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(exact, list(guide.parameters()))])
    values, grads = mean_loss_and_gradient(objective, subsampled(20, 5), guide, x, 250)
    check_mean(values, exact.detach(), 4)
    check_mean(grads, truth, 4.5)


def test_optimum_of_a_conjugate_model_has_the_closed_form():
    # beta * KL(q || N(0, 1)) - E log N(x | z, 0.5): precision 1 + n / (0.25 beta).
    beta, x = 3.0, torch.tensor([1.0, 0.4, 1.6])

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("items", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    precision = 1 + 3 / (0.25 * beta)
    mean = x.sum() / (0.25 * beta) / precision
    objective = BetaELBO(16, beta=beta, path_gradient=True)
    options = {"num_steps": 400, "seed": 0, "start": False, "progress_bar": False}
    options |= {"tolerance": None, "average": 0.0}
    guide = AutoNormal(model)
    result = fit(model, guide, x, objective=objective, lr=0.05, **options)
    with result.scope(), torch.no_grad():
        loc, scale = guide._get_loc_and_scale("z")
    # The optimum is the posterior under a likelihood to the power 1 / beta, which is in the
    # family, so path gradients are zero there.
    assert loc.item() == pytest.approx(mean.item(), abs=1e-5)
    assert scale.item() == pytest.approx(precision**-0.5, rel=1e-5)


def test_discrete_site_has_an_unbiased_gradient():
    values = torch.tensor([0.0, 1.5, -0.7])
    prior, x = torch.tensor([0.2, 0.3, 0.5]), torch.tensor(0.4)

    def model():
        k = pyro.sample("k", dist.Categorical(prior))
        pyro.sample("x", dist.Normal(values[k], 1.0), obs=x)

    logits = torch.tensor([0.1, -0.4, 0.3], requires_grad=True)

    def guide():
        pyro.sample("k", dist.Categorical(logits=logits))

    w = logits.softmax(-1)
    inner = dist.Normal(values, 1.0).log_prob(x) - 0.4 * (w.log() - prior.log())
    (exact,) = torch.autograd.grad((w * inner).sum(), logits)
    objective = BetaELBO(6, beta=0.4)
    grads = torch.stack(
        [
            torch.autograd.grad(-objective.differentiable_loss(model, guide), logits)[0]
            for _ in range(500)
        ]
    )
    check_mean(grads, exact, 4)


# Groups.


def test_one_beta_for_all_works_with_a_joint_flow():
    x = torch.randn(3)
    guide = AutoFlow(ladder).initialize(x)
    objective = BetaELBO(4, beta=0.5)
    loss = objective.differentiable_loss(ladder, guide, x)
    expected = 0.5 * objective.report["kl/latent"] - objective.report["log_likelihood"]
    torch.testing.assert_close(loss.detach(), expected)


def test_joint_flow_has_no_entropy_by_group():
    x = torch.randn(3)
    guide = AutoFlow(ladder).initialize(x)
    with pytest.raises(NotImplementedError, match=r"draws latent sites of several groups, \['top"):
        BetaELBO(4, beta={"top": 0.5}).loss(ladder, guide, x)


def check_split_of_groups(guide, x):
    """Terms by group agree with the log-densities of the guide's own sites."""
    objective = BetaELBO(1, beta={"z": 0.5}, max_plate_nesting=1)
    objective.loss(ladder, guide, x)
    pyro.set_rng_seed(3)
    objective.loss(ladder, guide, x)
    pyro.set_rng_seed(3)
    trace = pyro.poutine.trace(guide).get_trace(x)
    replayed = pyro.poutine.trace(pyro.poutine.replay(ladder, trace)).get_trace(x)
    trace.compute_log_prob()
    replayed.compute_log_prob()
    kl = -replayed.nodes["z"]["log_prob_sum"]
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and (name == "z" or "items" in name or "z_" in name):
            kl = kl + site["log_prob_sum"]
    torch.testing.assert_close(objective.report["kl/z"], kl.detach())


def test_auxiliary_sites_go_with_the_sites_they_draw():
    x = torch.randn(3)
    check_split_of_groups(AutoPlateFlow(ladder).initialize(x), x)
    check_split_of_groups(AutoNormal(ladder), x)


def test_groups_by_function():
    x, guide = torch.randn(3), LadderGuide(3)
    objective = BetaELBO(4, beta={"global": 0.1}, group_of=lambda n: {"top": "global"}.get(n))
    objective.loss(ladder, guide, x)
    assert {"kl/global", "kl/rest"} <= set(objective.report)
    assert float(objective.report["beta/rest"]) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"beta": {"top": 0.5, "z": LinearSchedule(5)}},
        {"beta": CyclicalSchedule(5, num_cycles=1), "path_gradient": True},
        {"free_bits": FreeBits(0.3)},
        {"free_bits": FreeBits({"z": 0.3}, per_dimension=True)},
    ],
)
def test_meta_device(options):
    x = torch.randn(4, device="meta")
    guide = LadderGuide(4).to("meta")
    objective = BetaELBO(4, **options)
    with pyro.validation_enabled(False):
        for _ in range(2):
            loss = objective.differentiable_loss(ladder, guide, x)
            loss.backward()
    assert loss.device.type == "meta"
    assert guide.top.grad.device.type == "meta"
    assert objective.report["elbo"].device.type == "meta"


def test_float32_stays_float32():
    x, guide = torch.randn(4, dtype=torch.float32), LadderGuide(4).float()
    objective = BetaELBO(4, beta=lambda step: torch.tensor(0.5, dtype=torch.float64))
    assert objective.differentiable_loss(ladder, guide, x).dtype == torch.float32


def test_bad_arguments():
    rule = "must be a finite number of at least 0 or a function of the step"
    with pytest.raises(ValueError, match=f"`beta` {rule}; got -1"):
        BetaELBO(beta=-1)
    with pytest.raises(ValueError, match=rf"`beta\['z'\]` {rule}; got nan"):
        BetaELBO(beta={"z": math.nan})
    with pytest.raises(TypeError, match="`group_of` must be callable; got dict"):
        BetaELBO(group_of={})
    with pytest.raises(TypeError, match="`free_bits` must be a FreeBits; got float"):
        BetaELBO(free_bits=0.1)
    with pytest.raises(ValueError, match="`nats` must be a finite number of at least 0; got -0.1"):
        FreeBits({"z": -0.1})
    with pytest.raises(NotImplementedError, match="per dimension have no path gradient"):
        BetaELBO(free_bits=FreeBits(0.1, per_dimension=True), path_gradient=True)
    with pytest.raises(ValueError, match="`clip_factor` must be None without path gradients"):
        BetaELBO(clip_factor=10.0)
    with pytest.raises(ValueError, match="`clip_factor` must be positive; got 0"):
        BetaELBO(clip_factor=0, path_gradient=True)


def test_bad_groups():
    x, guide = torch.randn(3), LadderGuide(3)
    with pytest.raises(ValueError, match=r"must name groups of latent sites; got \['y'\]"):
        BetaELBO(beta={"y": 0.5}).loss(ladder, guide, x)
    flow = AutoPlateFlow(ladder).initialize(x)
    name = flow.latent_name
    with pytest.raises(NotImplementedError, match="has no site of the model"):
        BetaELBO(free_bits=FreeBits({name: 0.1})).loss(ladder, flow, x)
    objective = BetaELBO(free_bits=FreeBits({"z": 0.1}, per_dimension=True))
    with pytest.raises(NotImplementedError, match="guide site `z` has Delta"):
        objective.loss(ladder, flow, x)


def test_path_gradient_of_a_discrete_site_is_refused():
    def model():
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    with pytest.raises(NotImplementedError, match="site `k` draws from Categorical"):
        BetaELBO(beta=0.5, path_gradient=True).loss(model, model)
