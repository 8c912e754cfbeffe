from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from flowvi.distributions import Flow, FlowDistribution, StandardNormal
from flowvi.transforms import Compose, Coupling, Direction, FlowTransform, TriangularAffine


def affine_flow(input_dim: int = 2, context_dim: int = 0) -> Flow:
    """A flow with a normal law that torch can score independently."""
    flow = Flow(TriangularAffine(input_dim, context_dim))
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    return flow


def closed_form(flow: Flow) -> MultivariateNormal:
    eye = torch.eye(flow.input_dim)
    zero = flow.transform(torch.zeros(flow.input_dim))
    return MultivariateNormal(zero, scale_tril=(flow.transform(eye) - zero).mT)


def coupling_flow(context_dim: int = 0) -> Flow:
    flow = Flow(Compose([Coupling(3, context_dim=context_dim), TriangularAffine(3, context_dim)]))
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    return flow


class Counted(FlowTransform):
    """Counts its passes in each direction."""

    def __init__(self, inner: FlowTransform) -> None:
        super().__init__(inner.input_dim, inner.context_dim)
        self.inner = inner
        self.calls = self.inverses = 0

    def _call_and_ladj(self, x, context):
        self.calls += 1
        return self.inner._call_and_ladj(x, context)

    def _inverse_and_ladj(self, y, context):
        self.inverses += 1
        return self.inner._inverse_and_ladj(y, context)


class ForwardOnly(Counted):
    """Like planar maps, it cannot score what it has not sampled."""

    has_inverse = False
    cheap = Direction.FORWARD

    def _inverse_and_ladj(self, y, context):
        return FlowTransform._inverse_and_ladj(self, y, context)


class TrainableNormal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(2))
        self.log_scale = nn.Parameter(torch.randn(2))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def test_agrees_with_the_closed_form():
    flow = affine_flow()
    z, log_q = flow().rsample_and_log_prob((7,))
    torch.testing.assert_close(log_q, closed_form(flow).log_prob(z))
    torch.testing.assert_close(flow().log_prob(z), log_q)


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_shapes_and_expand(batch):
    q = coupling_flow()().expand(batch)
    z, log_q = q.rsample_and_log_prob((5, 2))
    assert q.batch_shape == batch
    assert z.shape == (5, 2, *batch, 3)
    assert log_q.shape == (5, 2, *batch)
    assert q.log_prob(torch.zeros(3)).shape == batch


def test_context_gives_the_batch_shape():
    flow = coupling_flow(context_dim=2)
    context = torch.randn(4, 2)
    q = flow(context)
    assert q.batch_shape == (4,)
    z, log_q = q.expand((6, 4)).rsample_and_log_prob()
    rows = torch.stack([flow(context[i]).log_prob(z[:, i]) for i in range(4)], -1)
    torch.testing.assert_close(log_q, rows)


def test_bad_arguments_are_named():
    flow = coupling_flow(context_dim=2)
    with pytest.raises(ValueError, match=r"`context` must end with size 2 .*; got None"):
        flow()
    with pytest.raises(ValueError, match=r"`context` must end with size 2 .*; got shape \(4, 3\)"):
        flow(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"`batch_shape` must be one that \(4,\) broadcasts to"):
        flow(torch.zeros(4, 2)).expand((3,))
    with pytest.raises(ValueError, match=r"`base` must have event shape \(3,\).*; got \(2,\)"):
        FlowDistribution(StandardNormal(2)(), coupling_flow().transform)
    with pytest.raises(TypeError, match="`transform` must be a FlowTransform; got Linear"):
        Flow(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Expected value argument"):
        affine_flow()().log_prob(torch.tensor([float("nan"), 0.0]))


def test_one_pass_for_draw_and_score():
    counted = Counted(coupling_flow().transform)
    q = Flow(counted)()
    z = q.rsample((5,))
    q.log_prob(z)
    assert (counted.calls, counted.inverses) == (1, 0)
    q.log_prob(z.clone())
    assert (counted.calls, counted.inverses) == (1, 1)


@pytest.mark.parametrize("change", ["parameter", "value", "context", "buffer"])
def test_nothing_stale_after_a_change(change):
    flow = coupling_flow(context_dim=2)
    flow.transform.register_buffer("extra", torch.zeros(1))
    context = torch.randn(2)
    counted = Counted(flow.transform)
    q = Flow(counted)(context)
    with torch.no_grad():
        z = q.rsample((5,))
        changed = {
            "parameter": next(flow.parameters()),
            "value": z,
            "context": context,
            "buffer": flow.transform.extra,
        }
        changed[change].add_(0.5)
        got = q.log_prob(z)
        torch.testing.assert_close(got, Flow(flow.transform)(context).log_prob(z.clone()))
    assert counted.inverses == 1


def test_a_value_drawn_without_graph_is_scored_with_one():
    flow = affine_flow()
    q = flow()
    z = q.sample((6,))
    q.log_prob(z).sum().backward()
    got = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    flow().log_prob(z.clone()).sum().backward()
    for a, p in zip(got, flow.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_no_inverse_scores_only_its_own_draws():
    q = Flow(ForwardOnly(coupling_flow().transform))()
    with torch.no_grad():
        z = q.sample((2,))
        assert q.log_prob(z).shape == (2,)
        with pytest.raises(NotImplementedError, match="ForwardOnly has no inverse.*NumericalInv"):
            q.log_prob(z.clone())


def test_inference_mode():
    with torch.inference_mode():
        q = affine_flow()()
        z = q.rsample((3,))
        assert q.log_prob(z).shape == (3,)


def full_gradient(flow, q, z, log_q):
    return torch.autograd.grad(log_q.sum(), list(flow.parameters()), allow_unused=True)


@pytest.mark.parametrize("trainable_base", [False, True])
@pytest.mark.parametrize("recursion", [False, True])
def test_path_derivative_is_zero_at_the_optimum_and_leaves_no_score(trainable_base, recursion):
    transform = affine_flow().transform
    transform = transform if recursion else Counted(transform)
    flow = Flow(transform, TrainableNormal() if trainable_base else None)
    plain = flow()
    z, log_q = plain.path_derivative().rsample_and_log_prob((50,))
    torch.testing.assert_close(log_q, plain.log_prob(z.clone()))
    # d log q / d theta through the value only: the chain rule, written out.
    value = z.detach().requires_grad_()
    (score,) = torch.autograd.grad(plain.log_prob(value).sum(), value)
    expected = torch.autograd.grad((score * z).sum(), list(flow.parameters()), retain_graph=True)
    got = torch.autograd.grad(log_q.sum(), list(flow.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_log_prob_stopped_reaches_only_the_value():
    flow = Flow(affine_flow().transform, TrainableNormal())
    value = torch.randn(4, 2, requires_grad=True)
    stopped = flow().log_prob_stopped(value)
    torch.testing.assert_close(stopped, flow().log_prob(value))
    grads = torch.autograd.grad(stopped.sum(), [value, *flow.parameters()], allow_unused=True)
    assert grads[0].abs().min() > 0
    assert all(g is None for g in grads[1:])


def test_log_prob_stopped_holds_the_context_constant():
    context = torch.randn(4, 2, requires_grad=True)
    value = torch.randn(4, 3, requires_grad=True)
    stopped = coupling_flow(context_dim=2)(context).log_prob_stopped(value)
    grads = torch.autograd.grad(stopped.sum(), [value, context], allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert grads[1] is None


def test_antithetic_pairs_mirror_normal_bases_only():
    flow = Flow(affine_flow().transform, TrainableNormal())
    z = flow().path_derivative(antithetic=True).rsample((8,))
    x = flow.transform.inv(z)
    torch.testing.assert_close(x[:4] + x[4:], (2 * flow.base.loc).expand(4, 2))
    plain = Flow(affine_flow().transform)()
    odd = plain.path_derivative(antithetic=True).expand((3,)).rsample()
    assert odd.shape == (3, 2)


def test_antithetic_has_no_effect_on_a_skewed_base():
    law = dist.Gamma(torch.tensor([2.0, 3.0]), torch.ones(2)).to_event(1)
    q = FlowDistribution(law, TriangularAffine(2)).path_derivative(antithetic=True)
    assert (q.rsample((4000,)) > 0).all()


def test_antithetic_has_no_effect_where_rows_have_their_own_base():
    scale = torch.tensor([1.0, 9.0]).reshape(2, 1, 1).expand(2, 4000, 2)
    law = dist.Normal(torch.zeros(()), scale).to_event(1)
    q = FlowDistribution(law, TriangularAffine(2)).path_derivative(antithetic=True)
    sd = q.rsample().std((1, 2))
    assert ((sd / torch.tensor([1.0, 9.0]) - 1).abs() < 4 / 16000**0.5).all()


def test_base_without_reparameterisation():
    base = dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1)
    q = FlowDistribution(base, affine_flow().transform)
    assert not q.has_rsample
    assert not q().requires_grad
    with pytest.raises(NotImplementedError, match="no reparameterised draw. Use sample"):
        q.rsample()


def test_flow_as_base_stays_one_pass():
    counted = Counted(coupling_flow().transform)
    flow = Flow(Counted(affine_flow(3).transform), Flow(counted))
    q = flow().expand((4,))
    z = q.rsample((2,))
    assert q.log_prob(z).shape == (2, 4)
    assert (counted.calls, counted.inverses) == (1, 0)
    torch.testing.assert_close(q.log_prob(z.clone()), q.log_prob(z))
    flow().log_prob_stopped(z.detach().requires_grad_()).sum().backward()
    assert all(p.grad is None for p in flow.parameters())


def test_agrees_with_pyro_transformed_distribution():
    flow = coupling_flow(context_dim=2)
    context = torch.randn(2)
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    stock = dist.TransformedDistribution(base, [flow.transform.condition(context)])
    z = stock.sample((6,))
    torch.testing.assert_close(flow(context).log_prob(z), stock.log_prob(z))


def test_has_rsample_switch_survives_expand():
    q = affine_flow()().has_rsample_(False).expand((3,))
    assert not q.has_rsample
    assert not q().requires_grad
    assert affine_flow()().expand((3,))().requires_grad


def test_copies_drop_the_graph():
    q = coupling_flow()()
    q.rsample((2,))
    for copied in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        torch.testing.assert_close(copied.log_prob(torch.ones(3)), q.log_prob(torch.ones(3)))


def test_meta_device():
    flow = coupling_flow(context_dim=2).to("meta")
    q = flow(torch.zeros(4, 2, device="meta")).expand((6, 4))
    z, log_q = q.rsample_and_log_prob()
    loss = log_q.sum() + q.log_prob(z.clone()).sum()
    loss.backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_recovers_a_normal_posterior_with_stock_svi():
    target = MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.6], [0.6, 2.0]]))
    flow = Flow(TriangularAffine(2))

    def model():
        law = dist.MultivariateNormal(target.loc, target.covariance_matrix)
        pyro.sample("z", law)

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(20, vectorize_particles=True)
    )
    for _ in range(300):
        svi.step()
    # Three nats at the start; what is left is the jitter of a constant learning rate.
    assert kl_divergence(closed_form(flow), target) < 3e-2


def test_standard_normal_base_is_that_of_torch():
    ours = StandardNormal(3)()
    theirs = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1
    )
    value = torch.randn(5, 1, 3)
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(
        ours.expand((4,)).log_prob(value), theirs.expand((4,)).log_prob(value)
    )
    for law in (ours, ours.expand((4,))):
        torch.manual_seed(0)
        x = law.rsample((2,))
        torch.manual_seed(0)
        torch.testing.assert_close(x, theirs.expand(law.batch_shape).sample((2,)))
