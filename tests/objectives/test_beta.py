from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
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


def ladder(x):
    top = pyro.sample("top", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


class LadderGuide(torch.nn.Module):
    def __init__(self, size, batch=None):
        super().__init__()
        self.size, self.batch = size, batch
        self.top = torch.nn.Parameter(torch.tensor([0.4, -0.3]))
        self.local = torch.nn.Parameter(torch.randn(size, 2) * 0.3)

    def forward(self, x):
        pyro.sample("top", dist.Normal(self.top[0], self.top[1].exp()))
        with pyro.plate("items", self.size, subsample_size=self.batch) as index:
            local = self.local[index]
            pyro.sample("z", dist.Normal(local[:, 0], local[:, 1].exp()))


def subsampled(size, batch):
    def model(x):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("items", size, subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x[index])

    return model


def ladder_terms(x, guide):
    """Likelihood, KL of `top` and of `z`, from expectations of quadratics."""

    def cross(mean, var, loc, scale2):
        return -0.5 * ((mean - loc) ** 2 + var) / scale2 - 0.5 * math.log(2 * math.pi * scale2)

    def entropy(log_scale):
        return log_scale + 0.5 * math.log(2 * math.pi * math.e)

    m, v = guide.top[0], (2 * guide.top[1]).exp()
    a, w = guide.local[:, 0], (2 * guide.local[:, 1]).exp()
    likelihood = cross(a, w, x, 0.49).sum()
    kl_top = -entropy(guide.top[1]) - cross(m, v, 0.0, 1.0)
    kl_z = (-entropy(guide.local[:, 1]) - cross(a, w + v, m, 1.0)).sum()
    return likelihood, kl_top, kl_z


def mean_loss_and_gradient(objective, model, guide, x, steps):
    params = list(guide.parameters())
    values, grads = [], []
    for _ in range(steps):
        loss = objective.differentiable_loss(model, guide, x)
        values.append(-loss.detach())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(-loss, params)]))
    return torch.stack(values), torch.stack(grads)


def check_mean(draws, truth, errors):
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - truth).abs() < errors * error + 1e-12).all()


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


# Free bits.


def test_free_bits_by_group_agree_with_a_hand_computation():
    x, guide = torch.randn(4) + 1, LadderGuide(4)
    floors = {"top": 5.0, "z": 0.01}
    objective = BetaELBO(4, beta={"top": 0.5, "z": 0.7}, free_bits=FreeBits(floors))
    loss = objective.differentiable_loss(ladder, guide, x)
    report = objective.report
    assert report["kl/top"] < 5.0
    assert report["kl/z"] > 4 * 0.01
    expected = -report["log_likelihood"] + 0.5 * 5.0 + 0.7 * report["kl/z"]
    torch.testing.assert_close(loss.detach(), expected)
    (grad,) = torch.autograd.grad(loss, guide.top, retain_graph=True)
    # What is left of the gradient of `top` comes through the prior of `z`.
    plain = BetaELBO(4, beta={"top": 0.0, "z": 0.7}, max_plate_nesting=2)
    values, grads = mean_loss_and_gradient(plain, ladder, guide, x, 200)
    _, floored = mean_loss_and_gradient(objective, ladder, guide, x, 200)
    difference = floored[:, :2].mean(0) - grads[:, :2].mean(0)
    error = (floored[:, :2].var(0) / 200 + grads[:, :2].var(0) / 200).sqrt()
    assert (difference.abs() < 4.5 * error).all()
    assert grad.shape == (2,)


def test_floor_is_per_item_of_the_whole_data_under_subsampling():
    x, guide = torch.randn(20) + 1, LadderGuide(20, 5)
    objective = BetaELBO(4, free_bits=FreeBits({"z": 100.0}))
    loss = objective.loss(subsampled(20, 5), guide, x)
    report = objective.report
    assert loss == pytest.approx(float(2000 + report["kl/top"] - report["log_likelihood"]))


def test_a_group_of_several_plates_counts_the_items_of_each():
    x = torch.randn(3)
    guide = AutoFlow(ladder).initialize(x)
    objective = BetaELBO(4, free_bits=FreeBits(50.0))
    loss = objective.loss(ladder, guide, x)
    assert loss == pytest.approx(float(50 * (1 + 3) - objective.report["log_likelihood"]))


def vectors(x):
    with pyro.plate("items", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


class VectorGuide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor([0.0, 1.5, -2.0]))

    def forward(self, x):
        with pyro.plate("items", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 3), 0.9).to_event(1))


@pytest.mark.parametrize("vectorize", [True, False])
def test_free_bits_per_dimension_agree_with_a_hand_computation(vectorize):
    x, guide = torch.randn(5), VectorGuide()
    floor, beta, particles = 0.8, 0.5, 6
    free_bits = FreeBits(floor, per_dimension=True)
    objective = BetaELBO(particles, beta=beta, free_bits=free_bits, vectorize_particles=vectorize)
    objective.loss(vectors, guide, x)
    pyro.set_rng_seed(2)
    loss = objective.differentiable_loss(vectors, guide, x)
    (grad,) = torch.autograd.grad(loss, guide.loc)
    pyro.set_rng_seed(2)
    traces, _ = objective._runs(vectors, guide, (x,), {})
    z = torch.cat([g.nodes["z"]["value"].reshape(-1, 5, 3) for _, g in traces])
    log_q = dist.Normal(guide.loc, 0.9).log_prob(z)
    kl = (log_q - dist.Normal(0.0, 1.0).log_prob(z)).mean((0, 1))
    assert kl[0] < floor < kl[1] < kl[2]
    likelihood = dist.Normal(z.sum(-1), 1.0).log_prob(x).sum() / particles
    expected = beta * 5 * kl.clamp(min=floor).sum() - likelihood
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, guide.loc)[0])
    elbo = likelihood - 5 * kl.sum()
    torch.testing.assert_close(objective.report["elbo"], elbo.detach())


def test_floor_does_not_count_masked_items():
    mask = torch.tensor([True, False, True, False, False])

    def model(x):
        with pyro.plate("items", 5), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("items", 5), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.1, 1.0))

    objective = BetaELBO(4, free_bits=FreeBits(50.0))
    loss = objective.loss(model, guide, torch.zeros(5))
    assert loss == pytest.approx(float(100 - objective.report["log_likelihood"]))


# The step.


def test_step_advances_in_training_only():
    x, guide = torch.randn(3), LadderGuide(3)
    objective = BetaELBO(4, beta=LinearSchedule(10))
    svi = SVI(ladder, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    for step in range(3):
        svi.evaluate_loss(x)
        assert float(objective.report["beta/latent"]) == pytest.approx(step / 10)
        svi.step(x)
        assert float(objective.report["beta/latent"]) == pytest.approx(step / 10)
        with torch.no_grad():
            objective.differentiable_loss(ladder, guide, x)
    assert int(objective.step) == 3
    new = copy.copy(objective)
    new.differentiable_loss(ladder, guide, x)
    assert (int(objective.step), int(new.step)) == (3, 4)


def test_state_is_restored():
    objective, other = BetaELBO(beta=LinearSchedule(10)), BetaELBO(beta=LinearSchedule(10))
    objective.step.fill_(7)
    other.load_state_dict(objective.state_dict())
    assert int(other.step) == 7
    with pytest.raises(ValueError, match="`state` must hold exactly `step`; got"):
        other.load_state_dict({})
    with pytest.raises(ValueError, match="`state` must be empty for ELBO; got"):
        ELBO().load_state_dict(objective.state_dict())


class Killed(Exception):
    pass


def test_resumed_run_is_bit_equal(tmp_path):
    x = torch.randn(3)
    objective = BetaELBO(4, beta=CyclicalSchedule(30, num_cycles=2))
    options = {"objective": objective, "num_steps": 40, "start": False, "checkpoint_every": 10}
    options["progress_bar"] = False

    def kill(step, loss):
        if step == 23:
            raise Killed

    whole = fit(ladder, AutoNormal(ladder), x, seed=1, **options)
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        fit(ladder, AutoNormal(ladder), x, seed=1, checkpoint=path, callback=kill, **options)
    resumed = fit(ladder, AutoNormal(ladder), x, seed=9, checkpoint=path, **options)
    assert int(objective.step) == 0
    assert torch.equal(whole.losses, resumed.losses)
    assert whole.history.keys() == resumed.history.keys()
    for name, values in whole.history.items():
        assert torch.equal(values, resumed.history[name])
    expected = CyclicalSchedule(30, num_cycles=2)(torch.arange(40))
    torch.testing.assert_close(whole.history["beta/latent"], expected)


def test_fit_does_not_stop_before_the_schedule_ends():
    x = torch.randn(3)
    options = {"num_steps": 240, "start": False, "progress_bar": False, "seed": 0}
    objective = BetaELBO(2, beta=LinearSchedule(80))
    result = fit(ladder, AutoNormal(ladder), x, objective=objective, tolerance=10.0, **options)
    assert 140 <= result.num_steps < 240
    assert "plateau" in result.stop_reason
    never = BetaELBO(2, beta=lambda step: 1.0)
    result = fit(ladder, AutoNormal(ladder), x, objective=never, tolerance=10.0, **options)
    assert result.num_steps == 240
    assert not result.notes


def test_fit_says_that_it_ended_before_the_schedule():
    x = torch.randn(3)
    objective = BetaELBO(2, beta=LinearSchedule(120))
    options = {"num_steps": 5, "start": False, "progress_bar": False, "seed": 0}
    result = fit(ladder, AutoNormal(ladder), x, objective=objective, **options)
    assert "schedules of the objective last 120 steps and the run 5" in result.notes[-1]


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
