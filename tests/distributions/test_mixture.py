from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from flowvi.distributions import Flow, FlowDistribution, MixtureFlow, MixtureFlowDistribution
from flowvi.transforms import Coupling, FlowTransform, TriangularAffine, compose


def mixture(num: int = 3, dim: int = 2, context_dim: int = 0, std: float = 0.7) -> MixtureFlow:
    """Affine components, so that torch's own mixture of normals is the closed form."""
    flows = [Flow(TriangularAffine(dim, context_dim)) for _ in range(num)]
    out = MixtureFlow(flows, torch.linspace(-0.5, 0.7, num))
    for p in out.flows.parameters():
        nn.init.normal_(p, std=std)
    return out


def closed_form(m: MixtureFlow) -> MixtureSameFamily:
    eye, zero = torch.eye(m.input_dim), torch.zeros(m.input_dim)
    loc = torch.stack([f.transform(zero) for f in m.flows])
    tril = torch.stack([(f.transform(eye) - f.transform(zero)).mT for f in m.flows])
    return MixtureSameFamily(
        Categorical(logits=m.logits), MultivariateNormal(loc, scale_tril=tril)
    )


def test_log_prob_is_the_mixture_of_the_components():
    m = mixture()
    z, log_q = m().rsample_and_log_prob((9,))
    law = closed_form(m)
    torch.testing.assert_close(log_q, law.log_prob(z))
    torch.testing.assert_close(m().log_prob(torch.ones(2)), law.log_prob(torch.ones(2)))
    torch.testing.assert_close(m().log_prob_stopped(z), law.log_prob(z))


def test_density_integrates_to_one():
    flows = [Flow(compose(Coupling(2), TriangularAffine(2))) for _ in range(2)]
    m = MixtureFlow(flows)
    for p in m.parameters():
        nn.init.normal_(p, std=0.2)
    axis = torch.linspace(-12, 12, 400)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = m().log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total - 1) < 1e-3


def test_draws_follow_the_mixture():
    m = mixture()
    z = m().sample((20_000,))
    law = closed_form(m)
    weights, parts = m().weights, law.component_distribution
    mean = (weights[:, None] * parts.mean).sum(0)
    second = (weights[:, None] * (parts.variance + parts.mean**2)).sum(0)
    se = ((second - mean**2) / 20_000).sqrt()
    assert ((z.mean(0) - mean).abs() < 4 * se).all()
    torch.testing.assert_close((z**2).mean(0), second, rtol=0.05, atol=0.02)


def counts(q: MixtureFlowDistribution, shape: tuple[int, ...]) -> torch.Tensor:
    index = q._draw_index(torch.Size(shape))
    return torch.stack([(index == k).sum(0) for k in range(len(q.components))], -1)


def test_stratified_counts_are_within_one_of_their_expectation():
    q = mixture()()
    got = counts(q, (50, 40))
    assert ((got - 50 * q.weights).abs() < 1).all()
    # The stratification does not shift the frequencies: mean over columns, 4 standard errors.
    assert ((got.double().mean(0) - 50 * q.weights).abs() < 4 * 0.5 / 40**0.5).all()


def test_stratified_draws_of_two_sites_are_independent():
    q = mixture(2)()
    a, b = (q._draw_index(torch.Size((2, 4000))).double() for _ in range(2))
    w = q.weights[1].item()
    # The two rows of a column depend on each other, so only the columns count.
    se = w * (1 - w) / 4000**0.5
    assert abs(((a - w) * (b - w)).mean()) < 4 * se
    # Two columns of one draw as well.
    assert abs(((a[:, :2000] - w) * (a[:, 2000:] - w)).mean()) < 4 * se * 2**0.5


def test_stratification_lowers_the_variance():
    m = mixture(2, std=0.1)
    with torch.no_grad():
        for flow, loc in zip(m.flows, (-5.0, 5.0), strict=True):
            flow.transform.raw.loc.fill_(loc)
        stratified = m().sample((20, 400)).mean((0, 2))
        independent = m().expand((20, 400)).sample().mean((0, 2))
    # Counts of a component stay within one of their expectation instead of about two off.
    assert stratified.var() < 0.2 * independent.var()


def test_data_plates_and_events_are_not_stratified():
    """Along these dimensions dependent draws would bias the ELBO or its gradient."""
    q = mixture(2)
    with pyro.plate("data", 2, dim=-1):
        draws = torch.stack([q().expand((2,))._draw_index(torch.Size()) for _ in range(4000)])
    w = q().weights[1].item()
    covariance = ((draws[:, 0] - w) * (draws[:, 1] - w)).mean()
    assert abs(covariance) < 4 * w * (1 - w) / 4000**0.5


def test_vectorised_particles_are_stratified():
    q = mixture(2)
    with pyro.plate("num_particles_vectorized", 40, dim=-2), pyro.plate("data", 3, dim=-1):
        index = q().expand((40, 3))._draw_index(torch.Size())
    assert ((index.sum(0) - 40 * q().weights[1]).abs() < 1).all()


def target_log_prob(z: torch.Tensor) -> torch.Tensor:
    """Skewed and not quadratic, so that no term of the gradient vanishes by symmetry."""
    return -0.5 * (z**2).sum(-1) + 0.8 * z[..., 0] + 1.5 * (z[..., 0] + 2 * z[..., 1]).sin()


def brute_force_gradient(m: MixtureFlow, num: int) -> dict[str, torch.Tensor]:
    """Gradient of sum_k w_k E_k[log p - log q], the sum over components in full."""
    law = closed_form(m)
    total = 0.0
    for k, flow in enumerate(m.flows):
        z = flow.transform(torch.randn(num, m.input_dim))
        total = (
            total
            + law.mixture_distribution.probs[k] * (target_log_prob(z) - law.log_prob(z)).mean()
        )
    grads = torch.autograd.grad(-total, list(m.parameters()))
    return dict(zip(dict(m.named_parameters()), grads, strict=True))


def factor_model():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z)
    pyro.factor("target", target_log_prob(z) - base)


def elbo_gradients(m: MixtureFlow, loss, make, repeats: int) -> dict[str, torch.Tensor]:
    def guide():
        pyro.module("m", m)
        pyro.sample("z", make(m))

    out = {name: [] for name, _ in m.named_parameters()}
    for _ in range(repeats):
        m.zero_grad()
        loss.loss_and_grads(factor_model, guide)
        for name, p in m.named_parameters():
            out[name].append(p.grad.clone())
    return {name: torch.stack(g) for name, g in out.items()}


ESTIMATORS = {
    "Trace_ELBO, vectorised": (
        Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=0),
        lambda m: m(),
    ),
    "Trace_ELBO, loop": (Trace_ELBO(), lambda m: m()),
    "path derivative": (
        Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=0),
        lambda m: m().path_derivative(antithetic=True),
    ),
    "detached by has_rsample": (
        Trace_ELBO(20, vectorize_particles=True, max_plate_nesting=0),
        lambda m: m().mask(True),
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_elbo_gradient_is_unbiased(name):
    m = mixture(std=0.3)
    loss, make = ESTIMATORS[name]
    repeats = 250 if loss.num_particles > 1 else 600
    got = elbo_gradients(m, loss, make, repeats)
    expected = brute_force_gradient(m, 200_000)
    for key, samples in got.items():
        se = samples.std(0) / repeats**0.5
        z = (samples.mean(0) - expected[key]).abs() / se.clamp(min=1e-9)
        assert z[se > 0].max() < 4.5, (key, z)
    assert got["logits"].std() > 0


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (TraceMeanField_ELBO(), NotImplementedError, "must be fully reparameterized"),
        (TraceGraph_ELBO(), RuntimeError, "`x` must be a draw of this very.*TraceGraph_ELBO"),
    ],
)
def test_losses_that_would_miss_the_gradient_of_the_weights_refuse(loss, error, match):
    m = mixture()

    def guide():
        pyro.module("m", m)
        pyro.sample("z", m())

    with pytest.raises(error, match=match):
        loss.loss_and_grads(factor_model, guide)


def test_score_parts_refuses_a_foreign_value_with_a_graph():
    m = mixture()
    with pytest.raises(RuntimeError, match="`x` must be a draw of this very distribution"):
        m().score_parts(m().rsample())
    parts = m().score_parts(torch.ones(2))
    assert parts.score_function is parts.log_prob
    assert parts.entropy_term == 0


def test_path_derivative_keeps_values_and_only_the_value_gradient():
    m = mixture()
    q = m().path_derivative(antithetic=True).expand((8,))
    z, log_q = q.rsample_and_log_prob()
    torch.testing.assert_close(log_q, closed_form(m).log_prob(z))
    value = z.detach().requires_grad_()
    (score,) = torch.autograd.grad(closed_form(m).log_prob(value).sum(), value)
    params = list(m.flows.parameters())
    expected = torch.autograd.grad((score * z).sum(), params, retain_graph=True)
    got = torch.autograd.grad(log_q.sum(), params, retain_graph=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.grad(log_q.sum(), m.logits, allow_unused=True) == (None,)
    score_function = q.score_parts(z).score_function
    assert torch.autograd.grad(score_function[0], m.logits)[0].abs().sum() > 0


def test_context_gives_the_batch_shape():
    m = mixture(context_dim=3)
    context = torch.randn(5, 3)
    q = m(context)
    assert q.batch_shape == (5,)
    z = q.rsample((4,))
    assert z.shape == (4, 5, 2)
    rows = torch.stack([m(context[i]).log_prob(z[:, i]) for i in range(5)], -1)
    torch.testing.assert_close(q.log_prob(z), rows)
    assert q.expand((6, 5)).rsample().shape == (6, 5, 2)


def test_nothing_stale_after_a_change_of_the_weights():
    m = mixture()
    q = m()
    with torch.no_grad():
        z = q.rsample((3,))
        m.logits[0] += 1.0
        torch.testing.assert_close(q.log_prob(z), closed_form(m).log_prob(z))


def test_then_shares_the_parameters():
    m = mixture()
    moved = m.then(TriangularAffine(2))
    assert moved.logits is m.logits
    assert set(m.parameters()) < set(moved.parameters())
    torch.testing.assert_close(moved().log_prob(torch.ones(2)), m().log_prob(torch.ones(2)))


class OneWay(FlowTransform):
    has_inverse = False


def test_bad_arguments_are_named():
    flow = Flow(TriangularAffine(2))
    with pytest.raises(ValueError, match="`flows` must hold at least one flow; got none"):
        MixtureFlow([])
    with pytest.raises(TypeError, match="`flows` must hold Flow objects; got TriangularAffine"):
        MixtureFlow([TriangularAffine(2)])
    with pytest.raises(ValueError, match=r"`flows` must agree in input_dim; got \[2, 3\]"):
        MixtureFlow([flow, Flow(TriangularAffine(3))])
    with pytest.raises(ValueError, match=r"`flows` must agree in context_dim; got \[1, 2\]"):
        MixtureFlow([Flow(TriangularAffine(2, 1)), Flow(TriangularAffine(2, 2))])
    with pytest.raises(ValueError, match=r"`logits` must have shape \(1,\).*; got \(2,\)"):
        MixtureFlow([flow], torch.zeros(2))
    with pytest.raises(NotImplementedError, match="OneWay has no inverse.*NumericalInverse"):
        MixtureFlow([Flow(OneWay(2))])
    base = dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1)
    with pytest.raises(NotImplementedError, match="base Independent has no reparameterised"):
        MixtureFlowDistribution([FlowDistribution(base, TriangularAffine(2))], torch.zeros(1))


def test_meta_device():
    m = mixture(context_dim=1).to("meta")
    q = m(torch.zeros(3, 1, device="meta")).expand((4, 3))
    z = q()
    parts = q.score_parts(z)
    (parts.entropy_term.sum() + parts.score_function.sum()).backward()
    assert all(p.grad is not None for p in m.parameters())


def test_learns_two_separated_modes_and_their_weights():
    m = mixture(2, dim=1, std=0.0)
    with torch.no_grad():
        m.flows[0].transform.raw.loc.fill_(-3.0)
        m.flows[1].transform.raw.loc.fill_(3.0)
        m.logits.zero_()
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.8])),
        dist.Normal(torch.tensor([[-4.0], [4.0]]), torch.tensor([[0.5], [1.0]])).to_event(1),
    )

    def model():
        pyro.sample("z", law)

    def guide():
        pyro.module("m", m)
        return pyro.sample("z", m())

    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
    svi = SVI(model, guide, optim, Trace_ELBO(32, vectorize_particles=True))
    for _ in range(300):
        svi.step()
    torch.testing.assert_close(m().weights, torch.tensor([0.2, 0.8]), atol=0.03, rtol=0)
    draws = Predictive(guide, num_samples=50, parallel=True)()["z"]
    assert draws.shape == (50, 1)
